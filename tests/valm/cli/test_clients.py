"""What people ask a completions endpoint with, against `valm serve`."""

import importlib.util
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import valm
from tests.valm.cli.commands import THINGS, asked, run, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs the extra [serve]"),
]
PROMPT, TASK = "the color of the", "valm_memory_color"


@pytest.fixture(scope="module")
def generated(world):
    """What `valm generate` says after PROMPT."""
    model, tokenizer = valm.load(world / "valm")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])


def test_openai(address, generated):
    openai = pytest.importorskip("openai", reason="needs the package openai (extra compat)")
    client = openai.OpenAI(base_url=address, api_key="none")
    (name,) = [model.id for model in client.models.list()]
    options = {"model": name, "max_tokens": 3, "temperature": 0}
    answer = client.completions.create(prompt=PROMPT, **options)
    assert answer.choices[0].text == generated and answer.choices[0].images
    parts = client.completions.create(prompt=PROMPT, stream=True, **options)
    assert "".join(part.choices[0].text for part in parts) == generated
    message = client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **options)
    assert message.choices[0].message.content == generated
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(prompt=PROMPT, model=name, max_tokens=-1)


def test_langchain(address, generated):
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs langchain-openai (extra compat)")
    options = {"base_url": address, "api_key": "none", "model": "valm", "max_tokens": 3, "temperature": 0}
    model = langchain_openai.OpenAI(**options)
    assert model.invoke(PROMPT) == generated
    assert "".join(model.stream(PROMPT)) == generated
    answers = model.generate([PROMPT, PROMPT + " sea"])
    assert [len(answer) for answer in answers.generations] == [1, 1] and answers.generations[0][0].text == generated
    assert langchain_openai.ChatOpenAI(**options).invoke(PROMPT).content == generated


def test_local_completions_of_lm_eval(world, address, tmp_path, capsys):
    """The numbers of `valm eval`, and the log probabilities of the harness's class of this package."""
    pytest.importorskip("lm_eval", reason="needs the extra [harness]")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from valm.evaluation.harness import ValmLM, write_tasks

    write_tasks(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, metadata={"data": str(world / "sets")})
    options = {"tokenizer": str(world / "valm"), "tokenizer_backend": "huggingface", "add_bos_token": True}
    options |= {"max_length": 32, "batch_size": 4, "num_concurrent": 3}
    served = LocalCompletionsAPI(base_url=f"{address}/completions", model="valm", **options)
    models = (served, ValmLM(str(world / "valm"), batch_size=8))
    options = {"tasks": [TASK], "task_manager": manager, "bootstrap_iters": 0}
    found = [simple_evaluate(model=model, **options) for model in models]
    of_server, of_class = ([sample["filtered_resps"] for sample in one["samples"][TASK]] for one in found)
    assert len(of_server) == len(THINGS) * 9  # prompts
    for ours, others in zip(of_server, of_class, strict=True):
        assert [score for score, *_ in ours] == pytest.approx([score for score, *_ in others], abs=1e-3)
    out = tmp_path / "report"
    assert run("eval", world / "valm", "--tasks", "memory_color", "--data", world / "sets", "--out", out) == 0
    (fair,) = [row for row in json.loads((out / "results.json").read_text())["rows"] if row["protocol"] == "fair"]
    assert found[0]["results"][TASK]["acc,none"] == pytest.approx(fair["metrics"]["accuracy"]["value"])


def test_16_streams_of_which_half_leave(world, generated):
    """Their rows are free again, the others are answered, and SIGTERM ends what is left in time."""
    with serving(world / "valm", "--max-batch", "4") as (process, address):
        fields = {"prompt": PROMPT, "stream": True, "max_tokens": 20}
        streams = [asked(address, **fields, seed=number) for number in range(16)]
        for stream in streams[::2]:
            stream.readline()
            stream.close()
        for stream in streams[1::2]:
            assert stream.read().rstrip().endswith(b"data: [DONE]")
        answer = json.load(asked(address, prompt=PROMPT, max_tokens=3, temperature=0))
        assert answer["choices"][0]["text"] == generated
        running = [asked(address, **fields) for _ in range(16)]
        process.terminate()
        ends = [stream.read().rstrip() for stream in running]
        assert all(end.endswith(b"data: [DONE]") or b"server_stopping" in end for end in ends)
        assert process.wait(20) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_1000_requests(world):
    with serving(world / "valm") as (process, address):

        def ask(number):
            with asked(address, prompt=PROMPT, max_tokens=3, seed=number) as answer:
                answer.read()

        resident = []
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                list(pool.map(ask, range(200)))
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]))
    assert max(resident[1:]) - resident[0] < 10_000  # kB
