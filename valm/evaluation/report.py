"""What `valm eval` writes: results.json, a Markdown file and one HTML page, in the layout of the paper's tables."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from valm.evaluation.charts import axes, charts
from valm.evaluation.published import TABLE_5, TABLES
from valm.evaluation.questions import FAIR, PUBLISHED, TASKS
from valm.evaluation.suite import RESULTS
from valm.store.files import writable_folder, write_json
from valm.store.folders import atomic_folder
from valm.text import one_line
from valm_kernels.atomic_files import atomic_path, remove_leftovers

MARKDOWN, PAGE = "results.md", "report.html"
MISSING = "–"

TITLES = {
    2: "Table 2: colour, shape and size, accuracy in percent",
    4: "Table 4: language understanding, accuracy in percent",
    5: "Table 5: language modelling",
}
# Columns of the tables of language modelling: title, task, metric.
PERPLEXITIES = {
    PUBLISHED: (
        ("perplexity", "wikitext103", "perplexity"),
        ("perplexity", "lambada", "perplexity"),
        ("accuracy", "lambada", "accuracy"),
    ),
    FAIR: (
        ("per word", "wikitext103", "word_perplexity"),
        ("per byte", "wikitext103", "byte_perplexity"),
        ("per word", "lambada", "word_perplexity"),
        ("per byte", "lambada", "byte_perplexity"),
        ("last word", "lambada", "target_perplexity"),
        ("accuracy", "lambada", "accuracy"),
    ),
}
# Metrics of the details, in their order, and how they are called.
DETAILS = {
    "accuracy": "accuracy",
    "balanced": "balanced",
    "calibrated": "calibrated",
    "calibrated_mean": "calibrated by mean",
    "vote": "vote",
    "both_orders": "both orders",
    "preferred": "preferred",
    "said_yes": "said yes",
    "perplexity": "perplexity per token",
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "target_perplexity": "of the last word",
}


@dataclass(frozen=True)
class Table:
    """Rows of texts. groups: what kind each row is: "published", "baseline" or "ours"."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    note: str = ""


def write_report(results: Mapping[str, Any], out: str | os.PathLike) -> tuple[Path, Path | None]:
    """Writes RESULTS, MARKDOWN and PAGE into `out`. A report with other results that is there is copied to a new folder
    earlier-N in `out` first.

    Returns:
        The page, and the folder of the earlier report or None.

    Raises:
        OSError: they cannot be written.
    """
    out = writable_folder(out)
    remove_leftovers(out)
    written = json.loads(json.dumps(results))
    earlier = _keep_earlier(out, written)
    write_json(out / RESULTS, written)
    for name, content in ((MARKDOWN, markdown(results)), (PAGE, page(results))):
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return out / PAGE, earlier


