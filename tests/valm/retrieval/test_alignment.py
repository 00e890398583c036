import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.tolerance import assert_agree
from tests.valm.other_tokenizers import chat_like, gpt2_like, llama_like, qwen_like
from tests.valm.retrieval.indexed import slow
from tests.valm.retrieval.test_context import alone, check_steps, close, queries_in_a_padded_batch
from tests.valm.tiny_clip import TEXTS, make_clip
from valm.clip.tokenizer import clip_tokenizer, prompt_ids, prune_tokenizer, tokenize_documents
from valm.errors import ValmError
from valm.retrieval.alignment import BLANKS, LONGEST_WORD, Alignment, TextState, token_bytes
from valm.retrieval.context import ContextEncoder
from valm.retrieval.segments import Reading, SegmentState

# Text as it comes: words that CLIP has and has not, contractions, what its reading changes or joins with characters
# before (signs over letters, a capital that becomes two characters, ligatures), characters of several tokens, blanks.
BITS = [
    *("banana", "ban", "apples", "the", "isn't", "'r", "'re", "'", "!'s", "The", "1984", "...", "?!", '."', "-"),
    *("&amp;", "<b>", "http://x.org/a_b", "<|endoftext|", " ", " ", " ", " ", " ", "\n", "\t", "\u2019ll"),
    *("\u0130", "SIX\u00df", "caf\u00e9", "cafe\u0301", "\u0323", "b\u0301\u0323", "\u1100\u1161", "\u0958", "\ufb01"),
    *("\u4f60\u597d", "\U0001f600", "\U0001f469\u200d\U0001f680", "\u00e3\u00a4", "\u00a0", "\u3000", "\x1f"),
]
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=6)
TEXT = st.lists(st.sampled_from(BITS) | ANY, max_size=16).map("".join)
# A longer one is closed, which CLIP does not do.
SHORT_WORDS = TEXT.filter(lambda text: all(len(word) < LONGEST_WORD for word in BLANKS.split(text)))
fixed = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=[gpt2_like, slow(llama_like), chat_like])
def other(request):
    """The tokenizer of a language model."""
    return request.param()


@pytest.fixture(scope="module", params=["eot", slow("state")])
def encoder(request, clip, other):
    return ContextEncoder(clip, tokenizer=other, query=request.param, dtype=torch.float64)


def text_so_far(tokenizer, ids):
    """What is whole of it: bytes of a part of a character come out as U+FFFD, which the texts here have not."""
    for length in range(len(ids), -1, -1):
        text = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text


def left_padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@fixed
@given(text=SHORT_WORDS)
@example(text="the colour of the banana")
@example(text="\U0001f600 \U0001f469\u200d\U0001f680 don\u2019t")
@example(text="we'r we're a\u0301b\u0323\u0301")
def test_a_query_is_that_of_the_text_so_far(encoder, other, text):
    """As CLIP would cut it if it ended there, read from the start."""
    ids = other(text, add_special_tokens=False)["input_ids"]
    if not ids:
        return
    found = alone(encoder, ids)
    own = ContextEncoder(encoder.clip, query=encoder.query, dtype=torch.float64)
    assert not found[0].any()
    cut = [encoder.clip.tokenizer(text_so_far(other, ids[: n + 1]))["input_ids"] for n in range(len(ids))]
    known = [n for n in range(1, len(ids)) if len(cut[n]) > 1]  # of a text that is still empty it has no query
    if known:
        rows, mask = left_padded([cut[n] for n in known])
        assert close(found[known], own(rows, mask)[:, -1])
    around = alone(encoder, [other.bos_token_id, *ids, other.eos_token_id])
    assert close(around[2:-1], found[1:])
    assert not around[0].any() and around[1].any()
    if other.bos_token_id == other.eos_token_id:
        assert not around[-1].any()  # it begins the next
    else:
        tokens = encoder.clip.tokenizer(text)["input_ids"]
        if other.chat_template is None:
            tokens = [*tokens, encoder.clip.tokenizer.eos_token_id]
        if len(tokens) > 1:
            assert close(around[-1], alone(own, tokens)[-1])


# Tokens drawn at random are mostly no text: characters that are never whole, words cut anywhere.
IDS = st.integers(0, 10**6)
ROWS = st.lists(st.lists(IDS, min_size=1, max_size=40) | TEXT, min_size=1, max_size=4)


