import json
import shutil

import pytest
import torch
from PIL import Image

from tests.valm.cli.commands import run, wrong_inputs
from tests.valm.evaluation.small_sets import write_sets
from valm.clip.text_tower import fastest_dtype
from valm.evaluation.sets import SETS


@pytest.fixture
def color(world):
    """The options of a short evaluation: Memory Colors with the fair protocol."""
    return ("--tasks", "memory_color", "--data", world / "sets", "--protocol", "fair")


def test_eval_prints_and_writes_the_tables(world, tmp_path, output_of):
    out, other, sets = (tmp_path / name for name in ("out", "pictures", "sets"))
    write_sets(sets)
    shutil.copytree(world / "sets", sets, dirs_exist_ok=True)
    for name, lines in (("memory_color", 2), ("vicomte_color", 1)):  # one thing of each is enough
        table = sets / SETS[name].file
        table.write_text("\n".join(table.read_text().splitlines()[:lines]))
    other.mkdir()
    Image.new("RGB", (32, 32), "purple").save(other / "purple.png")
    models = ["eval", world / "valm", world / "gpt2", "--data", sets, "--controls", f"off,{other}", "--out", out]
    printed = output_of(*models, "--tasks", "memory_color,vicomte_color")
    assert f"written to {out / 'report.html'}" in printed
    results = json.loads((out / "results.json").read_text())
    names = ["valm", "valm, no images", "valm, images of pictures", "gpt2"]
    assert list(dict.fromkeys(row["model"] for row in results["rows"])) == names
    first = results["rows"][0]
    assert (first["task"], first["protocol"], first["items"], first["prompts"]) == ("memory_color", "published", 1, 9)
    page, text = (out / "report.html").read_text(), (out / "results.md").read_text()
    for content in (page, text):
        assert all(name in content for name in names)
        assert "53.99" in content and "VaLM, K = 4 (paper)" in content  # the published row of table 2
        assert f"{100 * first['metrics']['accuracy']['value']:.1f}" in content
        assert "no intervals, because they need 20 items and there are 1" in content
    assert printed.startswith(text)
    assert "http" not in page  # it needs nothing from elsewhere
    assert len(list((out / "cache").iterdir())) == 4 * 3


def test_eval_with_another_min_score(world, color, tmp_path, output_of):
    """One that no image reaches is the row without images; the twin has none to cut, which a warning says."""
    models, options = (world / "valm", world / "gpt2"), ["--limit", 2, *color, "--json", "--out", tmp_path]
    with pytest.warns(UserWarning, match="--min-score has no effect on .*gpt2"):
        printed = output_of("eval", *models, *options, "--min-score", "2", "--controls", "off")
    cut, off, _ = json.loads(printed)["rows"]
    assert cut["metrics"] == off["metrics"] and "2 images a token with a retrieval score from 2" in cut["kind"]
    scored = set((tmp_path / "cache").iterdir())
    results = json.loads(output_of("eval", world / "valm", *options))
    (whole,) = results["rows"]
    assert whole["kind"].endswith("2 images a token")
    assert len(set((tmp_path / "cache").iterdir()) - scored) == 1  # not from the scores of the other
    assert results == json.loads((tmp_path / "results.json").read_text())


def test_another_evaluation_into_the_same_folder_loses_nothing(world, color, tmp_path, capsys, output_of):
    arguments = ["eval", world / "gpt2", *color, "--out", tmp_path]
    printed = output_of(*arguments)
    assert "| MemoryColor | fair | 6 × 9 |" in printed and "published protocol" not in printed
    before = (tmp_path / "results.json").read_bytes()
    assert run(*arguments, "--limit", 2) == 0
    printed = capsys.readouterr()
    assert f"the report that was in {tmp_path} is now in {tmp_path / 'earlier-1'}" in printed.err
    assert "gpt2 (2 items at most)" in printed.out
    assert (tmp_path / "earlier-1" / "results.json").read_bytes() == before
    assert run(*arguments, "--limit", 2) == 0  # the same again
    assert not (tmp_path / "earlier-2").exists()


