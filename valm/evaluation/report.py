"""The report of `valm eval`: results.json, a Markdown file and one HTML page, in the layout of the paper's tables."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from valm.evaluation.charts import Quantity, axes, charts
from valm.evaluation.published import LAYOUTS, Column, Layout
from valm.evaluation.questions import FAIR
from valm.evaluation.sets import OWN
from valm.evaluation.statistics import FEWEST
from valm.evaluation.suite import RESULTS
from valm.store.files import writable_folder, write_json
from valm.store.folders import atomic_folder
from valm.text import markdown_table, one_line
from valm_kernels.atomic_files import atomic_path, remove_leftovers

MARKDOWN, PAGE = "results.md", "report.html"
MISSING = "–"
OURS = "ours"

# Metrics of the details, in their order, with their titles.
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
    """Rows of texts. groups: the kind of each row: "published", "baseline" or "ours"."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    note: str = ""


def write_report(results: Mapping[str, Any], out: str | os.PathLike) -> tuple[Path, Path | None]:
    """Writes RESULTS, MARKDOWN and PAGE into `out`. If `out` contains a report with other results, that report is first
    copied to a new folder earlier-N in `out`.

    Returns:
        The page, and the folder of the earlier report or None.

    Raises:
        OSError: the report cannot be written.
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
    """Copies the report in `out`, unless its results are equal, and returns the copy's folder."""
    if not (out / RESULTS).is_file():
        return None
    try:
        if json.loads((out / RESULTS).read_bytes()) == results:
            return None
    except (ValueError, RecursionError):  # not a report, or damaged
        pass
    earlier = next(folder for number in count(1) if not (folder := out / f"earlier-{number}").exists())
    with atomic_folder(earlier) as temporary:
        for name in (RESULTS, MARKDOWN, PAGE):
            if (out / name).is_file():
                shutil.copyfile(out / name, temporary / name)
    return earlier


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables of the report that contain a row of an evaluated model."""
    others = [task for task in results["tasks"] if task["table"] is None]
    of_others = [
        Layout(f"{title}, accuracy in percent", FAIR, tuple(Column(task["task"]) for task in of_group))
        for title, of_group in (
            ("Sets that are not in the paper", [task for task in others if task["group"] != OWN]),
            ("Your questions", [task for task in others if task["group"] == OWN]),
        )
    ]
    found = [_table(results, layout) for layout in (*LAYOUTS, *of_others)]
    found += [_differences(results), _details(results)]
    limit = results["conditions"].get("limit")
    return [table if limit is None else _marked(table, limit) for table in found if OURS in table.groups]


def _marked(table: Table, limit: int) -> Table:
    """The table, with a mark in each row that only a part of the items was used."""
    rows = tuple((f"{name} ({limit} items at most)", *cells) for name, *cells in table.rows)
    note = (
        f"A quick look at {limit} items of each set at most: do not compare it with other numbers, such as the paper's."
    )
    return replace(table, rows=rows, note=f"{note} {table.note}".rstrip())


def markdown(results: Mapping[str, Any]) -> str:
    """The tables and conditions as Markdown."""
    parts = ["# Evaluation"]
    for table in tables(results):
        parts += [f"## {table.title}", *filter(None, [table.note])]
        parts.append(markdown_table(map(_escaped, table.columns), (map(_escaped, row) for row in table.rows)))
    parts.append("## Conditions\n\n" + "\n".join(f"- {_escaped(text)}" for text in conditions(results)))
    return "\n\n".join(parts) + "\n"


def page(results: Mapping[str, Any]) -> str:
    """The tables, charts and conditions as a self-contained HTML page. All names are escaped."""
    environment = Environment(loader=PackageLoader("valm.evaluation", "templates"), autoescape=select_autoescape())
    template = environment.get_template("report.html")
    drawn = charts(results)
    return template.render(
        charts=drawn,
        axes=axes(drawn),
        titles=_titles(results),
        tables=tables(results),
        conditions=conditions(results),
        limit=results["conditions"].get("limit"),
    )


def conditions(results: Mapping[str, Any]) -> list[str]:
    """What the numbers depend on, and what differs from the conditions of the published numbers."""
    found = []
    about = results["conditions"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("valm", "torch", "transformers", "python"))
    found.append(f"Measured with {versions}.")
    found.append(
        "Brackets contain the 95 % interval of a bootstrap over items, and over the seeds of pooled checkpoints."
    )
    if about.get("limit"):
        found.append(f"A quick look at {about['limit']} items of each set at most, sampled with a fixed seed.")
    kinds = {row["model"]: row["kind"] for row in results["rows"]}
    found += [f"{name}: {kind}." for name, kind in kinds.items()]
    pooled = {row["model"]: row["checkpoints"] for row in results["rows"] if row["checkpoints"] > 1}
    found += [f"{name}: {checkpoints} pooled checkpoints." for name, checkpoints in pooled.items()]
    if about.get("query_dtype"):
        found.append(f"Retrieval queries in {about['query_dtype']}.")
    if about.get("knowledge_base"):
        found.append(f"Images from the knowledge base {about['knowledge_base']}.")
    titles = _titles(results)
    few = {row["task"]: row["items"] for row in results["rows"] if row["items"] < FEWEST}
    found += [
        f"{titles[task]}: no intervals, because they need {FEWEST} items and there are {items}. Ask more questions "
        "before you compare models."
        for task, items in few.items()
    ]
    found += [f"{task['title']}: {task['note']}." for task in results["tasks"] if task["note"]]
    refused = dict.fromkeys(
        (row["model"], titles[row["task"]], row["not_applicable"]) for row in results["rows"] if _refused(row)
    )
    found += [f"{model} has no number for {title}: {reason}." for model, title, reason in refused]
    return found


def _refused(row: Mapping[str, Any]) -> bool:
    return "not_applicable" in row


def _titles(results: Mapping[str, Any]) -> dict[str, str]:
    return {task["task"]: task["title"] for task in results["tasks"]}


def _table(results: Mapping[str, Any], layout: Layout) -> Table:
    """A table of the evaluated tasks: the paper's rows (if all items were used), our rows and the baseline."""
    titles = _titles(results)
    asked = [row for row in results["rows"] if row["protocol"] == layout.protocol]
    items = {row["task"]: row["items"] for row in asked}
    metrics = {(row["model"], row["task"]): row["metrics"] for row in asked if not _refused(row)}
    columns = [column for column in layout.columns if column.task in items]
    rows: list[tuple[str, ...]] = []
    groups = []
    if results["conditions"].get("limit") is None:
        for name, values in layout.rows.items():
            cells = zip(layout.columns, values, strict=True)
            rows.append((f"{name} (paper)", *(f"{value:.2f}" for column, value in cells if column in columns)))
            groups.append("published")
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        if any((model, column.task) in metrics for column in columns):
            of_model = [metrics.get((model, column.task), {}) for column in columns]
            rows.append((model, *(_cell(one, column.metric) for one, column in zip(of_model, columns, strict=True))))
            groups.append(OURS)
    if all(column.metric == "accuracy" for column in layout.columns):
        shares = {
            task: one["baselines"]["majority"] for (_, task), one in reversed(metrics.items()) if "baselines" in one
        }
        baseline = (f"{100 * shares[task]:.2f}" if task in shares else MISSING for task, *_ in columns)
        rows.append(("always the commonest answer", *baseline))
        groups.append("baseline")
    heads = (f"{titles[task]}, {items[task]:,} items" + (f": {title}" if title else "") for task, _, title in columns)
    title = f"{layout.title}, {layout.protocol} protocol"
    return Table(title, ("model", *heads), tuple(rows), tuple(groups), layout.note)


