import pytest
import torch
from PIL import Image

from tests.valm.evaluation.small_sets import write_sets
from tests.valm.models import tiny_model
from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.evaluation.cost import SubsetIndex, measure
from valm.evaluation.questions import chosen_tasks
from valm.evaluation.suite import Settings, entries
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def world(clip, tmp_path_factory):
    """A checkpoint that sees images, one that does not, a knowledge base of 20 images, and the sets."""
    root = tmp_path_factory.mktemp("cost")
    write_sets(root / "data")
    table = "object,color\nlemon,yellow\napple,red\nsky,blue\n"  # each colour is one token
    (root / "data/object_color/color-concrete-objects.csv").write_text(table)
    clip.save(root / "clip")
    (root / "pictures").mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (number * 12, 250 - number * 12, 99)).save(root / f"pictures/{number:02d}.png")
    loaded = Clip.load(root / "clip")
    kb = build(FolderSource(root / "pictures"), root / "kb", loaded, progress=False)
    ids = {"vocab_size": len(clip.tokenizer), "bos_token_id": clip.tokenizer.bos_token_id}
    seeing = tiny_model(image_dim=clip.embed_dim, **ids)
    seeing.set_retriever(Retriever(ContextEncoder(loaded), kb, 3))
    save_checkpoint(seeing, clip.tokenizer, root / "seeing")
    save_checkpoint(tiny_model(num_images=0, **ids), clip.tokenizer, root / "text")
    return root


def settings(world) -> Settings:
    return Settings(tuple(chosen_tasks("color_terms")), data=world / "data")


def test_a_subset_finds_its_own_images_and_grows(world):
    kb = ImageKnowledgeBase.open(world / "kb")
    small, large = (SubsetIndex(kb, size, torch.device("cpu")) for size in (5, 12))
    assert set(small.ids.tolist()) < set(large.ids.tolist())
    queries = torch.from_numpy(kb.gather(small.ids.numpy())).float()
    _, ids = small.search(queries, 3)
    assert set(ids.flatten().tolist()) <= set(small.ids.tolist())
    scores = queries @ torch.from_numpy(kb.gather(ids[0].numpy())).float().T
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)


def test_every_size_has_time_and_accuracy(world, tmp_path):
    models = entries([str(world / "seeing"), str(world / "text")])
    rows = measure(models, settings(world), [], [4, 20], tmp_path, progress=False)
    assert [(row["model"], row["images"]) for row in rows] == [("seeing", 4), ("seeing", 20)]
    assert all(row["seconds"] > 0 and row["cached"] > 0 and row["live"] > 0 for row in rows)
    assert all(0 <= row["metrics"]["color_terms"]["accuracy"]["value"] <= 1 for row in rows)
    default = measure(models, settings(world), [world / "kb"], None, tmp_path, progress=False)
    assert [row["images"] for row in default] == [3, 20]  # 1 and 10 % are fewer than a token needs


def test_wrong_sizes_and_models_without_images_are_refused(world):
    for names, sizes, message in [
        (["seeing"], [21], "21 images of .*, which has 20"),
        (["seeing"], [2], "each token needs 3"),
        (["text"], None, "none of these models retrieves images"),
    ]:
        with pytest.raises(ValmError, match=message):
            measure(entries([str(world / name) for name in names]), settings(world), [], sizes, progress=False)