def to_ids(other, row):
    """Of a drawn text or of drawn numbers, a special token among them now and then."""
    if isinstance(row, str):
        return other(row)["input_ids"] or [other.bos_token_id]
    return [
        [other.bos_token_id, other.eos_token_id][number // 9 % 2] if number % 9 == 0 else number % len(other)
        for number in row
    ]


@fixed
@given(rows=ROWS, data=st.data())
def test_a_query_is_the_same_in_a_padded_batch_and_as_a_prefix(encoder, other, rows, data):
    rows = [to_ids(other, row) for row in rows]
    for row, found in zip(rows, queries_in_a_padded_batch(encoder, rows, [5], data), strict=True):
        prefix = data.draw(st.integers(1, len(row)))
        assert close(found[:prefix], alone(encoder, row[:prefix]))


@fixed
@given(rows=ROWS, data=st.data())
def test_a_query_is_the_same_step_by_step(encoder, other, rows, data):
    check_steps(encoder, [to_ids(other, row) for row in rows], 5, data)


def test_a_word_is_seen_where_it_ends_and_not_before(clip):
    """A tokenizer that has "ban" and "ana": what the whole text is cut into says nothing of the first half."""
    other = gpt2_like(["ban ban ban anas anas"], vocab_size=262)
    ban, ana = (other(text, add_special_tokens=False)["input_ids"] for text in ("ban", "ana"))
    encoder = ContextEncoder(clip, tokenizer=other, dtype=torch.float64)
    found = alone(encoder, [other.bos_token_id, *ban, *ana])
    assert_agree(found[[len(ban), -1]], clip.encode_texts(["ban", "banana"]))


def test_documents_do_not_see_each_other_without_a_chat_template(encoder, other):
    """With one, what begins them may begin each turn of a chat."""
    texts = ["a red apple lies on the wooden table", "the sky is blue"]
    documents = [[other.bos_token_id, *other(text, add_special_tokens=False)["input_ids"]] for text in texts]
    together = alone(encoder, documents[0] + documents[1])
    apart = torch.cat([alone(encoder, document) for document in documents])
    assert close(together, apart) is (other.chat_template is None)


def test_the_images_of_an_answer_depend_on_the_question(clip):
    other = chat_like()
    encoder = ContextEncoder(clip, tokenizer=other, dtype=torch.float64)
    roles = ("a", "the")  # short, as the text tower here sees 18 tokens
    for texts in (("banana", "is"), ("table", "is")):
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        chat = other.apply_chat_template(turns, tokenize=False)
        found = alone(encoder, other(chat, add_special_tokens=False)["input_ids"])[-1]
        text = " ".join(word for turn in zip(roles, texts, strict=True) for word in turn)
        assert_agree(found, clip.encode_texts([text])[0])


def test_special_tokens_end_words_and_have_no_text(clip):
    other = gpt2_like()
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    encoder = ContextEncoder(clip, tokenizer=other, dtype=torch.float64)
    found, expected = (
        alone(encoder, other(text, add_special_tokens=False)["input_ids"])[-1]
        for text in ("the ban<|turn|>ana", "the ban ana")
    )
    assert close(found, expected)


def test_most_tokens_cost_nothing_of_their_own(clip, monkeypatch):
    """Of "banana band": one run for the words, one for the part of a word that is no prefix of them."""
    other = gpt2_like(["ban ban ban anas anas and and d d"], vocab_size=262)
    encoder = ContextEncoder(clip, tokenizer=other)
    calls = []
    run = encoder.tower.run
    monkeypatch.setattr(encoder.tower, "run", lambda *read, **options: calls.append(read[1]) or run(*read, **options))
    text = "the sky is blue and the grass is green"
    alone(encoder, other(text, add_special_tokens=False)["input_ids"])
    assert calls[0] == [1 + len(clip.tokenizer(text, add_special_tokens=False)["input_ids"])]
    assert all(length <= 4 for lengths in calls[1:] for length in lengths)


@pytest.mark.parametrize("text", ["x7Qf" * 5000, "\u4f60\u597d" * 2000], ids=["base64", "Chinese"])
def test_text_without_blanks_takes_no_more_than_its_length(clip, other, text):
    """Four times as much text: four times as many characters cut, and about as many to encode."""
    alignment = Alignment(other, clip.tokenizer)
    ids = other(text, add_special_tokens=False)["input_ids"]

    def read(count):
        cut = []
        alignment.clip_ids = lambda word: cut.append(len(word)) or Alignment.clip_ids(alignment, word)
        reading = Reading(0, SegmentState(), ContextEncoder(clip).rule)
        alignment.read(list(enumerate(ids[:count])), TextState(), reading)
        forks = [branch for run in reading.runs for branch in run.branches] + reading.forks
        return sum(cut), sum(len(run.ids) for run in reading.runs + forks)

    quarter, whole = read(len(ids) // 4), read(len(ids))
    assert all(3.8 < more / less < 4.2 for less, more in zip(quarter, whole, strict=True))


def test_a_word_without_end_is_read_without_looking_ahead(encoder, other):
    """Longer than LONGEST_WORD, in a prefix and token by token."""
    ids = other("abc1" * 60, add_special_tokens=False)["input_ids"]
    whole = alone(encoder, ids)
    for length in (1, 40, 90, len(ids) - 1):
        assert close(alone(encoder, ids[:length]), whole[:length])
    cache = encoder.new_cache(1)
    stepped = [encoder.step(torch.tensor([some]), cache)[0] for some in (ids[:50], ids[50:51], ids[51:90], ids[90:])]
    assert close(torch.cat(stepped), whole)


def test_a_clips_own_vocabulary_is_read_directly(clip):
    """Also a pruned one, and also as a copy that was saved and loaded."""
    assert ContextEncoder(clip, tokenizer=clip.tokenizer).alignment is None
    assert ContextEncoder(clip, tokenizer=prune_tokenizer(clip_tokenizer(), TEXTS)).alignment is None
    whole = make_clip(clip_tokenizer())
    assert ContextEncoder(whole, tokenizer=clip_tokenizer()).alignment is None


def test_a_pruned_vocabulary_over_the_whole_one(tokenizer):
    """Of the texts it was pruned for each token is one of CLIP's; others are read as CLIP reads them."""
    whole = make_clip(clip_tokenizer())
    encoders = [ContextEncoder(whole, tokenizer=one, dtype=torch.float64) for one in (tokenizer, None)]
    found, expected = (alone(encoder, encoder.tokenizer(TEXTS[0])["input_ids"]) for encoder in encoders)
    assert close(found, expected)
    found, expected = (alone(encoder, encoder.tokenizer("a crocodile")["input_ids"]) for encoder in encoders)
    assert len(found) > len(expected) and close(found[-1], expected[-1])


def test_the_text_of_each_token():
    other = gpt2_like()
    table = token_bytes(other)
    grin = other("\U0001f600", add_special_tokens=False)["input_ids"]
    assert b"".join(table[id] for id in grin) == "\U0001f600".encode() and len(grin) > 1
    assert table[other.eos_token_id] == b" "
    other.add_tokens(["a b"])
    assert token_bytes(other)[-1] == b"a b"
    llama = llama_like()
    table = token_bytes(llama)
    assert table[llama.convert_tokens_to_ids("\u2581the")] == b" the"
    assert table[llama.convert_tokens_to_ids("<0xF0>")] == b"\xf0"
    pruned = prune_tokenizer(clip_tokenizer(), TEXTS)
    assert token_bytes(pruned)[pruned.convert_tokens_to_ids("apple</w>")] == b"apple "


def test_a_tokenizer_without_bos_begins_documents_with_eos(clip):
    """The queries of Qwen's tokenizer are those of GPT-2's with the same tokens."""
    gpt2, qwen = gpt2_like(), qwen_like()
    (ids,) = tokenize_documents([TEXTS[0]], qwen)
    assert [ids] == tokenize_documents([TEXTS[0]], gpt2)
    assert torch.equal(*(alone(ContextEncoder(clip, tokenizer=one), ids) for one in (qwen, gpt2)))


def test_tokenizers_that_cannot_be_followed_are_refused(clip):
    without_eos = gpt2_like()
    without_eos.bos_token = without_eos.eos_token = None
    with pytest.raises(ValmError, match="names no eos token, which ends a document"):
        Alignment(without_eos, clip.tokenizer)
    with pytest.raises(ValmError, match="tokenizer is a ByT5Tokenizer, expected a fast tokenizer"):
        ContextEncoder(clip, tokenizer=ByT5Tokenizer())
    word_pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "s": 1, "the": 2, "##e": 3, "[B]": 4}, unk_token="[UNK]"))
    word_pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word_pieces.decoder = decoders.CTC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_pieces, bos_token="[B]")
    with pytest.raises(ValmError, match="in which each token has a text of its own"):
        token_bytes(tokenizer)
    other = gpt2_like()
    with pytest.raises(ValueError, match=f"input_ids contains {len(other)}, but the tokenizer has {len(other)} tokens"):
        alone(ContextEncoder(clip, tokenizer=other), [len(other)])


def test_a_vocabulary_may_have_holes_in_its_ids(clip):
    """As where tokens were removed; the largest id is above the number of tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {character: number for number, character in enumerate(alphabet)} | {"</s>": 300}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoder = ContextEncoder(clip, tokenizer=tokenizer)
    queries = alone(encoder, [300, *tokenizer("a red apple")["input_ids"]])
    expected = alone(ContextEncoder(clip), prompt_ids(clip.tokenizer, "a red apple"))
    torch.testing.assert_close(queries[-1], expected[-1])
    with pytest.raises(ValueError, match="input_ids contains 301, but the tokenizer has 301 tokens"):
        alone(encoder, [301])
