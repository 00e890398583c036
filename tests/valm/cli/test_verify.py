"""`valm verify` of every store with checksums: whole, and with one changed byte."""

import json

import numpy as np
import pytest

from tests.valm.cli.commands import run
from valm.cli.verify import verify
from valm.errors import ValmError
from valm_kernels import FlatIPIndex


def index(folder, world):
    FlatIPIndex(np.random.default_rng(0).standard_normal((5, 8), np.float32)).save(folder)


STORES = {
    "kb": (None, "vectors-00000.npy", "all 6 images"),
    "retrieval": (None, "image_ids-00000.npy", "documents"),
    "index": (index, "*.npy", "all 5 rows"),
}


@pytest.mark.parametrize("name", STORES)
def test_whole_and_damaged(name, world, copy_of, tmp_path, capsys):
    make, file, said = STORES[name]
    folder = tmp_path / name
    copy_of(name) if make is None else make(folder, world)
    capsys.readouterr()
    assert run("verify", folder) == 0
    out = capsys.readouterr().out
    assert said in out and out.strip().endswith("as they were written")
    damaged = max(folder.glob(file), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[-40] ^= 1
    damaged.write_bytes(content)
    assert run("verify", folder) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("valm: error: ") and str(folder) in error and ("damaged" in error or "checksum" in error)


@pytest.mark.parametrize("name", ["kb", "retrieval", "index"])
def test_a_changed_bit_of_the_manifest_is_damage(name, world, copy_of, tmp_path):
    make = STORES[name][0]
    folder = tmp_path / name
    copy_of(name) if make is None else make(folder, world)
    file = folder / "manifest.json"
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), 60, replace=False).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            verify(folder)
        except ValmError:
            continue
        assert json.loads(changed) == json.loads(whole), f"bit {bit}: {bytes(changed)!r}"


def test_a_damaged_tokenizer_and_an_index_without_parameters(copy_of, capsys):
    root = copy_of("retrieval", "kb")
    file = root / "retrieval" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a</w>"], vocab["b</w>"] = vocab["b</w>"], vocab["a</w>"]
    file.write_text(json.dumps(content))
    assert run("verify", root / "retrieval") == 1
    assert "is not the one that the corpus was read with" in capsys.readouterr().err
    (root / "kb" / "index.faiss").write_bytes(b"")
    assert run("verify", root / "kb") == 0
    assert "index.faiss has no parameters, as after a killed `valm kb index`" in capsys.readouterr().out


def test_links_out_are_never_opened(world, copy_of, capsys):
    root = copy_of("kb")
    (root / "kb" / "index.faiss").symlink_to(world / "clip")
    assert run("verify", root / "kb") == 1
    assert "index.faiss" in capsys.readouterr().err


def test_what_has_no_checksums_is_named(world, tmp_path, capsys):
    for folder, said in ((world / "valm", "has no checksums"), (tmp_path / "none", "there is no folder")):
        assert run("verify", folder) == 1
        assert said in capsys.readouterr().err
    (tmp_path / "build.json").write_text("{}")
    assert run("verify", tmp_path) == 1
    assert "is unfinished" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    assert run("verify", tmp_path) == 1
    assert str(tmp_path / "manifest.json") in capsys.readouterr().err
