import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import touch
from valm.errors import ValmError
from valm.knowledge_base.encode import Record
from valm.knowledge_base.fingerprint import fingerprint_files, fingerprint_records


def test_names_captions_and_sizes_count(tmp_path):
    touch(tmp_path, "a", "b")
    (tmp_path / "b").write_bytes(b"1")
    sources = [None, b"", b"1", tmp_path / "b", tmp_path / "a", Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))]
    hashes = [fingerprint_records([Record("x", "", source)]) for source in sources]
    # of the same size: no source and an empty one are not, content and a file are
    assert len(set(hashes)) == 5
    assert (hashes[1], hashes[2]) == (hashes[4], hashes[3])
    assert hashes[0] == fingerprint_records([Record("x", "", tmp_path / "none")])
    assert hashes[0] != fingerprint_records([Record("x", "y", None)]) != fingerprint_records([Record("y", "x", None)])
    assert fingerprint_files([tmp_path / "a"]) != fingerprint_files([tmp_path / "b"])
    with pytest.raises(ValmError, match=r"cannot read .*none: No such file"):
        fingerprint_files([tmp_path / "none"])


def test_a_file_that_cannot_be_looked_at_is_an_error_unless_no_file_can_have_its_name(tmp_path, monkeypatch):
    long = Record("x", "", tmp_path / ("x" * 300))
    assert fingerprint_records([long]) == fingerprint_records([Record("x", "", None)])

    def denied(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(ValmError, match=r"cannot read .*/a: Permission denied; once it can be read"):
        fingerprint_records([Record("x", "", tmp_path / "a")])
