"""Late fusion: at first the base, then what the images say; as many parameters as early fusion."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from studies.color.late_fusion import add_late_fusion, load_late_fusion, save_late_fusion
from valm.model.augment import augment


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=50, num_attention_heads=4, num_key_value_heads=2, **sizes)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_it_begins_as_the_base_and_then_sees_each_tokens_images(base, tmp_path):
    model = add_late_fusion(base, 24, 2).eval()
    plain = LlamaForCausalLM.from_pretrained(base).eval()
    ids, pool = torch.arange(12).view(2, 6), torch.randn(3, 24)
    index = torch.full((2, 6, 2), -1)
    index[1, 3] = torch.tensor([0, 2])
    given = {"input_ids": ids, "image_pool": pool, "image_index": index}
    torch.testing.assert_close(model(**given).logits, plain(ids).logits)
    with torch.no_grad():
        for parameter in model.model.image_fusion.parameters():
            parameter.normal_(std=0.1)
    none = model(input_ids=ids, image_pool=pool[:0], image_index=torch.full_like(index, -1)).logits
    changed = (model(**given).logits - none).abs().amax(-1) > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]
    given["image_index"] = index.flip(-1)  # their order does not matter
    torch.testing.assert_close(model(**given).logits[1, 3], model(**given | {"image_index": index}).logits[1, 3])
    save_late_fusion(model, tmp_path)
    torch.testing.assert_close(load_late_fusion(tmp_path, base, 24, 2)(**given).logits, model(**given).logits)


def test_it_trains_as_much_as_early_fusion_and_nothing_of_the_base(base):
    model = add_late_fusion(base, 24, 2)
    early = augment(LlamaForCausalLM.from_pretrained(base), 24, 2, unfreeze="block")
    late = {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}
    assert all(".image_fusion." in name for name in late)
    assert sum(late.values()) == pytest.approx(
        sum(one.numel() for one in early.parameters() if one.requires_grad), rel=0.1
    )
