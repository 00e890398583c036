"""What reading stores costs beside an earlier commit: opening a large knowledge base, and training from a retrieved
corpus.

    git worktree add ../valm-0.1.0 38405ac      # and build its native code there
    python -m benchmarks.valm.store_cost ../valm-0.1.0 --rounds 8

Each round runs both checkouts, one after the other, in a process of its own for each. It prints the ratio of this one
to the earlier one, of the least and of the median, by the clock and by processor time. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
STORES = HERE / "tests" / "fixtures" / "0.1.0"
ROWS, SHARDS = 1_000_000, 62
OPENED, TRAINED, STEPS = 30, 2, 50


def make_knowledge_base(folder: Path) -> None:
    """Files as all versions write them, of ROWS rows in SHARDS shards."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    manifest = json.loads((STORES / "kb" / "manifest.json").read_text())
    shards = []
    for number, rows in enumerate(np.array_split(np.arange(ROWS), SHARDS)):
        vectors, items = folder / f"vectors-{number:05d}.npy", folder / f"items-{number:05d}.parquet"
        np.save(vectors, np.ones((len(rows), manifest["dim"]), np.float16))
        table = {"uri": [f"{row}.jpg" for row in rows], "caption": [""] * len(rows)}
        sizes = {name: pa.array([1] * len(rows), pa.int32()) for name in ("width", "height")}
        pq.write_table(pa.table(table | sizes), items)
        files = [{"name": file.name, "bytes": file.stat().st_size, "sha256": "0" * 64} for file in (vectors, items)]
        shards.append({"count": len(rows), "skipped": 0, "files": files})
    whole = manifest | {"count": ROWS, "skipped": 0, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(whole, indent=2))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measure(folder: Path) -> None:
    """In a process of one of the checkouts: prints its times as JSON."""
    import torch

    from valm import ImageKnowledgeBase, ValmConfig, VaLMForCausalLM

    try:
        from valm.corpus.retrieved import CorpusRetrieval
    except ImportError:  # of 38405ac
        from valm.retrieval.cache import CorpusRetrieval

    def train() -> None:
        corpus, kb = CorpusRetrieval.open(folder / "corpus"), ImageKnowledgeBase.open(folder / "kb")
        tokenizer = corpus.tokenizer
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 64, "num_images": 2, "image_dim": kb.dim}
        torch.manual_seed(0)
        model = VaLMForCausalLM(ValmConfig(vocab_size=len(tokenizer), **ids, **sizes))
        with tempfile.TemporaryDirectory() as out:
            train_on(model, corpus, kb, tokenizer, Path(out))

    train()  # what is imported and compiled once
    found = {"open": [timed(lambda: ImageKnowledgeBase.open(folder / "large")) for _ in range(OPENED)]}
    found["train"] = [timed(train) for _ in range(TRAINED)]
    print(json.dumps(found))


def train_on(model: Any, corpus: Any, kb: Any, tokenizer: Any, out: Path) -> None:
    """STEPS steps, and the model is saved."""
    try:
        from valm.training.train import trainer, training_arguments
    except ImportError:  # of 38405ac
        from valm.training.train import train

        numbers = {"steps": STEPS, "batch_size": 4, "lr": 1e-3, "progress": None}
        train(model, corpus, kb, out, tokenizer=tokenizer, **numbers)
        return
    fields = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True}
    quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": []}
    made = trainer(model, corpus, kb, tokenizer=tokenizer, arguments=training_arguments(out, **fields, **quiet))
    made.train()
    made.write(out, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="checkout of the earlier commit, with its native code")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_knowledge_base(folder / "large")
        for name in ("corpus", "kb", "clip"):
            shutil.copytree(STORES / name, folder / name)
        for _ in range(arguments.rounds):
            for which, checkout in (("earlier", arguments.earlier), ("this", HERE)):
                paths = os.pathsep.join([str(checkout.resolve()), str(folder)])
                command = [sys.executable, __file__, "--measure", str(folder)]
                done = subprocess.run(
                    command, env=os.environ | {"PYTHONPATH": paths}, cwd=folder, stdout=subprocess.PIPE, check=True
                )
                for what, times in json.loads(done.stdout.splitlines()[-1]).items():
                    for clock, processor in times:
                        seconds[what, "clock", which].append(clock)
                        seconds[what, "processor", which].append(processor)
    for what in ("open", "train"):
        for by in ("clock", "processor"):
            before, now = seconds[what, by, "earlier"], seconds[what, by, "this"]
            median = statistics.median(now), statistics.median(before)
            print(
                f"{what:<6} {by:<10} least {min(now) * 1000:8.1f} of {min(before) * 1000:8.1f} ms, "
                f"{min(now) / min(before):.3f}; median {median[0] * 1000:8.1f} of {median[1] * 1000:8.1f} ms, "
                f"{median[0] / median[1]:.3f}; {len(now)} and {len(before)} times"
            )


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(Path(sys.argv[2]))
    else:
        main()
