"""What a knowledge base of millions of images costs: hours, memory, bytes, recall and milliseconds, by the commands
that users give.

    export VALM_EVAL_DATA=...                                       # DBPedia, AG News and LAMBADA
    python -m benchmarks.valm.scale data FOLDER --images 20000000
    python -m benchmarks.valm.scale build FOLDER --images 20000000 --results FILE --kill     # others without --kill
    python -m benchmarks.valm.scale index FOLDER --images 20000000 --results FILE --kill
    python -m benchmarks.valm.scale exact FOLDER --images 20000000 --results FILE --kill
    python -m benchmarks.valm.scale nodes FOLDER --images 20000000 --results FILE --ray HOST:PORT     # after exact
    python -m benchmarks.valm.scale corpus FOLDER --images 20000000 --results FILE --kill
    python -m benchmarks.valm.scale table FILE

`data` makes the vectors from real context queries (`benchmarks.valm.inputs.perturbed`) in clip-retrieval's layout,
`build` makes a knowledge base of the first of them, `index` indexes (as --factory says) and searches it, `exact`
searches it exactly from the disk, `nodes` by two nodes of a Ray cluster, and `corpus` retrieves the images of 1.1
million tokens, or of the first --corpus-bytes of their text, and trains on them. `--kill` kills each command on its
way and gives it again; 1 and 5 million images are too few for it. Each measurement is a line of FILE as soon as it is
there.

Memory is capped from outside, page cache included; as root with version 1 of cgroups:

    mkdir /sys/fs/cgroup/memory/8g; echo 8G > /sys/fs/cgroup/memory/8g/memory.limit_in_bytes
    echo $$ > /sys/fs/cgroup/memory/8g/cgroup.procs

The cluster of `nodes` has a head without cores, where the command runs, and three nodes, each in a group of its own:
two search, and one is there for the one that is killed.

    ray start --head --port 6399 --num-cpus 0 --object-store-memory 200000000
    ray start --address 127.0.0.1:6399 --num-cpus 1 --object-store-memory 200000000      # three times

The memory reported is what the process cannot give back, its anonymous pages, at most. Nothing else should run.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import numpy as np

from benchmarks.conftest import machine

FIELDS = ("images", "step", "quantity", "value", "machine")
SETS = ("lambada", "ag_news", "dbpedia")
TOWER = "half of ViT-B/32"  # its vectors have 256 numbers
REAL_VECTORS = 1 << 18
FILE_ROWS = 1_000_000
CAPTION = 64  # characters
K = 4
QUERIES = 2048
BATCHES = (1, 64, 512)
POLL_SECONDS = 0.1
# Where `--kill` kills: as soon as there is such a file.
KILLED_AT = {
    "build": ["vectors-00005.npy"],
    "index": ["done.json", "added-[1-9]*.faiss"],
    "exact": ["rows-*"],
    "retrieve": ["shard-00000.json"],
    "train": ["checkpoint-50"],
}
STEPS = 100


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

    def add_answers(self, output: str) -> None:
        """Adds what a process printed by `answer`."""
        for line in output.splitlines():
            step, quantities = json.loads(line)
            self.add(step, **quantities)


@dataclass
class Run:
    """A command that was run to its end.

    seconds: of all its processes. peak_mb: most anonymous memory. seen: seconds until a file was there, by its name.
    """

    seconds: float = 0.0
    peak_mb: float = 0.0
    kills: int = 0
    seen: dict[str, float] = field(default_factory=dict)
    output: str = ""


def run(command: Sequence[str | Path], folder: Path | None = None, killed_at: Sequence[str] = ()) -> Run:
    """Runs `command`, kills it when `folder`, or one in it, has a file like the next of `killed_at`, and runs it again.

    Raises:
        RuntimeError: it failed, or ended before it was killed.
    """
    result, left = Run(), list(killed_at)
    while True:
        start, killed = time.perf_counter(), False
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            result.peak_mb = max(result.peak_mb, anonymous_mb(process.pid))
            new = files_below(folder) - result.seen.keys() if folder is not None else set()
            result.seen |= dict.fromkeys(new, result.seconds + time.perf_counter() - start)
            if left and any(fnmatch(name, left[0]) for name in new):
                process.kill()
                killed = process.wait() == -signal.SIGKILL
        result.output = process.communicate()[0]
        result.seconds += time.perf_counter() - start
        if killed:
            result.kills += 1
            left.pop(0)
        elif process.returncode or left:
            raise RuntimeError(f"{command} ended with {process.returncode}, to be killed at {left}")
        else:
            return result


def anonymous_mb(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon")), 0.0)


def files_below(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in (folder, *folder.glob("*.partial")):
        with suppress(FileNotFoundError):
            found |= {entry.name for entry in os.scandir(path)}
    return found


def valm(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "valm", *arguments]


def make_data(folder: Path, images: int) -> None:
    """The embeddings, the CLIP, the texts for tuning, and the corpus; only what is not there yet."""
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
    """Links to the first files of the embeddings, which have `images` vectors."""
    some = folder / f"embeddings-{images}"
    for number in range(-(-images // FILE_ROWS)):
        for name in (f"img_emb/img_emb_{number}.npy", f"metadata/metadata_{number}.parquet"):
            (some / name).parent.mkdir(parents=True, exist_ok=True)
            if not (some / name).exists():
                os.link(folder / "embeddings" / name, some / name)
    return some


def measure_build(folder: Path, images: int, results: Results, killed_at: Mapping[str, list[str]]) -> None:
    kb = folder / f"kb-{images}"
    source = first_files(folder, images)
    command = valm("kb", "build", source, "--format", "embeddings", "--clip", folder / "clip", "--out", kb)
    built = run(command, kb, killed_at["build"])
    results.add("build", seconds=built.seconds, peak_mb=built.peak_mb, kills=built.kills)
    for kind in ("vectors", "items"):
        results.add("build", **{f"bytes of {kind}": sum(file.stat().st_size for file in kb.glob(f"{kind}-*"))})


def measure_index(
    folder: Path, images: int, results: Results, killed_at: Mapping[str, list[str]], factory: str | None
) -> None:
    kb = folder / f"kb-{images}"
    command = valm("kb", "index", kb, "--clip", folder / "clip", "--queries", folder / "tuned-on.txt")
    command += [] if factory is None else ["--factory", factory]
    made = run(command, kb, killed_at["index"])
    results.add("index", seconds=made.seconds, peak_mb=made.peak_mb, kills=made.kills, **stages(made))
    size = (kb / "index.faiss").stat().st_size
    results.add("index", **{"bytes of index.faiss": size})
    searched = run([sys.executable, "-m", __spec__.name, "search", folder, "--images", str(images)])
    results.add_answers(searched.output)
    results.add("search", peak_mb=searched.peak_mb)


def stages(made: Run) -> dict[str, float]:
    """Seconds of the stages of `valm kb index`, by the files that they end with."""
    ends = {
        "queries": "index-*.partial",
        "trained": "added-0.faiss",
        "vectors added": "added-[1-9]*.faiss",
        "exact answers": "index.faiss.*.tmp",
    }
    found, before = {}, 0.0
    for stage, pattern in ends.items():
        times = [seconds for name, seconds in made.seen.items() if fnmatch(name, pattern)]
        if times:
            end = max(times) if stage == "vectors added" else min(times)
            found[f"seconds, {stage}"], before = end - before, end
    found["seconds, written and tuned"] = made.seconds - before
    return found


def search(folder: Path, images: int) -> None:
    """Prints recall and milliseconds of the index, with the cells that it was tuned to and its neighbours."""
    import torch

    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.retrieval.faiss_index import FaissIndex
    from valm.retrieval.index_tuning import _exact, _ladder, recall

    queries = torch.from_numpy(np.load(folder / "queries.npy"))
    for batch in BATCHES:
        forget(folder / f"kb-{images}")  # before anything maps its files, whose pages would stay
        index = FaissIndex.open(ImageKnowledgeBase.open(folder / f"kb-{images}"))
        start = time.perf_counter()
        index.search(queries[:batch], K)
        answer("tuned", **{f"ms, {batch} queries, cold": 1e3 * (time.perf_counter() - start)})
        del index
        gc.collect()  # a knowledge base holds itself
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


def measure_exact(folder: Path, images: int, results: Results, killed_at: Mapping[str, list[str]]) -> None:
    shutil.rmtree(folder / "exact", ignore_errors=True)  # its files would have the command killed at once
    for step, kills in (("save", killed_at["exact"]), ("mapped", [])):
        command = [sys.executable, "-m", __spec__.name, f"exact-{step}", folder, "--images", str(images)]
        done = run(command, folder / "exact", kills)
        results.add_answers(done.output)
        results.add(f"exact, {step}", peak_mb=done.peak_mb, kills=done.kills)


def save_exact(folder: Path, images: int) -> None:
    """Saves a FlatIPIndex of all vectors. They are joined in one file before, which it maps."""
    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm_kernels import FlatIPIndex

    kb = ImageKnowledgeBase.open(folder / f"kb-{images}")
    file = folder / "vectors.npy"
    joined = np.lib.format.open_memmap(file, "w+", np.float16, (len(kb), kb.dim))
    begin = 0
    for vectors in kb.shards():
        joined[begin : begin + len(vectors)] = vectors
        begin += len(vectors)
    del joined
    start = time.perf_counter()
    index = FlatIPIndex(np.load(file, mmap_mode="r"))
    answer("exact, save", **{"seconds, packed": time.perf_counter() - start})
    start = time.perf_counter()
    index.save(folder / "exact")
    answer("exact, save", **{"seconds, written": time.perf_counter() - start})
    answer("exact, save", bytes=sum(file.stat().st_size for file in (folder / "exact").iterdir()))
    file.unlink()


def search_exact(folder: Path, images: int) -> None:
    """Prints milliseconds and bytes read: of the saved FlatIPIndex's files read once, and of searches in it, mapped."""
    import torch

    from valm_kernels import FlatIPIndex

    queries = torch.from_numpy(np.load(folder / "queries.npy"))
    exact = folder / "exact"
    for name in ("codes", "rows"):
        forget(exact)
        with timed("exact, mapped", f"{name} read once"), next(exact.glob(f"{name}-*.npy")).open("rb", 0) as file:
            buffer = bytearray(1 << 24)
            while file.readinto(buffer):
                pass
    for batch in BATCHES:
        forget(exact)
        index = FlatIPIndex.load(exact, mmap=True)
        for state, some in zip(("cold", "again"), queries.split(batch), strict=False):
            with timed("exact, mapped", f"{batch} queries, {state}"):
                index.search(some, K)
        del index


