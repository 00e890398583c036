from benchmarks.valm.queries_report import queries_table, read, whole_table

HEAD = "group,name,median_ms,min_ms\n"


def test_times_are_ratios_to_the_baseline(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(HEAD + "a,VaLM,30,22\na,GPT-2*,20,11\nb,eot float32,5,5\nb,GPT-2 base forward float32,10,20\n")
    assert read(file)["a"]["VaLM"] == (1.5, 2) and read(file)["b"]["eot float32"] == (0.5, 0.25)


def test_a_table_has_a_column_for_each_precision(tmp_path):
    file, queries = tmp_path / "rows.csv", "context queries, 1 x 512 tokens"
    file.write_text(HEAD + f'"{queries}",eot int8,5,5\n"{queries}",GPT-2 base forward float32,10,10\n')
    assert f"| {queries}: eot | GPT-2 base, one forward | | | 0.50 |" in queries_table(file)

    case = '"whole model, 2 x 512 tokens, small text tower, 1M pictures, k 4"'
    dtypes = ("float32", "bfloat16", "int8")
    names = [f"VaLM, {query}, tower in {dtype}" for query in ("state", "eot") for dtype in dtypes]
    rows = [f'{case},"{name}",{10 + n},20\n' for n, name in enumerate(["GPT-2*", "VaLM, pictures given", *names])]
    file.write_text(HEAD + "".join(rows))
    row = '| EPYC | small | `"eot"` | 1.10 (1.00) | 1.50 (1.00) | 1.60 (1.00) | 1.70 (1.00) |'
    assert row in whole_table({"EPYC": file})