def _keep_earlier(out: Path, results: Any) -> Path | None:
    """Copies the report in `out`, unless it is of the same results, and returns the copy's folder."""
    if not (out / RESULTS).is_file():
        return None
    try:
        if json.loads((out / RESULTS).read_bytes()) == results:
            return None
    except (ValueError, RecursionError):  # not one of ours, or damaged
        pass
    earlier = next(folder for number in count(1) if not (folder := out / f"earlier-{number}").exists())
    with atomic_folder(earlier) as temporary:
        for name in (RESULTS, MARKDOWN, PAGE):
            if (out / name).is_file():
                shutil.copyfile(out / name, temporary / name)
    return earlier


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables of the report; those that would have no row of ours are not among them."""
    found = []
    for protocol in (PUBLISHED, FAIR):
        found += [_accuracies(results, number, protocol) for number in (2, 4)]
        found.append(_perplexities(results, protocol))
    found += [_further(results), _differences(results), _details(results)]
    limit = results["conditions"].get("limit")
    return [table if limit is None else _marked(table, limit) for table in found if "ours" in table.groups]


def _marked(table: Table, limit: int) -> Table:
    """The table with its own rows marked as of a part of the items."""
    rows = tuple(
        row if group == "published" else (f"{row[0]} ({limit} items at most)", *row[1:])
        for group, row in zip(table.groups, table.rows, strict=True)
    )
    note = (
        f"A quick look at {limit} items of each set at most: do not compare it with other numbers, such as the paper's."
    )
    return replace(table, rows=rows, note=f"{note} {table.note}".rstrip())


def markdown(results: Mapping[str, Any]) -> str:
    """The tables, and what they depend on, as Markdown."""
    parts = ["# Evaluation"]
    for table in tables(results):
        lines = [f"## {table.title}", ""] + ([table.note, ""] if table.note else [])
        lines += [_line(table.columns), _line(["---"] * len(table.columns))]
        lines += [_line(row) for row in table.rows]
        parts.append("\n".join(lines))
    parts.append("## Conditions\n\n" + "\n".join(f"- {_escaped(text)}" for text in conditions(results)))
    return "\n\n".join(parts) + "\n"


def page(results: Mapping[str, Any]) -> str:
    """The same with charts as one HTML page, which needs nothing else. All names are escaped."""
    environment = Environment(loader=PackageLoader("valm.evaluation", "templates"), autoescape=select_autoescape())
    template = environment.get_template("report.html")
    drawn = charts(results)
    titles = {name: task.title for name, task in TASKS.items()}
    return template.render(
        charts=drawn, axes=axes(drawn), titles=titles, tables=tables(results), conditions=conditions(results)
    )


def conditions(results: Mapping[str, Any]) -> list[str]:
    """What the numbers depend on, and what differs from the published ones' conditions."""
    found = []
    about = results["conditions"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("valm", "torch", "transformers", "python"))
    found.append(f"Measured with {versions}.")
    found.append(
        "In brackets stands the 95 % interval of a bootstrap over items, and over seeds of pooled checkpoints."
    )
    if about.get("limit"):
        found.append(f"Of each set {about['limit']} items at most, drawn by a fixed seed: for a quick look.")
    kinds = {row["model"]: row["kind"] for row in results["rows"]}
    found += [f"{name}: {kind}." for name, kind in kinds.items()]
    pooled = {row["model"]: row["checkpoints"] for row in results["rows"] if row["checkpoints"] > 1}
    found += [f"{name}: {checkpoints} checkpoints together." for name, checkpoints in pooled.items()]
    if about.get("query_dtype"):
        found.append(f"Retrieval queries in {about['query_dtype']}.")
    if about.get("knowledge_base"):
        found.append(f"Images from the knowledge base {about['knowledge_base']}.")
    found += [f"{task['title']}: {task['note']}." for task in results["tasks"] if task["note"]]
    refused = dict.fromkeys(
        (row["model"], TASKS[row["task"]].title, row["not_applicable"]) for row in results["rows"] if _refused(row)
    )
    found += [f"{model} has no number for {title}: {reason}." for model, title, reason in refused]
    return found


def _refused(row: Mapping[str, Any]) -> bool:
    return "not_applicable" in row


def _models(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in results["rows"]))


def _find(results: Mapping[str, Any], model: str, task: str, protocol: str) -> Mapping[str, Any] | None:
    """The metrics of a row, None where there is none."""
    for row in results["rows"]:
        if (row["model"], row["task"], row["protocol"]) == (model, task, protocol):
            return row.get("metrics")
    return None


def _items(results: Mapping[str, Any], protocol: str) -> dict[str, int]:
    """The tasks that were asked in this protocol, and of how many items."""
    return {row["task"]: row["items"] for row in results["rows"] if row["protocol"] == protocol}


def _title(task: str, items: Mapping[str, int]) -> str:
    return f"{TASKS[task].title}, {items[task]:,} items"


def _published_rows(
    rows: Mapping[str, tuple[float, ...]], tasks: Sequence[str], asked: Container[str]
) -> list[tuple[str, ...]]:
    """Published rows, one value for each of `tasks`, as texts without those that were not asked."""
    return [
        (f"{name} (paper)", *(f"{value:.2f}" for task, value in zip(tasks, values, strict=True) if task in asked))
        for name, values in rows.items()
    ]


def _accuracies(results: Mapping[str, Any], number: int, protocol: str) -> Table:
    every, published = TABLES[number]
    items = _items(results, protocol)
    tasks = [task for task in every if task in items]
    rows: list[tuple[str, ...]] = []
    groups = []
    if protocol == PUBLISHED:
        rows += _published_rows(published, every, items)
        groups += ["published"] * len(published)
    for name in _models(results):
        metrics = [_find(results, name, task, protocol) for task in tasks]
        if any(metrics):
            rows.append((name, *(_percent(one, "accuracy") for one in metrics)))
            groups.append("ours")
    baselines = [_baseline(results, task, protocol) for task in tasks]
    rows.append(("always the commonest answer", *(_share(one) for one in baselines)))
    groups.append("baseline")
    return Table(
        f"{TITLES[number]}, {protocol} protocol",
        ("model", *(_title(task, items) for task in tasks)),
        tuple(rows),
        tuple(groups),
        "The paper's prompts and scoring with their known faults." if protocol == PUBLISHED else "",
    )


