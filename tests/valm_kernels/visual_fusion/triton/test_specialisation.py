"""Which kernels are launched, and how many variants of each Triton would compile, with launches that are only recorded.

In a process without the interpreter, where Triton's own binder tells what it would specialise for.
"""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton specialises nothing in an interpreting process", allow_module_level=True)

import triton

from tests.checks.triton.compile_record import Launch, meta_inputs, recorders, specialise, without
from tests.valm_kernels.visual_fusion.problems import Problem
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.inputs import Gradients
from valm_kernels.visual_fusion.triton import backward, forward

ARCH = 90


def inputs_of(problem):
    return checked_inputs(**problem.inputs(torch.float16))


def decoding_step(num_keys, **options):
    """The inputs of one step of a generation: one query, `num_keys` cached keys in memory for many."""
    problem = Problem(batch=1, num_queries=1, prefix=num_keys - 1, head_dim=72, num_images=1, gaps=False, **options)
    cache = torch.zeros(1, 1024, problem.kv_heads, 72, dtype=torch.float16).transpose(1, 2)[:, :, :num_keys]
    return inputs_of(problem)._replace(k=cache, v=cache)


def static_step(num_keys, **options):
    """The same with a cache of constant size, as a CUDA graph would be captured: only the values of tensors change."""
    lengths = torch.tensor([num_keys], dtype=torch.int32)
    return decoding_step(1024, **options)._replace(cache_seqlens=lengths)


def keys_of_a_generation(options, steps, as_launched=lambda launch: launch, step=decoding_step):
    """By kernel, what its launches in the given steps would compile."""
    with recorders(ARCH) as found:
        for num_keys in steps:
            forward.forward(step(num_keys, **options))
    return {
        name: {specialise(as_launched(launch), ARCH).key for launch in recorder.launches}
        for name, recorder in found.items()
        if recorder.launches
    }


def with_default_specialisation(launch):
    return Launch(triton.jit(launch.kernel.fn), launch.arguments, launch.keywords)


@pytest.mark.parametrize("first_key", [None, "left_padding"])
@pytest.mark.parametrize("pool_size", [None, 16])
def test_generation_compiles_each_kernel_once(pool_size, first_key):
    """Over 64 steps the number of keys passes multiples of 16 and the length at which the keys are split further."""
    options = {"pool_size": pool_size, "first_key": first_key}
    steps = range(481, 545)
    keys = keys_of_a_generation(options, steps)
    assert set(keys) == {"forward", "merge"}
    assert all(len(of_kernel) == 1 for of_kernel in keys.values()), {n: len(k) for n, k in keys.items()}
    # the check sees what Triton does by default
    assert len(keys_of_a_generation(options, steps, with_default_specialisation)["forward"]) > 1


@pytest.mark.parametrize("pool_size", [None, 16])
def test_generation_in_a_static_cache_launches_the_same_at_every_step(pool_size):
    """Kernels, grids and numbers are those of the first step, as in a CUDA graph that is replayed."""
    steps = range(481, 545)
    keys = keys_of_a_generation({"pool_size": pool_size}, steps, step=static_step)
    assert {name: len(of_kernel) for name, of_kernel in keys.items()} == {"forward": 1, "merge": 1}
    with recorders(ARCH) as found:
        for num_keys in steps:
            forward.forward(static_step(num_keys, pool_size=pool_size))
    for name in keys:
        given = [[*launch.arguments, *launch.keywords.values()] for launch in found[name].launches]
        numbers = {str([x for x in arguments if not isinstance(x, torch.Tensor)]) for arguments in given}
        assert len(given) == len(steps) and len(numbers) == 1


def launched(inputs, *needed):
    """The gradients that the kernels of the backward were given to fill, by kernel, where only some are needed."""
    lse = torch.empty(inputs.q.shape[:3], dtype=torch.float32, device=inputs.q.device)
    with recorders(ARCH) as found:
        gradients = backward.backward(
            inputs.q, None, None, inputs.q, lse, inputs, [n in needed for n in Gradients._fields]
        )
    assert {name for name, gradient in gradients._asdict().items() if gradient is not None} == set(needed)
    filled = {}
    for name, recorder in found.items():
        for launch in recorder.launches:
            values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
            values |= values["results"]._asdict() if "results" in values else {}
            values |= {f"d{n}": x for n, x in values["gradients"]._asdict().items()} if "gradients" in values else {}
            filled[name] = {n for n, x in values.items() if n.startswith("d") and isinstance(x, torch.Tensor)}
    return filled


def test_nothing_is_computed_for_gradients_that_nobody_needs():
    dense, pooled = (without(meta_inputs(64, torch.float16, pooled), "first_key") for pooled in (False, True))
    assert launched(dense, "q") == {"query": {"dq", "delta"}}
    assert launched(dense, "v") == {"query": {"delta"}, "key": {"delta", "dk", "dv"}}
    assert launched(dense, "image_v", "image_k_bias") == {
        "query": {"delta", "dimage_v", "dimage_k_bias"},
        "bias": {"dimage_k_bias"},
    }
    assert launched(pooled, "q", "image_logit_bias") == {
        "query": {"dq", "delta", "dimage_logit_bias"},
        "bias": {"dimage_logit_bias"},
    }
    assert set(launched(pooled, "image_v")) == {"query", "popular", "pool"}
    biased = without(meta_inputs(64, torch.float16, True, score_bias=True), "first_key")
    assert launched(biased, "image_score_bias") == {"query": {"delta", "dimage_score_bias"}}
    own_query = without(meta_inputs(64, torch.float16, False, image_q=True), "first_key")
    assert launched(own_query, "image_q") == {"query": {"delta", "dimage_q"}}


def test_a_batch_may_be_larger_than_the_second_dimension_of_a_grid():
    """CUDA launches at most 65,535 programs along it."""
    problem = Problem(batch=2**16, num_queries=1, head_dim=8, num_images=1, pool_size=2, first_key="left_padding")
    inputs = inputs_of(problem)
    lse = torch.empty(inputs.q.shape[:3])
    with recorders(ARCH) as found:
        forward.forward(inputs)
        backward.backward(inputs.q, None, None, inputs.q, lse, inputs, [True] * len(Gradients._fields))
    grids = [grid for recorder in found.values() for grid in recorder.grids]
    assert len(grids) == 7 and all(size < 2**16 for grid in grids for size in grid[1:])
