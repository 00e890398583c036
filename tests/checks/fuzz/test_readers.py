"""Whatever is in a file of a store, a model or a user, reading it is refused in a sentence or has the same result.

`make fuzz MINUTES=10` goes on with other seeds. What fails once is replayed with its seed: VALM_FUZZ_SEED=N pytest ...
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
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
from transformers import AutoModelForCausalLM

from tests.checks.counts import COUNTS
from tests.checks.fuzz.mutations import ODD_YAML, REFUSED, check_mutants, files_of, fuzzed, mutated_bytes, result_of
from tests.valm.evaluation.small_sets import write_sets
from tests.valm.model.decoders import IMAGE_DIM, IMAGES, tiny_llama
from tests.valm.training.documents import TOKENIZER, new_trainer
from valm import ImageKnowledgeBase, load
from valm.cli import build_parser
from valm.cli.train import chosen_plan
from valm.clip.clip import Clip
from valm.clip.tokenizer import load_tokenizer
from valm.corpus.retrieved import CorpusRecord, CorpusRetrieval
from valm.corpus.texts import read_documents
from valm.evaluation.sets import SETS, read_set
from valm.knowledge_base.captions import read_table
from valm.knowledge_base.format import ImageRecord
from valm.knowledge_base.records import Encoding
from valm.knowledge_base.sources.embeddings import EmbeddingSource
from valm.knowledge_base.sources.webdataset import tar_records
from valm.knowledge_base.sources.zip_file import ZipSource
from valm.model.adapter import adapter_base, load_adapter, save_adapter
from valm.model.augment import augment
from valm.retrieval.index_parameters import index_parameters
from valm.store.files import writable_folder
from valm.store.shards import ProgressBar, ShardedBuild
from valm.training.clip import new_clip
from valm.training.train import training_arguments
from valm_kernels import FlatIPIndex

pytestmark = pytest.mark.slow


@fuzzed(300)
def test_knowledge_base(stores, outside, data):
    def read(verified: bool) -> Any:
        kb = ImageKnowledgeBase.open(stores / "kb")
        if verified and kb.verify(progress=False):
            return REFUSED
        items = [kb.item(id) for id in range(len(kb))]
        thumbnails = [small and small.tobytes() for small in map(kb.thumbnail, range(len(kb)))]
        return kb.manifest, items, thumbnails, list(kb.skipped()), kb.vectors().tobytes()

    files = [file for file in files_of(stores / "kb") if not file.name.startswith("index")]
    verified = data.draw(st.booleans())
    check_mutants(data, files, outside, lambda: read(verified), read(True) if verified else ...)


@fuzzed(300)
def test_index_parameters(stores, outside, data):
    kb = ImageKnowledgeBase.open(stores / "kb")

    # without the file there is no index
    def read() -> Any:
        return index_parameters(kb) or REFUSED

    check_mutants(data, [stores / "kb" / "index.json"], outside, read, read())


@fuzzed(300)
def test_corpus_retrieval(stores, outside, data):
    def read(verified: bool) -> Any:
        corpus = CorpusRetrieval.open(stores / "corpus")
        if verified and corpus.verify(progress=False):
            return REFUSED
        corpus.lengths()
        documents = [(document["input_ids"].tolist(), document["image_ids"].tolist()) for document in corpus]
        return corpus.manifest, documents

    verified = data.draw(st.booleans())
    check_mutants(data, files_of(stores / "corpus"), outside, lambda: read(verified), read(True) if verified else ...)


@fuzzed(300)
def test_unfinished_builds(stores, outside, data):
    folder = stores / data.draw(st.sampled_from(["kb-unfinished", "corpus-unfinished"]))
    is_kb = folder.name.startswith("kb")
    what, record = ("knowledge base", ImageRecord) if is_kb else ("corpus retrieval", CorpusRecord)
    files = [file for file in files_of(folder) if file.suffix == ".json" or file.name.endswith("00000.arrow")]
    plan = json.loads((folder / "build.json").read_text())["plan"]

    def read() -> Any:
        return ShardedBuild(folder, what, plan, record).done()

    check_mutants(data, files, outside, read, ...)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@fuzzed(300)
def test_flat_index(stores, outside, dtype, data):
    queries = np.load(stores / "flat" / "queries.npy", allow_pickle=False)

    def read() -> Any:
        scores, ids = FlatIPIndex.load(stores / "flat" / dtype, verify=True).search(queries, 5)
        return scores.tolist(), ids.tolist()

    errors = (ValueError, OSError)
    check_mutants(data, files_of(stores / "flat" / dtype), outside, read, read(), errors)


@fuzzed(100)
@pytest.mark.filterwarnings("ignore:the model's")
def test_checkpoint(stores, outside, data):
    folder = stores / data.draw(st.sampled_from(["gpt2", "valm", "blind"]))
    check_mutants(data, files_of(folder), outside, lambda: load(folder), ...)


@fuzzed(100)
def test_tokenizer_of_a_language_model(stores, outside, data):
    files = [stores / "gpt2" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    check_mutants(data, files, outside, lambda: load_tokenizer(stores / "gpt2"), ...)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tiny_llama().save_pretrained(folder / "base")
    model = augment(AutoModelForCausalLM.from_pretrained(folder / "base"), IMAGE_DIM, IMAGES)
    return save_adapter(model, folder / "adapter")


@fuzzed(200)
def test_adapter(adapter, outside, data):
    def read() -> Any:
        base = AutoModelForCausalLM.from_pretrained(adapter_base(adapter))
        return load_adapter(base, adapter)(torch.arange(5)[None]).logits.shape

    check_mutants(data, files_of(adapter), outside, read, ...)


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    """A training with a checkpoint of its second step."""
    folder = tmp_path_factory.mktemp("training")
    new_trainer(folder, max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder


@fuzzed(50)
def test_checkpoint_of_a_training(training, outside, data):
    checkpoint = training / "checkpoint-2"

    def read() -> Any:
        made = new_trainer(training, max_steps=3)
        made.train(resume_from_checkpoint=str(checkpoint))
        return made.losses(), [weight.tolist() for weight in made.model.parameters()]

    # a damaged file is read by PyTorch and transformers, whose errors pass
    check_mutants(data, files_of(checkpoint), outside, read, ..., (Exception,))


@fuzzed(60)
def test_clip(stores, outside, data):
    check_mutants(data, files_of(stores / "clip"), outside, lambda: Clip.load(stores / "clip").weights_hash, ...)


@fuzzed(200)
def test_clip_configurations(tmp_path_factory, outside, data):
    file = tmp_path_factory.mktemp("clip") / "clip.json"
    towers = {"vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}}
    towers["text_cfg"] = {"context_length": 20, "width": 32, "heads": 2, "layers": 2}
    file.write_text(json.dumps({"model_cfg": {"embed_dim": 24, **towers}, "preprocess_cfg": {"mean": [0.5] * 3}}))
    check_mutants(data, [file], outside, lambda: new_clip(file, tokenizer=TOKENIZER), ...)


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
    check_mutants(data, [file], linked, lambda: read_table(file), ...)


@fuzzed(300)
def test_embeddings(tmp_path_factory, linked, clip, data):
    folder = tmp_path_factory.mktemp("embeddings")
    vectors, metadata = folder / "img_emb" / "img_emb_0.npy", folder / "metadata" / "metadata_0.parquet"
    vectors.parent.mkdir(), metadata.parent.mkdir()
    np.save(vectors, np.ones((9, clip.embed_dim), np.float16))
    pq.write_table(pa.table({"caption": ["red"] * 9, "url": [f"{row}.png" for row in range(9)]}), metadata)
    with ProgressBar("", "", None, False) as bar:

        def read() -> Any:
            return [len(part.source(clip, Encoding(), bar)) for part in EmbeddingSource(folder).parts()]

        check_mutants(data, [vectors, metadata], linked, read, ...)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@fuzzed(300)
def test_archives(tmp_path_factory, kind, data):
    file = tmp_path_factory.mktemp("archive") / f"a.{kind}"
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    members = {"a.png": picture.getvalue(), "a.txt": b"red", "b.png": b"", "b.json": b'{"caption": "x"}'}
    with tarfile.open(file, "w") if kind == "tar" else zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if isinstance(archive, zipfile.ZipFile):
                archive.writestr(name, content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    def read() -> Any:
        for record in tar_records(file) if kind == "tar" else ZipSource(file).images():
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
