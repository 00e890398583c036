import signal
from pathlib import Path

import pytest

from tests.valm.killed import exit_code_if_killed, needs_fork
from tests.valm.knowledge_base.inputs import build_folder
from tests.valm.store.manifests import contents
from valm.errors import ValmError


def test_nothing_readable(clip, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_text("no")
    with pytest.raises(ValmError, match=r"none of the 1 images could be read; the first, x\.png: not a picture"):
        build_folder(tmp_path / "pictures", tmp_path / "kb", clip)
    assert contents(tmp_path / "kb") == {}


@pytest.mark.slow
@needs_fork
def test_what_is_given_up_may_be_killed(clip, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in "abc":
        (tmp_path / "pictures" / f"{name}.png").write_text("no")

    def fail():
        with pytest.raises(ValmError, match="none of the 3 images could be read"):
            build_folder(tmp_path / "pictures", tmp_path / "kb", clip, shard_size=1)

    points = 0
    while exit_code_if_killed(fail, points, ((Path, "unlink"),)) == -signal.SIGKILL:
        fail()
        assert contents(tmp_path / "kb") == {}
        points += 1
    assert points == 7  # three records, their tables, and the plan
