"""That PyTorch's own functions for FlashAttention-3 and -4, which are private, take the calls of flash.py."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.valm_kernels.visual_fusion.test_flash import DOCUMENTS, GROUPED, checked
from valm_kernels.visual_fusion import flash
from valm_kernels.visual_fusion.inputs import Inputs

pytestmark = pytest.mark.slow

# Of the modules torch.nn.attention._fa3 and _fa4: what takes the place of each operator.
REPLACEMENTS = {
    "_flash": "scaled_dot_product_flash_attention_forward_impl",
    "_flash_backward": "scaled_dot_product_flash_attention_backward_impl",
    "_packed_flash": "flash_attention_forward_impl",
    "_packed_flash_backward": "flash_attention_backward_impl",
}


@pytest.mark.parametrize("problem", [GROUPED, DOCUMENTS])
@pytest.mark.parametrize("name", ["_fa3", "_fa4"])
def test_flash_attention_3_and_4_take_the_calls(monkeypatch, name, problem):
    """They check the arguments and call kernels that are not here."""
    module = pytest.importorskip(f"torch.nn.attention.{name}")

    def forward(q, k, v, *arguments, **options):
        """Their kernels: lse is (B, H, T), or (H, T) of documents."""
        *batch, tokens, heads, _ = q.shape
        lse = torch.empty(*batch, heads, tokens, dtype=torch.float32, device=q.device)
        return torch.empty_like(q), lse, None, None

    def backward(grad_out, q, k, v, *arguments, **options):
        return None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_get_device_major", lambda device: 9)
    if name == "_fa3":
        monkeypatch.setattr(module, "_FA3_CUDA_FWD", forward)
        monkeypatch.setattr(module, "_FA3_CUDA_BWD", backward)
    else:
        kernels = SimpleNamespace(
            _flash_attn_fwd=lambda *tensors, **options: forward(*tensors)[:2],
            _flash_attn_bwd=lambda q, k, v, *others, **options: tuple(map(torch.empty_like, (q, k, v))),
        )
        monkeypatch.setattr(module, "_FA4_MODULE_PATH", "kernels")
        monkeypatch.setattr(module, "_fa4_import_module", lambda path: kernels)
    for operator, replacement in REPLACEMENTS.items():
        default = getattr(module, f"{name}_{replacement}_default", None)
        monkeypatch.setattr(flash, operator, default or getattr(module, f"{name}_{replacement}"))
    given = checked(problem)
    with FakeTensorMode():
        inputs = Inputs._make(
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x
            for x in given
        )
        out, lse = flash.text_forward(inputs)
        assert out.shape == inputs.q.shape and lse.shape == inputs.q.shape[:3] and lse.dtype == torch.float32
        gradients = flash.text_backward(torch.empty_like(out), out, lse, inputs)
    assert [g.shape for g in gradients] == [inputs.q.shape, inputs.k.shape, inputs.v.shape]
