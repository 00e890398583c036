from dataclasses import replace

import pytest
import torch

from tests.valm_kernels.visual_fusion.problems import Problem
from valm_kernels import attention_weights, sort_image_slots, visual_fusion_attn

DENSE = Problem(batch=2, query_heads=4, kv_heads=2, num_queries=5, prefix=2, head_dim=8, num_images=3)
ONE_ROW = replace(DENSE, batch=1)
POOLED = Problem(batch=2, query_heads=4, kv_heads=2, num_queries=5, prefix=2, head_dim=8, num_images=3, pool_size=6)


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


BIASES = ("image_k_bias", "image_v_bias", "image_logit_bias")
OPTIONS = ("image_mask", *BIASES, "image_score_bias", "first_key", "cache_seqlens")

# problem, changed arguments, error, what its message says
WRONG = {
    **{
        f"{name} not a tensor": (DENSE, {name: [1.0]}, TypeError, f"{name} must be a tensor, got list")
        for name in ("q", "k", "v", "image_k", "image_v", "image_q", "image_index", "cu_seqlens", *OPTIONS)
    },
    "image_slots not a tensor": (POOLED, {"image_slots": [1]}, TypeError, "image_slots must be a tensor, got list"),
    "q None": (DENSE, {"q": None}, TypeError, "q must be a tensor, got None"),
    "k None": (DENSE, {"k": None}, TypeError, "k must be a tensor, got None"),
    "v None": (DENSE, {"v": None}, TypeError, "v must be a tensor, got None"),
    # rank
    "q rank": (DENSE, {"q": zeros(4, 5, 8)}, ValueError, r"q must have 4 dimensions .* got shape \(4, 5, 8\)"),
    "k rank": (DENSE, {"k": zeros(2, 7, 8)}, ValueError, "k must have 4 dimensions"),
    "v rank": (DENSE, {"v": zeros(2, 7, 8)}, ValueError, "v must have 4 dimensions"),
    "image_k rank": (DENSE, {"image_k": zeros(2, 5, 3, 8)}, ValueError, "image_k must have 5 dimensions"),
    "image_k pooled rank": (POOLED, {"image_k": zeros(6, 8)}, ValueError, "image_k must have 3 dimensions"),
    "image_v rank": (DENSE, {"image_v": zeros(2, 2, 5, 24)}, ValueError, "image_v must have shape that of image_k"),
    "image_index rank": (
        POOLED,
        {"image_index": zeros(2, 5, dtype=torch.int64)},
        ValueError,
        "image_index must have 3 dimensions",
    ),
    "image_index heads": (
        POOLED,
        {"image_index": zeros(2, 3, 5, 3, dtype=torch.int64)},
        ValueError,
        r"image_index must have shape \(B, Tq, K\) or \(B, Hkv, Tq, K\) = \(2, 2, 5, 3\), got \(2, 3, 5, 3\)",
    ),
    "image_slots of all heads": (
        POOLED,
        {
            "image_index": zeros(2, 2, 5, 3, dtype=torch.int64),
            "image_slots": sort_image_slots(zeros(2, 5, 3, dtype=torch.int64), 6),
        },
        ValueError,
        r"image_slots must have shape \(Hkv, U \+ 1 \+ B Tq K\) = \(2, 37\), got \(37,\)",
    ),
    "image_mask rank": (
        DENSE,
        {"image_mask": zeros(2, 5, dtype=torch.bool)},
        ValueError,
        "image_mask must have 3 dimensions",
    ),
    "image_k_bias rank": (DENSE, {"image_k_bias": zeros(16)}, ValueError, "image_k_bias must have shape"),
    "image_v_bias rank": (DENSE, {"image_v_bias": zeros(16)}, ValueError, "image_v_bias must have shape"),
    "image_logit_bias rank": (DENSE, {"image_logit_bias": zeros(4, 1)}, ValueError, "image_logit_bias must have shape"),
    "image_score_bias rank": (DENSE, {"image_score_bias": zeros(2, 5)}, ValueError, "image_score_bias must have shape"),
    "first_key rank": (DENSE, {"first_key": zeros(5, dtype=torch.int32)}, ValueError, "first_key must have shape"),
    "cache_seqlens rank": (
        DENSE,
        {"cache_seqlens": zeros(2, 5, dtype=torch.int32)},
        ValueError,
        r"cache_seqlens must have shape \(B,\) = \(2,\), got \(2, 5\)",
    ),
    "cache_seqlens number": (DENSE, {"cache_seqlens": 7}, TypeError, "cache_seqlens must be a tensor, got int"),
    "cu_seqlens rank": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([[0, 7]])},
        ValueError,
        r"cu_seqlens must have shape \(N \+ 1,\) with at least one document for each of the 1 rows, got \(1, 2\)",
    ),
    # shape
    "empty batch": (DENSE, {"q": zeros(0, 4, 5, 8)}, ValueError, "q must have no empty dimension"),
    "no queries": (DENSE, {"q": zeros(2, 4, 0, 8)}, ValueError, "q must have no empty dimension"),
    "no keys": (DENSE, {"k": zeros(2, 2, 0, 8)}, ValueError, "k must have no empty dimension"),
    "k batch": (DENSE, {"k": zeros(3, 2, 7, 8)}, ValueError, "k must have shape"),
    "q batch": (DENSE, {"q": zeros(3, 4, 5, 8)}, ValueError, r"k must have shape .* \(3, 2, 7, 8\), got"),
    "k head_dim": (DENSE, {"k": zeros(2, 2, 7, 9)}, ValueError, r"k must have shape .* \(2, 2, 7, 8\), got"),
    "v length": (DENSE, {"v": zeros(2, 2, 6, 8)}, ValueError, "v must have shape"),
    "heads": (DENSE, {"q": zeros(2, 3, 5, 8)}, ValueError, "q must have a multiple of k's 2 heads, got 3"),
    "more queries than keys": (DENSE, {"q": zeros(2, 4, 8, 8)}, ValueError, "k must have at least as many tokens"),
    "head_dim small": (
        DENSE,
        {"q": zeros(2, 4, 5, 4), "k": zeros(2, 2, 7, 4), "v": zeros(2, 2, 7, 4)},
        ValueError,
        "from 8 to 256, got 4",
    ),
    "head_dim large": (
        DENSE,
        {"q": zeros(2, 4, 5, 257), "k": zeros(2, 2, 7, 257), "v": zeros(2, 2, 7, 257)},
        ValueError,
        "from 8 to 256, got 257",
    ),
    "image_q rank": (DENSE, {"image_q": zeros(2, 5, 8)}, ValueError, "image_q must have shape that of q"),
    "image_q heads": (DENSE, {"image_q": zeros(2, 2, 5, 8)}, ValueError, "image_q must have shape that of q"),
    "image_q tokens": (DENSE, {"image_q": zeros(2, 4, 7, 8)}, ValueError, "image_q must have shape that of q"),
    "image_k tokens": (DENSE, {"image_k": zeros(2, 2, 7, 3, 8)}, ValueError, "image_k must have shape"),
    "image_k heads": (DENSE, {"image_k": zeros(2, 4, 5, 3, 8)}, ValueError, "image_k must have shape"),
    "image_k pooled heads": (POOLED, {"image_k": zeros(4, 6, 8)}, ValueError, "image_k must have shape"),
    "image_v pool": (POOLED, {"image_v": zeros(2, 7, 8)}, ValueError, "image_v must have shape"),
    "image_v images": (DENSE, {"image_v": zeros(2, 2, 5, 4, 8)}, ValueError, "image_v must have shape"),
    "too many images": (
        DENSE,
        {"image_k": zeros(2, 2, 5, 65, 8), "image_v": zeros(2, 2, 5, 65, 8), "image_mask": None},
        ValueError,
        "at most 64 images per token .* got 65",
    ),
    "image_index tokens": (
        POOLED,
        {"image_index": zeros(2, 6, 3, dtype=torch.int64)},
        ValueError,
        "image_index must have shape",
    ),
    "image_mask tokens": (
        DENSE,
        {"image_mask": zeros(2, 7, 3, dtype=torch.bool)},
        ValueError,
        "image_mask must have shape",
    ),
    "image_mask images": (
        DENSE,
        {"image_mask": zeros(2, 5, 4, dtype=torch.bool)},
        ValueError,
        "image_mask must have shape",
    ),
    "image_k_bias heads": (DENSE, {"image_k_bias": zeros(4, 8)}, ValueError, "image_k_bias must have shape"),
    "image_v_bias dim": (DENSE, {"image_v_bias": zeros(2, 9)}, ValueError, "image_v_bias must have shape"),
    "image_logit_bias heads": (DENSE, {"image_logit_bias": zeros(2)}, ValueError, "image_logit_bias must have shape"),
    **{
        f"image_score_bias {what}": (
            problem,
            {"image_score_bias": zeros(*shape)},
            ValueError,
            r"image_score_bias must have shape \(B, Tq, K\) = \(2, 5, 3\), got",
        )
        for what, problem, shape in (
            ("batch", DENSE, (1, 5, 3)),
            ("tokens", DENSE, (2, 7, 3)),
            ("images", DENSE, (2, 5, 4)),
            ("of a pool", POOLED, (2, 5, 6)),
            ("per head", POOLED, (2, 4, 5, 3)),
        )
    },
    "image_score_bias without images": (
        replace(DENSE, num_images=0),
        {"image_score_bias": zeros(2, 5, 3)},
        ValueError,
        r"image_score_bias must have shape \(B, Tq, K\) = \(2, 5, 0\), got \(2, 5, 3\)",
    ),
    "image_index batch": (
        POOLED,
        {"image_index": zeros(3, 5, 3, dtype=torch.int64)},
        ValueError,
        "image_index must have shape",
    ),
    "image_mask batch": (
        DENSE,
        {"image_mask": zeros(3, 5, 3, dtype=torch.bool)},
        ValueError,
        "image_mask must have shape",
    ),
    "first_key batch": (DENSE, {"first_key": zeros(1, 5, dtype=torch.int32)}, ValueError, "first_key must have shape"),
    "first_key tokens": (DENSE, {"first_key": zeros(2, 7, dtype=torch.int32)}, ValueError, "first_key must have shape"),
    "cache_seqlens batch": (
        DENSE,
        {"cache_seqlens": zeros(3, dtype=torch.int32)},
        ValueError,
        "cache_seqlens must have shape",
    ),
    "cu_seqlens batch": (
        DENSE,
        {"cu_seqlens": torch.tensor([0, 7])},
        ValueError,
        "cu_seqlens must have shape .* for each of the 2 rows, got",
    ),
    "cu_seqlens without documents": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([0])},
        ValueError,
        r"cu_seqlens must have shape .* for each of the 1 rows, got \(1,\)",
    ),
    "max_seqlen alone": (ONE_ROW, {"max_seqlen": 7}, ValueError, "max_seqlen is the length of the longest document"),
    "max_seqlen not a number": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([0, 7]), "max_seqlen": 7.0},
        TypeError,
        "max_seqlen must be an int or None, got float",
    ),
    "max_seqlen zero": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([0, 7]), "max_seqlen": 0},
        ValueError,
        "max_seqlen must be at least 1, got 0",
    ),
    "max_seqlen too small": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([0, 2, 7]), "max_seqlen": 4},
        ValueError,
        "max_seqlen is 4, but document 1 of cu_seqlens has 5 tokens",
    ),
    "cu_seqlens across rows": (
        DENSE,
        {"cu_seqlens": torch.tensor([0, 6, 14])},
        ValueError,
        "cu_seqlens must have the bound of each row of 7 keys, but document 1, 6 to 14, is in two rows",
    ),
    "image_slots rank": (
        POOLED,
        {"image_slots": zeros(1, 37, dtype=torch.int32)},
        ValueError,
        r"image_slots must have shape \(U \+ 1 \+ B Tq K,\) = \(37,\), got \(1, 37\)",
    ),
    "image_slots length": (
        POOLED,
        {"image_slots": zeros(30, dtype=torch.int32)},
        ValueError,
        r"image_slots must have shape .* = \(37,\), got \(30,\)",
    ),
    "image_slots without image_index": (
        DENSE,
        {"image_slots": zeros(37, dtype=torch.int32)},
        ValueError,
        "image_slots belongs to the pooled layout: give image_index too",
    ),
    "image_slots without images": (
        replace(DENSE, num_images=0),
        {"image_slots": zeros(37, dtype=torch.int32)},
        ValueError,
        "image_slots belongs to the pooled layout: give image_index too",
    ),
    # dtype
    "image_slots dtype": (
        POOLED,
        {"image_slots": zeros(37, dtype=torch.int64)},
        TypeError,
        "image_slots must be torch.int32 .* got torch.int64",
    ),
    "q integer": (DENSE, {"q": zeros(2, 4, 5, 8, dtype=torch.int64)}, TypeError, "q must be float32, .*int64"),
    "q complex": (DENSE, {"q": zeros(2, 4, 5, 8, dtype=torch.complex64)}, TypeError, "q must be float32"),
    "k dtype": (DENSE, {"k": zeros(2, 2, 7, 8, dtype=torch.bfloat16)}, TypeError, "k must have the dtype of q"),
    "v dtype": (DENSE, {"v": zeros(2, 2, 7, 8, dtype=torch.float16)}, TypeError, "v must have the dtype of q"),
    "image_q dtype": (
        DENSE,
        {"image_q": zeros(2, 4, 5, 8, dtype=torch.float16)},
        TypeError,
        "image_q must have the dtype of q",
    ),
    "image_k dtype": (
        DENSE,
        {"image_k": zeros(2, 2, 5, 3, 8, dtype=torch.float64)},
        TypeError,
        "image_k must have the dtype of q",
    ),
    "image_v integer": (
        DENSE,
        {"image_v": zeros(2, 2, 5, 3, 8, dtype=torch.int32)},
        TypeError,
        "image_v must have the dtype of q",
    ),
    "image_index dtype": (
        POOLED,
        {"image_index": zeros(2, 5, 3)},
        TypeError,
        "image_index must be torch.int32 or torch.int64",
    ),
    "image_index narrow": (
        POOLED,
        {"image_index": zeros(2, 5, 3, dtype=torch.int16)},
        TypeError,
        "image_index must be torch.int32 or torch.int64 .* got torch.int16",
    ),
    "image_mask dtype": (
        DENSE,
        {"image_mask": zeros(2, 5, 3, dtype=torch.uint8)},
        TypeError,
        "image_mask must be torch.bool",
    ),
    "image_k_bias dtype": (
        DENSE,
        {"image_k_bias": zeros(2, 8, dtype=torch.bfloat16)},
        TypeError,
        "image_k_bias must be torch.float32 beside",
    ),
    "image_v_bias dtype": (
        DENSE,
        {"image_v_bias": zeros(2, 8, dtype=torch.float64)},
        TypeError,
        "image_v_bias must be torch.float32",
    ),
    "image_logit_bias dtype": (
        DENSE,
        {"image_logit_bias": zeros(4, dtype=torch.int64)},
        TypeError,
        "image_logit_bias must be torch.float32",
    ),
    "image_score_bias dtype": (
        DENSE,
        {"image_score_bias": zeros(2, 5, 3, dtype=torch.float16)},
        TypeError,
        "image_score_bias must be torch.float32 beside",
    ),
    "image_score_bias of float64": (
        DENSE,
        {"image_score_bias": zeros(2, 5, 3, dtype=torch.float64)},
        TypeError,
        "image_score_bias must be torch.float32 beside a torch.float32 q, got torch.float64",
    ),
    "first_key dtype": (
        DENSE,
        {"first_key": zeros(2, 5, dtype=torch.int64)},
        TypeError,
        "first_key must be torch.int32",
    ),
    "cache_seqlens dtype": (
        DENSE,
        {"cache_seqlens": zeros(2, dtype=torch.int64)},
        TypeError,
        "cache_seqlens must be torch.int32 beside a torch.float32 q, got torch.int64",
    ),
    "cu_seqlens dtype": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([0.0, 7.0])},
        TypeError,
        "cu_seqlens must be torch.int32 or torch.int64 beside a torch.float32 q, got torch.float32",
    ),
    # device
    **{
        f"{name} device": (DENSE, {name: zeros(2, 2, 7, 8, device="meta")}, ValueError, f"{name} must be on the device")
        for name in (
            "k",
            "v",
            "image_k",
            "image_v",
            "image_q",
            "image_k_bias",
            "image_v_bias",
            "image_logit_bias",
            "image_score_bias",
            "first_key",
            "cu_seqlens",
            "cache_seqlens",
        )
    },
    "image_index device": (POOLED, {"image_index": zeros(1, device="meta")}, ValueError, "image_index must be on"),
    "image_mask device": (DENSE, {"image_mask": zeros(1, device="meta")}, ValueError, "image_mask must be on"),
    # combinations
    "mask beside index": (
        POOLED,
        {"image_mask": zeros(2, 5, 3, dtype=torch.bool)},
        ValueError,
        "image_mask belongs to the dense layout",
    ),
    "pool without index": (POOLED, {"image_index": None}, ValueError, "the pooled layout .* needs image_index"),
    "dense with index": (
        DENSE,
        {"image_mask": None, "image_index": zeros(2, 5, 3, dtype=torch.int64)},
        ValueError,
        "image_k must have 3 dimensions",
    ),
    "image_v missing": (DENSE, {"image_v": None}, ValueError, "image_v must be given together with image_k"),
    "image_k missing": (DENSE, {"image_k": None}, ValueError, "image_k must be given together with image_v"),
    "index without images": (
        POOLED,
        {"image_k": None, "image_v": None},
        ValueError,
        "image_k must be given for the 3 slots of image_index",
    ),
    "cu_seqlens not causal": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([0, 7]), "causal": False},
        ValueError,
        "cu_seqlens needs causal=True",
    ),
    "cu_seqlens beside cache_seqlens": (
        ONE_ROW,
        {"cu_seqlens": torch.tensor([0, 7]), "cache_seqlens": torch.tensor([7]).int()},
        ValueError,
        "cu_seqlens cannot be combined with cache_seqlens",
    ),
    # values
    **{
        f"cu_seqlens {what}": (ONE_ROW, {"cu_seqlens": torch.tensor(bounds).int()}, ValueError, message)
        for what, bounds, message in (
            ("begins late", [1, 7], "must begin with 0 and end with 7, .* got 1 and 7"),
            ("ends early", [0, 5], "must begin with 0 and end with 7, .* got 0 and 5"),
            ("ends late", [0, 9], "must begin with 0 and end with 7, .* got 0 and 9"),
            ("falls", [0, 4, 3, 7], "must not fall, but document 1 begins at 4 and ends at 3"),
        )
    },
    "index too large": (
        POOLED,
        {"image_index": torch.full((2, 5, 3), 6)},
        ValueError,
        "image_index must be -1 .* from 0 to 5, got 6",
    ),
    "index too small": (
        POOLED,
        {"image_index": torch.full((2, 5, 3), -2)},
        ValueError,
        "image_index must be -1 .* got -2",
    ),
    "causal": (DENSE, {"causal": 1}, TypeError, "causal must be a bool, got int"),
    "scale": (DENSE, {"scale": "0.1"}, TypeError, "scale must be a number or None, got str"),
    "scale bool": (DENSE, {"scale": True}, TypeError, "scale must be a number or None, got bool"),
    "scale infinite": (DENSE, {"scale": float("inf")}, ValueError, "scale must be positive and finite, got inf"),
    "scale NaN": (DENSE, {"scale": float("nan")}, ValueError, "scale must be positive and finite, got nan"),
    "scale zero": (DENSE, {"scale": 0}, ValueError, "scale must be positive and finite, got 0"),
    "scale subnormal": (
        DENSE,
        {"scale": 1e-310},
        ValueError,
        r"scale must be from 2\*\*-60 to 2\*\*60, .*, got 1e-310",
    ),
    "scale huge": (DENSE, {"scale": 1e38}, ValueError, r"scale must be from 2\*\*-60 to 2\*\*60, .*, got 1e\+38"),
    "softcap subnormal": (DENSE, {"softcap": 5e-324}, ValueError, r"softcap must be from 2\*\*-60 to 2\*\*60"),
    "scale negative": (DENSE, {"scale": -0.3}, ValueError, "scale must be positive and finite, got -0.3"),
    "softcap": (DENSE, {"softcap": "50"}, TypeError, "softcap must be a number or None, got str"),
    "softcap bool": (DENSE, {"softcap": True}, TypeError, "softcap must be a number or None, got bool"),
    "softcap infinite": (DENSE, {"softcap": float("inf")}, ValueError, "softcap must be positive and finite, got inf"),
    "softcap NaN": (DENSE, {"softcap": float("nan")}, ValueError, "softcap must be positive and finite, got nan"),
    "softcap zero": (DENSE, {"softcap": 0}, ValueError, "softcap must be positive and finite, got 0"),
    "softcap negative": (DENSE, {"softcap": -50.0}, ValueError, "softcap must be positive and finite, got -50.0"),
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


