import pytest
import torch

from tests.checks.families import check
from valm.model.positions import TokensBefore, alone, identity_rotation


def test_the_identity_rotation_keeps_the_scale():
    angle = torch.randn(2, 5, 8)
    cos, sin = identity_rotation((1.2 * angle.cos(), 1.2 * angle.sin()))
    assert cos.shape == sin.shape == (2, 5, 8)
    torch.testing.assert_close(cos, torch.full((2, 5, 8), 1.2))
    assert not sin.any()
    complex_numbers = torch.polar(torch.ones(2, 5, 4), angle[..., :4])
    assert torch.equal(identity_rotation(complex_numbers), torch.ones(2, 5, 4) + 0j)


def test_tokens_alone_are_at_the_position_of_the_last():
    """Also with three positions for each token, as Qwen2-VL has, and with what a family adds for each token."""
    states, positions = torch.randn(2, 5, 8), torch.arange(30).view(3, 2, 5)
    shared = {"full_attention": states}
    call = {"hidden_states": states, "position_ids": positions, "position_embeddings": (positions[..., None],) * 2}
    call |= {"attention_mask": torch.ones(2, 1, 5, 5), "cache": TokensBefore(3), "use_cache": True, "layer_idx": 1}
    call |= {"scale_of_queries": torch.arange(10).view(2, 1, 5, 1), "shared": shared}
    found = alone(torch.zeros(4, 7, 8), call)
    assert found["hidden_states"].shape == (4, 7, 8)
    last = torch.tensor([4, 14, 24])[:, None, None].expand(3, 4, 7)
    assert torch.equal(found["position_ids"], last)
    assert all(torch.equal(table, last[..., None]) for table in found["position_embeddings"])
    assert found["attention_mask"] is found["cache"] is None and found["use_cache"] is False
    assert found["scale_of_queries"].tolist() == [[[[4]]]] and found["layer_idx"] == 1
    found["shared"]["full_attention"] = None
    assert shared["full_attention"] is states, "the model's own keys were changed"


# Ministral 3 and Mistral 4 scale queries by their positions, Llama 4 and Beam in the layers without rotation; layer -2
# of Llama 4 has none here, and layer -1 of Beam.
@pytest.mark.parametrize(
    "family, layer", [("ministral3", -2), ("mistral4", -2), ("llama4_text", -2), ("llama4_text", -1), ("beam", -1)]
)
def test_images_meet_queries_that_are_scaled_by_their_positions(family, layer):
    found = check(family, layer)
    assert found.wrong() == []
    assert found.reference_far is not None and found.cached is not None
