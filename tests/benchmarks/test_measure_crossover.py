"""From which length on flash or cuDNN's attention is said to be faster, with a stand-in for the card."""

import json

import pytest
import torch

from benchmarks.outcomes import DEVICE_LOST
from benchmarks.valm_kernels import measure_crossover
from benchmarks.valm_kernels.measure_crossover import CUDNN, LENGTHS, TOKENS, cases, measure, read_times, shortest
from benchmarks.valm_kernels.tune_tiles import BEGUN_AGAIN, Case, launches, works
from tests.checks.triton.compile_record import specialise
from valm_kernels.visual_fusion import crossover, flash

ONE, TWO = measure_crossover.ONE_KERNEL, measure_crossover.FLASH


@pytest.fixture
def card(monkeypatch):
    """A card on which both take a time of their own at each length; returns these, and the calls measured."""
    times, measured = {}, []

    def do_bench_cudagraph(call, rep, return_mode):
        call()
        case = measured[-1]
        impl = ONE if not case.flash else CUDNN if flash.uses_cudnn(None) else TWO
        time = times.get((case.head_dim, case.keys, impl), 1.0)
        if isinstance(time, BaseException):
            raise time
        return time

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure_crossover, "capability", lambda device: 90)
    monkeypatch.setattr(measure_crossover.triton.testing, "do_bench_cudagraph", do_bench_cudagraph)
    monkeypatch.setattr(Case, "inputs", lambda case, device: None)
    monkeypatch.setattr(measure_crossover, "has_results_of_one_kernel", lambda case, inputs: True)
    monkeypatch.setattr(Case, "run", lambda case, inputs: measured.append(case))
    return times, measured


def lengths(folder, name="keys"):
    """The measured lengths as the package reads them, by compute capability and head dimension."""
    return {size: entry[name] for size, entry in crossover.read_measured(folder / "crossover.json").items()}


def test_each_length_has_the_same_tokens_and_a_backward():
    found = list(cases())
    assert len(found) == (3 + 3 + 2) * len(LENGTHS)  # cuDNN does not support 256
    for head_dim, length, impl, case in found:
        assert (case.head_dim, case.queries, case.keys, case.flash) == (head_dim, length, length, impl != ONE)
        assert case.batch * length == TOKENS and "query" in case.kernels


def test_all_it_launches_was_compiled_for_the_tiles():
    """So that its step takes no time for the compiler."""

    def variants(case, arch=90):
        work = launches(case, arch, None, None)
        return {(launch.kernel.fn.__name__, specialise(launch, arch).key) for launch in work}

    compiled = set().union(*(variants(case) for case, kernel, _ in works(90) if kernel is None))
    needed = set().union(*(variants(case) for *_, case in cases()))
    assert needed and needed <= compiled


@pytest.mark.parametrize(
    ("two", "keys"),
    [
        ([2, 2, 0.9, 0.9, 0.9], 2048),
        ([0.9, 2, 0.9, 0.9, 0.9], 2048),
        ([0.9] * 5, 512),
        ([0.9, 0.9, 0.9, 0.9, 1.0], None),
        ([0.9, 0.9, 0.9, 0.98, 0.9], 8192),  # 2 % may be chance
        ([2, 2, 2, 2, 0.9], 8192),
    ],
)
def test_the_length_is_the_least_from_which_on_flash_attention_was_faster(two, keys):
    times = {(64, length, ONE): (1.0, "") for length in LENGTHS}
    times |= {(64, length, TWO): (time, "") for length, time in zip(LENGTHS, two, strict=True)}
    assert shortest(times, 64, ONE, TWO) == keys


@pytest.mark.parametrize(
    ("two", "cudnn", "keys"),
    [
        ([2, 2, 0.9, 0.9, 0.9], [2, 0.8, 0.8, 0.8, 0.8], 1024),
        ([2, 0.7, 0.9, 0.9, 0.9], [2, 0.8, 0.8, 0.8, 0.8], 2048),  # flash attention is faster at 1,024
        ([0.7] * 5, [0.8] * 5, None),
        ([2] * 5, [1.1] * 5, None),
        ([0.9] * 5, [0.89] * 5, None),  # 1 % may be chance
        ([0.9] * 5, [0.8, 0.8, RuntimeError("cuDNN Frontend error"), 0.8, 0.8], None),
        ([0.9] * 5, [2, RuntimeError("cuDNN Frontend error"), 2, 0.8, 0.8], None),
    ],
)
def test_cudnn_is_taken_from_the_length_on_where_it_was_faster_than_both(card, tmp_path, two, cudnn, keys):
    times, _ = card
    for impl, column in ((TWO, two), (CUDNN, cudnn)):
        times |= {(64, length, impl): time for length, time in zip(LENGTHS, column, strict=True)}
    assert measure(tmp_path) == []
    assert lengths(tmp_path, "cudnn_keys") == {(90, 64): keys, (90, 128): None, (90, 256): None}
    assert read_times(tmp_path / "crossover.csv")[64, 4096, CUDNN][0] == cudnn[3]


