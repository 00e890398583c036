import pytest

from tests.valm.cli.commands import SIZE, run


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    retrieve = ["retrieve", "{world}/corpus.txt", "--kb", "{world}/kb", "--out", "{tmp}/out"]
    return {
        "corpus to retrieve missing": (["retrieve", "{tmp}/none", *retrieve[2:]], "there is no corpus file {tmp}/none"),
        "corpus to retrieve empty": (["retrieve", "{tmp}/empty.txt", *retrieve[2:]], "the corpus has no documents"),
        "retrieval into something else": ([*retrieve[:-1], "{world}/clip"], "is not empty"),
        "retrieval of other settings": ([*retrieve[:-1], "{world}/retrieval"], "(k differ)"),
        "retrieval without knowledge base": ([*retrieve[:3], "{world}/clip", *retrieve[4:]], "is not a knowledge base"),
        "more images than there are, retrieved": ([*retrieve, "-k", "7"], "k must be from 1 to the 6"),
        "search actors without ray": ([*retrieve, "--search-actors", "2"], "give --ray too"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)


def test_retrieve_verify(copy_of, capsys):
    root = copy_of("retrieval")
    assert run("retrieve", "--verify", root / "retrieval") == 0
    assert "6 documents are as they were written" in capsys.readouterr().out
    file = root / "retrieval" / "tokens-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert run("retrieve", "--verify", root / "retrieval") == 1
    assert "is damaged, retrieve it again: tokens-00000.npy" in capsys.readouterr().err
    assert run("train", "--retrieval", root / "retrieval", "--out", root / "model", *SIZE) == 1
    assert "is damaged, retrieve it again: tokens-00000.npy" in capsys.readouterr().err
