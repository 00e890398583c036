from dataclasses import replace

import pytest
import torch

from tests.valm_kernels.visual_fusion.problems import Problem
from valm_kernels import attention_weights, visual_fusion_attn
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.inputs import TENSOR_NAMES

DENSE = Problem(batch=2, query_heads=4, kv_heads=2, num_queries=5, prefix=2, head_dim=8, num_images=3)
ONE_ROW = replace(DENSE, batch=1)
POOLED = replace(DENSE, pool_size=6)
NO_IMAGES = replace(DENSE, num_images=0)


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


# argument, its dtype, what it must
LIKE_Q = "have the dtype of q, torch.float32"
WIDE = "be torch.float32 for a torch.float32 q"
WHOLE = "be torch.int32 for a torch.float32 q"
INDICES = "be torch.int32 or torch.int64 for a torch.float32 q"
WRONG_DTYPES = [
    ("q", torch.int64, "be float32, float16, bfloat16 or float64"),
    ("q", torch.complex64, "be float32, float16, bfloat16 or float64"),
    ("k", torch.bfloat16, LIKE_Q),
    ("v", torch.float16, LIKE_Q),
    ("image_q", torch.float16, LIKE_Q),
    ("image_k", torch.float64, LIKE_Q),
    ("image_v", torch.int32, LIKE_Q),
    ("image_index", torch.float32, INDICES),
    ("image_index", torch.int16, INDICES),
    ("image_mask", torch.uint8, "be torch.bool for a torch.float32 q"),
    ("image_k_bias", torch.bfloat16, WIDE),
    ("image_v_bias", torch.float64, WIDE),
    ("image_logit_bias", torch.int64, WIDE),
    ("image_score_bias", torch.float16, WIDE),
    ("image_score_bias", torch.float64, WIDE),
    ("first_key", torch.int64, WHOLE),
    ("cache_seqlens", torch.int64, WHOLE),
    ("cu_seqlens", torch.float32, INDICES),
]

# problem, argument, shapes of it, what the message says after its name
OF_SCORES = r"must have shape \(B, Tq, K\) = \(2, 5, 3\), got"
WRONG_SHAPES = [
    (DENSE, "q", [(4, 5, 8)], r"must have 4 dimensions .* got shape \(4, 5, 8\)"),
    (DENSE, "k", [(2, 7, 8)], "must have 4 dimensions"),
    (DENSE, "v", [(2, 7, 8)], "must have 4 dimensions"),
    (DENSE, "q", [(2, 0, 5, 8), (2, 4, 5, 0)], "must have heads and a head_dim D, got shape"),
    (DENSE, "k", [(2, 0, 7, 8)], "must have heads and a head_dim D, got shape"),
    (DENSE, "k", [(3, 2, 7, 8)], "must have shape"),
    (DENSE, "k", [(2, 2, 7, 9)], r"must have shape .* \(2, 2, 7, 8\), got"),
    (DENSE, "v", [(2, 2, 6, 8)], "must have shape"),
    (DENSE, "q", [(2, 3, 5, 8)], "must have a multiple of k's 2 heads, got 3"),
    (DENSE, "image_q", [(2, 5, 8), (2, 2, 5, 8), (2, 4, 7, 8)], "must have shape q.shape"),
    (DENSE, "image_k", [(2, 5, 3, 8)], "must have 5 dimensions"),
    (DENSE, "image_k", [(2, 2, 7, 3, 8), (2, 4, 5, 3, 8)], "must have shape"),
    (DENSE, "image_v", [(2, 2, 5, 24), (2, 2, 5, 4, 8)], "must have shape image_k.shape"),
    (DENSE, "image_mask", [(2, 5)], "must have 3 dimensions"),
    (DENSE, "image_mask", [(2, 7, 3), (2, 5, 4), (3, 5, 3)], "must have shape"),
    (DENSE, "image_k_bias", [(16,), (4, 8)], "must have shape"),
    (DENSE, "image_v_bias", [(16,), (2, 9)], "must have shape"),
    (DENSE, "image_logit_bias", [(4, 1), (2,)], "must have shape"),
    (DENSE, "image_score_bias", [(2, 5), (1, 5, 3), (2, 7, 3), (2, 5, 4)], OF_SCORES),
    (DENSE, "first_key", [(5,), (1, 5), (2, 7)], "must have shape"),
    (DENSE, "cache_seqlens", [(2, 5), (3,)], r"must have shape \(B,\) = \(2,\), got \("),
    (POOLED, "image_k", [(6, 8)], "must have 3 dimensions"),
    (POOLED, "image_k", [(4, 6, 8)], "must have shape"),
    (POOLED, "image_v", [(2, 7, 8)], "must have shape"),
    (POOLED, "image_index", [(2, 5)], "must have 3 dimensions"),
    (POOLED, "image_index", [(2, 6, 3), (3, 5, 3)], "must have shape"),
    (
        POOLED,
        "image_index",
        [(2, 3, 5, 3)],
        r"must have shape .* or \(B, Hkv, Tq, K\) = \(2, 2, 5, 3\), got \(2, 3, 5, 3\)",
    ),
    (POOLED, "image_score_bias", [(2, 5, 6), (2, 4, 5, 3)], OF_SCORES),
    (POOLED, "image_mask", [(2, 5, 3)], "belongs to the dense layout"),
    (NO_IMAGES, "image_q", [(2, 4, 6, 8)], "must have shape q.shape"),
    (NO_IMAGES, "image_score_bias", [(2, 5, 3)], r"must have shape \(B, Tq, K\) = \(2, 5, 0\), got \(2, 5, 3\)"),
]
NOT_FLOAT32 = {"image_index": torch.int64, "image_mask": torch.bool}
NOT_FLOAT32 |= dict.fromkeys(("first_key", "cache_seqlens"), torch.int32)

