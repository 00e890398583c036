import errno
import json
import math
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

from tests.tolerance import assert_agree
from tests.valm.killed import exit_code, forked, needs_fork
from tests.valm.models import HashRetriever
from tests.valm.training.documents import TOKENIZER, documents, new_model, new_trainer, trained
from tests.valm.training.test_train import plain_llama
from valm.errors import ValmError
from valm.model.augment import augment
from valm.model.checkpoint import load, load_decoder
from valm.retrieval.source import RetrievalSource
from valm.training.callbacks import ended_by_signals
from valm.training.image_trainer import STATE_FILE, newest_checkpoint
from valm.training.train import training_arguments

# More than two epochs of eight documents in threes, with dropout.
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}


class StopAfter(TrainerCallback):
    """Ends a training after a step, with a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class BeforeSteps(TrainerCallback):
    """Remembers the weights before each step."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model, **more):
        self.weights.append(weights(model))


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Losses and weights of a training."""
    made = trained(tmp_path_factory.mktemp("run"), **SAVING)
    return made.losses(), weights(made.model)


def check_resumed(folder, uninterrupted):
    """Checks that the training in `folder` goes on as if it had not stopped."""
    resumed = new_trainer(folder, **SAVING)
    with ended_by_signals(resumed):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert resumed.losses() == uninterrupted[0]
    assert same(weights(resumed.model), uninterrupted[1])


@pytest.mark.parametrize(
    "step", [1, pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow)]
)
def test_resumed_anywhere_the_losses_and_weights_are_the_same(tmp_path, uninterrupted, step):
    stopped = new_trainer(tmp_path, **SAVING)
    stopped.add_callback(StopAfter(step))
    stopped.train()
    check_resumed(tmp_path, uninterrupted)


@pytest.fixture(scope="module")
def on_base(tmp_path_factory):
    """Makes a model of one base, which is in a folder."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    plain_llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return lambda: augment(load_decoder(folder), 24, 3, logit_bias=0.0)


@pytest.mark.parametrize("step", [1, 5])
def test_checkpoints_of_a_frozen_base_are_adapters_and_go_on(tmp_path, on_base, step):
    base = on_base().config.base_place
    whole = trained(tmp_path / "whole", model=on_base(), **SAVING)
    stopped = new_trainer(tmp_path / "stopped", model=on_base(), **SAVING)
    stopped.add_callback(StopAfter(step))
    stopped.train()
    checkpoint = tmp_path / "stopped" / f"checkpoint-{step}"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"image_fusion.safetensors", "optimizer.pt", STATE_FILE} <= names and "_retrieval.json" not in names
    assert not list(checkpoint.glob("model*")) and "config.json" not in names
    loaded, tokenizer = load(checkpoint)
    assert same(weights(loaded), weights(stopped.model)) and len(tokenizer) == len(TOKENIZER)
    assert loaded.config.base_place == base
    resumed = trained(tmp_path / "stopped", model=on_base(), resume=True, **SAVING)
    assert resumed.losses() == whole.losses() and same(weights(resumed.model), weights(whole.model))


def test_the_best_adapter_becomes_the_model(tmp_path, on_base):
    made = evaluated(tmp_path / "out", [3.0, 1.0, 2.0], model=on_base(), max_steps=3)
    each = BeforeSteps()
    made.add_callback(each)
    made.train()
    assert same(weights(made.model), each.weights[2]) and not same(weights(made.model), each.weights[1])
    made.write(tmp_path / "model", TOKENIZER, command="as it was made")
    assert same(weights(load(tmp_path / "model")[0]), each.weights[2])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| eval_loss | 1 |" in card and "as it was made" in card


@pytest.mark.parametrize("how", ["trains", "has no folder"])
def test_a_base_that_trains_or_is_in_no_folder_is_saved_whole(tmp_path, on_base, how):
    model = on_base().requires_grad_(True) if how == "trains" else augment(plain_llama(), 24, 3)
    made = trained(tmp_path / "out", model=model, **(SAVING | {"max_steps": 2}))
    made.write(tmp_path / "model", TOKENIZER)
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "model"):
        assert (folder / "model.safetensors").is_file() and not list(folder.glob("image_fusion*"))
        assert same(weights(load(folder)[0]), weights(made.model))


