from tests.valm.conftest import clip, make_kb, tokenizer

__all__ = ["clip", "make_kb", "tokenizer"]
