"""Runs a `PicturesPlan`: says what it found, estimates, makes the parts, and writes the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from valm.knowledge_base.sources import Source
from valm.pictures.estimate import estimate
from valm.pictures.making import BELOW, FAST, QUESTIONS, Making, look, make
from valm.pictures.plan import PicturesPlan
from valm.pictures.report import REPORT_FILE, perplexities, verdict, write_report
from valm.store.files import WAIT_SECONDS
from valm.store.folders import remove_folder
from valm.store.parts import CONTROL, PARTS_FILE, STAGES_FILE
from valm.store.stages import Stages, duration
from valm.text import printable
from valm_kernels.atomic_files import folder_lock


def run_pictures(plan: PicturesPlan, source: Source | None = None) -> Path:
    """Makes a model that sees pictures, a control and a report, and prints its progress. A killed run continues.

    Args:
        source: the opened pictures of `plan`; by default they are opened here.

    Returns:
        The report. `valm.load(plan.out)` opens the model.

    Raises:
        OSError: `plan.out` cannot be written.
        TimeoutError: another process works in `plan.out`.
        ValmError: the pictures, the texts or the decoder cannot be used, or `plan.out` contains something else.
        KeyboardInterrupt: Ctrl-C or SIGTERM ended a training, with a checkpoint.

    Example:
        >>> from valm.pictures.plan import PicturesPlan
        >>> from valm.pictures.run import run_pictures
        >>> plan = PicturesPlan(pictures="pictures", model="base", clip="clip", text="corpus.txt", steps=2, out="made")
        >>> run_pictures(plan).name
        ...
        'report.html'
        >>> model, tokenizer = valm.load("made")
    """
    found = look(plan, source)
    making = Making(plan, found)
    for remark in getattr(found.source, "remarks", ()):
        print(printable(remark))
    captions = sum(len(record.caption.splitlines()) for record in found.captioned)
    print(f"{plan.pictures}: {len(found.records):,} pictures, {len(found.captioned):,} with {captions:,} captions")
    making.begin()
    with folder_lock(making.out / PARTS_FILE, WAIT_SECONDS):
        stage = Stages(making.out / STAGES_FILE)
        if CONTROL not in stage.seconds:
            _prepare(making, stage)
        make(making, stage)
        if plan.questions is not None:
            stage(QUESTIONS, making.ask, "your questions")
        stage("report", partial(write_report, making, dict(stage.seconds)), "the report")
        if (making.out / BELOW).is_dir():
            remove_folder(making.out / BELOW)
    _conclude(making)
    return making.out / REPORT_FILE


def _prepare(making: Making, stage: Stages) -> None:
    """Opens the decoder, and prints what it is and how long the unfinished stages will take."""
    tokenizer = making.decoder()
    expected = estimate(making, tokenizer)
    making.note(FAST, expected.fast)
    print(f"{making.plan.model}: {expected.architecture}, {expected.parameters / 1e6:,.0f} million parameters")
    left = sum(seconds for name, seconds in expected.seconds.items() if name not in stage.seconds)
    disk, memory = f"{max(expected.disk / 1e6, 1):,.0f} MB", f"{expected.memory / 1e9:.1f} GB"
    print(
        f"about {duration(left)}, {disk} of disk and at least {memory} of memory on this machine; the same command "
        "continues after Ctrl-C",
        flush=True,
    )


def _conclude(making: Making) -> None:
    rows = perplexities(making)
    print("\n  perplexity of texts that no training has read (lower is better)")
    for row in rows:
        print(f"  {row.label:<40} {row.value:10.2f}")
    print(f"  {verdict(rows)}")
    print(f"\nreport    {making.out / REPORT_FILE}\nask it    valm serve {making.out}")
