"""Time and disk that the command says it needs."""

import shutil

import pytest

from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, own_tokenizer, prune_tokenizer
from valm.pictures.estimate import estimate
from valm.pictures.making import Making, look
from valm.pictures.plan import PicturesPlan
from valm.store.parts import CONTROL, KB, MODEL, RETRIEVAL


@pytest.mark.slow  # it times every stage twice
def test_times_every_stage_and_counts_a_converted_decoder(drawn, decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clip(prune_tokenizer(clip_tokenizer(), ["a red ellipse"])).save(tmp_path / "clip")
    shutil.copytree(decoder, tmp_path / "out" / "smollm2")
    given, converted = (
        PicturesPlan(pictures=drawn, model=model, clip="clip", out="out") for model in (str(decoder), "smollm2")
    )
    found, tokenizer = look(given), own_tokenizer(decoder)
    expected, more = (estimate(Making(plan, found), tokenizer) for plan in (given, converted))
    assert list(expected.seconds) == ["clip", KB, RETRIEVAL, MODEL, CONTROL, "report"]
    assert expected.seconds[MODEL] > expected.seconds[CONTROL] > 0 and expected.fast == ["cache_below", "limit_softmax"]
    assert more.disk - expected.disk == 4 * expected.parameters
