"""FlatIPIndex: what it stores, what it finds, and what it says of a damaged file or a full disk."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.valm_kernels.topk.databases import DTYPES, assert_same, normals
from valm_kernels import FlatIPIndex, ip_topk, memory_maps
from valm_kernels.checksums import json_sha256
from valm_kernels.topk import cpu, storage
from valm_kernels.topk import index as index_module


def assert_same_answers(a: FlatIPIndex, b: FlatIPIndex, queries: torch.Tensor, k: int) -> None:
    assert_same(a.search(queries, k), b.search(queries, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_search_is_exact_over_what_is_stored(dtype):
    database, queries = normals(700, 40), normals(2, 9, 40, seed=1)
    index = FlatIPIndex(database, dtype)
    assert (len(index), index.dim, index.dtype) == (700, 40, dtype)
    stored = index.dequantised()
    worst = (stored - database).abs().amax(1) / database.abs().amax(1)
    assert worst.max() <= {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127 + 1e-6}[dtype]
    assert_same(index.search(queries, 6), ip_topk(queries, stored, 6, impl="reference"))


def test_fitting_memory_is_not_copied(tmp_path):
    database = normals(30, 16)
    assert FlatIPIndex(database)._stored.rows.data_ptr() == database.data_ptr()
    np.save(tmp_path / "shard.npy", database.half().numpy())
    shard = np.load(tmp_path / "shard.npy", mmap_mode="r")
    index = FlatIPIndex(shard)
    assert index._stored.rows.data_ptr() == shard.__array_interface__["data"][0]
    assert_same_answers(index, FlatIPIndex(database, "float16"), normals(3, 16), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype):
    database, queries = normals(90, 24), normals(5, 24, seed=1)
    database[70:] = database[:20]
    index = FlatIPIndex(database[:50], dtype)
    index.search(queries, 7)
    index.add(database[50:51])
    index.add(database[51:].numpy())
    index.add(torch.empty(0, 24))
    assert_same_answers(index, FlatIPIndex(database, dtype), queries, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [1, 31, 32, 70, 200])
def test_added_rows_alone_are_packed(dtype, first, tmp_path, monkeypatch):
    """Into the free places of the last panel and behind it; with equal rows in a part and in two; far from the rest."""
    database, queries = normals(400, 24), normals(5, 24, seed=1)
    database[first // 2] = database[0]
    database[210:230] = database[205:206]
    database[300:310] = database[first - 1 : first]
    database[330:] += 50
    panels, pack = [], cpu._pack
    monkeypatch.setattr(cpu, "_pack", lambda *arguments: panels.append(arguments[-1]) or pack(*arguments))
    index, count = FlatIPIndex(database[:first], dtype), first
    assert panels == [0]
    while count < 400:
        more = min(400, count + max(1, count // 3))
        first_rows = index._stored.prepared.first_rows
        index.add(database[count:more])
        if index._stored.prepared is None:
            assert more > 2 * index._stored.centred
        else:
            assert panels[-1] == (count if first_rows is None else len(first_rows)) // 32
        count = more
        assert_same_answers(index, FlatIPIndex(database[:count], dtype, pack=False), queries, min(count, 7))
        if count > 250:
            index.save(tmp_path / str(count))
            index = FlatIPIndex.load(tmp_path / str(count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streamed", [None, True])
def test_ids_of_the_rows_own(tmp_path, dtype, streamed):
    """In searches, filters, added and removed rows, and files: as row numbers would be, translated."""
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:80] + (1 << 40)
    index = FlatIPIndex(normals(60, 24), dtype, ids=ids[:60], streamed=streamed)
    index.add(normals(20, 24, seed=1), ids=ids[60:])
    queries = normals(4, 24, seed=2)
    queries[2, 3] = torch.nan

    def assert_translated(numbers, k, **filters):
        plain = FlatIPIndex(index.dequantised(), streamed=streamed)
        scores, rows = plain.search(queries, k, **{name: torch.isin(numbers, some) for name, some in filters.items()})
        assert_same(index.search(queries, k, **filters), (scores, torch.where(rows < 0, -1, numbers[rows])))

    assert_translated(ids, 5)
    assert_translated(ids, 5, allowed=ids[7:11])
    index.remove(ids[10:30])
    left = torch.cat([ids[:10], ids[30:]])
    assert len(index) == 60
    assert_translated(left, 60)
    index.save(tmp_path)
    index = FlatIPIndex.load(tmp_path, streamed=streamed)
    assert_translated(left, 5, allowed=left[:40])


def test_rows_without_ids_move_up_where_some_are_removed():
    database, queries = normals(50, 16), normals(3, 16, seed=1)
    for removed in (torch.tensor([3, 40, 3]), np.array([40, 3]), torch.isin(torch.arange(50), torch.tensor([3, 40]))):
        index = FlatIPIndex(database)
        before = index.search(queries, 4)
        index.remove(removed)
        stays = torch.ones(50, dtype=torch.bool)
        stays[[3, 40]] = False
        for found, rows in ((index.search(queries, 4), database[stays]), (before, database)):
            assert_same(found, ip_topk(queries, rows, 4))


def with_ids(rows):
    return FlatIPIndex(rows, ids=torch.arange(10, 60))


def test_flags_name_rows_whatever_their_ids():
    database, queries = normals(50, 16), normals(3, 16, seed=1)
    flags = np.arange(50) % 2 == 0
    found = with_ids(database).search(queries, 4, allowed=flags)
    assert torch.equal(found.indices, 10 + ip_topk(queries, database, 4, allowed=flags).indices)


def searched(rows, **filters):
    return with_ids(rows).search(rows[:1], 2, **filters)


BROKEN = torch.zeros(50, 16, dtype=torch.bool)
BROKEN[33, 2] = True
REFUSALS = [
    (lambda rows: FlatIPIndex(rows, "float8"), ValueError, "dtype is 'float8', expected one of float32"),
    (lambda rows: FlatIPIndex(rows[:0]), ValueError, "database is empty"),
    (lambda rows: FlatIPIndex(rows.long()), TypeError, "database has dtype torch.int64"),
    (lambda rows: FlatIPIndex(rows + 1e6 * BROKEN, "float16"), ValueError, "stored as float16, row 33 holds"),
    (lambda rows: FlatIPIndex(rows.masked_fill(BROKEN, torch.nan), "int8"), ValueError, "database row 33 holds NaN"),
    (lambda rows: FlatIPIndex(rows[:4]).search(rows[0], 5), ValueError, "k is 5, but the database has only 4 rows"),
    (lambda rows: FlatIPIndex(rows, ids=torch.arange(49)), ValueError, r"ids must have shape \(50,\), .* has \(49,\)"),
    (lambda rows: FlatIPIndex(rows, ids=torch.arange(50.0)), TypeError, "ids has dtype torch.float32, expected int64"),
    (lambda rows: FlatIPIndex(rows, ids=torch.arange(50) // 2), ValueError, "ids contains 0 more than once"),
    (lambda rows: FlatIPIndex(rows, ids=torch.arange(50) - 2), ValueError, "ids contains -2, but must not be negative"),
    (lambda rows: FlatIPIndex(rows).add(rows[:3, :15]), ValueError, r"shape \(M, 16\), but have shape \(3, 15\)"),
    (lambda rows: FlatIPIndex(rows).add(rows.masked_fill(BROKEN, torch.inf)), ValueError, "vectors row 33 holds NaN"),
    (lambda rows: with_ids(rows).add(rows), ValueError, "vectors must have ids too"),
    (lambda rows: FlatIPIndex(rows).add(rows, torch.arange(50)), ValueError, "vectors must have no ids"),
    (lambda rows: with_ids(rows).add(rows, torch.arange(50)), ValueError, "ids contains 10 more than once"),
    (lambda rows: with_ids(rows).remove(torch.tensor([11, 9])), ValueError, "ids contains 9, which"),
    (lambda rows: with_ids(rows).remove(torch.tensor([1.0])), TypeError, "ids has dtype torch.float32"),
    (lambda rows: with_ids(rows).remove([11]), TypeError, "ids must be a torch tensor or a numpy array"),
    (lambda rows: with_ids(rows).remove(torch.tensor([[11]])), ValueError, r"ids must have shape \(n,\), .*\(1, 1\)"),
    (lambda rows: FlatIPIndex(rows).remove(torch.arange(50)), ValueError, "all 50 rows would be removed"),
    (lambda rows: FlatIPIndex(rows).remove(torch.tensor([50])), ValueError, "ids must be from 0 to 49, .* from 50"),
    (lambda rows: searched(rows, allowed=torch.tensor([3])), ValueError, "allowed contains 3, which is not the id"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(normals(50, 16))


def test_an_add_that_fails_adds_nothing(monkeypatch):
    index = FlatIPIndex(normals(5, 16), "int8")
    real, joined = torch.cat, []

    def cat(tensors):
        joined.append(tensors)
        if len(joined) == 2:
            raise MemoryError
        return real(tensors)

    monkeypatch.setattr(torch, "cat", cat)
    with pytest.raises(MemoryError):
        index.add(normals(3, 16))
    monkeypatch.undo()
    assert index.dequantised().shape == (5, 16)
    assert index.search(normals(16), 5).indices.shape == (5,)
    monkeypatch.setattr(index_module, "MAX_ROWS", 7)
    with pytest.raises(ValueError, match=r"vectors has 3 rows, but only 2 more fit next to the 5 stored"):
        index.add(normals(3, 16))


def test_numpy_queries_and_repr():
    index = FlatIPIndex(normals(30, 16).numpy(), "float16")
    result = index.search(normals(2, 16).numpy(), 3)
    assert isinstance(result.indices, np.ndarray) and result.indices.shape == (2, 3)
    assert index.search(torch.empty(2, 0, 16), 3).scores.shape == (2, 0, 3)
    assert "30 rows of 16 float16 on cpu, " in repr(index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("equal_rows", [False, True])
def test_save_and_load(tmp_path, dtype, mmap, equal_rows):
    database = normals(60, 24)
    if equal_rows:
        database[30:] = database[:30]
    index = FlatIPIndex(database, dtype)
    index.save(tmp_path / "new" / "index")
    loaded = FlatIPIndex.load(tmp_path / "new" / "index", mmap=mmap)
    assert (len(loaded), loaded.dim, loaded.dtype) == (60, 24, dtype)
    assert_same_answers(loaded, index, normals(4, 24, seed=1), 9)
    loaded.add(normals(3, 24, seed=2))
    assert len(loaded) == 63


def test_what_is_read_into_memory_is_aligned(tmp_path):
    """Searches of codes at other addresses took a third longer."""
    FlatIPIndex(normals(61, 23), "int8").save(tmp_path)
    folder = storage.Folder(tmp_path, mmap=False, verify=True)
    for file in tmp_path.glob("*.npy"):
        stored = np.load(file)
        shape = tuple(None for _ in stored.shape)
        array = folder.read(file.name.rpartition("-")[0], str(stored.dtype), shape)
        assert array.ctypes.data % 64 == 0 and array.flags.writeable
        assert np.array_equal(array, stored)


def test_without_a_packed_copy(tmp_path):
    database, queries = normals(500, 24), normals(9, 24, seed=1)
    packed, plain = FlatIPIndex(database, "float16"), FlatIPIndex(database, "float16", pack=False)
    assert_same_answers(plain, packed, queries, 9)
    assert plain.bytes_per_row == 48
    assert packed.bytes_per_row > plain.bytes_per_row + 24
    plain.save(tmp_path)
    loaded = FlatIPIndex.load(tmp_path, mmap=True)
    assert loaded.bytes_per_row == 48
    assert_same_answers(loaded, packed, queries, 9)


def test_saving_again_leaves_one_index(tmp_path):
    FlatIPIndex(normals(60, 24), "int8").save(tmp_path)
    second = FlatIPIndex(normals(50, 16), "float16")
    second.save(tmp_path)
    second.save(tmp_path)
    listed = json.loads((tmp_path / "manifest.json").read_text())["arrays"].values()
    assert set(contents(tmp_path)) == {"manifest.json", *(entry["file"] for entry in listed)}
    assert_same_answers(FlatIPIndex.load(tmp_path), second, normals(2, 16), 3)


@pytest.fixture
def saved(tmp_path):
    FlatIPIndex(normals(60, 24), "float16").save(tmp_path / "index")
    return tmp_path / "index"


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit_manifest(folder, **changes) -> None:
    """With a checksum that agrees, as an attacker would write it."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["sha256"] = json_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_truncated_altered_and_missing_files(saved):
    (rows,) = saved.glob("rows-*.npy")
    content = rows.read_bytes()
    rows.write_bytes(content[:-100])
    for mmap in (False, True):
        with pytest.raises(ValueError, match=f"has {len(content) - 100} bytes, expected {len(content)}"):
            FlatIPIndex.load(saved, mmap=mmap)
    rows.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksum differs"):
        FlatIPIndex.load(saved)
    with pytest.raises(ValueError, match="its checksum differs"):
        FlatIPIndex.load(saved, mmap=True, verify=True)
    rows.unlink()
    with pytest.raises(ValueError, match=r"rows-\w+.npy is missing"):
        FlatIPIndex.load(saved)


