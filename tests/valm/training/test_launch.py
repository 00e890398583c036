import pytest
from transformers import TrainingArguments

from tests.valm.training.documents import TOKENIZER, Vectors, documents, new_model
from valm.errors import ValmError
from valm.training.launch import check_alone
from valm.training.train import trainer, training_arguments


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_would_train_apart_are_refused(tmp_path, monkeypatch, name):
    alone = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv(name, "2")
    sentence = "2 processes were launched, but each would train by itself on cpu: .*--use_cpu"
    with pytest.raises(ValmError, match=sentence):
        training_arguments(tmp_path, use_cpu=False)
    with pytest.raises(ValmError, match=sentence):  # whatever made the arguments
        trainer(
            new_model(), documents(), Vectors(), tokenizer=TOKENIZER, arguments=alone, cache_below=tmp_path / "below"
        )
    assert not list(tmp_path.iterdir())


def test_accelerate_starts_one_process_on_cpus(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    training_arguments(tmp_path)  # --num_processes 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValmError, match=r"one process of several.*torchrun .*with MASTER_PORT unset"):
        training_arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as its launcher for one GPU says
    training_arguments(tmp_path)


def test_without_a_gpu_training_is_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert training_arguments(tmp_path, bf16=True).use_cpu
    assert not training_arguments(tmp_path, use_cpu=False).use_cpu


def test_a_command_of_one_process_is_refused_to_several(monkeypatch):
    check_alone("valm retrieve")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValmError, match="valm retrieve runs in one process, but 2 were launched: start it without"):
        check_alone("valm retrieve")
