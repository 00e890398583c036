import pytest


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
