"""Nothing that valm writes into an upload says where its base, its texts or its images are on the user's disk."""

import pytest

from tests.valm.cli.commands import SIZE, run
from tests.valm.model.decoders import tiny_llama
from tests.valm.three_images import retriever_in
from tests.valm.tiny_clip import TEXTS
from tests.valm.uploads import SECRET, Uploads
from valm.retrieval.source import RetrievalSource, read_places


@pytest.mark.parametrize(("strategy", "base"), [("every_save", False), ("checkpoint", True)])
def test_a_training(tmp_path, monkeypatch, clip, strategy, base):
    root = tmp_path / SECRET
    root.mkdir()
    retriever = retriever_in(root, clip)
    (root / "corpus.txt").write_text("\n".join(TEXTS * 3))
    options = SIZE
    if base:
        tokenizer = retriever.encoder.tokenizer
        tiny_llama(vocab_size=len(tokenizer)).save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")
        options = ["--base", root / "base", "--steps", "3", "--batch-size", "2"]
    uploads = Uploads(monkeypatch)
    retrieved = ["--kb", root / "kb", "--out", root / "retrieval", "-k", "2"]
    assert run("retrieve", root / "corpus.txt", *retrieved) == 0
    data = ["--retrieval", root / "retrieval", *retrieved[:2], "--validation", "0.3", "--out", tmp_path / "out"]
    hub = ["--push_to_hub", "--hub_model_id", "me/it", "--hub_strategy", strategy, "--save_steps", "1"]
    assert run("train", *data, *options, *hub) == 0
    source = RetrievalSource.of_knowledge_base(retriever.kb, "eot")
    uploads.check("me/it", source, str(tmp_path))
    assert {"me/it/training_args.bin", "me/it/tokenizer.json"} <= uploads.keys()
    if strategy == "checkpoint":
        uploads.check("me/it/last-checkpoint", source, str(tmp_path))
        assert "me/it/last-checkpoint/trainer_state.json" in uploads
    places = {"knowledge_base": f"../{SECRET}/kb"} | ({"base": f"../{SECRET}/base"} if base else {})
    assert read_places(tmp_path / "out" / "checkpoint-3") == places
    assert ("me/it/image_fusion.safetensors" in uploads) == base != ("me/it/model.safetensors" in uploads)