@pytest.mark.parametrize("name", ["image_index", "image_mask", "first_key", "cu_seqlens", "cache_seqlens"])
def test_integer_arguments_take_no_gradient(name):
    """PyTorch itself refuses it for whole numbers; what could carry one has the wrong dtype here."""
    problem = POOLED if name == "image_index" else DENSE
    inputs = {"first_key": zeros(2, 5, dtype=torch.int32), "cache_seqlens": torch.tensor([6, 7]).int()}
    inputs |= {"cu_seqlens": torch.tensor([0, 7])} | problem.inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"[Oo]nly Tensors of floating point"):
        inputs[name].requires_grad_()
    inputs[name] = inputs[name].float().requires_grad_()
    with pytest.raises(TypeError, match=f"{name} must be torch"):
        visual_fusion_attn(**inputs)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_image_q_is_checked_without_images(impl):
    inputs = Problem(num_images=0, num_queries=5, biases=False).inputs(torch.float32)
    with pytest.raises(ValueError, match="image_q must have shape that of q"):
        visual_fusion_attn(**inputs, image_q=zeros(2, 4, 6, 16), impl=impl)


def test_a_text_bias_that_does_not_fit_is_refused():
    inputs = POOLED.inputs(torch.float32)
    q, k = inputs["q"], inputs["k"]
    with pytest.raises(ValueError, match=r"text_bias must have shape \(B or 1, Hq or 1, Tq, Tk\)"):
        attention_weights(q, k, None, text_bias=torch.zeros(1, 1, q.shape[2], k.shape[2] + 1))
    with pytest.raises(TypeError, match="text_bias must be floating point"):
        attention_weights(q, k, None, text_bias=torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=torch.bool))
    with pytest.raises(ValueError, match="text_bias must be on the device of q, cpu, but is on meta"):
        attention_weights(q, k, None, text_bias=torch.zeros(1, 1, q.shape[2], k.shape[2], device="meta"))
    wide = attention_weights(q, k, None, text_bias=torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=torch.float64))
    assert {part.dtype for part in wide} == {torch.promote_types(q.dtype, torch.float32)}
