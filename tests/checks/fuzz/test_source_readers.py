"""As test_store_readers.py, for a user's own files: images with captions, corpora, evaluation sets, configs; and for
the small files that commands write to go on from.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from tests.checks.counts import COUNTS
from tests.checks.fuzz.mutations import ODD_YAML, check_mutants, files_of, fuzzed, mutated_bytes, result_of
from tests.valm.evaluation.small_sets import write_sets
from tests.valm.training.documents import documents, new_trainer
from valm.cli import build_parser
from valm.cli.train import chosen_plan
from valm.corpus.texts import read_documents
from valm.evaluation.controls import named_images
from valm.evaluation.questions import Documents, Questions, chosen_sets
from valm.evaluation.scorers import Scorer
from valm.evaluation.sets import SETS, read_set
from valm.evaluation.settings import Settings
from valm.evaluation.suite import CACHE, asked_by, scores_of
from valm.knowledge_base.captions import read_captions
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.embeddings import EmbeddingSource
from valm.knowledge_base.sources.folder import TableSource
from valm.knowledge_base.sources.webdataset import tar_records
from valm.progress import progress_bar
from valm.store.files import writable_folder
from valm.store.shards import ProgressBar
from valm.training.run_note import RUN_FILE, note_run
from valm.training.train import training_arguments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def linked(tmp_path_factory) -> Path:
    """A user's own file may be a link to another one."""
    file = tmp_path_factory.mktemp("linked") / "file"
    file.write_text("image,caption\n")
    return file


@fuzzed(200)
def test_captions_tables(tmp_path_factory, linked, data):
    folder = tmp_path_factory.mktemp("captions")
    (folder / "captions.csv").write_text('image,caption\na.png,"a ""red"" dog"\nb.png,two\nb.png,three\n')
    (folder / "captions.json").write_text('{"a.png": "one", "b.png": ["two", "three"]}')
    file = folder / data.draw(st.sampled_from(["captions.csv", "captions.json"]))
    check_mutants(data, [file], linked, lambda: read_captions(folder, ["a.png", "b.png"], file), ...)


@fuzzed(300)
def test_table_of_images(tmp_path_factory, linked, data):
    file = tmp_path_factory.mktemp("table") / "images.csv"
    file.write_text('path,caption\na.png,"a ""red"" dog"\nb.png,two\nb.png,three\n,four\n')
    check_mutants(data, [file], linked, lambda: TableSource(file).plan(), ...)


@fuzzed(300)
def test_embeddings(tmp_path_factory, linked, clip, data):
    folder = tmp_path_factory.mktemp("embeddings")
    vectors, metadata = folder / "img_emb" / "img_emb_0.npy", folder / "metadata" / "metadata_0.parquet"
    vectors.parent.mkdir(), metadata.parent.mkdir()
    np.save(vectors, np.ones((9, clip.embed_dim), np.float16))
    pq.write_table(pa.table({"caption": ["red"] * 9, "url": [f"{row}.png" for row in range(9)]}), metadata)
    with ProgressBar("", "", None, False) as bar:

        def read() -> Any:
            return [len(shard(clip, Encoding(), bar).items) for shard in EmbeddingSource(folder).shards({})]

        check_mutants(data, [vectors, metadata], linked, read, ...)


@fuzzed(300)
def test_images(tmp_path_factory, linked, data):
    """All formats, and files of one that are named as another."""
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]))
    file = tmp_path_factory.mktemp("image") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (16, 20, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    check_mutants(data, [file], linked, lambda: named_images([(file.name, file)]), ...)


@fuzzed(300)
def test_archives(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("archive") / "a.tar"
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(file, "w") as tar:
        for name, content in (("a.png", picture.getvalue()), ("a.txt", b"red"), ("b.json", b'{"caption": "x"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def read() -> Any:
        for record in tar_records(file):
            with suppress(Exception):  # then it is listed as skipped
                record.read()

    # pipes are refused where archives are looked for (test_build.py)
    original = file.read_bytes()
    file.write_bytes(mutated_bytes(data.draw, original))
    COUNTS["of these hostile archives"] += 1
    result_of(read)


@fuzzed(300)
def test_corpus_files(tmp_path_factory, linked, data):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("a red dog\nein Hund läuft\n\nthree\n", encoding="utf-8")
    pq.write_table(pa.table({"text": [f"document {number}" for number in range(50)]}), folder / "a.parquet")
    rows = [json.dumps({"text": f"document {number}"}) for number in range(5)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    (folder / "a.json").write_text(f"[{', '.join(rows)}]")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    file = folder / data.draw(st.sampled_from(["a.txt", "a.parquet", "a.jsonl", "a.json", "a.jsonl.gz"]))
    check_mutants(data, [file], linked, lambda: list(read_documents([file])), ...)


@fuzzed(300)
def test_evaluation_sets(tmp_path_factory, linked, data):
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    name = data.draw(st.sampled_from(sorted(SETS)))
    file = folder / SETS[name].file
    beside = [one for one in files_of(file.parent) if one.stem.partition("_")[0] == file.stem.partition("_")[0]]
    check_mutants(data, beside, linked, lambda: read_set(SETS[name], folder), ...)


@fuzzed(300)
def test_scores_of_an_evaluation(tmp_path_factory, outside, data):
    folder = tmp_path_factory.mktemp("scores")
    write_sets(folder / "data")
    sets = chosen_sets(["memory_color", "lambada"])
    asked = asked_by(Settings(data=folder / "data"), sets)
    one = asked[data.draw(st.sampled_from(sorted(asked)))]

    def read() -> Any:
        with progress_bar(shown=False) as bar:
            return {
                name: values.tolist() for name, values in scores_of(GivenScorer(), one, folder / CACHE, [], bar).items()
            }

    whole = read()
    check_mutants(data, files_of(folder / CACHE), outside, read, whole)


class GivenScorer(Scorer):
    """Scores by rule."""

    kind = "given"

    def answers(self, asked: Questions, progress: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(asked.texts), len(asked.texts[0]), len(asked.candidates))
        return torch.arange(float(np.prod(shape))).view(shape), torch.ones(shape[2])

    def documents(self, asked: Documents, progress: Any = None) -> dict[str, np.ndarray]:
        return {"nats": np.full(len(asked.texts), 9.5)}


@fuzzed(300)
def test_config_of_a_training(tmp_path_factory, monkeypatch, linked, data):
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.chdir(folder)
    file = folder / "train.yaml"
    lines = ["steps: 3", "lr: 1.0e-3", "corpus: [a.txt, b.txt]", "images: 2", "bf16: false", "warmup_steps: 2"]
    lines.append("out: out")
    if data.draw(st.booleans()):
        line = data.draw(st.integers(0, len(lines) - 1))
        lines[line] = f"{lines[line].partition(':')[0]}: {data.draw(st.sampled_from(ODD_YAML))}"
    file.write_text("\n".join(lines))

    def read() -> Any:
        plan = chosen_plan(build_parser().parse_args(["train", "--config", str(file)]))
        return training_arguments(writable_folder(plan.out), **plan.training_fields()).max_steps

    check_mutants(data, [file], linked, read, ...)


@fuzzed(100)
def test_note_on_a_training(tmp_path_factory, outside, data):
    """What `valm train --resume` compares: `_run.json`."""
    folder = tmp_path_factory.mktemp("run")
    made = new_trainer(folder)

    def read() -> Any:
        note_run(folder, made, documents(), {"learning_rate": 5e-4, "validation": None})

    read()
    check_mutants(data, [folder / RUN_FILE], outside, read, None)
