import pytest

from valm.store.stages import Stages, duration


def test_a_finished_stage_is_skipped_and_a_killed_one_runs_again(tmp_path, capsys):
    done = []

    def killed():
        done.append("killed")
        raise KeyboardInterrupt

    def second():
        done.append("second")
        return "two pictures"

    stage = Stages(tmp_path / "stages.json", "seed 0, ")
    stage("first", lambda: done.append("first"))
    with pytest.raises(KeyboardInterrupt):
        stage("second", killed)
    again = Stages(tmp_path / "stages.json", "seed 0, ")
    again("first", lambda: done.append("again"))
    again("second", second, title="the second")
    assert done == ["first", "killed", "second"]
    assert set(again.seconds) == {"first", "second"}
    said = capsys.readouterr().out
    assert "seed 0, first: finished before" in said and "seed 0, the second: 0 s; two pictures" in said


def test_times_are_for_people():
    assert [duration(seconds) for seconds in (0.4, 59, 144, 5400, 7200)] == [
        "0 s",
        "59 s",
        "2.4 min",
        "90.0 min",
        "2.0 h",
    ]