# scale or softcap, error, what the message says after its name
WRONG_NUMBERS = [
    ("0.1", TypeError, "must be a number or None, got str"),
    (True, TypeError, "must be a number or None, got bool"),
    (float("inf"), ValueError, "must be positive and finite, got inf"),
    (float("nan"), ValueError, "must be positive and finite, got nan"),
    (0, ValueError, "must be positive and finite, got 0"),
    (-0.3, ValueError, "must be positive and finite, got -0.3"),
    (1e-310, ValueError, r"must be from 2\*\*-60 to 2\*\*60, .*, got 1e-310"),
    (1e38, ValueError, r"must be from 2\*\*-60 to 2\*\*60, .*, got 1e\+38"),
]


def documents(*bounds, **options):
    return {"cu_seqlens": torch.tensor(bounds), **options}


def of_head_dim(size):
    return {"q": zeros(2, 4, 5, size), "k": zeros(2, 2, 7, size), "v": zeros(2, 2, 7, size)}


def index_with(row):
    index = zeros(2, 5, 3, dtype=torch.int64)
    index[1, 3, 2] = row
    return {"image_index": index}


TOO_MANY = zeros(2, 2, 5, 65, 8)

# problem, changed arguments, error, what its message says
WRONG = {
    **{
        f"{name} not a tensor": (DENSE, {name: [1.0]}, TypeError, f"{name} must be a tensor, got list")
        for name in TENSOR_NAMES
    },
    **{f"{name} None": (DENSE, {name: None}, TypeError, f"{name} must be a tensor, got None") for name in "qkv"},
    **{
        f"{name} device": (DENSE, {name: zeros(1, device="meta")}, ValueError, f"{name} must be on the device")
        for name in TENSOR_NAMES[1:]
    },
    **{
        f"{name} {dtype}": (DENSE, {name: zeros(1, dtype=dtype)}, TypeError, f"{name} must {must}, got {dtype}")
        for name, dtype, must in WRONG_DTYPES
    },
    **{
        f"{name} {shape} beside {problem.num_images} images, pool {problem.pool_size}": (
            problem,
            {name: zeros(*shape, dtype=NOT_FLOAT32.get(name, torch.float32))},
            ValueError,
            f"{name} {message}",
        )
        for problem, name, shapes, message in WRONG_SHAPES
        for shape in shapes
    },
    **{
        f"{name} {number!r}": (DENSE, {name: number}, error, f"{name} {message}")
        for name in ("scale", "softcap")
        for number, error, message in WRONG_NUMBERS
    },
    # of two arguments together
    "q batch": (DENSE, {"q": zeros(3, 4, 5, 8)}, ValueError, r"k must have shape .* \(3, 2, 7, 8\), got"),
    "more queries than keys": (DENSE, {"q": zeros(2, 4, 8, 8)}, ValueError, "k must have at least as many tokens"),
    "head_dim small": (DENSE, of_head_dim(4), ValueError, "from 8 to 256, got 4"),
    "head_dim large": (DENSE, of_head_dim(257), ValueError, "from 8 to 256, got 257"),
    "too many images": (
        DENSE,
        {"image_k": TOO_MANY, "image_v": TOO_MANY, "image_mask": None},
        ValueError,
        "at most 64 images per token .* got 65",
    ),
    "pool without index": (POOLED, {"image_index": None}, ValueError, "the pooled layout .* needs image_index"),
    "dense with index": (DENSE, {"image_mask": None, **index_with(0)}, ValueError, "image_k must have 3 dimensions"),
    "image_v missing": (DENSE, {"image_v": None}, ValueError, "image_v must be given together with image_k"),
    "image_k missing": (DENSE, {"image_k": None}, ValueError, "image_k must be given together with image_v"),
    "index without images": (
        POOLED,
        {"image_k": None, "image_v": None},
        ValueError,
        "image_k must be given for the 3 slots of image_index",
    ),
    # documents
    **{
        f"cu_seqlens {bounds}": (problem, documents(*bounds), ValueError, f"cu_seqlens must {must}")
        for problem, bounds, must in (
            (ONE_ROW, [[0, 7]], r"have shape \(N \+ 1,\) with .* for each of the 1 rows, got \(1, 2\)"),
            (ONE_ROW, [0], r"have shape .* for each of the 1 rows, got \(1,\)"),
            (DENSE, [0, 7], "have shape .* for each of the 2 rows, got"),
            (DENSE, [0, 6, 14], "contain the bound of each row of 7 keys, but document 1, 6 to 14, is in two rows"),
            (ONE_ROW, [1, 7], "begin with 0 and end with 7, .* got 1 and 7"),
            (ONE_ROW, [0, 5], "begin with 0 and end with 7, .* got 0 and 5"),
            (ONE_ROW, [0, 9], "begin with 0 and end with 7, .* got 0 and 9"),
            (ONE_ROW, [0, 4, 3, 7], "not fall, but document 1 begins at 4 and ends at 3"),
        )
    },
    "not causal": (ONE_ROW, documents(0, 7, causal=False), ValueError, "cu_seqlens needs causal=True"),
    "cu_seqlens beside cache_seqlens": (
        ONE_ROW,
        documents(0, 7, cache_seqlens=torch.tensor([7]).int()),
        ValueError,
        "cu_seqlens cannot be combined with cache_seqlens",
    ),
    "max_seqlen alone": (ONE_ROW, {"max_seqlen": 7}, ValueError, "max_seqlen is the length of the longest document"),
    **{
        f"max_seqlen {most}": (ONE_ROW, documents(0, 2, 7, max_seqlen=most), error, f"max_seqlen {message}")
        for most, error, message in (
            (7.0, TypeError, "must be an int or None, got float"),
            (0, ValueError, "must be at least 1, got 0"),
            (4, ValueError, "is 4, but document 1 of cu_seqlens has 5 tokens"),
        )
    },
    # values
    **{
        f"index {row}": (POOLED, index_with(row), ValueError, rf"image_index must be -1 .* from 0 to 5, got {row}")
        for row in (-2, 6)
    },
    **{
        f"cache_seqlens {length}": (
            DENSE,
            {"cache_seqlens": torch.tensor([6, length]).int()},
            ValueError,
            rf"cache_seqlens must be from 0 to 7, .* got {length}",
        )
        for length in (-1, 8)
    },
    "causal": (DENSE, {"causal": 1}, TypeError, "causal must be a bool, got int"),
    "return_lse": (DENSE, {"return_lse": 1}, TypeError, "return_lse must be a bool, got int"),
    "return_image_weights": (
        DENSE,
        {"return_image_weights": None},
        TypeError,
        "return_image_weights must be a bool, got NoneType",
    ),
}


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case, impl):
    problem, changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        visual_fusion_attn(**{**problem.inputs(torch.float32), "impl": impl, **changes})


def test_a_text_bias_that_does_not_fit_is_refused():
    inputs = POOLED.inputs(torch.float32)
    q, k = inputs["q"], inputs["k"]
    with pytest.raises(ValueError, match=r"text_bias must have shape \(B or 1, Hq or 1, Tq, Tk\)"):
        attention_weights(q, k, None, text_bias=zeros(1, 1, 5, 8))
    with pytest.raises(TypeError, match="text_bias must be floating point"):
        attention_weights(q, k, None, text_bias=zeros(1, 1, 5, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="text_bias must be on the device of q, cpu, but is on meta"):
        attention_weights(q, k, None, text_bias=zeros(1, 1, 5, 7, device="meta"))
    wide = attention_weights(q, k, None, text_bias=zeros(1, 1, 5, 7, dtype=torch.float64))
    assert {part.dtype for part in wide} == {torch.float32}


def test_no_argument_is_dropped():
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        checked_inputs(**DENSE.inputs(), window=4)
