from pathlib import Path

from benchmarks.valm_kernels.topk_report import Key, Measured, figure, read

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "topk-epyc-2-cores.csv"


def test_rows_are_read_by_their_case(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(
        "group,name,min_ms,note\n"
        "N 50k E 512 k 4 queries 16,a,1.5,recall 1.0000\n"
        "N 200k E 768 k 8 queries 1 mean cosine 0.55,b,2,recall 0.9500\n"
        "N 200k E 768 k 8 queries 1 decaying,b,3,recall 1.0000\n"
        "one query over N 200k E 768 float16,a sum of the same bytes,2,\n"
    )
    assert read(file) == {
        Key(50, 16, 512, 4): {"a": Measured(1.5, 1.0)},
        Key(200, 1, cosine=0.55): {"b": Measured(2.0, 0.95)},
        Key(200, 1, decaying=True): {"b": Measured(3.0, 1.0)},
    }


def test_the_plot_has_a_panel_for_each_size():
    titles = [axes.get_title() for axes in figure(read(RESULTS)).axes]
    assert titles == ["50,000 rows", "200,000 rows", "1,000,000 rows"]
