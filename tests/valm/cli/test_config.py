import numpy as np
import pytest

from valm.cli import build_parser
from valm.cli.config import _fields
from valm.cli.train import chosen_plan
from valm.errors import ValmError
from valm.training import training_arguments


@pytest.mark.parametrize(
    "content, message",
    [
        ("steps: " + "[" * 1500, "cannot be read"),  # deeper than Python's stack; YAML takes time by the square
        ("seed: 2026-99-99", "cannot be read"),
        ("out: !!python/name:os.system", "cannot be read"),
        ('out: "a\\0b"', r"contains a value that no option accepts: 'a\\x00b'"),
        ('out: "\\ud800"', "contains a value that no option accepts"),
        ("steps: 0x" + "f" * 9999, "contains a value that no option accepts: a number of more than 60 digits"),
        ("- steps", "must be a list of options"),
        ("resume: off-by-one", "has resume: 'off-by-one', expected true or false"),
        ("step: 3", r"unknown field 'step', did you mean steps\?"),
        ("layerz: 3", r"unknown field 'layerz', did you mean layer\?"),
        ("learning_rat: 1", "unknown field 'learning_rat', did you mean learn"),
        ("batch_size: many", "argument --batch-size: invalid"),
        ("1: 2", "unknown field 1"),
        ("lr: [1]", "has lr: a list of 1, expected one value"),
        ("model: [a, b]", "has model: a list of 2, expected one value"),
        ("kb: {a: 1}", "has kb: an object of 1, expected one value"),
        ("kb: !!set {a}", "has kb: {'a'}, expected one value"),
        ("model: !!binary aGVsbG8=", "has model: b'hello', expected one value"),
        ("corpus: [[a.txt]]", "has corpus: a list of 1, expected one value"),
        ("corpus: {a.txt: 1}", "has corpus: an object of 1, expected one value"),
        ("resume: []", "has resume: a list of 0, expected true or false"),
        ("resume: [true]", "has resume: a list of 1, expected true or false"),
        ("resume: 'true'", "has resume: 'true', expected true or false"),
        ("learning_rate: [1]", "has learning_rate: a list of 1, expected one value"),
        ("metric_for_best_model: {}", "has metric_for_best_model: an object of 0, expected one value"),
        ("report_to: {a: 1}", "has report_to: an object of 1, expected one value"),
        ("fsdp_config: [1]", "has fsdp_config: a list of 1, expected one value"),
        ("lr: 1\nsteps: 2\nlr: 1", "contains 'lr' twice"),
        ("batch-size: 1\nbatch_size: 1", "has 'batch_size' twice"),
        ("gradient_checkpointing_kwargs: {a: 1, a: 2}", "contains 'a' twice"),
        (b"out: caf\xe9", "is not UTF-8 text"),
        (b"\xff\xfeo\0u\0t\0:\0 \0a\0", "is not UTF-8 text"),
        ("", "must be a list of options"),
        ("lr", "must be a list of options"),
        ("lr: 1\nlr", "cannot be read"),
        ("? [a]\n: 1", "cannot be read"),
    ],
)
def test_what_is_no_config_is_one_sentence(tmp_path, content, message):
    (tmp_path / "train.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValmError, match=message):
        build_parser().parse_args(["train", "corpus.txt", "--config", str(tmp_path / "train.yaml")])


def test_values_that_an_option_can_have(tmp_path):
    lines = ["logit_bias: -1.0e-5", "corpus: [a.txt, b.txt]", "run_name: -x", "report_to: [none]"]
    lines += ["gradient_checkpointing_kwargs: {use_reentrant: false}", "model: 2026-01-02", "resume: false", "kb: null"]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    found = build_parser().parse_args(["train", "--out", "out", "--config", str(tmp_path / "train.yaml")])
    assert (found.logit_bias, found.model, found.resume, found.kb) == (-1e-5, "2026-01-02", None, None)
    assert list(map(str, found.corpus)) == ["a.txt", "b.txt"]
    expected = {"report_to": ["none"], "gradient_checkpointing_kwargs": {"use_reentrant": False}, "run_name": "-x"}
    assert found.fields == expected


def test_any_value_of_any_name_is_taken_or_one_sentence(tmp_path, capsys):
    """Of a sample. What the parser refuses with its usage, it refuses without a file too."""
    values = ["[1]", "{a: 1}", "[]", "true", "evil", "-1", ".nan", "1.5", "''", "2020-01-01", "1.0e+999", "--x"]
    train = ["train", "corpus.txt", "--out", "out"]
    names = [*vars(build_parser().parse_args(train)), *_fields()]
    refused = 0
    for draw in np.random.default_rng(0).choice(len(names) * len(values), 40, replace=False).tolist():
        name, value = names[draw % len(names)], values[draw // len(names)]
        (tmp_path / "train.yaml").write_text(f"{name}: {value}")
        try:
            plan = chosen_plan(build_parser().parse_args([*train, "--config", str(tmp_path / "train.yaml")]))
            plan.check()
            training_arguments(tmp_path, **plan.training_fields())
        except (ValmError, SystemExit) as error:
            refused += 1
            assert "\n" not in str(error)
    assert 10 < refused < 38


def test_its_option_has_no_short_form(tmp_path, capsys):
    (tmp_path / "train.yaml").write_text("seed: 3")
    with pytest.raises(ValmError, match="has no option --conf"):
        build_parser().parse_args(["train", "corpus.txt", "--out", "a", "--conf", str(tmp_path / "train.yaml")])