@contextmanager
def timed(step: str, what: str) -> Iterator[None]:
    """Prints the milliseconds of a block, and the bytes that it read from the disk."""
    read, start = bytes_read(), time.perf_counter()
    yield
    milliseconds = 1e3 * (time.perf_counter() - start)
    answer(step, **{f"ms, {what}": milliseconds, f"bytes read, {what}": bytes_read() - read})


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def measure_corpus(
    folder: Path, images: int, results: Results, killed_at: Mapping[str, list[str]], most_bytes: int
) -> None:
    kb, corpus = folder / f"kb-{images}", folder / "corpus-part.txt"
    whole = (folder / "corpus.txt").read_bytes()
    corpus.write_bytes(whole[: whole.rfind(b"\n", 0, most_bytes)] if len(whole) > most_bytes else whole)
    retrieval, model = folder / "retrieval", folder / "model"
    for out in (retrieval, model):
        shutil.rmtree(out, ignore_errors=True)
    command = valm("retrieve", corpus, "--kb", kb, "--clip", folder / "clip", "--out", retrieval)
    found = run(command, retrieval, killed_at["retrieve"])
    tokens = json.loads((retrieval / "manifest.json").read_text())["tokens"]
    results.add("retrieve", seconds=found.seconds, peak_mb=found.peak_mb, kills=found.kills, tokens=tokens)
    command = valm("train", "--retrieval", retrieval, "--kb", kb, "--out", model, "--steps", str(STEPS), "--resume")
    command += ["--model", "4x256x4", "--context", "256", "--save_steps", "50"]
    trained = run(command, model, killed_at["train"])
    results.add("train", seconds=trained.seconds, peak_mb=trained.peak_mb, kills=trained.kills, steps=STEPS)


