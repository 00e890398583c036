import html
import json

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, basic_clean
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from tests.valm.models import tiny_config
from tests.valm.other_tokenizers import chat_like, gpt2_like, llama_like, qwen_like
from valm.clip.tokenizer import (
    batches_by_length,
    begin_id,
    beginning_with_bos,
    clip_tokenizer,
    load_tokenizer,
    open_tokenizer,
    own_tokenizer,
    prompt_ids,
    prune_tokenizer,
    tokenize_documents,
)
from valm.errors import ValmError
from valm.model.checkpoint import save_checkpoint
from valm.model.gpt2 import VaLMForCausalLM

TEXTS = [
    "The color of a sunflower is yellow.",
    "it’s “fine” ﬁsh — 12.5% don't 'tis, WE'LL",
    "  a\n\tb  c ",
    "日本語 テスト 😀👍 café naïve",
    "</w> w",
    "",
]
LETTERS = st.sampled_from(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'’“”.,;:!?-–—/() \n\téüñçøßЖя中语あ😀½€"
)
WORDS = st.sampled_from(["the", "color", "of", "sunflower's", "Don't", "unbelievable", "x1y2", "&amp;", "ﬂower"])
ANY_TEXT = st.lists(st.one_of(WORDS, st.text(LETTERS, max_size=8)), max_size=12).map(" ".join)


tokenizer = clip_tokenizer()
simple = SimpleTokenizer()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_vocabulary_has_clips_size_and_eot_is_the_largest_id():
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert tokenizer("a")["input_ids"][0] == 49406


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_open_clips(text):
    assert ids_of(tokenizer, text) == simple.encode(text)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_ids_equal_open_clips_on_any_cleaned_text(text):
    assert ids_of(tokenizer, basic_clean(text)) == simple.encode(text)
    if html.unescape(text) == text and ftfy.fix_encoding(text) == text:
        assert ids_of(tokenizer, text) == simple.encode(text)


def test_pruned_tokenizer_cuts_its_texts_as_before_and_others_still():
    pruned = prune_tokenizer(tokenizer, TEXTS)
    assert len(pruned) < 800
    assert pruned.eos_token_id == len(pruned) - 1
    for text in TEXTS:
        assert pruned.tokenize(text) == tokenizer.tokenize(text)
    other = "zebra ÿ 龘"
    assert pruned.decode(ids_of(pruned, other)) == tokenizer.decode(ids_of(tokenizer, other))


def test_pruning_by_nothing_leaves_the_bytes():
    assert len(prune_tokenizer(tokenizer, [])) == 514


@pytest.mark.parametrize("pruned", [False, True])
def test_saved_folder_opens_with_auto_tokenizer(pruned, tmp_path):
    original = prune_tokenizer(tokenizer, TEXTS) if pruned else tokenizer
    original.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert opened(text)["input_ids"] == original(text)["input_ids"]
    sot, eot = "<|startoftext|>", "<|endoftext|>"
    assert (opened.bos_token, opened.eos_token, opened.pad_token) == (sot, eot, eot)
    assert opened.padding_side == "left"


def test_documents_begin_with_sot_and_end_with_eot():
    tokenizer = prune_tokenizer(clip_tokenizer(), ["red blue sea"])
    sot, eot = tokenizer.bos_token_id, tokenizer.eos_token_id
    red, blue, sea = tokenizer("red blue sea", add_special_tokens=False)["input_ids"]
    documents = tokenize_documents(["red blue red", " ", "sea"], tokenizer)
    assert documents == [[sot, red, blue, red, eot], [], [sot, sea, eot]]
    assert tokenize_documents([], tokenizer) == []


@pytest.mark.parametrize("make", [gpt2_like, llama_like])
def test_tokenizers_of_others_begin_texts_as_ours(make, tmp_path):
    original = make()
    original.pad_token = None
    if make is gpt2_like:
        original.bos_token = None
    original.save_pretrained(tmp_path)
    for _ in range(2):  # also of what we saved ourselves
        loaded = load_tokenizer(tmp_path)
        assert loaded.bos_token == ("<|endoftext|>" if make is gpt2_like else "<s>")
        assert loaded.pad_token == loaded.eos_token
        plain = original("the sky is blue", add_special_tokens=False)["input_ids"]
        assert loaded("the sky is blue")["input_ids"] == [loaded.bos_token_id, *plain]
        assert loaded(["a", "the sky is blue"], padding=True)["attention_mask"][0][0] == 0
        assert loaded.decode(plain) == "the sky is blue"
        loaded.save_pretrained(tmp_path)


