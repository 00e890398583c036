from benchmarks.valm_kernels import back_ends
from valm_kernels.visual_fusion import crossover


def test_the_table_follows_the_package(monkeypatch):
    monkeypatch.setattr(crossover, "MEASURED", {})
    monkeypatch.setattr(crossover, "ESTIMATE", 1000 * 64)
    before = back_ends.table()
    assert '| 16 bits, D 64 | `"triton"`; Tk ≥ 1,000: `"flash+triton"` |' in before
    entry = {"keys": 700, "cudnn_keys": None, "longest": 8192}
    monkeypatch.setattr(crossover, "MEASURED", {(90, 64): entry})
    assert (
        before.count("Tk ≥ 700") == 0 and back_ends.table().count("Tk ≥ 700") == 3
    )  # with FlashAttention-3 and -4 too
