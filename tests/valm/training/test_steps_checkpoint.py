import pytest
import torch
from safetensors import SafetensorError

from valm.errors import ValmError
from valm.training import steps_checkpoint
from valm.training.steps import take_steps
from valm.training.steps_checkpoint import StepsCheckpoint

STEPS = 9


@pytest.fixture(autouse=True)
def saved_after_every_step(monkeypatch):
    monkeypatch.setattr(steps_checkpoint, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(steps_checkpoint, "SAVE_RATIO", 0.0)


def new_model():
    torch.manual_seed(0)
    # a batch norm has buffers, and dropout draws random numbers
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))


def train(model, checkpoint=None, stop=STEPS):
    data = torch.randn(STEPS, 16, 4, generator=torch.Generator().manual_seed(1))

    def losses():
        for step in range(0 if checkpoint is None else len(checkpoint.losses), STEPS):
            if step == stop:
                raise KeyboardInterrupt
            yield (model(data[step]) - 1).square().mean()

    options = {"steps": STEPS, "lr": 0.1, "weight_decay": 0.1, "progress": None}
    return take_steps(model.parameters(), losses(), checkpoint=checkpoint, **options)


def interrupted(path, stop=4, **settings):
    model = new_model()
    with pytest.raises(KeyboardInterrupt):
        train(model, StepsCheckpoint(path, model, {"lr": 0.1, **settings}), stop)


@pytest.mark.parametrize("stops", [[1], [4], [STEPS - 1], [2, 5]])
def test_a_resumed_training_is_an_uninterrupted_one(tmp_path, stops):
    whole = new_model()
    losses = train(whole)
    for stop in stops:
        interrupted(tmp_path / "state", stop)
    resumed = new_model()
    checkpoint = StepsCheckpoint(tmp_path / "state", resumed, {"lr": 0.1})
    assert checkpoint.losses == losses[: stops[-1]]
    assert train(resumed, checkpoint) == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_without_a_file_it_begins(tmp_path):
    model = new_model()
    assert train(model, StepsCheckpoint(tmp_path / "state", model, {})) == train(new_model())


def test_it_is_written_every_so_often(tmp_path, monkeypatch):
    monkeypatch.setattr(steps_checkpoint, "SAVE_SECONDS", 30.0)
    interrupted(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_another_training_does_not_resume(tmp_path):
    interrupted(tmp_path / "state", seed=1)
    for settings, message in (
        ({"lr": 0.2, "seed": 1}, "its lr is 0.1, here it is 0.2; choose another folder"),
        ({"lr": 0.1}, "its seed is 1, here it is "),
    ):
        with pytest.raises(ValmError, match=message):
            StepsCheckpoint(tmp_path / "state", new_model(), settings)
    model = torch.nn.Linear(2, 2)
    checkpoint = StepsCheckpoint(tmp_path / "state", model, {"lr": 0.1, "seed": 1})
    with pytest.raises(ValmError, match=r"cannot resume from .*state: Error.* in loading state_dict"):
        train(model, checkpoint)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*arguments):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(steps_checkpoint, "save_file", full)
    model = new_model()
    with pytest.raises(ValmError, match=r"cannot write .*state: No space left on device"):
        train(model, StepsCheckpoint(tmp_path / "state", model, {"lr": 0.1}))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_one_sentence(tmp_path):
    interrupted(tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    changed = bytearray(content)
    changed[-3] ^= 1
    for damaged, message in (
        (bytes(changed), "it differs from its checksum; delete it to start again"),
        (content[:-8], "cannot resume from .*state: "),
        (b"", "cannot resume from .*state: "),
        (content.replace(b"sha256", b"sha255"), "cannot resume from .*state: .*sha256"),
    ):
        (tmp_path / "state").write_bytes(damaged)
        with pytest.raises(ValmError, match=message):
            StepsCheckpoint(tmp_path / "state", new_model(), {"lr": 0.1})
