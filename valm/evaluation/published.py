"""The published numbers (Wang et al. 2022, tables 2, 4 and 5), to lay others beside."""

from __future__ import annotations

# Accuracy in percent; by table: the tasks of its columns, and a row for each model.
TABLES: dict[int, tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    2: (
        ("memory_color", "color_terms", "object_shape", "relative_size"),
        {
            "GPT-2*": (44.14, 39.10, 51.09, 47.22),
            "BERT": (24.34, 26.33, 31.86, 34.78),
            "CaptionBERT": (24.84, 28.40, 38.14, 66.05),
            "CLIP": (26.25, 23.08, 13.66, 47.99),
            "OSCAR": (20.32, 16.86, 33.14, 50.14),
            "VisualBERT": (26.68, 38.02, 11.14, 67.23),
            "VaLM, K = 4": (53.99, 52.66, 62.77, 85.03),
            "VaLM, K = 8": (58.64, 50.19, 59.41, 62.35),
        },
    ),
    4: (
        ("sst2", "mpqa", "dbpedia", "ag_news"),
        {
            "Majority": (50.90, 50.00, 9.4, 25.0),
            "GPT-2*": (68.04, 71.25, 67.20, 53.51),
            "VaLM, K = 4": (70.12, 78.70, 72.27, 53.81),
            "VaLM, K = 8": (67.33, 77.35, 68.48, 59.77),
        },
    ),
}

# Perplexity of WikiText-103, perplexity of LAMBADA, accuracy of LAMBADA in percent.
TABLE_5: dict[str, tuple[float, float, float]] = {
    "GPT-2*": (36.44, 42.46, 42.17),
    "VaLM, K = 4": (35.78, 42.51, 42.65),
    "VaLM, K = 8": (35.76, 42.38, 42.87),
}
