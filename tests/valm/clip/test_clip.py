import json
import os
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.tolerance import assert_agree
from tests.valm.hub_cache import as_in_the_hub_cache
from tests.valm.store.manifests import replacements
from tests.valm.tiny_clip import TINY, make_clip
from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer
from valm.errors import ValmError


def picture(seed, size=(40, 30), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_saved_and_loaded_is_the_same_clip(clip, tmp_path):
    clip.save(tmp_path / "clip")
    loaded = Clip.load(tmp_path / "clip")
    pictures = [picture(0), picture(1, (64, 64), "L")]
    assert torch.equal(loaded.encode_images(pictures), clip.encode_images(pictures))
    assert torch.equal(loaded.encode_texts(["a red apple"]), clip.encode_texts(["a red apple"]))
    assert loaded.weights_hash == clip.weights_hash
    assert (loaded.name, loaded.embed_dim, loaded.context_length) == ("tiny", 16, 20)
    assert loaded.tokenizer.get_vocab() == clip.tokenizer.get_vocab()
    assert not list((tmp_path / "clip").glob("*.tmp"))
    assert Clip.load(f"local-dir:{tmp_path / 'clip'}").weights_hash == clip.weights_hash


def test_open_clip_itself_reads_the_folder(clip, tmp_path):
    clip.save(tmp_path)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    pixels = transform(picture(3))
    with torch.no_grad():
        features = model.eval().encode_image(pixels[None], normalize=True)
    assert torch.equal(features, clip.encode_images([picture(3)]))


def test_a_snapshot_in_the_hub_cache_is_loaded(clip, tmp_path):
    clip.save(tmp_path / "clip")
    snapshot = as_in_the_hub_cache(tmp_path / "clip", tmp_path / "cache")
    assert Clip.load(snapshot).weights_hash == clip.weights_hash


def test_texts_are_pooled_at_eot(clip):
    ids = clip.token_ids(["a red apple"])
    words = clip.tokenizer("a red apple", add_special_tokens=False)["input_ids"]
    assert ids.shape == (1, 20)
    assert ids[0, : 2 + len(words)].tolist() == [clip.tokenizer.bos_token_id, *words, clip.tokenizer.eos_token_id]
    # whatever stands after EOT is not seen, and the features are unit vectors
    other = ids.clone()
    other[:, 2 + len(words) :] = 3
    with torch.no_grad():
        expected = clip.model.encode_text(other, normalize=True)
    torch.testing.assert_close(clip.encode_texts(["a red apple"]), expected)
    assert torch.allclose(clip.encode_texts(["a", "dog", ""]).norm(dim=-1), torch.ones(3))


def test_the_frames_of_an_image_that_stays_open(clip, tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as opened:
        found = []
        for frame in range(3):
            opened.seek(frame)
            found.append(clip.encode_images([opened]))
    assert_agree(torch.cat(found), clip.encode_images(frames))


def test_a_single_text_is_no_list(clip):
    with pytest.raises(ValueError, match=r"texts must be a list of texts, got a text: give \['a dog'\]"):
        clip.encode_texts("a dog")


def test_a_long_text_is_cut(clip):
    ids = clip.token_ids(["apple " * 50])
    assert ids[0, -1] == clip.tokenizer.eos_token_id
    assert (ids[0, :-1] != clip.tokenizer.eos_token_id).all()


def test_full_vocabulary_matches_open_clip():
    torch.manual_seed(0)
    clip = Clip.create({**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 77}})
    texts = ["A photo of a red apple.", "two dogs; 12 cats!"]
    with torch.no_grad():
        expected = clip.model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts), normalize=True)
    torch.testing.assert_close(clip.encode_texts(texts), expected)


def test_eot_that_is_not_the_largest_id(tokenizer):
    moved = clip_tokenizer()
    moved.add_tokens(["<picture>"])
    clip = Clip.create(TINY, moved)
    assert clip.model.text_pool_type == "eos"
    assert clip.model.text_eos_id == moved.eos_token_id
    with pytest.raises(ValmError, match="pools the text at the largest id"):
        Clip(clip.model, moved, {**TINY})
    wrong = {**TINY, "text_cfg": {**TINY["text_cfg"], "pool_type": "eos", "eos_id": 2}}
    with pytest.raises(ValmError, match="eos_id of clip is 2, but EOT is 49407"):
        Clip(clip.model, moved, wrong)
    with pytest.raises(ValmError, match="tokens, but its text tower only"):
        Clip(make_clip(tokenizer).model, moved, TINY)


def test_hash_depends_on_every_weight(tokenizer):
    first, second = make_clip(tokenizer), make_clip(tokenizer)
    assert first.weights_hash == second.weights_hash
    third = make_clip(tokenizer)
    third.model.logit_scale += 1e-3
    assert third.weights_hash != first.weights_hash