class Asks(TrainerCallback):
    """Sends this process a signal in a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            signal.raise_signal(self.number)


@pytest.mark.usefixtures("in_front")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    stopped = new_trainer(tmp_path, **SAVING)
    stopped.add_callback(Asks(3, number))
    with pytest.raises(KeyboardInterrupt, match="ended after step 3"), ended_by_signals(stopped):
        stopped.train()
    assert signal.getsignal(number) == before
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    check_resumed(tmp_path, uninterrupted)


@pytest.mark.usefixtures("in_front")
def test_a_second_signal_ends_it_at_once(tmp_path):
    stopped = new_trainer(tmp_path, **SAVING)
    stopped.add_callback(Asks(3, signal.SIGINT))
    stopped.add_callback(Asks(3, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as interrupt, ended_by_signals(stopped):
        stopped.train()
    assert str(interrupt.value) == "" and stopped.state.global_step == 2


@pytest.mark.usefixtures("in_front")
def test_a_signal_in_the_last_step_changes_nothing(tmp_path, uninterrupted):
    made = new_trainer(tmp_path, **SAVING)
    made.add_callback(Asks(7, signal.SIGINT))
    with ended_by_signals(made):
        made.train()
    assert made.losses() == uninterrupted[0]


@pytest.mark.usefixtures("in_front")
@pytest.mark.parametrize("fields", [{"save_total_limit": 1}, {"save_strategy": "best"}], ids=str)
def test_the_checkpoint_of_an_ended_training_stays(tmp_path, fields):
    better = [3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    stopped = evaluated(tmp_path, better, **({"save_steps": 1, "max_steps": 6} | fields))
    stopped.add_callback(Asks(4, signal.SIGINT))
    with (
        pytest.raises(KeyboardInterrupt, match=r"ended after step \d, with a checkpoint") as ended,
        ended_by_signals(stopped),
    ):
        stopped.train()
    step = str(ended.value).split()[3].rstrip(",")
    assert newest_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")


@pytest.fixture
def checkpoint(tmp_path):
    """That of the one step of a training."""
    trained(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    return tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_half_written_checkpoint_is_passed_over(tmp_path, part):
    trained(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    state = tmp_path / "checkpoint-2" / STATE_FILE
    state.write_bytes(state.read_bytes()[: part * state.stat().st_size // 3])
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def resume(checkpoint):
    trained(checkpoint.parent, resume=True, max_steps=2)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_that_lost_a_file_is_not_resumed_from(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(
        ValmError, match=r"checkpoint-1 contains a model without its optimizer or learning rates .save_only_model"
    ):
        resume(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer", None])
def test_links_out_are_not_opened(checkpoint, tmp_path, name):
    if name is None:
        checkpoint.rename(tmp_path / "elsewhere")
        checkpoint.symlink_to(tmp_path / "elsewhere")
    else:
        (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / name).symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="is a link that leads out of its folder"):
        resume(checkpoint)


def test_a_failed_upload_is_not_said_of_the_checkpoint(tmp_path, monkeypatch):
    made = new_trainer(tmp_path, **SAVING, push_to_hub=False)
    made.args.push_to_hub = True
    monkeypatch.setattr(made, "init_hf_repo", lambda *_: None)
    monkeypatch.setattr(made, "_push_from_checkpoint", lambda folder: (_ for _ in ()).throw(RuntimeError("no network")))
    with pytest.raises(RuntimeError, match="no network"):
        made.train()


@pytest.mark.parametrize("accumulation, call", [(1, 2), (3, 7), (3, 0)])
def test_a_loss_that_is_not_finite_stops_before_its_step(tmp_path, accumulation, call):
    sizes = {"per_device_train_batch_size": 3 // accumulation, "gradient_accumulation_steps": accumulation}
    made = new_trainer(tmp_path, **sizes)
    compute_loss, calls = made.compute_loss, iter(range(99))

    def with_nan(*arguments, **more):
        loss = compute_loss(*arguments, **more)
        return loss * math.nan if next(calls) == call else loss

    made.compute_loss = with_nan
    before = BeforeSteps()
    made.add_callback(before)
    with pytest.raises(ValmError, match=f"the loss is nan at step {call // accumulation + 1}: "):
        made.train()
    assert len(before.weights) == call // accumulation + 1 and same(before.weights[-1], weights(made.model))
    assert not any(tmp_path.iterdir())


def test_every_checkpoint_notes_what_finds_its_images(tmp_path):
    run = tmp_path / "run"
    made = new_trainer(run, **SAVING)
    (tmp_path / "kb").mkdir()
    source = RetrievalSource("eot", "clip", "0" * 64, "kb", "1" * 64, knowledge_base=tmp_path / "kb")
    made.model.finder.set_source(source)
    made.train()
    assert load(run / "checkpoint-2")[0].finder.source == source
    made.write(run, TOKENIZER)
    for folder in (run, run / "checkpoint-2", run / "checkpoint-7"):
        model, tokenizer = load(folder)
        assert model.finder.source == source
        assert tokenizer.model_max_length == 32
    assert list(tmp_path.rglob("_retrieval.json")) == [run / "_retrieval.json"]  # no upload of a checkpoint has it
    assert json.loads((run / "_retrieval.json").read_text()) == {"knowledge_base": "../kb"}


def test_evaluation_is_the_perplexity_of_all_tokens_and_changes_no_step(tmp_path, uninterrupted):
    held_out = documents(count=5, seed=1)
    for number, document in enumerate(held_out):
        for name, values in document.items():
            document[name] = values[: 3 + number]
    fields = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    made = trained(tmp_path, eval_dataset=held_out, **(SAVING | fields))
    assert made.losses() == uninterrupted[0]
    logged = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6, 7]
    losses = [made.compute_loss(made.model.eval(), made.data_collator([one])).item() for one in held_out]
    expected = np.average(losses, weights=[len(one["input_ids"]) - 1 for one in held_out])
    assert_agree(logged[-1]["eval_loss"], expected)
    assert_agree(logged[-1]["eval_perplexity"], math.exp(expected))


def test_batches_of_one_length_are_in_a_random_order(tmp_path):
    made = new_trainer(tmp_path, train_sampling_strategy="group_by_length")
    order = list(made._get_train_sampler())
    assert sorted(order) == list(range(len(made.train_dataset))) != order


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
BEST |= {"load_best_model_at_end": True}


def evaluated(folder, losses, **fields):
    """A trainer that saves the best checkpoints, whose evaluations find these losses."""
    made = new_trainer(folder, eval_dataset=documents(), **BEST | fields)
    own, found = made.evaluation_loop, iter(losses)

    def evaluation_loop(*arguments, **options):
        output = own(*arguments, **options)
        output.metrics["eval_loss"] = next(found)
        return output

    made.evaluation_loop = evaluation_loop
    return made


@pytest.mark.parametrize("how", ["renamed", "absolute"])
def test_the_best_checkpoint_stays_the_model_where_a_training_resumes_under_another_path(tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = evaluated("first", [3.0, 2.0, 1.0], max_steps=3)
    first.train()
    folder = tmp_path / "first"
    if how == "renamed":
        folder = folder.rename(tmp_path / "second")
    resumed = evaluated(folder, [4.0, 5.0, 6.0], max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert same(weights(resumed.model), weights(first.model))
    assert resumed.model_numbers()["steps"] == 3 and resumed.model_numbers()["eval_loss"] == 1


@pytest.mark.parametrize("best", [None, "..", "/", "checkpoint-1/../.."])
def test_a_best_checkpoint_that_is_not_in_the_folder_is_named(tmp_path, best):
    evaluated(tmp_path, [1.0, 2.0], max_steps=2).train()
    if best is None:
        shutil.rmtree(tmp_path / "checkpoint-1")
    else:
        file = tmp_path / "checkpoint-2" / STATE_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | {"best_model_checkpoint": best}))
    with pytest.raises(ValmError, match=r"the best checkpoint so far, .*, is missing: put it back"):
        evaluated(tmp_path, [3.0], max_steps=3).train(resume_from_checkpoint=True)
    evaluated(tmp_path, [3.0], max_steps=3, load_best_model_at_end=False).train(resume_from_checkpoint=True)


def test_only_weights_that_are_really_missing_are_said_to_be(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(transformers_trainer.logger, "warning", said.append)
    made = evaluated(tmp_path, [1.0, 2.0], max_steps=2)
    made.train()  # and takes the best checkpoint, which contains tied weights once
    assert said == []
    made._issue_warnings_after_load(SimpleNamespace(missing_keys=["lm_head.weight", "other"], unexpected_keys=[]))
    assert said == ["There were missing keys in the checkpoint model loaded: ['other']."]


def test_the_numbers_are_of_the_checkpoint_that_became_the_model(tmp_path):
    """The best evaluation was between two checkpoints."""
    made = evaluated(tmp_path, [3.0, 2.0, 1.0, 4.0], save_steps=2, max_steps=4)
    made.train()
    assert same(weights(made.model), weights(load(tmp_path / "checkpoint-2")[0]))
    assert made.model_numbers()["steps"] == 2 and made.model_numbers()["eval_loss"] == 2


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(tmp_path, monkeypatch):
    trained(tmp_path, **SAVING)
    again = new_trainer(tmp_path, **SAVING)
    with pytest.raises(ValmError, match="contains another training's checkpoints: resume it, or choose another"):
        again.train()
    monkeypatch.setattr(again, "_save_rng_state", lambda folder: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(ValmError, match=r"cannot write the checkpoint .*checkpoint-6: no space"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not (tmp_path / "checkpoint-6" / STATE_FILE).exists()


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    made = new_trainer(tmp_path, **SAVING)
    save = made._save_rng_state

    def full(folder):
        if made.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder)

    monkeypatch.setattr(made, "_save_rng_state", full)
    with pytest.raises(ValmError, match=r"cannot write the checkpoint .*checkpoint-4: .*No space left on device"):
        made.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.slow
@needs_fork
def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path):
    """A limit on the size of files stands for it."""
    resource = pytest.importorskip("resource")
    trained(tmp_path, **(SAVING | {"max_steps": 2}))

    def train(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() reports EFBIG
        made = new_trainer(tmp_path, **SAVING)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            made.train(resume_from_checkpoint=True)
        except ValmError as error:
            if "cannot write the checkpoint" in str(error):
                raise SystemExit(3) from error

    for limit in (100, 3000, 60_000, 300_000):
        assert exit_code(forked(lambda limit=limit: train(limit))) == 3
        assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_no_checkpoint(tmp_path):
    for given, message in ((True, "contains no checkpoint to resume from"), ("checkpoint-9", "there is no checkpoint")):
        with pytest.raises(ValmError, match=message):
            trained(tmp_path, resume=given)


def test_what_trainers_wrote_is_read_as_tensors_only(tmp_path, monkeypatch):
    """SECURITY.md: nothing is unpickled, the Trainer's own files included."""
    trained(tmp_path, **SAVING)
    shutil.rmtree(tmp_path / "checkpoint-7")
    load_file, read = torch.load, []

    def reading(file, *arguments, **more):
        read.append((str(file).rpartition("/")[2], more.get("weights_only")))
        return load_file(file, *arguments, **more)

    monkeypatch.setattr(torch, "load", reading)
    trained(tmp_path, resume=True, **SAVING)
    assert {name for name, _ in read} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(tensors_only is True for _, tensors_only in read)


