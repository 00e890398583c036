"""The claim of VaLM at desk size: a language model answers with colours that stand in no text it has read."""
