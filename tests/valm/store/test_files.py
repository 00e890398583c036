import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from valm.errors import ValmError
from valm.store.files import atomic_path, only_writer, output_file, read_json, read_text, writable_folder, write_json


def test_a_full_disk_names_the_file(tmp_path):
    match = r"cannot write .*data\.bin: .*(No space|28608 written)"
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("76800 requested and 28608 written")):
        with pytest.raises(ValmError, match=match), atomic_path(tmp_path / "data.bin"):
            raise error
    assert os.listdir(tmp_path) == []


def test_one_process_at_a_time_holds_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("valm.store.files.WAIT_SECONDS", 0)
    refused = pytest.raises(ValmError, match="second writer")
    with only_writer(tmp_path, "first writer"), refused, only_writer(tmp_path, "second writer"):
        pass
    with pytest.raises(TimeoutError, match="of the block"), only_writer(tmp_path, "third writer"):
        raise TimeoutError("of the block")


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"name": "été", "n": 3})
    assert read_json(tmp_path / "a.json", "the file", dict[str, Any]) == {"name": "été", "n": 3}
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["n"] == 3


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(ValmError, match=r"cannot read the manifest .*b\.json: No such file"):
        read_json(tmp_path / "b.json", "the manifest", Any)
    (tmp_path / "c.json").write_text('{"cut": ')
    with pytest.raises(ValmError, match=r"the manifest .*c\.json is damaged, it is not JSON: .*; make it again"):
        read_json(tmp_path / "c.json", "the manifest", Any)


@pytest.mark.parametrize("content", ["\ufeffone\ntwo", "one\ntwo"])
def test_a_text_is_read_without_its_byte_order_mark(tmp_path, content):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "one\ntwo"


@pytest.mark.parametrize(
    "content, message",
    [
        ("one".encode("utf-16"), "is UTF-16, expected UTF-8: convert it"),
        (b"one\0two", "is not UTF-8 text: it has NUL bytes"),
        (b"<!doctype HTML>\n<p>one", "is HTML or XML"),
        (b"%PDF-1.7\n\xff", "is a PDF or RTF document"),
        (b"\xff", "is not UTF-8 text: invalid start byte at byte 0"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValmError, match=rf"a\.txt {message}"):
        read_text(tmp_path / "a.txt")


def test_writable_folder(tmp_path):
    assert writable_folder(tmp_path / "x" / "y").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValmError, match="cannot make the output folder"):
        writable_folder(tmp_path / "file" / "under")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValmError, match="permission denied"):
            writable_folder(tmp_path / "locked")


def write_output(path: Path, text: str) -> None:
    with output_file(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("exists", [False, True])
def test_an_output_goes_to_what_a_link_leads_to(tmp_path, exists):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "page.html", tmp_path / "page.html"
    link.symlink_to(Path("there") / "page.html")
    if exists:
        target.write_text("old")
    write_output(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    with pytest.raises(RuntimeError), output_file(link) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new" and os.listdir(target.parent) == ["page.html"]


@pytest.mark.skipif(os.name != "posix", reason="files have modes")
def test_an_output_keeps_the_mode_of_the_file_before(tmp_path):
    file = tmp_path / "page.html"
    file.write_text("old")
    for mode in (0o600, 0o664):
        file.chmod(mode)
        write_output(file, "new")
        assert stat.S_IMODE(file.stat().st_mode) == mode and file.read_text() == "new"


def test_an_output_goes_into_a_device(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError:
        pytest.skip("may not make a device")
    write_output(device, "new")
    assert stat.S_ISCHR(device.stat().st_mode) and os.listdir(tmp_path) == ["null"]


@pytest.mark.timeout(60)
def test_an_output_goes_into_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_output(pipe, "new")
    reader.join()
    assert read == ["new"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_output_that_is_a_folder_is_one_sentence(tmp_path):
    with pytest.raises(ValmError, match=r"cannot write .*: Is a directory"):
        write_output(tmp_path, "new")