def _perplexities(results: Mapping[str, Any], protocol: str) -> Table:
    items = _items(results, protocol)
    every = PERPLEXITIES[protocol]
    columns = [column for column in every if column[1] in items]
    rows: list[tuple[str, ...]] = []
    groups = []
    if protocol == PUBLISHED:
        rows += _published_rows(TABLE_5, [task for _, task, _ in every], items)
        groups += ["published"] * len(TABLE_5)
    for name in _models(results):
        cells = []
        for _, task, metric in columns:
            metrics = _find(results, name, task, protocol)
            cells.append(_percent(metrics, metric) if metric == "accuracy" else _number(metrics, metric))
        if any(cell != MISSING for cell in cells):
            rows.append((name, *cells))
            groups.append("ours")
    return Table(
        f"{TITLES[5]}, {protocol} protocol",
        ("model", *(f"{_title(task, items)}: {title}" for title, task, _ in columns)),
        tuple(rows),
        tuple(groups),
        "Perplexity per token of each model's own tokenizer; not the same text as the paper's (see the conditions)."
        if protocol == PUBLISHED
        else "Per word and per byte of the text, in any vocabulary. A tokenizer that drops case or blanks, as CLIP's "
        "does, leaves less to predict: compare such a model with those of the same tokenizer only.",
    )


def _further(results: Mapping[str, Any]) -> Table:
    """The tasks that the paper has not."""
    items = _items(results, FAIR)
    tasks = [task for task in items if TASKS[task].table is None and TASKS[task].group != "lm"]
    rows, groups = [], []
    for name in _models(results):
        metrics = [_find(results, name, task, FAIR) for task in tasks]
        if any(metrics):
            rows.append((name, *(_percent(one, "accuracy") for one in metrics)))
            groups.append("ours")
    baselines = [_baseline(results, task, FAIR) for task in tasks]
    rows.append(("always the commonest answer", *(_share(one) for one in baselines)))
    columns = ("model", *(_title(task, items) for task in tasks))
    return Table(
        "Sets that the paper has not, accuracy in percent, fair protocol",
        columns,
        tuple(rows),
        (*groups, "baseline"),
    )


def _differences(results: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            f"{pair['first']} – {pair['second']}",
            TASKS[pair["task"]].title,
            pair["protocol"],
            pair["metric"],
            _signed(pair, 100 if pair["metric"] == "accuracy" else 1),
            MISSING if pair["p"] is None else f"{pair['p']:.4f}",
        )
        for pair in results["pairs"]
    )
    return Table(
        "Differences on the same items",
        ("models", "task", "protocol", "of", "difference [95 %]", "p"),
        rows,
        ("ours",) * len(rows),
        "The first model minus each other one: accuracy in points, of which more is better, or nats per byte, of which "
        "less is (of models whose tokenizers both keep case and blanks, or neither). Intervals by paired bootstrap "
        "over items, and over the seeds of pooled checkpoints, of which few give too narrow ones; p, of single "
        "checkpoints, by a permutation test over items. Neither is corrected for how many comparisons there are.",
    )


def _details(results: Mapping[str, Any]) -> Table:
    used = [name for name in DETAILS if any(name in row.get("metrics", {}) for row in results["rows"])]
    rows = []
    for row in results["rows"]:
        if _refused(row):
            continue
        metrics = row["metrics"]
        perplexities = {name for name in DETAILS if name.endswith("perplexity")}
        cells = [_number(metrics, name) if name in perplexities else _percent(metrics, name) for name in used]
        baselines = metrics.get("baselines")
        majority = MISSING
        if baselines and baselines["constants"]:
            majority = f"{100 * baselines['majority']:.1f} ({baselines['majority_answer']})"
        of = f"{row['items']:,} × {row['prompts']}" if "prompts" in row else f"{row['items']:,}"
        rows.append((row["model"], TASKS[row["task"]].title, row["protocol"], of, *cells, majority))
    columns = ("model", "task", "protocol", "items × prompts", *(DETAILS[name] for name in used), "constant answer")
    return Table(
        "Every number",
        columns,
        tuple(rows),
        ("ours",) * len(rows),
        "Calibrated: less the answer's score without a prompt; by mean: less its mean over the items. Balanced: mean "
        "over the answers.",
    )


def _baseline(results: Mapping[str, Any], task: str, protocol: str) -> float | None:
    for row in results["rows"]:
        if (row["task"], row["protocol"]) == (task, protocol) and not _refused(row):
            return row["metrics"]["baselines"]["majority"]
    return None


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.2f}"


def _percent(metrics: Mapping[str, Any] | None, name: str) -> str:
    if metrics is None or name not in metrics:
        return MISSING
    value = metrics[name]
    if not isinstance(value, Mapping):
        return f"{100 * value:.1f}"
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _number(metrics: Mapping[str, Any] | None, name: str) -> str:
    if metrics is None or name not in metrics:
        return MISSING
    value = metrics[name]
    return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"


def _signed(pair: Mapping[str, float], scale: float) -> str:
    low, high = scale * pair["low"], scale * pair["high"]
    return f"{scale * pair['value']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """The text in Markdown, where it is no HTML and no end of a cell."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")
