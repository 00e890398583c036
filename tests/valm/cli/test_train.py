import itertools
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.tolerance import assert_agree
from tests.valm.cli.commands import SIZE, STEPS, evaluations, run, wrong_inputs
from tests.valm.other_tokenizers import gpt2_like
from valm.corpus.plan import RetrievalPlan
from valm.corpus.retrieved import CorpusRetrieval
from valm.corpus.run import run_retrieval
from valm.corpus.texts import TextCorpus
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.checkpoint import load, load_decoder
from valm.retrieval.retriever import BlindRetriever
from valm.training import trainer, training_arguments
from valm.training.collate import Collator


def test_images_only_from_a_score_on(world, base, tmp_path, capsys, error_of):
    """The same number beside a corpus and beside what was retrieved of it, in the model and in its twins' data."""
    questions = tmp_path / "questions.txt"
    questions.write_text("the color of the apple is\nthe color of the sea is")
    auto = ["--min-score", "auto"]
    train = ["train", "--kb", world / "kb", "--base", base, *STEPS]
    assert run(*train, world / "corpus.txt", "--out", tmp_path / "live", *auto, "--questions", questions) == 0
    printed = float(re.search(r"min_score (\S+): below it", capsys.readouterr().err)[1])
    retrieve = ["retrieve", "--kb", world / "kb", "--tokenizer", base]
    assert run(*retrieve, world / "corpus.txt", "--out", tmp_path / "retrieval") == 0
    train += ["--retrieval", tmp_path / "retrieval"]
    assert run(*train, "--out", tmp_path / "stored", *auto, "--questions", questions) == 0
    scores = [load(tmp_path / name)[0].fusion_options.min_score for name in ("live", "stored")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and scores[0] == pytest.approx(printed, abs=1e-4)
    expected, found = (load(tmp_path / name)[0].state_dict() for name in ("live", "stored"))
    for name in expected:
        assert_agree(found[name], expected[name])
    for twin in ("random", "shuffled", "blind"):
        assert run(*train, "--out", tmp_path / twin, "--twin", twin, *auto) == 0
    kept = {twin: load(tmp_path / twin)[0].fusion_options.min_score for twin in ("random", "shuffled", "blind")}
    captions = kept["random"]
    assert captions is not None and captions != scores[0]
    assert kept == {"random": captions, "shuffled": captions, "blind": captions}
    blind, _ = load(tmp_path / "blind")
    assert blind.fusion_options.blind and isinstance(blind.retriever, BlindRetriever)
    assert blind.retriever.kb is not None and blind.retriever.kb.path == world / "kb"
    other = error_of(*train, "--out", tmp_path / "stored", "--min-score", "0.9", "--resume")
    assert "its --min-score is" in other
    early = ["train", "--kb", world / "kb", "--base", base, world / "corpus.txt", "--out", tmp_path / "early"]
    missing = error_of(*early, *auto, "--questions", tmp_path / "none")
    assert f"--questions: there is no {tmp_path / 'none'}" in missing
    assert not list(tmp_path.glob("early*retrieval"))


def without_scores(world, out, **options):
    corpus = TextCorpus([world / "corpus.txt"])
    run_retrieval(RetrievalPlan(corpus=corpus, kb=world / "kb", images=2, scores=False, out=out, **options))


def test_a_base_has_a_threshold_by_default(world, base, tmp_path, capsys, monkeypatch):
    """Unless the knowledge base has few captions and no questions are given, or the retrieval no scores; -1 is none."""
    without_scores(world, tmp_path / "bare", tokenizer=str(base))
    questions = tmp_path / "questions.txt"
    questions.write_text("the color of the apple is")

    def threshold(name, *options, retrieval=world / "base-retrieval", of=("--base", base, *STEPS)):
        train = ["train", "--retrieval", retrieval, "--kb", world / "kb", *of, *options]
        assert run(*train, "--out", tmp_path / name) == 0
        return load(tmp_path / name)[0].fusion_options.min_score, capsys.readouterr().err

    few, said = threshold("few")
    assert few is None and "kb has fewer than 20 captions, and there is no --questions file, so there is no sc" in said
    own, _ = threshold("questions", "--questions", questions)
    assert own is not None
    monkeypatch.setattr("valm.training.run.FEWEST", 2)
    bare, said = threshold("no-scores", retrieval=tmp_path / "bare")
    assert bare is None and "bare contains no scores, so there is no score threshold: every token" in said
    auto, _ = threshold("auto", "--min-score", "auto")
    assert auto not in (None, own)
    assert threshold("blind", "--twin", "blind")[0] == auto
    found = [
        threshold("plain"),
        threshold("off", "--min-score", -1),
        threshold("new", of=SIZE, retrieval=world / "retrieval"),
    ]
    assert [number for number, _ in found] == [auto, None, None]
    assert not any("so there is no score threshold" in said for _, said in found)


def test_a_pretrained_decoder_stays_as_it_is(world, base, tmp_path, error_of):
    """And so does that of a control. Both read one file of the inputs of their fusion layer."""
    options = ["--retrieval", world / "base-retrieval", "--kb", world / "kb", *STEPS]
    options += ["--logit-bias", "-1", "--lr", "1e-2", "--cache-below", tmp_path / "below", "--save_steps", 1]
    train = ["train", "--base", base, *options]
    assert run(*train, "--out", tmp_path / "model") == 0
    assert run(*train, "--out", tmp_path / "random", "--twin", "random") == 0
    assert len(list((tmp_path / "below").iterdir())) == 1
    before = load_file(base / "model.safetensors")
    for folder in (tmp_path / "model", tmp_path / "model" / "checkpoint-3"):
        assert (folder / "image_fusion.safetensors").is_file() and not list(folder.glob("model*"))
    models = [load(tmp_path / name) for name in ("model", "random")]
    after = [model.state_dict() for model, _ in models]
    added = {"proj.weight", "norm.weight", "norm.bias", "k_bias", "v_bias", "logit_bias_delta"}
    for weights in after:
        assert all(torch.equal(weights[name], weight) for name, weight in before.items())
        assert {name.partition(".image_fusion.")[2] for name in set(weights) - set(before)} == added
    assert all(not torch.equal(after[0][name], after[1][name]) for name in set(after[0]) - set(before))
    model, tokenizer = models[0]
    assert model.config.fusion["layer"] == -2 and model.config.fusion["logit_bias"] == -1
    ids = tokenizer("the color of the apple is", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2
    again = ["--out", tmp_path / "model", "--resume"]
    for option, value, was in (("--lr", 0.001, 0.01), ("--context", 8, 512)):
        said = f"contains another training: its {option} is {was}, here it is {value}"
        assert said in error_of(*train, option, value, *again)
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.1
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    said = "contains the training of another base model (model.layers.1.mlp.up_proj.weight differs)"
    assert said in error_of(*train, "--base", tmp_path / "other", *again)
    assert run(*train, *again) == 0
    base.rename(tmp_path / "moved")
    moved = error_of("generate", tmp_path / "model", "the coal")
    assert "there is no folder" in moved and "put it back, allow its download (--allow-download), or note wh" in moved
    (tmp_path / "moved").rename(base)
    said = "contains the training of a pretrained decoder (--base): choose another folder"
    assert said in error_of("train", *options[:4], *SIZE, *again)


def test_a_training_on_the_tokens_of_the_text_is_evaluated_on_all(world, base, tmp_path):
    train = ["train", "--retrieval", world / "base-retrieval", "--kb", world / "kb", "--base", base, *STEPS]
    train += ["--logit-bias", "-1", "--lr", "1e-2", "--limit-softmax"]
    assert run(*train, "--validation", 0.3, "--save_steps", 1, "--out", tmp_path / "limited") == 0
    losses = [entry["eval_loss"] for entry in evaluations(tmp_path / "limited")]
    assert losses[0] > losses[-1] > 4  # of 300 tokens that are about alike; the text has 60


@pytest.mark.parametrize("twin", [None, pytest.param("blind", marks=pytest.mark.slow)])
def test_a_training_is_compared_with_its_base(world, base, tmp_path, output_of, twin):
    """On the terminal, in _run.json and on the card; and what is written has the perplexity that was said."""
    out = tmp_path / "model"
    train = ["train", "--retrieval", world / "base-retrieval", "--kb", world / "kb", "--base", base, "--out", out]
    train += [] if twin is None else ["--twin", twin]
    train += ["--steps", 4, "--batch-size", 4, "--lr", 0.03, "--lr_scheduler_type", "constant"]
    train += ["--patience", 0, "--limit-softmax", "--cache-below", tmp_path / "below", "--logit-bias", -1]
    train += ["--validation", world / "base-retrieval"]
    said = output_of(*train)
    best = min(evaluations(out), key=lambda entry: entry["eval_loss"])
    of_base = json.loads((out / "_run.json").read_text())["numbers"]["eval_perplexity_base"]
    step = f"at step {best['step']}, which is the model"
    assert f"held-out perplexity {best['eval_perplexity']:.2f} of the best checkpoint, {step}\n" in said
    assert f"held-out perplexity {of_base:.2f} of the base, which is the model without images\n" in said
    worse = best["eval_perplexity"] > of_base
    assert ("the base predicts the validation text better than this model" in said) == worse
    for name, value in (("eval_perplexity", best["eval_perplexity"]), ("eval_perplexity_base", of_base)):
        assert f"| {name} | {value:.4g} |" in (out / "README.md").read_text()
    model, tokenizer = load(out)
    corpus, kb = CorpusRetrieval.open(world / "base-retrieval"), ImageKnowledgeBase.open(world / "kb")
    options = {"arguments": training_arguments(tmp_path / "check", use_cpu=True, report_to="none")}
    options |= {"tokenizer": tokenizer, "eval_dataset": corpus}
    check = trainer(model, corpus, kb if twin is None else None, **options)
    assert_agree(check.evaluate()["eval_perplexity"], best["eval_perplexity"])
    plain = trainer(load_decoder(base), corpus, **options)
    assert_agree(plain.evaluate()["eval_perplexity"], of_base)
    assert abs(of_base / best["eval_perplexity"] - 1) > 1e-3


@pytest.mark.parametrize("source", ["retrieval", "images"])
def test_the_tokenizer_of_the_base_is_saved(world, base, tmp_path, source, monkeypatch):
    """Its own, so a chat prompt begins with one bos; and a prompt is read after bos as a document is."""
    of = {
        "retrieval": ["--retrieval", world / "base-retrieval", "--kb", world / "kb"],
        "images": [world / "corpus.txt", "--kb", world / "kb"],
    }
    assert run("train", "--base", base, *of[source], *STEPS, "--save_steps", 3, "--out", tmp_path / "it") == 0
    own = AutoTokenizer.from_pretrained(base)
    chat = own.apply_chat_template([{"role": "user", "content": "the coal"}], tokenize=False)
    for folder in (tmp_path / "it", tmp_path / "it" / "checkpoint-3"):
        model, tokenizer = load(folder)
        assert tokenizer.chat_template == own.chat_template
        assert tokenizer.special_tokens_map == own.special_tokens_map
        for text in ("the coal", chat):
            assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    begin = own.bos_token_id
    seen = []
    monkeypatch.setattr(type(model), "generate", lambda self, ids, **options: seen.append(ids.tolist()) or ids)
    assert run("generate", tmp_path / "it", "the coal") == run("generate", tmp_path / "it", chat) == 0
    assert seen == [[[begin, *own("the coal")["input_ids"]]], [own(chat)["input_ids"]]]
    assert own(chat)["input_ids"].count(begin) == 1
    found, _ = model.retriever.find([chat, "the coal"])
    assert found.shape[:2] == (2, len(own(chat)["input_ids"]))


def test_a_tokenizer_without_a_pad_token_pads_on_the_left(world, tmp_path):
    tokenizer = gpt2_like(["the color of the coal is black"], vocab_size=300)
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    tokenizer.save_pretrained(tmp_path / "own")
    retrieve = ["retrieve", world / "corpus.txt", "--kb", world / "kb", "--tokenizer", tmp_path / "own", "-k", "2"]
    assert run(*retrieve, "--out", tmp_path / "retrieval") == 0
    train = ["train", "--retrieval", tmp_path / "retrieval", "--kb", world / "kb", *SIZE, "--context", 16]
    assert run(*train, "--out", tmp_path / "model") == 0
    model, found = load(tmp_path / "model")
    assert found.pad_token == found.eos_token and model.config.pad_token_id == found.eos_token_id
    assert found(["the coal", "the"], padding=True)["attention_mask"][1][0] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--query", "state"], "its query is state, not eot"),
        (["-k", "3"], "its k is 3, not 2"),
        (["--query-dtype", "bfloat16"], "its precision is bfloat16, not float32"),
    ],
)
def test_a_validation_that_was_retrieved_otherwise_is_refused(world, base, tmp_path, error_of, option, message):
    retrieve = ["retrieve", world / "corpus.txt", "--kb", world / "kb", "--tokenizer", base, "-k", "2", *option]
    assert run(*retrieve, "--out", tmp_path / "held-out") == 0
    train = ["train", "--retrieval", world / "base-retrieval", "--kb", world / "kb", "--base", base, *STEPS]
    error = error_of(*train, "--validation", tmp_path / "held-out", "--out", tmp_path / "model")
    assert f"was not retrieved like the corpus: {message}" in error


