import datasets
import numpy as np
import pytest

from tests.valm.cli.commands import SIZE, run
from valm.corpus.retrieved import CorpusRetrieval


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    retrieve = ["retrieve", "{world}/corpus.txt", "--kb", "{world}/kb", "--out", "{tmp}/out"]
    return {
        "corpus to retrieve missing": (["retrieve", "{tmp}/none", *retrieve[2:]], "there is no corpus file {tmp}/none"),
        "corpus to retrieve empty": (["retrieve", "{tmp}/empty.txt", *retrieve[2:]], "the corpus has no documents"),
        "no corpus": (["retrieve", *retrieve[2:]], "there is no corpus: give its files, or --dataset"),
        "corpus to retrieve without such a column": (
            ["retrieve", "{tmp}/rows.jsonl", *retrieve[2:], "--column", "story"],
            "rows.jsonl, line 1: there is no 'story', only text",
        ),
        "files and a dataset": (
            [*retrieve, "--dataset", "Salesforce/wikitext"],
            "give either corpus files or --dataset",
        ),
        "option of a dataset": ([*retrieve, "--streaming"], "--streaming is of a Hugging Face dataset"),
        "dataset missing": (
            ["retrieve", "--dataset", "{tmp}/none", *retrieve[2:]],
            "cannot read the dataset {tmp}/none",
        ),
        "retrieval into something else": ([*retrieve[:-1], "{world}/clip"], "is not empty"),
        "retrieval of other settings": (
            [*retrieve[:-1], "{world}/retrieval"],
            "holds another corpus retrieval: its k is ",
        ),
        "retrieval in another precision": (
            [*retrieve[:-1], "{world}/retrieval", "-k", "2", "--query-dtype", "bfloat16"],
            "its precision is ",
        ),
        "retrieval without knowledge base": ([*retrieve[:3], "{world}/clip", *retrieve[4:]], "is not a knowledge base"),
        "more images than there are, retrieved": ([*retrieve, "-k", "7"], "k must be from 1 to the 6"),
        "more images than a token sees": (
            [*retrieve, "-k", "65"],
            "--images is 65, expected at least 1 and below 65",
        ),
        "search actors without ray": ([*retrieve, "--search-actors", "2"], "give --ray too"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, tmp_path, name):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)


def test_a_damaged_retrieval_is_not_trained_on(copy_of, capsys):
    root = copy_of("retrieval")
    file = root / "retrieval" / "tokens-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert run("train", "--retrieval", root / "retrieval", "--out", root / "model", *SIZE) == 1
    assert "is damaged, retrieve it again: tokens-00000.npy" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_dataset_is_retrieved_as_its_texts_in_a_file(world, tmp_path, streaming):
    lines = (world / "corpus.txt").read_text().splitlines()
    datasets.DatasetDict({"all": datasets.Dataset.from_dict({"line": lines})}).save_to_disk(tmp_path / "data")
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict({"line": lines}).to_json(tmp_path / "rows" / "train.jsonl")
    corpus = ["--dataset", f"{tmp_path / 'data'}::all", "--column", "line"]
    if streaming:
        corpus = ["--dataset", tmp_path / "rows", "--column", "line", *streaming]
    out = ["--kb", world / "kb", "-k", 2, "--out", tmp_path / "retrieval"]
    assert run("retrieve", *corpus, *out) == run("retrieve", *corpus, *out) == 0
    found, expected = CorpusRetrieval.open(tmp_path / "retrieval"), CorpusRetrieval.open(world / "retrieval")
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])
        assert np.array_equal(one["image_ids"], other["image_ids"])