def measure_nodes(folder: Path, images: int, results: Results, address: str) -> None:
    """A search by two nodes of a Ray cluster that has three, of which one is killed in the middle."""
    import ray
    import torch

    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.retrieval.ray_index import ShardedIndex
    from valm_kernels import FlatIPIndex

    queries = torch.from_numpy(np.load(folder / "queries.npy"))
    expected = FlatIPIndex.load(folder / "exact", mmap=True).search(queries, K)
    start = time.perf_counter()
    index = ShardedIndex(ImageKnowledgeBase.open(folder / f"kb-{images}"), 2, address)
    index.search(queries[:1], K)
    results.add("two nodes", **{"seconds, rows read and packed": time.perf_counter() - start})
    processes = [
        ray.get(actor.__ray_call__.remote(lambda rows: (os.getpid(), os.getppid()))) for actor in index._actors
    ]
    for batch in BATCHES:
        start = time.perf_counter()
        found = index.search(queries[:batch], K)
        results.add("two nodes", **{f"ms, {batch} queries": 1e3 * (time.perf_counter() - start)})
        assert all(torch.equal(ours, theirs[:batch]) for ours, theirs in zip(found, expected, strict=True))
    results.add("two nodes", peak_mb=max(anonymous_mb(process) for process, _ in processes))
    killing = threading.Timer(1.0, lambda: os.kill(processes[1][1], signal.SIGKILL))
    killing.start()
    start = time.perf_counter()
    found = index.search(queries, K)
    results.add("two nodes", **{f"seconds, {len(queries)} queries, one node killed": time.perf_counter() - start})
    assert killing.finished.is_set() and not Path(f"/proc/{processes[1][1]}").exists()
    assert all(map(torch.equal, found, expected))