def test_cudnn_is_not_taken_with_other_results(card, monkeypatch, tmp_path):
    times, _ = card
    times |= {(head_dim, length, CUDNN): 0.5 for head_dim in (64, 128) for length in LENGTHS}

    def agrees(case, inputs):
        return not (flash.uses_cudnn(inputs) and (case.head_dim, case.keys) == (64, 512))

    monkeypatch.setattr(measure_crossover, "has_results_of_one_kernel", agrees)
    assert measure(tmp_path) == []
    assert lengths(tmp_path, "cudnn_keys") == {(90, 64): None, (90, 128): 512, (90, 256): None}


def test_the_package_reads_what_was_measured(card, monkeypatch, tmp_path):
    times, measured = card
    times |= {(64, 4096, TWO): 0.8, (64, 8192, TWO): 0.7, (256, 8192, TWO): RuntimeError("out of memory")}
    measure(tmp_path)
    # at 256 a time is missing
    assert lengths(tmp_path) == {(90, 64): 4096, (90, 128): None}
    assert len(measured) == len(list(cases()))
    entry = json.loads((tmp_path / "crossover.json").read_text())[0]
    assert (entry["device"], entry["torch"]) == ("a card", torch.__version__)
    del times[256, 8192, TWO]  # what failed once may have been short of memory
    assert measure(tmp_path) == []
    assert len(measured) == len(list(cases())) + 1, "measured again"
    assert (90, 256) in lengths(tmp_path)


def test_no_length_without_all_times_or_from_other_results(card, monkeypatch, tmp_path):
    times, measured = card
    times |= {(64, length, ONE): RuntimeError("CUDA out of memory") for length in LENGTHS}
    times |= {(128, length, TWO): 0.5 for length in LENGTHS}
    agrees = "has_results_of_one_kernel"
    monkeypatch.setattr(measure_crossover, agrees, lambda case, _: (case.head_dim, case.keys) != (128, 512))
    monkeypatch.setattr("sys.argv", ["measure_crossover", str(tmp_path)])
    for _ in range(3):  # twice, and then no more
        with pytest.raises(SystemExit, match=r"times are missing:\n(.*\n)*flash.* at 512 keys of 128: other results"):
            measure_crossover.main()
    assert len(measured) == len(list(cases())) + len(LENGTHS)
    assert list(lengths(tmp_path)) == [(90, 256)]


def test_a_lost_card_ends_the_process_and_the_next_goes_on(card, monkeypatch, tmp_path):
    _, measured = card

    def synchronize():
        if len(measured) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("sys.argv", ["measure_crossover", str(tmp_path)])
    with pytest.raises(SystemExit) as raised:
        measure_crossover.main()
    assert raised.value.code == DEVICE_LOST
    measure_crossover.main()
    assert [(case.head_dim, case.keys) for case in measured] == [(dim, keys) for dim, keys, _, _ in cases()]


def test_what_was_stopped_is_tried_again_and_what_kills_the_process_twice(card, tmp_path):
    times, measured = card
    times |= {(dim, length, TWO): 0.9 for dim in (64, 128) for length in LENGTHS}
    times |= {(64, 512, TWO): KeyboardInterrupt(), (128, 4096, TWO): KeyboardInterrupt()}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path)
    del times[128, 4096, TWO]  # it was the end of the step's time
    times[128, 4096, TWO] = 0.9
    measure(tmp_path)
    assert len(measured) == len(list(cases())) + 2
    assert read_times(tmp_path / "crossover.csv")[64, 512, TWO] == (None, BEGUN_AGAIN)
    assert lengths(tmp_path) == {(90, 128): 512, (90, 256): None}