def test_ones_own_questions_are_asked_alone_or_beside_the_sets(world, color, tmp_path, output_of):
    same, other = tmp_path / "fruit.csv", tmp_path / "more.csv"
    head = "question,answer,choices\n"
    same.write_text(f"{head}the color of the apple is,red,red|green|blue\nthe apple is,green,blue|red|green\n")
    other.write_text(f'{head}the sky is,blue,red|blue\n"the apple, is",red,red | green | blue\n')
    models, out = (world / "valm", world / "gpt2"), tmp_path / "out"
    printed = output_of("eval", *models, "--ask", f"{same},{other}", "--controls", "off", "--out", out)
    assert "## Your questions, accuracy in percent, fair protocol" in printed
    assert "| model | Your questions: fruit, 2 items | Your questions: more, 2 items |" in printed
    assert "Your questions: fruit: no intervals, because they need 20 items and there are 2." in printed
    assert "<h3>Your questions: fruit " in (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in results["rows"]] == ["valm"] * 2 + ["valm, no images"] * 2 + ["gpt2"] * 2
    pairs = [(pair["task"], pair["metric"]) for pair in results["pairs"] if pair["second"] == "gpt2"]
    assert pairs == [("ask-fruit", "accuracy"), ("ask-fruit", "calibrated by mean"), ("ask-more", "accuracy")]
    fruit, more = (row["metrics"] for row in results["rows"][:2])
    assert set(fruit["accuracy"]) == {"value"} and "low" not in results["pairs"][0]
    assert "calibrated" in fruit and "calibrated_mean" in fruit and "calibrated" not in more
    assert fruit["baselines"]["constants"] == {"red": 0.5, "green": 0.5}
    assert more["baselines"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    rows = json.loads(output_of("eval", world / "gpt2", *color, "--ask", same, "--json"))["rows"]
    assert [row["task"] for row in rows] == ["memory_color", "ask-fruit"]


@wrong_inputs(
    {
        "eval {world}/gpt2 --tasks size --data {tmp}": "get it from https://",
        "eval {world}/gpt2 --ask {tmp}/none.csv": "{tmp}/none.csv",
        "eval {world}/gpt2 --ask {tmp}/empty.txt": "empty.txt has the columns",
        "eval {world}/gpt2 --tasks memory_color --data {world}/sets --out {tmp}/empty.txt": "is a file",
    }
)
def test_wrong_input_is_one_sentence(sentence, command, message):
    sentence(command, message)


@pytest.mark.usefixtures("alone")
def test_a_model_whose_knowledge_base_is_gone_is_one_sentence(world, tmp_path, error_of):
    asked = ["eval", tmp_path / "alone", "--tasks", "memory_color", "--data", world / "sets", "--controls", "off"]
    error = error_of(*asked, "--out", tmp_path / "out")
    assert "but has no retriever: give a knowledge base as kb (--kb)\n" in error
    assert list((tmp_path / "out").iterdir()) == []
    assert run(*asked, "--limit", 1, "--kb", world / "kb") == 0


@pytest.mark.parametrize(("amx", "expected"), [(True, "bfloat16"), (False, "int8")])
def test_queries_are_in_the_fastest_precision_of_a_processor(amx, expected, world, color, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("valm.clip.text_tower.is_int8_fast", lambda: True)
    out = tmp_path / "report"
    assert run("eval", world / "valm", *color, "--device", "cpu", "--limit", 1, "--out", out) == 0
    assert json.loads((out / "results.json").read_text())["conditions"]["query_dtype"] == expected


def test_the_report_says_the_precision_of_queries_that_there_are(world, color, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    line = "Retrieval queries in bfloat16."
    color = [*color, "--device", "cpu", "--limit", 1, "--controls", "off", "--out", tmp_path]
    assert run("eval", world / "gpt2", *color) == 0
    assert line not in (tmp_path / "results.md").read_text()
    assert run("eval", world / "gpt2", world / "valm", *color) == 0
    assert json.loads((tmp_path / "results.json").read_text())["conditions"]["query_dtype"] == "bfloat16"
    for name in ("results.md", "report.html"):
        assert line in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("isa", "expected"),
    [("avx512vnni", torch.int8), ("avx512", torch.float32), ("avx2", torch.int8), ("generic", torch.float32)],
)
def test_the_fastest_precision_of_a_processor_without_amx(isa, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("valm_kernels.int8_rows.cpu_isa", lambda: isa)
    assert fastest_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_the_fastest_precision_of_a_gpu(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fastest_dtype(torch.device("cuda", 0)) == expected
