"""Our class and tasks in lm-evaluation-harness, against the harness's own class."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import valm
from tests.tolerance import assert_agree
from tests.valm.evaluation.small_sets import write_sets
from tests.valm.models import llama_of, model_for
from tests.valm.other_tokenizers import LINES, chat_like, gpt2_like
from tests.valm.three_images import retriever_in
from tests.valm.tiny_clip import make_clip
from valm.cli import main
from valm.clip.tokenizer import prompt_ids
from valm.errors import ValmError
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever

pytest.importorskip("lm_eval", reason="needs the extra [harness]")

from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from valm.evaluation.harness import OF_LOADING, ValmLM, write_tasks

pytestmark = pytest.mark.slow  # lm-eval comes with the extra `check`
PROSE = Path(__file__).parents[2] / "fixtures" / "prose.txt"


@pytest.fixture(scope="module")
def models(tmp_path_factory, clip):
    """Folders: gpt2, the same as a VaLM without images, and as an augmented model with open images and a retriever."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = gpt2_like([*LINES, PROSE.read_text(encoding="utf-8")])
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    sizes |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    for parameter in gpt2.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    gpt2.save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    plain = valm.VaLMForCausalLM(valm.ValmConfig(num_images=0, **sizes))
    plain.load_state_dict(gpt2.state_dict())
    save_checkpoint(plain, tokenizer, root / "valm")
    kb = retriever_in(root, clip).kb
    seeing = valm.augment(gpt2, kb.dim, 2, logit_bias=1.0)
    seeing.set_retriever(Retriever(ContextEncoder(kb.load_clip(), tokenizer=tokenizer), kb, 2))
    seeing.save_pretrained(root / "seeing")
    tokenizer.save_pretrained(root / "seeing")
    return root


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, argument, 0) for argument in arguments]


@pytest.mark.parametrize("name, arguments", [("valm", {}), ("seeing", {"retrieval": "off"})])
def test_scores_are_those_of_the_harness_own_class(models, name, arguments):
    own = HFLM(pretrained=str(models / "gpt2"), device="cpu", batch_size=4, max_length=64)
    # ours begins texts with bos, as it was trained
    ours = ValmLM(str(models / name), batch_size=3, add_bos_token=False, **arguments)
    assert ours.max_length == own.max_length == 64
    prose = PROSE.read_text(encoding="utf-8")
    assert len(own.tok_encode(prose)) > 3 * 64  # several windows
    rolling = instances("loglikelihood_rolling", [(prose,), (prose[:100],)])
    assert_agree(ours.loglikelihood_rolling(rolling), own.loglikelihood_rolling(rolling))
    asked = instances("loglikelihood", [(prose[:60], prose[60:80]), ("", "The colour"), ("The colour of", " it")])
    expected = own.loglikelihood(asked)
    for (score, greedy), (other, also) in zip(ours.loglikelihood(asked), expected, strict=True):
        assert math.isclose(score, other, rel_tol=1e-4, abs_tol=1e-4) and greedy == also


def test_no_batch_size_and_no_order_changes_a_score(models):
    prose = PROSE.read_text(encoding="utf-8")
    asked = [(prose[:length], prose[length : length + 9]) for length in (10, 25, 40, 60, 33)]
    one = ValmLM(str(models / "seeing"), batch_size=1).loglikelihood(instances("loglikelihood", asked))
    many = ValmLM(str(models / "seeing"), batch_size=5).loglikelihood(instances("loglikelihood", asked[::-1]))
    assert_agree([score for score, _ in one], [score for score, _ in many[::-1]])
    off = ValmLM(str(models / "seeing"), retrieval="off").loglikelihood(instances("loglikelihood", asked))
    assert [score for score, _ in off] != pytest.approx([score for score, _ in one], rel=1e-3)
    cut = ValmLM(str(models / "seeing"), min_score=2.0).loglikelihood(instances("loglikelihood", asked))
    assert_agree([score for score, _ in cut], [score for score, _ in off])


