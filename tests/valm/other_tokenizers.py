"""Tokenizers of language models other than CLIP's, trained on a few lines."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The colour of the banana is yellow. A red apple lies on the wooden table, and the sky isn't green!",
    'Two dogs run; she said: "Look at the yellow bus." Na\u00efve caf\u00e9s, 12 black cats & a boat',
    "banana banana bananas band apple apples the the color of the sky is blue",
]


def gpt2_like(lines=LINES, vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """Byte-level BPE; one special token that begins, ends and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": vocab_size, "initial_alphabet": alphabet, "special_tokens": [end]}
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(**options, show_progress=False))
    roles = {"bos_token": end, "eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, padding_side="left")


CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def chat_like(lines=LINES, vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """Like SmolLM2-Instruct's: bos begins each turn of a chat, and only the chat template adds it before a text."""
    backend = gpt2_like(lines, vocab_size - 2).backend_tokenizer
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles, chat_template=CHAT)


def llama_like(lines=LINES, vocab_size: int = 200) -> PreTrainedTokenizerFast:
    """Blanks are a character of words; characters outside the vocabulary become byte tokens."""
    blank = "\u2581"
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    words = trained.get_vocab()
    merges = [
        (left, right)
        for word in sorted(words, key=words.get)
        for left, right in ((word[:cut], word[cut:]) for cut in range(1, len(word)))
        if left in words and right in words
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(words, key=words.get)]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    steps = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, padding_side="left")


def qwen_like(lines=LINES, vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """Like GPT-2's, without bos: eos ends a document, and another token pads."""
    tokenizer = gpt2_like(lines, vocab_size)
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(["<|pad|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token, pad_token="<|pad|>")
