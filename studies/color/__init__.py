"""A study of whether images help a language model, and whether it is their retrieval that helps."""