def test_rolling_text_has_one_bos(models):
    model = ValmLM(str(models / "valm"), batch_size=1)
    seen = []
    forward = model.model.forward
    model.model.forward = lambda ids, **arguments: seen.append(ids) or forward(ids, **arguments)
    model.loglikelihood_rolling(instances("loglikelihood_rolling", [("The colour of",)]))
    assert (seen[0] == model.tokenizer.bos_token_id).sum() == 1
    assert model.add_bos_token is None


def test_a_chat_prompt_has_one_bos(tmp_path):
    """And a text without a template begins with bos, as documents do, whatever the base's tokenizer does by itself."""
    tokenizer = chat_like()
    save_checkpoint(valm.augment(llama_of(tokenizer), 1, 1), tokenizer, tmp_path)
    model = ValmLM(str(tmp_path), batch_size=1, retrieval="off")
    chat = model.apply_chat_template([{"role": "user", "content": "the sky"}])
    for text in (chat, "the sky"):
        for ids in (model.tok_encode(text), model.tok_batch_encode([text])[0][0].tolist()):
            assert ids == prompt_ids(tokenizer, text) and ids.count(tokenizer.bos_token_id) == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sets of a few rows, all in the layout of the real ones."""
    root = tmp_path_factory.mktemp("data")
    write_sets(root)
    return root


def test_every_task_file_runs(models, data, tmp_path):
    tasks = write_tasks(tmp_path)
    assert len(tasks) == len(list(tmp_path.iterdir())) == 20  # 12 sets in the fair protocol, 8 in the published one
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, metadata={"data": str(data)})
    model = ValmLM(str(models / "valm"), batch_size=8)
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
    assert set(results) == set(tasks)
    assert all(0 <= results[name]["acc,none"] <= 1 for name in tasks if "wikitext" not in name)
    assert results["valm_wikitext103"]["word_perplexity,none"] > 1


class ConstantYes(ValmLM):
    """Finds "yes" likelier than anything else."""

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(0.0 if request.args[1] == " yes" else -1.0, False) for request in requests]


def test_constant_yes_is_perfect_as_published_and_half_right_in_the_fair_protocol(models, data, tmp_path):
    write_tasks(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, metadata={"data": str(data)})
    tasks = ["valm_relative_size", "valm_relative_size_published", "valm_vicomte_size"]
    model = ConstantYes(str(models / "valm"))
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
    assert [results[name]["acc,none"] for name in tasks] == [0.5, 1.0, 0.5]


def test_a_blind_model_is_evaluated_too(tmp_path, clip):
    retriever = BlindRetriever(retriever_in(tmp_path, clip).encoder)
    blind = model_for(retriever, blind=True)
    blind.set_retriever(retriever)
    save_checkpoint(blind, clip.tokenizer, tmp_path / "blind")
    asked = instances("loglikelihood", [("a red apple", " lies"), ("the sky", " is blue")])
    on = ValmLM(str(tmp_path / "blind")).loglikelihood(asked)
    off = ValmLM(str(tmp_path / "blind"), retrieval="off").loglikelihood(asked)
    assert [score for score, _ in on] != pytest.approx([score for score, _ in off], rel=1e-3)


def test_a_cache_of_other_weights_is_refused(models, tmp_path):
    asked = instances("loglikelihood", [("The colour of", " it"), ("", "The colour")])
    for retrieval in ("random", "off", "on"):
        made = ValmLM(str(models / "seeing"), retrieval=retrieval)
        cached = CachingLM(made, str(tmp_path / f"{retrieval}.db"))
        assert cached.loglikelihood(asked) == made.loglikelihood(asked)  # and its images are the same as before
        again = CachingLM(ValmLM(str(models / "seeing"), retrieval=retrieval), str(tmp_path / f"{retrieval}.db"))
        assert again.loglikelihood(asked) == cached.loglikelihood(asked)
    fusion = next(weight for name, weight in made.model.named_parameters() if "image_fusion" in name)
    fusion.data += 1e-3
    with pytest.raises(ValmError, match=r"on\.db belong to other weights, .*: delete it, or name another cache"):
        CachingLM(made, str(tmp_path / "on.db"))


def test_the_harness_own_arguments_reach_it(monkeypatch):
    seen = []

    def execute(self, arguments):
        seen.append(vars(arguments) | {"tasks there": len(list(Path(arguments.include_path).glob("valm_*.yaml")))})

    monkeypatch.setattr(HarnessCLI, "execute", execute)
    assert main(["lm-eval", "run", "--model", "valm", "--model_args", "pretrained=x,kb=y", "--tasks", "piqa"]) == 0
    assert main(["lm-eval", "ls", "tasks", "--include_path", "mine"]) == 0
    for retrieval in ("on", "off", "on"):
        options = ["--model_args", f"pretrained=x,retrieval={retrieval}", "--tasks", "piqa", "--use_cache", "scores"]
        assert main(["lm-eval", "run", "--model", "valm", *options]) == 0
    first, second, third = (arguments["use_cache"] for arguments in seen[2:])
    assert first == third != second and first.startswith("scores-")
    run, ls = seen[:2]
    assert run["model_args"] == {"pretrained": "x", "kb": "y"} and run["tasks"] == ["piqa"]
    assert (run["tasks there"], ls["include_path"]) == (20, "mine")
    assert not Path(run["include_path"]).exists()


def test_the_command_hands_over_to_the_harness(models, data, tmp_path, capsys):
    arguments = ["lm-eval", "run", "--model", "valm"]
    arguments += ["--model_args", f"pretrained={models / 'seeing'},retrieval=random"]
    arguments += ["--metadata", f"data={data}", "--output_path", str(tmp_path), "--batch_size", "4", "--tasks"]
    assert main([*arguments, "valm_memory_color"]) == 0
    assert "valm_memory_color" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results*.json")
    assert json.loads(written.read_text())["n-samples"]["valm_memory_color"]["effective"] == 4 * 9
    assert main([*arguments, "valm_memory"]) == 1
    assert "valm: error: Tasks not found: valm_memory" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("none", {}, "there is no checkpoint folder"),
        ("valm", {"retrieval": "random"}, "sees no images"),
        ("valm", {"kb": "kb"}, "sees no images"),
        ("seeing", {"retrieval": "other"}, "must be one of on, off, random"),
        ("seeing", {"retreival": "off"}, r"the model has no argument retreival, did you mean retrieval\?"),
        ("seeing", {"query_dtype": "float8"}, "query_dtype must be one of float32, bfloat16, int8, got 'float8'"),
        ("seeing", {"add_bos": False}, r"no argument add_bos, did you mean add_bos_token\?"),
        (
            "seeing",
            {"dtype": "bfloat16"},
            "model argument dtype has no effect on a model that `valm.load` loads: leave it out",
        ),
    ],
)
def test_wrong_arguments_are_named(models, name, arguments, message):
    with pytest.raises(ValmError, match=message):
        ValmLM(str(models / name), **arguments)


def test_what_the_harness_class_takes_beside_a_loaded_model(models):
    taken = {"backend": "causal", "truncation": True, "logits_cache": False, "max_length": 32, "device": "cpu"}
    taken |= {"softmax_dtype": "float32", "mixed_precision_dtype": "float32", "batch_size": "auto"}
    taken |= {"max_batch_size": 2, "trust_remote_code": False, "add_bos_token": True, "prefix_token_id": 1}
    taken |= {"think_end_token": "x", "enable_thinking": True, "chat_template_args": {"a": 1}}
    model = ValmLM(str(models / "seeing"), **taken)
    assert (model.max_length, model.truncation, model.chat_template_args["a"]) == (32, True, 1)
    parameters = {*inspect.signature(HFLM.__init__).parameters} - {"self", "pretrained", "kwargs"}
    assert {*taken, *OF_LOADING} <= parameters


def test_a_knowledge_base_of_another_clip_is_refused(models, tmp_path, tokenizer):
    kb = retriever_in(tmp_path, make_clip(tokenizer, seed=1, layers=2)).kb
    with pytest.raises(ValmError, match=r"was built with the CLIP tiny .* not with tiny"):
        ValmLM(str(models / "seeing"), kb=str(kb.path), clip=str(models / "clip"))
