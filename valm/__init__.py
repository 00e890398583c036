"""VaLM: a causal language model that looks at retrieved pictures while it reads (Wang et al. 2022)."""
