import pytest

from studies.stages import Stages


def test_a_finished_stage_is_skipped_and_a_killed_one_runs_again(tmp_path, capsys):
    done = []

    def killed():
        done.append("killed")
        raise KeyboardInterrupt

    stage = Stages(tmp_path / "stages.json", "seed 0, ")
    stage("first", lambda: done.append("first"))
    with pytest.raises(KeyboardInterrupt):
        stage("second", killed)
    again = Stages(tmp_path / "stages.json", "seed 0, ")
    again("first", lambda: done.append("again"))
    again("second", lambda: done.append("second"))
    assert done == ["first", "killed", "second"]
    assert set(again.seconds) == {"first", "second"}
    assert "seed 0, first: finished before" in capsys.readouterr().out