@pytest.mark.parametrize(
    ("name", "places", "number", "message"),
    [
        ("first_rows", 0, 60, "first_rows contains row numbers outside of 0 to 59"),
        ("next_duplicate", 0, 60, "next_duplicate contains row numbers outside of 0 to 59"),
        ("next_duplicate", slice(None), 0, "first_rows and next_duplicate do not name each row once"),
    ],
)
def test_row_numbers_that_do_not_fit(tmp_path, name, places, number, message):
    """Unverified, a memory-mapped file could hold anything: nothing may be read outside of the rows."""
    FlatIPIndex(normals(1, 24).repeat(60, 1)).save(tmp_path)
    (file,) = tmp_path.glob(f"{name}-*.npy")
    np.lib.format.open_memmap(file, mode="r+")[places] = number
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        FlatIPIndex.load(tmp_path, mmap=True)


def test_row_numbers_that_change_after_the_load():
    """A search does not read beyond what it found."""
    index = FlatIPIndex(normals(1, 24).repeat(60, 1))
    index._stored.prepared.next_duplicate.zero_()
    result = index.search(normals(24), 5)
    assert result.indices.tolist() == [0, -1, -1, -1, -1] and (result.scores[1:] == -torch.inf).all()


def test_files_that_are_no_npy_files(saved):
    (rows,) = saved.glob("rows-*.npy")
    content = rows.read_bytes()
    fortran = content.replace(b"'fortran_order': False", b"'fortran_order': True ")
    for damaged in (b"x" + content[1:], content[:20] + b"((" + content[22:], content[:12] + bytes(len(content) - 12)):
        rows.write_bytes(damaged)
        for mmap in (False, True):
            with pytest.raises(ValueError, match=re.escape(f"{rows} is damaged, it is not an npy file")):
                FlatIPIndex.load(saved, mmap=mmap, verify=False)
    rows.write_bytes(fortran)
    with pytest.raises(ValueError, match=r"expected contiguous float16 of shape \(60, 24\)"):
        FlatIPIndex.load(saved, mmap=True)