@pytest.mark.parametrize("make", [gpt2_like, llama_like, qwen_like, chat_like])
def test_a_tokenizer_of_its_own_model_stays_as_it_is(make, tmp_path):
    original = make()
    original.save_pretrained(tmp_path)
    own = own_tokenizer(tmp_path)
    own.save_pretrained(tmp_path / "again")
    for loaded in (own, own_tokenizer(tmp_path / "again")):
        assert loaded("the sky")["input_ids"] == original("the sky")["input_ids"]
        assert loaded.special_tokens_map == original.special_tokens_map
        assert loaded.chat_template == original.chat_template
    beginning = beginning_with_bos(own)
    assert beginning.chat_template == original.chat_template and own("the sky") == original("the sky")
    begin = begin_id(original)
    plain = original("the sky", add_special_tokens=False)["input_ids"]
    # as a document, as a prompt, and as `load_tokenizer` sets it up
    expected = [begin, *plain]
    assert tokenize_documents(["the sky"], own) == [[*expected, own.eos_token_id]]
    for made in (own, beginning, load_tokenizer(tmp_path)):
        assert prompt_ids(made, "the sky") == expected
        assert prompt_ids(made, original.decode(begin) + "the sky") == expected
    assert beginning("the sky")["input_ids"] == load_tokenizer(tmp_path)("the sky")["input_ids"] == expected


def test_a_prompt_of_a_chat_template_begins_once():
    tokenizer = chat_like()
    chat = [{"role": "user", "content": "the sky"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = prompt_ids(tokenizer, text)
    assert ids == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_tokenizers_that_will_not_do(tmp_path):
    with pytest.raises(ValmError, match=r"the tokenizer .* cannot be read"):
        load_tokenizer(tmp_path)
    endless = gpt2_like()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(ValmError, match="names no eos token, which ends a document"):
        load_tokenizer(tmp_path)
    odd = gpt2_like()
    odd.add_special_tokens({"bos_token": "hf-hub:a/b"})
    odd.save_pretrained(tmp_path)
    with pytest.raises(ValmError, match=r"the bos token 'hf-hub:a/b' of the tokenizer .* cannot be read"):
        load_tokenizer(tmp_path)


def test_a_continuation_begins_with_a_blank(tmp_path):
    """So that a pipeline, which puts it behind the prompt, does not join two words."""
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for made in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(tmp_path)):
        ids = made("the color is")["input_ids"]
        answer = made("yellow .", add_special_tokens=False)["input_ids"]
        assert made.decode([*ids, *answer], skip_special_tokens=True) == "the color is yellow ."
        assert made.decode(answer) == " yellow ." and made.decode(answer[0]) == " yellow"
        assert made.decode([]) == "" and made.decode(tokenizer.eos_token_id, skip_special_tokens=True) == ""
    gpt2_like().save_pretrained(tmp_path / "gpt2")
    assert type(open_tokenizer(tmp_path / "gpt2")) is PreTrainedTokenizerFast


def test_transformers_alone_decodes_what_was_saved(tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), open_tokenizer(tmp_path)
    begin, end = plain.bos_token_id, plain.eos_token_id
    for ids in ([], [begin], [begin, end, end]):
        assert plain.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True) == ""
    assert plain.decode([begin, begin]) == ours.decode([begin, begin]) == "<|startoftext|><|startoftext|>"
    for text in TEXTS:
        ids = plain(text)["input_ids"]
        assert plain.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
        assert plain.decode(ids[1:]) == ours.decode(ids[1:]).removeprefix(" ")


def test_a_pipeline_puts_a_blank_between_prompt_and_answer(tmp_path):
    tokenizer = prune_tokenizer(clip_tokenizer(), ["the color is yellow"])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = tiny_config(vocab_size=len(tokenizer), num_images=0, **ids)
    save_checkpoint(VaLMForCausalLM(config), tokenizer, tmp_path)
    pipe = pipeline("text-generation", str(tmp_path))
    yellow = tokenizer("yellow", add_special_tokens=False)["input_ids"][0]
    other = [[id] for id in range(len(tokenizer)) if id != yellow]
    # eos stays allowed among bad words, unless there must be a token
    (found,) = pipe("The color is", min_new_tokens=1, max_new_tokens=1, do_sample=False, bad_words_ids=other)
    assert found["generated_text"] == "The color is yellow"


def test_batches_have_documents_of_similar_length():
    assert batches_by_length([3, 9, 3, 2, 4], 8) == [[1], [4, 0], [2, 3]]
    assert batches_by_length([], 8) == []


def test_a_folder_of_valm_pictures_has_its_models_tokenizer(tmp_path):
    gpt2_like().save_pretrained(tmp_path / "model")
    about = {"format": "valm pictures", "version": 1, "parts": {"model": "model"}, "settings": {}}
    (tmp_path / "pictures.json").write_text(json.dumps(about))
    (tmp_path / "stages.json").write_text(json.dumps({"model": 1.5}))
    assert own_tokenizer(tmp_path).get_vocab() == gpt2_like().get_vocab()
    (tmp_path / "stages.json").unlink()
    with pytest.raises(ValmError, match="no finished model: run its `valm pictures` command again"):
        own_tokenizer(tmp_path)