def test_shards_that_pytorch_would_unpickle_are_refused(tmp_path, monkeypatch):
    made = new_trainer(tmp_path)
    plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
    monkeypatch.setattr(type(made.accelerator.state), "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValmError, match="would unpickle a SHARDED_STATE_DICT: set FULL_STATE_DICT"):
        made.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
        {"optim": "adamw_torch", "train_sampling_strategy": "group_by_length"},
    ],
)
def test_fields_of_the_trainer_work(tmp_path, fields):
    made = trained(tmp_path, max_steps=30, **fields)
    assert np.mean(made.losses()[-3:]) < 0.7 * made.losses()[0]


def test_a_model_finds_the_images_itself_while_it_trains(tmp_path):
    class Retriever(HashRetriever):
        def __call__(self, input_ids, attention_mask=None):
            padding = TOKENIZER.eos_token_id
            assert (input_ids == padding).any(1).all() and not input_ids[attention_mask == 0].ne(padding).any()
            self.called = True
            return super().__call__(input_ids, attention_mask)

    model = new_model()
    retriever = Retriever()
    model.set_retriever(retriever)
    texts = [{"input_ids": document["input_ids"]} for document in documents()]
    made = trained(tmp_path, model=model, kb=None, dataset=texts)
    assert retriever.called and len(made.losses()) == 6


def test_the_lower_perplexity_is_the_better_one(tmp_path):
    saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "perplexity"}
    made = trained(tmp_path, eval_dataset=documents(), **saving, **best)
    found = {entry["step"]: entry["eval_perplexity"] for entry in made.state.log_history if "eval_loss" in entry}
    assert made.state.best_global_step == min(found, key=found.get) != 2
    assert training_arguments(tmp_path, metric_for_best_model="perplexity", greater_is_better=True).greater_is_better
