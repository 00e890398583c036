"""A sample of the random cases, and that what is wrong is found."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from tests.valm_kernels import attack
from tests.valm_kernels.topk import random_searches
from tests.valm_kernels.topk.databases import normals
from tests.valm_kernels.visual_fusion.random_cases import DTYPES, LAYOUTS, attention_errors, random_case
from valm_kernels import TopK, ip_topk
from valm_kernels.topk import cpu as topk_cpu
from valm_kernels.visual_fusion import cpu
from valm_kernels.visual_fusion.inputs import Gradients


def test_a_sample_has_nothing_wrong(capsys):
    assert attack.main(["--attention", "40", "--searches", "20", "--first", "100000"]) == 0
    printed = capsys.readouterr().out
    assert "; 0 wrong" in printed and "searches: 20 (" in printed and "| 16 bits: image_logit_bias |" in printed


def test_a_case_depends_on_its_number_alone():
    assert attention_errors(3, "cpu") == attention_errors(3, "cpu")
    assert random_searches.check_search(3) == random_searches.check_search(3)


def test_cases_have_all_options():
    cases = [random_case(number) for number in range(1000)]
    assert {case.dtype for case in cases} == set(DTYPES) and {case.layout for case in cases} == set(LAYOUTS)
    for field in fields(cases[0].problem):
        values = {getattr(case.problem, field.name) for case in cases}
        assert len(values) > 1, field.name
    assert {case.problem.num_images for case in cases} >= {0, 1, 8, 64}


@pytest.mark.parametrize("wrong", ["out", "lse", *Gradients._fields])
def test_wrong_attention_is_found(monkeypatch, capsys, wrong):
    forward, backward = cpu.forward, cpu.backward

    def other_forward(*arguments):
        out, lse = forward(*arguments)
        return out * (1.02 if wrong == "out" else 1), lse + (0.01 if wrong == "lse" else 0)

    def other_backward(*arguments):
        gradients = backward(*arguments)
        gradient = getattr(gradients, wrong, None)
        return gradients if gradient is None else gradients._replace(**{wrong: gradient * 1.02})

    monkeypatch.setattr(cpu, "forward", other_forward)
    monkeypatch.setattr(cpu, "backward", other_backward)
    assert attack.main(["--attention", "7", "--searches", "0", "--first", "12"]) == 1  # these have all gradients
    assert re.search(f"AssertionError: off by more than 2 times its bound: .*'{wrong}':", capsys.readouterr().out)


@pytest.mark.parametrize("wrong", ["another row", "another score"])
def test_wrong_searches_are_found(monkeypatch, capsys, wrong):
    search = topk_cpu.search

    def other_search(*arguments):
        scores, indices = search(*arguments)
        if wrong == "another row":
            return scores, indices.flip(1)
        return torch.nextafter(scores, torch.zeros(())), indices

    monkeypatch.setattr(topk_cpu, "search", other_search)
    assert attack.main(["--attention", "0", "--searches", "20"]) == 1
    assert "than the definition's" in capsys.readouterr().out


def test_a_definition_that_is_wrong_itself_is_found(monkeypatch):
    """Search and reference agree, but not with the products in float64."""
    queries, rows = normals(3, 16), normals(50, 16, seed=1)
    right = ip_topk(queries, rows, 4)
    random_searches._check(right, queries, rows, 4, None, None)
    for wrong, message in (
        (TopK(right.scores * 1.0001, right.indices), "not the float64 sum, rounded"),
        (TopK(right.scores[:, 1:], right.indices[:, 1:]), "a better row is missing"),
        (TopK(right.scores[:, [0, 0]], right.indices[:, [0, 0]]), "a row is returned twice"),
    ):
        monkeypatch.setattr(random_searches, "ip_topk", lambda *_, wrong=wrong, **options: wrong)
        with pytest.raises(AssertionError, match=message):
            random_searches._check(wrong, queries, rows, wrong.scores.shape[1], None, None)
