"""What a knowledge base of millions of images costs with the users' commands: time, memory, bytes, recall.

    export VALM_EVAL_DATA=...                                       # DBPedia, AG News and LAMBADA
    python -m benchmarks.valm.scale data FOLDER --images 20000000
    python -m benchmarks.valm.scale build FOLDER --images 20000000 --results FILE
    python -m benchmarks.valm.scale index FOLDER --images 20000000 --results FILE

`data` makes vectors from real context queries (`benchmarks.valm.inputs.perturbed`) in clip-retrieval's layout. `build`
makes a knowledge base of the first vectors. `index` indexes it (as --factory says) and searches it. Each measurement is
added to FILE at once. The reported memory is the peak of anonymous pages, which the system cannot reclaim. Run nothing
else meanwhile.

Limit the memory from outside, page cache included; as root with version 1 of cgroups:

    mkdir /sys/fs/cgroup/memory/8g; echo 8G > /sys/fs/cgroup/memory/8g/memory.limit_in_bytes
    echo $$ > /sys/fs/cgroup/memory/8g/cgroup.procs
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import numpy as np

from benchmarks.conftest import machine

FIELDS = ("images", "step", "quantity", "value", "machine")
SETS = ("lambada", "ag_news", "dbpedia")
TOWER = "half of ViT-B/32"  # with vectors of 256 numbers
REAL_VECTORS = 1 << 18
FILE_ROWS = 1_000_000
CAPTION = 64  # characters
K = 4
QUERIES = 2048
BATCHES = (1, 64, 512)
POLL_SECONDS = 0.1


class Results:
    """Appends measurements to a file, and prints them."""

    def __init__(self, file: Path, images: int):
        self.file, self.images = file, images

    def add(self, step: str, **quantities: float | str) -> None:
        new = not self.file.exists()
        with self.file.open("a", newline="") as opened:
            writer = csv.writer(opened)
            if new:
                writer.writerow(FIELDS)
            for quantity, value in quantities.items():
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                writer.writerow([self.images, step, quantity, shown, machine()])
                print(f"{self.images:>11,}  {step:24} {quantity:32} {shown}", flush=True)


@dataclass
class Run:
    """A finished command.

    peak_mb: peak of anonymous memory. seen: seconds until each file appeared, by its name.
    """

    seconds: float = 0.0
    peak_mb: float = 0.0
    seen: dict[str, float] = field(default_factory=dict)
    output: str = ""


def run(command: Sequence[str | Path], folder: Path | None = None) -> Run:
    """Runs `command`, and notes when files appear in `folder`.

    Raises:
        RuntimeError: it failed.
    """
    result, start = Run(), time.perf_counter()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        result.peak_mb = max(result.peak_mb, anonymous_mb(process.pid))
        new = files_below(folder) - result.seen.keys() if folder is not None else set()
        result.seen |= dict.fromkeys(new, time.perf_counter() - start)
    result.output = process.communicate()[0]
    result.seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return result


def anonymous_mb(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon")), 0.0)


def files_below(folder: Path) -> set[str]:
    with suppress(FileNotFoundError):
        return {entry.name for entry in os.scandir(folder)}
    return set()


def valm(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "valm", *arguments]


def make_data(folder: Path, images: int) -> None:
    """Makes the embeddings, the CLIP, the texts for tuning and the corpus, if they are missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.valm.inputs import clip, evaluation_texts, perturbed, prose, real_vectors
    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.index_tuning import context_queries

    for name in ("img_emb", "metadata"):
        (folder / "embeddings" / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "clip").exists():
        clip(TOWER).save(folder / "clip")
    texts = {name: [" ".join(text.split()) for text in evaluation_texts(name)] for name in SETS}
    (folder / "tuned-on.txt").write_text("\n".join(texts["ag_news"]), encoding="utf-8")
    (folder / "corpus.txt").write_text("\n".join([*prose(), *chain(*texts.values())]), encoding="utf-8")
    if not (folder / "queries.npy").exists():
        queries = context_queries(ContextEncoder(clip(TOWER)), texts["lambada"], QUERIES)
        np.save(folder / "queries.npy", queries.numpy())
    if not (folder / "real.npy").exists():
        np.save(folder / "real.npy", real_vectors(TOWER, REAL_VECTORS))
    real = np.load(folder / "real.npy")
    captions = " ".join(texts["dbpedia"])
    for number in range(-(-images // FILE_ROWS)):
        file = folder / "embeddings" / "img_emb" / f"img_emb_{number}.npy"
        count = min(FILE_ROWS, images - number * FILE_ROWS)
        if file.exists():
            continue
        rows = range(number * FILE_ROWS, number * FILE_ROWS + count)
        begins = np.random.default_rng(number).integers(0, len(captions), count).tolist()
        table = {
            "url": [f"https://images.example/{row // 10_000:05d}/{row:09d}.jpg" for row in rows],
            "caption": [captions[begin : begin + CAPTION] for begin in begins],
        }
        pq.write_table(pa.table(table), folder / "embeddings" / "metadata" / f"metadata_{number}.parquet")
        block = np.empty((count, real.shape[1]), np.float16)
        for start in range(0, count, 1 << 16):
            some = slice(start, min(count, start + (1 << 16)))
            block[some] = perturbed(real, some.stop - some.start, rows[start])
        np.save(file.with_suffix(".tmp.npy"), block)
        file.with_suffix(".tmp.npy").replace(file)
        print(file, flush=True)


def first_files(folder: Path, images: int) -> Path:
    """Links to the first files of the embeddings, with `images` vectors in all."""
    some = folder / f"embeddings-{images}"
    for number in range(-(-images // FILE_ROWS)):
        for name in (f"img_emb/img_emb_{number}.npy", f"metadata/metadata_{number}.parquet"):
            (some / name).parent.mkdir(parents=True, exist_ok=True)
            if not (some / name).exists():
                os.link(folder / "embeddings" / name, some / name)
    return some


def measure_build(folder: Path, images: int, results: Results) -> None:
    kb = folder / f"kb-{images}"
    source = first_files(folder, images)
    built = run(valm("kb", "build", source, "--format", "embeddings", "--clip", folder / "clip", "--out", kb), kb)
    stored = sum(file.stat().st_size for file in kb.iterdir())
    results.add("build", seconds=built.seconds, peak_mb=built.peak_mb, bytes=stored)


def measure_index(folder: Path, images: int, results: Results, factory: str | None) -> None:
    kb = folder / f"kb-{images}"
    command = valm("kb", "index", kb, "--clip", folder / "clip", "--queries", folder / "tuned-on.txt")
    made = run(command if factory is None else [*command, "--factory", factory], kb)
    results.add("index", seconds=made.seconds, peak_mb=made.peak_mb, **stages(made))
    results.add("index", **{"bytes of index.faiss": (kb / "index.faiss").stat().st_size})
    searched = run([sys.executable, "-m", __spec__.name, "search", folder, "--images", str(images)])
    for line in searched.output.splitlines():
        step, quantities = json.loads(line)
        results.add(step, **quantities)
    results.add("search", peak_mb=searched.peak_mb)


def stages(made: Run) -> dict[str, float]:
    """Seconds of the stages of `valm kb index`, by the files that they end with."""

    def times(pattern: str) -> list[float]:
        return [seconds for name, seconds in made.seen.items() if fnmatch(name, pattern)]

    begun, written = times("index.faiss.*.tmp"), times("index-*.partial*")  # the latter appears after each part
    ends = {"queries": min(begun), "trained": min(written), "vectors added": max(written)}
    found, before = {}, 0.0
    for stage, end in (*ends.items(), ("exact answers, tuned and written", made.seconds)):
        found[f"seconds, {stage}"], before = end - before, end
    return found


def search(folder: Path, images: int) -> None:
    """Prints recall and milliseconds of the index, with the cells that it was tuned to and its neighbours."""
    import torch

    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.retrieval.faiss_index import FaissIndex
    from valm.retrieval.index_tuning import _exact, _ladder, recall

    queries = torch.from_numpy(np.load(folder / "queries.npy"))
    for batch in BATCHES:
        forget(folder / f"kb-{images}")  # before anything maps its files: mapped pages would stay
        index = FaissIndex.open(ImageKnowledgeBase.open(folder / f"kb-{images}"))
        start = time.perf_counter()
        index.search(queries[:batch], K)
        answer("tuned", **{f"ms, {batch} queries, cold": 1e3 * (time.perf_counter() - start)})
        del index
        gc.collect()  # a knowledge base refers to itself
    kb = ImageKnowledgeBase.open(folder / f"kb-{images}")
    start = time.perf_counter()
    truth = _exact(kb, queries, K, progress=False)
    answer("exact answers", seconds=time.perf_counter() - start, queries=len(queries))
    index = FaissIndex.open(kb)
    parameters = index.parameters
    answer("tuned", factory=parameters.factory, search=parameters.search, candidates=parameters.candidates)
    answer("tuned", recall_when_made=parameters.recall, trained_on=parameters.trained_on)
    index.search(queries, K)
    tuned = int(parameters.search.removeprefix("nprobe="))
    ladder = _ladder(4 * tuned)
    fewer, more = [cells for cells in ladder if cells < tuned], [cells for cells in ladder if cells > tuned]
    neighbours = [*(("fewer cells", cells) for cells in fewer[-1:]), *(("more cells", cells) for cells in more[:1])]
    for name, cells in (("tuned", tuned), *neighbours):
        index.use(replace(parameters, search=f"nprobe={cells}"))
        answer(name, cells=cells, recall=recall(index.search(queries, K).indices, truth))
        for batch in BATCHES:
            times = []
            for some in queries.split(batch)[: 32 if batch == 1 else 4]:
                start = time.perf_counter()
                index.search(some, K)
                times.append(1e3 * (time.perf_counter() - start))
            answer(name, **{f"ms, {batch} queries": statistics.median(times)})


def answer(step: str, **quantities: float | str) -> None:
    print(json.dumps([step, quantities]), flush=True)


def forget(folder: Path) -> None:
    """Drops the files in `folder` from the page cache."""
    for file in folder.iterdir():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["data", "build", "index", "search"])  # `index` starts `search` as a process
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000_000)
    parser.add_argument("--results", type=Path, default=Path("scale.csv"))
    parser.add_argument("--factory", help="of the index, instead of that which its size chooses")
    given = parser.parse_args()
    folder, images, results = given.folder.absolute(), given.images, Results(given.results, given.images)
    if given.step == "data":
        make_data(folder, images)
    elif given.step == "build":
        measure_build(folder, images, results)
    elif given.step == "index":
        measure_index(folder, images, results, given.factory)
    else:
        search(folder, images)


if __name__ == "__main__":
    main()
