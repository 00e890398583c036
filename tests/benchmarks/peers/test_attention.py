import pytest
import torch

from benchmarks.peers.attention import (
    eager_concat,
    flash_implementation,
    flash_merge,
    flash_merge_compiled,
    gather_attn,
    text_only,
)
from tests.tolerance import assert_agree


def inputs(device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 9, 8)] * 3 + [(1, 2, 9, 3, 8)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    "merge", [flash_merge, pytest.param(flash_merge_compiled, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_flash_merge_is_eager_attention(merge):
    grads = []
    for attend in (merge, eager_concat):
        leaves = inputs()
        out = attend(*leaves)
        grads.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for found, expected in zip(*grads, strict=True):
        assert_agree(found, expected)


def test_flash_merge_of_grouped_heads_is_that_of_copied_ones():
    q, k, v, image_k, image_v = inputs()
    q = torch.cat([q, q.flip(2)], 1).detach().requires_grad_()  # 4 heads over 2
    grouped = flash_merge(q, k, v, image_k, image_v)
    copied = flash_merge(q, *(x.repeat_interleave(2, 1) for x in (k, v, image_k, image_v)))
    assert_agree(grouped, copied)
    leaves = (q, k, v, image_k, image_v)
    pairs = (torch.autograd.grad(out.sin().sum(), leaves) for out in (grouped, copied))
    for found, expected in zip(*pairs, strict=True):
        assert_agree(found, expected)
    torch.testing.assert_close(text_only(q, k, v), text_only(q, *(x.repeat_interleave(2, 1) for x in (k, v))))


def test_another_flash_attention_takes_its_place_for_as_long_as_asked(monkeypatch):
    active = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append, raising=False)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear, raising=False)
    with flash_implementation(None):
        assert active == []
    with pytest.raises(KeyError), flash_implementation("FA4"):
        assert active == ["FA4"]
        raise KeyError
    assert active == []


def test_one_that_is_not_installed_is_skipped(monkeypatch):
    def activate(name):
        raise ModuleNotFoundError("No module named 'flash_attn'\nmore")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
    message = r"FA4 cannot take .* No module named 'flash_attn'$"
    with pytest.raises(pytest.skip.Exception, match=message), flash_implementation("FA4"):
        pass


def test_flash_merge_calls_the_operators_of_cuda_as_they_are_defined():
    """Without a card: meta tensors take the same operators."""
    leaves = inputs("meta", torch.float16)
    out = flash_merge(*leaves)
    gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


def test_a_wide_softcap_and_q_itself_for_the_images_are_plain_attention():
    leaves = inputs()
    expected = eager_concat(*leaves)
    assert_agree(eager_concat(*leaves, leaves[0], 1e8), expected)
    assert not eager_concat(*leaves, leaves[0], 0.5).allclose(expected, rtol=1e-3)
    assert not eager_concat(*leaves, leaves[1], 1e6).allclose(expected, rtol=1e-3)


@pytest.mark.slow
def test_gather_attn_is_eager_attention_whose_keys_are_the_values():
    """By its eager code, which checks the call as its kernels do."""
    pytest.importorskip("attn_gym", reason="the extra `check` has it")
    q, text, *_ = inputs()
    pool = torch.randn(2, 5, 8, dtype=torch.float64).requires_grad_()
    image_index = torch.randint(0, 5, (1, 9, 3))
    laid_out = pool.transpose(0, 1)[image_index].permute(0, 3, 1, 2, 4)
    found = gather_attn(q, text, pool, image_index, impl="reference")
    expected = eager_concat(q, text, text, laid_out, laid_out)
    assert_agree(found, expected)
    pairs = (torch.autograd.grad(out.sin().sum(), (q, text, pool), retain_graph=True) for out in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        assert_agree(ours, theirs)