def _differences(results: Mapping[str, Any]) -> Table:
    titles = _titles(results)
    rows = tuple(
        (
            f"{pair['first']} – {pair['second']}",
            titles[pair["task"]],
            pair["protocol"],
            pair["metric"],
            Quantity(1 if pair["metric"] == "nats per byte" else 100, "+.2f").text(pair),
            MISSING if pair.get("p") is None else f"{pair['p']:.4f}",
        )
        for pair in results["pairs"]
    )
    return Table(
        "Differences on the same items",
        ("models", "task", "protocol", "of", "difference [95 %]", "p"),
        rows,
        (OURS,) * len(rows),
        "The first model minus each other model: accuracy, uncalibrated and calibrated by mean, in points (higher is "
        "better), or nats per byte (lower is better; compared only if both tokenizers keep case and blanks, or neither "
        "does). Intervals are from a paired bootstrap over items, and over the seeds of pooled checkpoints; few seeds "
        "give too narrow intervals. p, for single checkpoints, is from a permutation test over items. Neither is "
        "corrected for multiple comparisons.",
    )


def _details(results: Mapping[str, Any]) -> Table:
    titles = _titles(results)
    used = [name for name in DETAILS if any(name in row.get("metrics", {}) for row in results["rows"])]
    rows = []
    for row in results["rows"]:
        if _refused(row):
            continue
        metrics = row["metrics"]
        cells = [_cell(metrics, name) for name in used]
        baselines = metrics.get("baselines")
        majority = MISSING
        if baselines and baselines["constants"]:
            majority = f"{100 * baselines['majority']:.1f} ({baselines['majority_answer']})"
        of = f"{row['items']:,} × {row['prompts']}" if "prompts" in row else f"{row['items']:,}"
        rows.append((row["model"], titles[row["task"]], row["protocol"], of, *cells, majority))
    columns = ("model", "task", "protocol", "items × prompts", *(DETAILS[name] for name in used), "constant answer")
    return Table(
        "Every number",
        columns,
        tuple(rows),
        (OURS,) * len(rows),
        "Calibrated: minus the answer's score without a prompt; by mean: minus its mean over the items. Balanced: "
        "averaged over the answers.",
    )


def _cell(metrics: Mapping[str, Any], name: str) -> str:
    """A metric in percent, or a perplexity, with its interval if there is one."""
    if name not in metrics:
        return MISSING
    value, shown = metrics[name], Quantity(1, ".4g") if name.endswith("perplexity") else Quantity(100, ".1f")
    return shown.text(value if isinstance(value, Mapping) else {"value": value})


def _escaped(text: str) -> str:
    """The text, escaped so that Markdown reads neither HTML nor the end of a table cell in it."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")
