"""`valm verify` of every store with checksums: whole, and with one changed byte."""

import json

import numpy as np
import pytest

from tests.valm.store.manifests import replacements
from valm.cli.verify import verify
from valm.errors import ValmError
from valm_kernels import FlatIPIndex

# The file of each that is damaged, what is said of a whole one, and what helps a damaged one.
STORES = {
    "kb": ("shard-00000.arrow", "all 6 images", "build it again"),
    "retrieval": ("shard-00000.arrow", "documents", "retrieve it again"),
    "index": ("*.npy", "all 5 rows", "make the index again"),
}


@pytest.fixture(params=STORES)
def store(request, copy_of, tmp_path):
    if request.param == "index":
        FlatIPIndex(np.random.default_rng(0).standard_normal((5, 8), np.float32)).save(tmp_path / "index")
    else:
        copy_of(request.param)
    return tmp_path / request.param


def test_whole_and_damaged(store, output_of, error_of):
    file, whole, remedy = STORES[store.name]
    out = output_of("verify", store)
    assert whole in out and out.strip().endswith("as they were written")
    damaged = max(store.glob(file), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[-40] ^= 1
    damaged.write_bytes(content)
    error = error_of("verify", store).strip().splitlines()[-1]
    assert error.startswith("valm: error: ") and str(store) in error and "is damaged" in error
    assert damaged.name in error and remedy in error


def test_a_changed_bit_of_the_manifest_is_damage(store):
    file = store / "manifest.json"
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), 60, replace=False).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            verify(store)
        except ValmError:
            continue
        assert json.loads(changed) == json.loads(whole), f"bit {bit}: {bytes(changed)!r}"


def test_a_damaged_tokenizer_and_an_index_without_parameters(copy_of, output_of, error_of):
    root = copy_of("retrieval", "kb")
    file = root / "retrieval" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a</w>"], vocab["b</w>"] = vocab["b</w>"], vocab["a</w>"]
    file.write_text(json.dumps(content))
    assert "is not the one that read the corpus" in error_of("verify", root / "retrieval")
    (root / "kb" / "index.faiss").write_bytes(b"")
    assert "index.faiss has no parameters, as after a killed `valm kb index`" in output_of("verify", root / "kb")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("of, name", [("kb", "manifest.json"), ("kb", "index.json"), ("retrieval", "tokenizer.json")])
def test_what_is_no_regular_file_is_not_opened(copy_of, tmp_path, of, name):
    store = copy_of(of) / of
    (store / name).touch()
    for _ in replacements(store / name, tmp_path / "outside"):
        with pytest.raises(PermissionError, match=r"not a regular file|a link that leads out") as caught:
            verify(store)
        assert caught.value.filename == str(store / name)


def test_links_out_are_never_opened(world, copy_of, error_of):
    root = copy_of("kb")
    (root / "kb" / "index.faiss").symlink_to(world / "clip")
    assert "index.faiss" in error_of("verify", root / "kb")


def test_what_has_no_checksums_is_named(world, tmp_path, error_of):
    assert "has no checksums" in error_of("verify", world / "valm")
    assert "there is no folder" in error_of("verify", tmp_path / "none")
    (tmp_path / "build.json").write_text("{}")
    assert "is unfinished" in error_of("verify", tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    assert str(tmp_path / "manifest.json") in error_of("verify", tmp_path)