def test_a_database_that_no_search_takes(tmp_path):
    """Rows longer than the kernels have room for, in a manifest that agrees with its file."""
    FlatIPIndex(normals(60, 2048), pack=False).save(tmp_path)
    (file,) = tmp_path.glob("rows-*.npy")
    np.save(file, np.zeros((40, 3072), np.float32))  # as many bytes
    edit_manifest(tmp_path, count=40, dim=3072)
    with pytest.raises(ValueError, match=r"manifest.json is damaged: database has E = 3072, expected 8 to 2048"):
        FlatIPIndex.load(tmp_path, verify=False)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_save_deletes_nothing_that_it_did_not_write(saved, absolute):
    mine = saved.parent / "mine.txt"
    mine.write_text("mine")
    arrays = json.loads((saved / "manifest.json").read_text())["arrays"]
    arrays["rows"]["file"] = str(mine) if absolute else "../mine.txt"
    edit_manifest(saved, arrays=arrays)
    FlatIPIndex(normals(9, 16)).save(saved)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "has format version 99, this code reads version 2"),
        ({"dtype": "float32"}, r"holds float16 of shape \(60, 24\), expected contiguous float32"),
        ({"dtype": "float8"}, "manifest.json is damaged: unknown dtype 'float8'"),
        ({"arrays": {}}, "lists no array 'rows'"),
    ],
)
def test_manifests_that_do_not_fit(saved, changes, message):
    edit_manifest(saved, **changes)
    with pytest.raises(ValueError, match=message):
        FlatIPIndex.load(saved)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda manifest: '{"format": "something else"}', "does not describe a valm flat inner-product index"),
        (lambda manifest: manifest[:40], "it is not JSON"),
        # without their list, the codes of equal rows would be taken for those of the first rows
        (lambda manifest: manifest.replace('"first_rows"', '"others"'), "is damaged: it differs from its own checksum"),
    ],
)
def test_altered_manifests(tmp_path, alter, message):
    FlatIPIndex(normals(1, 24).repeat(60, 1)).save(tmp_path)
    (tmp_path / "manifest.json").write_text(alter((tmp_path / "manifest.json").read_text()))
    with pytest.raises(ValueError, match=message):
        FlatIPIndex.load(tmp_path)


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a saved index: it has no manifest\.json"):
        FlatIPIndex.load(tmp_path)


