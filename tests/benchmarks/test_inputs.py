import pytest

from benchmarks.valm.inputs import evaluation_texts


def test_a_benchmark_without_its_evaluation_set_is_skipped(monkeypatch):
    monkeypatch.delenv("VALM_EVAL_DATA", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs LAMBADA: set VALM_EVAL_DATA to the folder"):
        evaluation_texts("lambada")