def test_a_model_from_nothing_cannot_chat(world, base, tmp_path):
    """So its tokenizer has no chat template, also where that of the corpus has one."""
    assert CorpusRetrieval.open(world / "base-retrieval").tokenizer.chat_template is not None
    train = ["train", "--retrieval", world / "base-retrieval", "--kb", world / "kb", *SIZE, "--context", 16]
    assert run(*train, "--out", tmp_path / "model") == 0
    model, tokenizer = load(tmp_path / "model")
    assert tokenizer.chat_template is None and not model.retriever.encoder.alignment.one_document


def test_a_blind_twin_has_the_clip_and_the_precision_of_its_retrieval(world, tmp_path, error_of):
    """Where the knowledge base does not find it, `valm retrieve` was told where it is."""
    kb = ["--kb", shutil.copytree(world / "kb", tmp_path / "moved" / "kb")]
    retrieved = ["retrieve", world / "corpus.txt", *kb, "--clip", world / "clip", "--query-dtype", "bfloat16"]
    assert run(*retrieved, "--out", tmp_path / "retrieval") == 0
    train = ["train", "--retrieval", tmp_path / "retrieval", *kb, "--twin", "blind", *SIZE]
    assert run(*train, "--out", tmp_path / "blind") == 0
    assert json.loads((tmp_path / "blind" / "config.json").read_text())["retrieval"]["precision"] == "bfloat16"
    (tmp_path / "retrieval" / "_clip.json").unlink()
    for command in (train, ["train", world / "corpus.txt", *kb, *SIZE]):
        error = error_of(*command, "--out", tmp_path / "never")
        assert "which is not a folder there: give its folder or name (--clip), or allow" in error


