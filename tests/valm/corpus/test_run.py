import shutil

import numpy as np
import pytest

import valm_kernels
from tests.valm.cli.commands import run
from tests.valm.tiny_clip import TEXTS
from valm.corpus import plan
from valm.corpus.plan import RetrievalPlan
from valm.corpus.retrieved import CorpusRetrieval, note_clip
from valm.corpus.run import run_retrieval
from valm.corpus.texts import TextCorpus
from valm.errors import ValmError


@pytest.fixture
def given(tmp_path, clip, make_kb):
    clip.save(tmp_path / "clip")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    return {"corpus": TextCorpus([tmp_path / "corpus.txt"]), "kb": make_kb(5).path}


def test_a_plan_is_the_retrieval_of_the_command(given, tmp_path):
    found = run_retrieval(RetrievalPlan(**given, out=tmp_path / "plan", images=2))
    command = ["retrieve", tmp_path / "corpus.txt", "--kb", given["kb"], "-k", 2]
    assert run(*command, "--out", tmp_path / "command") == 0
    assert found.fingerprint == CorpusRetrieval.open(tmp_path / "command").fingerprint
    assert np.array_equal(found[0]["image_ids"].shape, (len(found[0]["input_ids"]), 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": 65}, "--images is 65, expected at least 1 and below 65"),
        ({"query": "self"}, "--query must be one of eot, state, got 'self'"),
        ({"query_dtype": "auto"}, "--query-dtype must be one of float32, bfloat16, int8, got 'auto'"),
        ({"search_actors": 2}, "--search-actors needs a Ray cluster: give --ray too"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_opened(tmp_path, fields, message):
    with pytest.raises(ValmError, match=message):
        run_retrieval(RetrievalPlan(corpus=TextCorpus(["none"]), kb="none", out=tmp_path / "out", **fields))
    assert plan.MAX_IMAGES == valm_kernels.MAX_IMAGES


def test_the_clip_that_was_given_is_noted(given, tmp_path):
    """Whoever trains a blind model needs it again. One on a hub is not opened in silence."""
    assert run_retrieval(RetrievalPlan(**given, out=tmp_path / "own")).clip() is None
    moved = shutil.copytree(tmp_path / "clip", tmp_path / "moved")
    found = run_retrieval(RetrievalPlan(**given, out=tmp_path / "out", clip=str(moved)))
    assert found.clip() == str(moved)
    note_clip(tmp_path / "out", "hf-hub:someone/clip")
    assert (found.clip(), found.clip(allow_download=True)) == (None, "hf-hub:someone/clip")