def test_hash_depends_on_what_is_computed_with_the_weights(tokenizer, clip, tmp_path):
    quick = Clip.create({**TINY, "quick_gelu": True}, tokenizer)
    darker = Clip.create(TINY, tokenizer, preprocess_cfg={"mean": (0.1, 0.1, 0.1)})
    plain = Clip.create(TINY, tokenizer)
    for other in (quick, darker):
        other.model.load_state_dict(plain.model.state_dict())
    assert len({each.weights_hash for each in (quick, darker, plain)}) == 3
    darker.save(tmp_path)
    assert Clip.load(tmp_path).weights_hash == darker.weights_hash


def test_weights_of_another_activation_are_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValmError, match=r"trained with QuickGELU.*: load ViT-B-32-quickgelu:openai$"):
        Clip.load("ViT-B-32:openai")
    assert "openai" in open_clip.list_pretrained_tags_by_model("ViT-B-32-quickgelu")


@pytest.mark.timeout(60)
def test_weights_that_are_no_regular_file_are_not_opened(clip, tmp_path):
    clip.save(tmp_path / "clip")
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    for _ in replacements(weights, tmp_path / "outside"):
        if weights.is_file():  # a link anywhere, as in the cache of a hub
            assert Clip.load(weights.parent).weights_hash == clip.weights_hash
        else:
            with pytest.raises(PermissionError, match=r"not a regular file.*open_clip_model\.safetensors"):
                Clip.load(weights.parent)


@pytest.mark.timeout(20)
def test_a_config_that_is_a_pipe_is_not_opened(clip, tmp_path):
    clip.save(tmp_path / "clip")
    (tmp_path / "clip" / ".#notes").symlink_to("nowhere")  # an editor's, which does not matter
    assert Clip.load(tmp_path / "clip").weights_hash == clip.weights_hash
    config = tmp_path / "clip" / "open_clip_config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(PermissionError, match=r"not a regular file.*open_clip_config\.json"):
        Clip.load(tmp_path / "clip")


def test_errors_name_the_folder(clip, tmp_path):
    with pytest.raises(ValmError, match="no CLIP at 'nowhere': it is not a folder"):
        Clip.load("nowhere")
    with pytest.raises(ValmError, match="weights of ViT-B-32: openai"):
        Clip.load("ViT-B-32")
    with pytest.raises(ValmError, match="no architecture named 'ViT-Z-99'"):
        Clip.create("ViT-Z-99")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        Clip.load(tmp_path)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    clip.save(whole)

    def damaged(name, content):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        (broken / name).unlink() if content is None else (broken / name).write_bytes(content)
        with pytest.raises(ValmError, match="broken") as caught:
            Clip.load(broken)
        return str(caught.value)

    weights = (whole / "open_clip_model.safetensors").read_bytes()
    assert "cannot be read" in damaged("open_clip_model.safetensors", weights[: len(weights) // 2])
    assert "Required pretrained weights" in damaged("open_clip_model.safetensors", None)
    assert "cannot be read" in damaged("tokenizer.json", b"{}")
    assert "model_cfg: Field required" in damaged("open_clip_config.json", b"{}")
    for part, name, value in (("model_cfg", "embed_dim", 8), ("preprocess_cfg", "resize_mode", "x")):
        config = json.loads((whole / "open_clip_config.json").read_text())
        config[part][name] = value
        assert "cannot be read" in damaged("open_clip_config.json", json.dumps(config).encode())


def edit_config(folder, part, **changes):
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][part].update(changes)
    file.write_text(json.dumps(config))


def test_another_tokenizer_is_refused(clip, tmp_path):
    clip.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    edit_config(tmp_path, "text_cfg", hf_tokenizer_name="bert-base-uncased")
    with pytest.raises(ValmError, match="tokenizer of bert-base-uncased"):
        Clip.load(tmp_path)


def test_unwritable_output(clip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        clip.save(tmp_path / "file" / "clip")


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("text_cfg", "hf_model_name", "someone/model"),
        ("vision_cfg", "timm_model_pretrained", True),
        ("vision_cfg", "timm_model_name", "hf-hub:someone/model"),
        ("vision_cfg", "timm_model_name", "local-dir:elsewhere"),
    ],
)
def test_a_folder_reaches_neither_the_network_nor_other_folders(clip, tmp_path, monkeypatch, part, name, value):
    clip.save(tmp_path)
    edit_config(tmp_path, part, **{name: value})
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    with pytest.raises(ValmError, match=f"names {name}: a CLIP folder must contain all"):
        Clip.load(tmp_path)
    assert asked == []


def test_a_clip_that_cannot_be_downloaded_is_one_sentence(monkeypatch):
    def create_model(*arguments, **options):
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValmError, match=r"^the CLIP ViT-B-32:laion2b_e16 cannot be read: Failed to download weights$"):
        Clip.load("ViT-B-32:laion2b_e16")