def test_a_threshold_needs_retrieval_scores(world, tmp_path, error_of):
    without_scores(world, tmp_path / "bare")
    unscored = ["train", "--retrieval", tmp_path / "bare", "--kb", world / "kb", *SIZE, "--out", tmp_path / "unscored"]
    said = "contains no retrieval scores, which a model with a min_score needs: retrieve the corpus again"
    assert said in error_of(*unscored, "--min-score", 0.5)


def test_a_model_with_a_tokenizer_of_its_own(world, tmp_path, output_of):
    """Trained with pictures, saved and loaded, asked, and let go on: as one with CLIP's."""
    corpus, kb = world / "corpus.txt", ["--kb", world / "kb"]
    size = [*SIZE, "--context", "64"]  # of this tokenizer prompts have more tokens
    other = ["--tokenizer", tmp_path / "tokenizer"]
    gpt2_like(["the color of the coal is black"], vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    assert run("retrieve", corpus, *kb, *other, "--out", tmp_path / "retrieval", "-k", "2") == 0
    retrieval = ["--retrieval", tmp_path / "retrieval"]
    assert run("train", *retrieval, *kb, "--out", tmp_path / "valm", *size) == 0
    model, tokenizer = load(tmp_path / "valm")
    assert model.retriever.encoder.alignment is not None
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("the color of the apple is", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    cached, again = (model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)
    said = output_of("generate", tmp_path / "valm", "the color of the apple", "--max-new-tokens", 4)
    assert said.startswith("the color of the apple")
    asked = ["--tasks", "memory_color", "--data", world / "sets", "--limit", 1]
    assert "accuracy" in output_of("eval", tmp_path / "valm", *asked)
    # and the baseline without pictures
    assert run("train", corpus, *other, "--out", tmp_path / "gpt2", *size) == 0


def test_training_on_a_retrieval_is_training_on_its_corpus(world, tmp_path, output_of):
    retrieve = ["retrieve", world / "corpus.txt", "--kb", world / "kb"]
    assert run(*retrieve, "--out", tmp_path / "four") == 0
    train, out = ["train", "--kb", world / "kb", *SIZE], tmp_path / "model"
    assert run(*train, "--retrieval", tmp_path / "four", "--out", tmp_path / "retrieved") == 0
    assert run(*train, world / "corpus.txt", "--out", out) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (tmp_path / "retrieved" / name).read_bytes()
    # publishing the model does not publish the corpus, which is beside it
    assert {path.name for path in out.iterdir()} == {
        *("checkpoint-3", "config.json", "generation_config.json", "model.safetensors", "_retrieval.json", "_run.json"),
        *("README.md", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (tmp_path / "model-retrieval" / "manifest.json").is_file()
    shutil.rmtree(out)
    assert run("train", "--retrieval", world / "retrieval", "--out", out, *SIZE) == 0
    assert (out / "model.safetensors").read_bytes() == (world / "gpt2" / "model.safetensors").read_bytes()
    # killed, and run again
    assert "6 documents" in output_of(*retrieve, "--out", world / "retrieval", "-k", "2")


def test_twins_see_the_same_tokens_with_other_images(world, tmp_path, monkeypatch):
    seen = {}

    def recorded(self, documents):
        seen[twin].append([list(map(int, document["input_ids"])) for document in documents])
        return collate(self, documents)

    collate = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", recorded)
    retrieval = ["train", "--retrieval", world / "retrieval", "--kb", world / "kb", *SIZE]
    for twin in (None, "text", "random", "blind", "shuffled"):
        seen[twin] = []
        assert run(*retrieval, *(["--twin", twin] if twin else []), "--out", tmp_path / str(twin)) == 0
    assert len(seen[None]) >= 3 and all(batches == seen[None] for batches in seen.values())
    weights = {twin: load_file(tmp_path / str(twin) / "model.safetensors") for twin in seen}
    # the text twin is GPT-2*, of which a model with images has every weight besides its own
    expected = load_file(world / "gpt2" / "model.safetensors")
    assert all(torch.equal(weights["text"][name], weight) for name, weight in expected.items())
    assert set(weights["text"]) < set(weights["random"]) == set(weights["blind"]) == set(weights[None])
    for one, other in itertools.combinations(weights.values(), 2):
        assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])
    blind, tokenizer = load(tmp_path / "blind")
    assert blind.fusion_options.blind and isinstance(blind.retriever, BlindRetriever)
    ids = tokenizer("the color of the apple is", return_tensors="pt")["input_ids"]
    assert blind.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2
    # a run goes on as the twin that it was only
    assert run(*retrieval, "--twin", "shuffled", "--out", tmp_path / "random", "--resume") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "training a model with text only: "),
        (["--kb", "{world}/kb"], "training a model with 2 images a token of {world}/kb: "),
        (["--kb", "{world}/kb", "--twin", "text"], "training the text control with text only: "),
        (
            ["--kb", "{world}/kb", "--twin", "blind"],
            "training the blind control with its query as the image of a token: ",
        ),
    ],
)
def test_a_line_says_what_is_trained_before_it_is(world, tmp_path, capsys, options, said):
    """So a --kb that was forgotten is seen."""
    given = [option.format(world=world) for option in options]
    assert run("train", "--retrieval", world / "retrieval", *given, *SIZE, "--out", tmp_path / "model") == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("training "))
    assert line.startswith(said.format(world=world)) and line.endswith(" parameters; 6 documents, 4 a step")


