"""Scores of each kind of model, against its own forward pass."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    VisualBertConfig,
    VisualBertForPreTraining,
)

import valm
from tests.tolerance import assert_agree
from tests.valm.models import model_of
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.three_images import retriever_in
from valm.errors import ValmError
from valm.evaluation.questions import FAIR, PUBLISHED, Documents, Questions
from valm.evaluation.scorers import (
    CausalScorer,
    ClipScorer,
    MaskedScorer,
    NotApplicable,
    model_fingerprint,
    open_scorer,
)
from valm.evaluation.settings import Settings
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever

WORDS = ["the", "color", "of", "banana", "is", "yellow", "red", "##dish", ".", "a", "sky", "blue"]


def questions(protocol=FAIR, candidates=("yellow", "reddish", "blue")) -> Questions:
    texts = (("the color of the banana is", "a banana is"), ("the color of the sky is", "a sky is"))
    right = ((0, 0), (2, 2))
    return Questions("memory_color", protocol, ("banana", "sky"), ("", ""), texts, candidates, right)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, clip):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = gpt2_like()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, **ids)
    GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    bert = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    sizes = {"vocab_size": len(bert), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 40}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(root / "bert")
    bert.save_pretrained(root / "bert")
    visual = VisualBertConfig(**sizes, visual_embedding_dim=8)
    VisualBertForPreTraining(visual).save_pretrained(root / "visualbert")
    bert.save_pretrained(root / "visualbert")
    clip.save(root / "clip")
    return root


def test_each_folder_is_opened_as_what_it_is(folders):
    kinds = {name: open_scorer(str(folders / name), Settings()) for name in ("gpt2", "bert", "clip")}
    assert isinstance(kinds["gpt2"], CausalScorer) and kinds["gpt2"].kind == "causal language model (GPT2LMHeadModel)"
    assert isinstance(kinds["bert"], MaskedScorer) and isinstance(kinds["clip"], ClipScorer)
    prints = {scorer.fingerprint for scorer in kinds.values()}
    assert len(prints) == 3 and open_scorer(str(folders / "bert"), Settings()).fingerprint in prints
    assert not any(scorer.sees_images for scorer in kinds.values())


@pytest.mark.parametrize("name, output", [("bert", "logits"), ("visualbert", "prediction_logits")])
def test_a_masked_model_has_one_mask_for_each_token_of_an_answer(folders, name, output):
    scorer = open_scorer(str(folders / name), Settings())
    asked = questions()
    scores, alone = scorer.answers(asked, None)
    tokenizer, model = scorer.tokenizer, scorer.model
    for prompt, found in ((asked.texts[1][0], scores[1, 0]), ("", alone)):
        for number, answer in enumerate(asked.candidates):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert len(ids) == (2 if answer == "reddish" else 1)
            text = " ".join([prompt, *["[MASK]"] * len(ids), "."])
            read = tokenizer(text, return_tensors="pt")["input_ids"]
            log_probs = model(read)[output][0].log_softmax(-1)
            masks = (read[0] == tokenizer.mask_token_id).nonzero()[:, 0]
            expected = sum(log_probs[at, id] for at, id in zip(masks, ids, strict=True))
            assert_agree(found[number], expected)
    with pytest.raises(NotApplicable, match="no probability of a text"):
        scorer.documents(Documents("lambada", FAIR, ("a b",), True), None)


def test_clip_scores_are_similarities_on_its_own_scale(folders):
    scorer = open_scorer(str(folders / "clip"), Settings())
    asked = questions()
    scores, alone = scorer.answers(asked, None)
    clip = scorer.clip
    similarity = clip.encode_texts([asked.texts[1][0]]) @ clip.encode_texts(list(asked.candidates)).T
    expected = (similarity[0] * clip.model.logit_scale.exp()).log_softmax(-1)
    torch.testing.assert_close(scores[1, 0], expected)
    assert alone is None


def test_a_causal_model_scores_answers_alone_and_documents(folders):
    scorer = open_scorer(str(folders / "gpt2"), Settings())
    _, alone = scorer.answers(questions(), None)
    tokenizer, model = scorer.tokenizer, scorer.model
    read = [tokenizer.bos_token_id, *tokenizer(" yellow")["input_ids"]]
    log_probs = model(torch.tensor([read])).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(-1, torch.tensor(read[1:])[:, None]).sum()
    assert_agree(alone[0], expected)
    text = "The banana is yellow"
    fair = scorer.documents(Documents("lambada", FAIR, (text,), True), None)
    published = scorer.documents(Documents("lambada", PUBLISHED, (text,), True), None)
    assert published["tokens"] == fair["tokens"] + 1  # the eos behind it
    assert (fair["words"], fair["bytes"]) == (4, len(text))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    last = model(ids[:, :-1]).logits[0, -1].log_softmax(-1)
    assert_agree(published["word_nats"], -last[ids[0, -1]].item())


def test_an_augmented_decoder_without_images_scores_as_the_original(folders, tmp_path, clip):
    kb = retriever_in(tmp_path, clip).kb
    original = open_scorer(str(folders / "gpt2"), Settings())
    base = GPT2LMHeadModel.from_pretrained(folders / "gpt2")
    augmented = valm.augment(base, kb.dim, 2, logit_bias=2.0)
    augmented.set_retriever(Retriever(ContextEncoder(kb.load_clip(), tokenizer=original.tokenizer), kb, 2))
    valm.save_adapter(augmented, tmp_path / "adapter")
    scorer = open_scorer(str(tmp_path / "adapter"), Settings())
    assert scorer.sees_images and scorer.kind == "GPT2LMHeadModel, 2 images a token"
    asked = questions()
    own = scorer.fingerprint
    seen, _ = scorer.answers(asked, None)
    scorer.switch("off", None)
    without, _ = scorer.answers(asked, None)
    expected, _ = original.answers(asked, None)
    assert_agree(without, expected)
    assert not torch.allclose(seen, expected, rtol=1e-3)
    scorer.switch("on", None)
    torch.testing.assert_close(scorer.answers(asked, None)[0], seen)
    assert scorer.fingerprint == own
    build(FolderSource(tmp_path / "images", shard_size=2), tmp_path / "other", kb.load_clip(), progress=False)
    other = open_scorer(str(tmp_path / "adapter"), Settings(kb=tmp_path / "other"))
    assert other.fingerprint != own
    double = CausalScorer(*valm.load(tmp_path / "adapter", query_dtype=torch.float64), scorer.kind)
    assert double.fingerprint != own
    assert double.query_dtype == torch.float64 != scorer.query_dtype and original.query_dtype is None
    shorter = ContextEncoder(kb.load_clip(), tokenizer=original.tokenizer, overlap=0, min_tokens=3)
    augmented.set_retriever(Retriever(shorter, kb, 2))
    valm.save_adapter(augmented, tmp_path / "shorter")
    assert open_scorer(str(tmp_path / "shorter"), Settings()).fingerprint != own
    # `valm eval MODEL TWIN --kb KB` is how a model whose knowledge base was moved is compared
    valm.save_checkpoint(model_of(original.tokenizer, num_images=0), original.tokenizer, tmp_path / "twin")
    with pytest.warns(UserWarning, match=r"twin sees no images, so it ignores the knowledge base \(--kb\)"):
        assert not open_scorer(str(tmp_path / "twin"), Settings(kb=tmp_path / "other")).sees_images


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_published_protocol_needs_single_tokens(folders, name):
    scorer = open_scorer(str(folders / name), Settings())
    with pytest.raises(NotApplicable, match="tokens for this tokenizer"):
        scorer.answers(questions(PUBLISHED), None)
    if name == "bert":
        scorer.answers(questions(PUBLISHED, ("yellow", "red", "blue")), None)


def test_a_long_prompt_loses_its_beginning(folders):
    """RoBERTa has fewer positions than its config says, and CLIP cuts the end of other texts."""
    torch.manual_seed(0)
    bert = open_scorer(str(folders / "bert"), Settings())
    sizes = {name: getattr(bert.model.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 0}
    roberta = MaskedScorer(RobertaForMaskedLM(RobertaConfig(**sizes, **layers)), bert.tokenizer)
    for scorer in (bert, roberta, open_scorer(str(folders / "clip"), Settings())):
        found = []
        for begin in ("a red sky " * 90, "blue " + "a red sky " * 90):
            texts = tuple(tuple(begin + text for text in row) for row in questions().texts)
            found.append(scorer.answers(dataclasses.replace(questions(), texts=texts), None)[0])
        assert torch.equal(*found) and found[0].isfinite().all()
        assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_context_without_room_for_a_prompt_is_named(folders, name):
    """A slice from -0 would be the whole prompt."""
    scorer = open_scorer(str(folders / name), Settings())
    sizes = {"gpt2": ("n_positions", 1), "bert": ("max_position_embeddings", 5)}  # [CLS] [MASK] [MASK] . [SEP]
    setattr(scorer.model.config, *sizes[name])
    with pytest.raises(ValmError, match=r"the model reads . tokens, too few for the longest answer and a prompt"):
        scorer.answers(questions())


@pytest.mark.parametrize("name", ["gpt2", "bert", "clip"])
def test_each_item_is_asked_with_its_own_choices(folders, name):
    scorer = open_scorer(str(folders / name), Settings())
    choices = (("yellow", "blue"), ("red", "blue", "yellow"))
    differing = dataclasses.replace(questions(), candidates=(), choices=choices)
    scores, alone = scorer.answers(differing)
    assert scores.shape == (2, 2, 3) and alone is None
    assert scores[0, :, 2].isneginf().all()
    for item, candidates in enumerate(choices):
        expected, _ = scorer.answers(questions(candidates=candidates))
        assert_agree(scores[item, :, : len(candidates)], expected[item])


def test_a_model_without_a_head_is_refused(folders, tmp_path):
    """transformers would give it random weights, and take a BERT for a causal model."""
    bert, gpt2 = (open_scorer(str(folders / name), Settings()) for name in ("bert", "gpt2"))
    bert.model.bert.save_pretrained(tmp_path / "bert")
    GPT2Model(gpt2.model.config).save_pretrained(tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    del weights["h.0.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "gpt2" / "model.safetensors", {"format": "pt"})
    for name, scorer in (("bert", bert), ("gpt2", gpt2)):
        scorer.tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValmError, match=r"contains no weights for .*: it is incomplete or no language model"):
            open_scorer(str(tmp_path / name), Settings())


def test_the_logits_are_the_last_whatever_a_class_returns(folders):
    scorer = open_scorer(str(folders / "gpt2"), Settings())
    expected, _ = scorer.answers(questions(), None)
    own = scorer.model.forward
    scorer.model.forward = lambda *args, logits_to_keep=0, **kwargs: own(*args, **kwargs)
    found, _ = scorer.answers(questions(), None)
    torch.testing.assert_close(found, expected)


def test_the_role_of_a_token_is_part_of_what_scores_depend_on(folders):
    scorer = open_scorer(str(folders / "gpt2"), Settings())
    before = scorer.fingerprint
    scorer.tokenizer.bos_token = scorer.tokenizer.convert_ids_to_tokens(7)
    assert scorer.fingerprint != before


def test_an_answer_that_the_tokenizer_cannot_write_is_named(folders):
    scorer = open_scorer(str(folders / "bert"), Settings())
    with pytest.raises(NotApplicable, match=r"cannot write the answer 'zebra': it becomes \[UNK\]"):
        scorer.answers(questions(candidates=("yellow", "zebra")), None)


def test_what_cannot_be_opened_is_named(folders, tmp_path):
    with pytest.raises(ValmError, match="there is no model folder"):
        open_scorer(str(tmp_path / "none"), Settings())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ValmError, match=r"the language model .* cannot be read"):
        open_scorer(str(tmp_path), Settings())
    bert = open_scorer(str(folders / "bert"), Settings())
    with pytest.raises(ValmError, match="names no mask token"):
        MaskedScorer(bert.model, gpt2_like())


def test_the_same_bytes_under_another_name_or_in_another_shape_are_another_model():
    def printed(**weights):
        model = SimpleNamespace(config=GPT2Config(), state_dict=lambda: weights)
        return model_fingerprint(model, gpt2_like())

    values = torch.arange(6.0)
    others = [{"b": values}, {"a": values.view(2, 3)}, {"a": values.view(torch.int32)}]
    prints = {printed(a=values), *(printed(**other) for other in others)}
    assert len(prints) == 4 and printed(a=values.clone()) in prints