def table(file: Path) -> str:
    """The measurements as a Markdown table, with a column for each size."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    sizes = sorted({int(row["images"]) for row in rows})
    cells = {(row["step"], row["quantity"], int(row["images"])): row["value"] for row in rows}
    lines = ["| | " + " | ".join(f"{size:,}" for size in sizes) + " |", "| --- |" + " --- |" * len(sizes)]
    for step, quantity in dict.fromkeys((row["step"], row["quantity"]) for row in rows):
        values = [cells.get((step, quantity, size), "") for size in sizes]
        lines.append(f"| {step}: {quantity} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # the last three are processes of `index` and `exact`
    steps = ["data", "build", "index", "exact", "nodes", "corpus", "table", "search", "exact-save", "exact-mapped"]
    parser.add_argument("step", choices=steps)
    parser.add_argument("folder", type=Path, help="of `table`, the file of results")
    parser.add_argument("--images", type=int, default=20_000_000)
    parser.add_argument("--results", type=Path, default=Path("scale.csv"))
    parser.add_argument("--kill", action="store_true", help="kill each command in the middle, and give it again")
    parser.add_argument("--factory", help="of the index, instead of that which its size chooses")
    parser.add_argument("--corpus-bytes", type=int, default=1 << 30, help="of the text that `corpus` retrieves for")
    parser.add_argument("--ray", help="HOST:PORT of the cluster of `nodes`")
    given = parser.parse_args()
    folder, images, results = given.folder.absolute(), given.images, Results(given.results, given.images)
    killed_at = KILLED_AT if given.kill else defaultdict(list)
    if given.step == "data":
        make_data(folder, images)
    elif given.step == "build":
        measure_build(folder, images, results, killed_at)
    elif given.step == "index":
        measure_index(folder, images, results, killed_at, given.factory)
    elif given.step == "exact":
        measure_exact(folder, images, results, killed_at)
    elif given.step == "nodes":
        measure_nodes(folder, images, results, given.ray)
    elif given.step == "corpus":
        measure_corpus(folder, images, results, killed_at, given.corpus_bytes)
    elif given.step == "table":
        print(table(given.folder))
    elif given.step == "search":
        search(folder, images)
    elif given.step == "exact-save":
        save_exact(folder, images)
    elif given.step == "exact-mapped":
        search_exact(folder, images)


if __name__ == "__main__":
    main()