def test_a_config_file_says_what_the_command_line_does(world, tmp_path):
    """With a field whose number YAML takes for text, and one that the command line overrides."""
    lines = [f"corpus: {world}/corpus.txt", f"tokenizer: {world}/clip", "model: 3x32x4", "context: 32"]
    lines += ["steps: 9", "batch-size: 4", "learning_rate: 5e-4", "save_strategy: 'no'", "report_to: [none]"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert run("train", "--config", tmp_path / "run.yaml", "--steps", 3, "--out", tmp_path / "model") == 0
    written, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", world / "gpt2"))
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())
    assert not list((tmp_path / "model").glob("checkpoint-*"))


def test_a_text_of_its_own_is_measured_as_it_goes_and_the_best_checkpoint_becomes_the_model(world, tmp_path, output_of):
    train = ["train", world / "corpus.txt", "--kb", world / "kb", *SIZE, "--out", tmp_path / "model"]
    printed = output_of(*train, "--validation", world / "corpus.txt", "--save_steps", 1)
    found = evaluations(tmp_path / "model")
    assert [entry["step"] for entry in found] == [1, 2, 3]
    assert all(entry["eval_perplexity"] > 1 for entry in found)
    best = min(found, key=lambda entry: entry["eval_loss"])["step"]
    perplexity = f"held-out perplexity {found[best - 1]['eval_perplexity']:.2f} of the best checkpoint, at step {best}"
    assert f"{perplexity}, which is the model\n" in printed
    out = tmp_path / "model"
    written, saved = (load_file(path / "model.safetensors") for path in (out, out / f"checkpoint-{best}"))
    assert all(torch.equal(written[name], saved[name]) for name in written)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model-retrieval", "model-validation-retrieval"}
    model, _ = load(tmp_path / "model")
    assert model.retriever is not None