def test_a_full_disk_leaves_the_old_index(saved):
    """A limit on the size of files stands for the full disk: write() fails half-way through the rows."""
    resource = pytest.importorskip("resource")
    before, (soft, hard) = contents(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=f"File too large.*{saved}"):
            FlatIPIndex(torch.ones(5000, 24)).save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(saved) == before
    FlatIPIndex.load(saved)


@pytest.mark.parametrize(
    ("file", "error"),
    [("rows-", KeyboardInterrupt()), ("manifest.json", OSError(28, "No space left on device"))],
)
def test_a_failing_write_leaves_the_old_index(saved, monkeypatch, file, error):
    """At the first step, and at the very last, when the new rows are already there."""
    before, real = contents(saved), os.replace

    def replace(source, target):
        if Path(target).name.startswith(file):
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(type(error), match=re.escape(str(error))):
        FlatIPIndex(normals(9, 16)).save(saved)
    assert contents(saved) == before


def test_an_interruption_just_after_the_commit_leaves_the_new_index(saved, monkeypatch):
    real = os.replace

    def interrupted(source, target):
        real(source, target)
        if str(target).endswith("manifest.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FlatIPIndex(normals(9, 16)).save(saved)
    assert len(FlatIPIndex.load(saved)) == 9


def test_a_folder_that_cannot_be_synced(saved, monkeypatch):
    """Some file systems refuse to sync a folder; where a disk fails to, the new index is there all the same."""
    real = os.fsync

    def fsync(code):
        def function(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, os.strerror(code))
            real(descriptor)

        return function

    monkeypatch.setattr(os, "fsync", fsync(22))  # EINVAL
    FlatIPIndex(normals(9, 16)).save(saved)
    assert len(FlatIPIndex.load(saved)) == 9
    monkeypatch.setattr(os, "fsync", fsync(5))  # EIO
    with pytest.raises(OSError, match="Input/output error"):
        FlatIPIndex(normals(8, 16)).save(saved)
    assert len(FlatIPIndex.load(saved)) == 8


def test_what_killed_saves_left_goes_with_a_later_one(saved):
    """Once it is a day old: younger files may be those of another process that saves."""
    ours = [saved / f"rows-{'0' * 16}.npy"]
    others = [saved / name for name in ("notes.tmp", "rows.npy", "README-0123456789abcdef.npy")]
    for file in (*ours, *others):
        file.touch()
    index = FlatIPIndex(normals(9, 16))
    index.save(saved)
    assert all(file.exists() for file in (*ours, *others))
    for file in (*ours, *others, *saved.glob("rows-*.npy")):
        os.utime(file, (0, 0))
    index.save(saved)
    assert not any(file.exists() for file in ours) and all(file.exists() for file in others)
    assert len(FlatIPIndex.load(saved)) == 9


def test_files_that_cannot_be_deleted_are_left(saved, monkeypatch):
    def refuse(self, missing_ok=False):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    index = FlatIPIndex(normals(9, 16))
    index.save(saved)
    assert len(FlatIPIndex.load(saved)) == 9
    monkeypatch.setattr(os, "replace", lambda *paths: refuse(None))
    with pytest.raises(OSError, match="Read-only file system"):
        index.save(saved)


def test_read_only_folder(tmp_path):
    """Root, who may write anywhere, becomes nobody."""
    index, folder = FlatIPIndex(torch.ones(50, 24)), tmp_path / "index"
    index.save(tmp_path / "another")
    folder.mkdir()
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=str(folder)):
            index.save(folder)
    finally:
        os.seteuid(user)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("place", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
def test_the_default_dtype_and_device_are_not_those_of_an_index(tmp_path, place):
    """A program that loads models sets them; the native code writes float32 on the CPU."""
    database, queries, more = normals(300, 40), normals(5, 40, seed=1), normals(20, 40, seed=2)
    database[7] = database[2]
    expected = FlatIPIndex(torch.cat([database, more])).search(queries, 4)
    default = torch.get_default_dtype()
    if place != "meta":
        torch.set_default_dtype(place)
    try:
        with torch.device("meta") if place == "meta" else nullcontext():
            index = FlatIPIndex(database)
            index.add(more)
            index.save(tmp_path / "index")
            found = [index.search(queries, 4), FlatIPIndex.load(tmp_path / "index").search(queries, 4)]
            index.remove(torch.tensor([3], device="cpu"))
            index.search(queries, 4)
    finally:
        torch.set_default_dtype(default)
    for each in found:
        assert_same(each, expected)


def test_a_manifest_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "valm image knowledge base"}')
    with pytest.raises(ValueError, match=r"manifest\.json belongs to something else, not to a valm flat"):
        FlatIPIndex(normals(9, 8)).save(tmp_path)
    assert list(contents(tmp_path)) == ["manifest.json"]
    (tmp_path / "manifest.json").write_text("damaged")
    FlatIPIndex(normals(9, 8)).save(tmp_path)
    assert len(FlatIPIndex.load(tmp_path)) == 9


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("step", ["check_own", "file_sha256", "_load"])
def test_a_load_while_another_index_is_saved_reads_that(tmp_path, monkeypatch, step, mmap):
    """Whenever the files of the manifest that it has read go."""
    first, second = FlatIPIndex(normals(30, 8)), FlatIPIndex(normals(40, 8, seed=1))
    first.save(tmp_path)
    where = storage.Folder if step == "_load" else storage
    original, saved = getattr(where, step), []

    def after_a_save(*arguments):
        if not saved and arguments[-1].suffix == ".npy":
            saved.append(second.save(tmp_path))
        return original(*arguments)

    monkeypatch.setattr(where, step, after_a_save)
    loaded = FlatIPIndex.load(tmp_path, mmap=mmap, verify=True)
    assert saved and torch.equal(loaded.dequantised(), second.dequantised())
    next(file for file in tmp_path.glob("rows-*.npy")).unlink()
    with pytest.raises(ValueError, match=r"is damaged: rows-\w+\.npy is missing"):
        FlatIPIndex.load(tmp_path, mmap=mmap)


def test_dequantised_rows_are_a_copy():
    index = FlatIPIndex(normals(30, 8))
    before = index.search(normals(3, 8, seed=1), 4)
    index.dequantised().neg_()
    assert_same(index.search(normals(3, 8, seed=1), 4), before)


@pytest.mark.parametrize(("limit", "pack", "alone"), [(1, True, True), (1, False, False), (1 << 40, True, False)])
def test_rows_of_a_mapped_index_beyond_memory_are_read_alone(tmp_path, monkeypatch, limit, pack, alone):
    """But not those of one without codes, which a search reads all."""
    asked = []
    monkeypatch.setattr(memory_maps, "memory_limit", lambda: limit)
    monkeypatch.setattr(index_module, "read_at_random", lambda rows: asked.append(rows.shape))
    rows = torch.randn(100, 16)
    saved = FlatIPIndex(rows, pack=pack)
    saved.save(tmp_path)
    FlatIPIndex.load(tmp_path)
    assert asked == []
    loaded = FlatIPIndex.load(tmp_path, mmap=True)
    assert asked == ([(100, 16)] if alone else [])
    assert_same_answers(loaded, saved, rows[:3], 4)
