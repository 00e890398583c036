import shutil

import datasets
import numpy as np
import pytest

from tests.valm.cli.commands import SIZE, run, wrong_inputs
from valm.corpus.retrieved import CorpusRetrieval

OUT = "--kb {world}/kb --out {tmp}/out "
RETRIEVE = "retrieve {world}/corpus.txt " + OUT


@wrong_inputs(
    {
        "retrieve {tmp}/none " + OUT: "{tmp}/none: No such file or directory",
        "retrieve {tmp}/empty.txt " + OUT: "the corpus has no documents",
        "retrieve " + OUT: "there is no corpus: give files, or --dataset",
        "retrieve {tmp}/rows.jsonl --column story " + OUT: "rows.jsonl, row 1: there is no column 'story', only text",
        "retrieve --dataset {tmp}/none " + OUT: "cannot read the dataset {tmp}/none",
        RETRIEVE + "--dataset Salesforce/wikitext": "give either corpus files, with --captions, or --dataset",
        RETRIEVE + "--streaming": "--streaming needs a Hugging Face dataset",
        RETRIEVE + "--captions {tmp}/table.csv": "--captions is for folders and zip files of pictures",
        RETRIEVE + "--out {world}/clip": "is not empty",
        RETRIEVE + "--out {world}/retrieval": "holds another corpus retrieval: its k is ",
        RETRIEVE + "--out {world}/retrieval -k 2 --query-dtype bfloat16": "its precision is ",
        RETRIEVE + "--kb {world}/clip": "is not a knowledge base",
        RETRIEVE + "-k 7": "k must be from 1 to the 6",
        RETRIEVE + "-k 65": "--images is 65, expected at least 1 and below 65",
        RETRIEVE + "--search-actors 2": "give --ray too",
    }
)
def test_wrong_input_is_one_sentence(sentence, tmp_path, command, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    sentence(command, message)


def test_a_damaged_retrieval_is_not_trained_on(copy_of, error_of):
    root = copy_of("retrieval")
    file = root / "retrieval" / "shard-00000.arrow"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    error = error_of("train", "--retrieval", root / "retrieval", "--out", root / "model", *SIZE)
    assert "is damaged, retrieve it again: shard-00000.arrow" in error


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_retrieved_as_its_texts_in_a_file(world, tmp_path, streaming):
    dataset = datasets.Dataset.from_dict({"line": (world / "corpus.txt").read_text().splitlines()})
    datasets.DatasetDict({"all": dataset}).save_to_disk(tmp_path / "data")
    (tmp_path / "rows").mkdir()
    dataset.to_json(tmp_path / "rows" / "train.jsonl")
    corpus = [tmp_path / "rows", "--streaming"] if streaming else [f"{tmp_path / 'data'}::all"]
    out = ["--column", "line", "--kb", world / "kb", "-k", 2, "--out", tmp_path / "retrieval"]
    for _ in range(2):  # the second time it is there
        assert run("retrieve", "--dataset", *corpus, *out) == 0
    found, expected = CorpusRetrieval.open(tmp_path / "retrieval"), CorpusRetrieval.open(world / "retrieval")
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])
        assert np.array_equal(one["image_ids"], other["image_ids"])


def test_pictures_are_retrieved_as_their_captions(world, tmp_path, output_of):
    """With a table of captions that stands beside the folder."""
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "apple.txt").rename(tmp_path / "pictures" / "README.txt")
    (tmp_path / "table.csv").write_text("image,caption\napple.png,an apple\napple.png,it is red\n")
    captions = ["--captions", tmp_path / "table.csv", "--kb", world / "kb", "-k", 2, "--out", tmp_path / "retrieval"]
    assert "7 documents" in output_of("retrieve", tmp_path / "pictures", *captions)