OUT = " ".join(["--out {tmp}/model", *SIZE])
TRAIN, CACHED = "train {world}/corpus.txt " + OUT, "train --retrieval {world}/retrieval " + OUT
OF_BASE = " ".join(["--out {tmp}/model --base {world}/base", *STEPS])
WITH_KB = "train --retrieval {world}/base-retrieval --kb {world}/kb " + OF_BASE


@wrong_inputs(
    {
        WITH_KB + " --base {tmp}/none": "cannot be read: there is no folder {tmp}/none",
        WITH_KB + " --twin text": "the base itself is the text-only baseline: give --kb, and leave --twin text out",
        "train {world}/corpus.txt " + OF_BASE: "--base trains only what sees images, so without images nothing trains",
        WITH_KB + " --layer 3": "layer must be one of the 3 layers of LlamaForCausalLM, got 3",
        "train --retrieval {world}/retrieval --kb {world}/kb " + OF_BASE: "tokenizer",
        "train {tmp}/empty.txt " + OUT: "no documents",
        "train {world}/pictures/sea.png --out {tmp}/model": "sea.png, row 1: 'utf-8' codec can't decode",
        CACHED + " --streaming": "--streaming needs a Hugging Face dataset",
        CACHED + " --tokenizer {world}/clip": "give --tokenizer to `valm retrieve`",
        CACHED + " --validation {world}/corpus.txt": "retrieve --valid",
        CACHED + " --retrieval {world}/kb": "is not the manifest of a corpus retrieval",
        TRAIN + " --min-score 1": "--min-score is for a model with images: give --kb too",
        TRAIN + " --seed -1": "--seed is -1, expected at least",
        TRAIN + " --tokenizer {world}/pictures": "cannot be read",
        TRAIN + " --lerning_rate 1": "no option --lerning_rate, did you mean --learning_rate?",
        TRAIN + " --lr_scheduler_type cosin": "invalid choice: 'cosin'",
        TRAIN + " --config {tmp}/none.yaml": "{tmp}/none.yaml: No such file",
        TRAIN + " --validation {tmp}/none.txt": "--validation: there is no {tmp}/none.txt",
        TRAIN + " --validation {world}/retrieval": "but the corpus is not: give a",
        TRAIN + " --validation 1.5": "above 0 and below 1, got 1.5",
        TRAIN + " --out {world}/corpus.txt": "{world}/corpus.txt",
        TRAIN + " --tokenizer {world}/clip --lr 1e30 --lr_scheduler_type constant": "the loss is nan at step 2: ",
    }
)
@pytest.mark.usefixtures("base")
def test_wrong_input_is_one_sentence(sentence, command, message):
    sentence(command, message)


def test_a_base_that_lacks_weights_is_one_sentence(sentence, base, tmp_path):
    shutil.copytree(base, tmp_path / "hole")
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "hole/model.safetensors")
    sentence(WITH_KB + " --base {tmp}/hole", "contains no weights for lm_head.weight")


def test_a_folder_of_retrievals_is_one_sentence(sentence, world, tmp_path):
    for store, copy in (("retrieval", "eot"), ("retrieval", "state"), ("kb", "kb")):
        shutil.copytree(world / store, tmp_path / "both" / copy)
    said = "{tmp}/both is not a corpus retrieval: it has no manifest.json. Make one with `valm retrieve`"
    sentence(CACHED + " --retrieval {tmp}/both", said)


def test_a_retrieval_from_another_knowledge_base_is_one_sentence(sentence, world, tmp_path):
    run("kb", "merge", world / "kb", world / "kb", "--out", tmp_path / "kb")
    sentence(CACHED + " --kb {tmp}/kb", "from another knowledge base")
