import copy
import pickle
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.model.decoders import (
    IMAGE_DIM,
    IMAGES,
    augmented,
    each_model,
    random_ids,
    random_images,
    tiny_gpt2,
    tiny_llama,
)
from tests.valm.models import HashRetriever, tiny_model
from valm.errors import ValmError
from valm.model.augment import augment, fusion_module
from valm.model.probe import attention_path, decoder_layers


def logits(model, **arguments):
    return model(random_ids(2, 9), **random_images(2, 9), **arguments).logits


def loss_of(model, **scores):
    ids, images = random_ids(2, 9), random_images(2, 9)
    images["image_pool"] = images["image_pool"].half()  # as the collator gives it
    return model(ids, labels=ids, **images, **scores).loss


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def opened_up(base):
    return augment(base, IMAGE_DIM, IMAGES, logit_bias=0.0)


def test_closed_images_leave_the_logits_as_they_were():
    for base in (tiny_llama, tiny_gpt2):
        expected = base()(random_ids(2, 9)).logits
        model = augment(base(), IMAGE_DIM, IMAGES)
        with torch.no_grad():
            assert fusion_module(model)(torch.zeros(1, IMAGE_DIM)).logit_bias.tolist() == [-10] * 4
            fusion_module(model).logit_bias_delta.fill_(-20.0)
        assert_agree(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_ln_img_starts_as_the_layers_own_norm(family):
    base = tiny(family)
    layer = decoder_layers(base)[-2]
    attention = layer.get_submodule(attention_path(base, -2))
    read = []
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs.get("hidden_states", (*args, None)[0])), with_kwargs=True
    )
    base(torch.arange(8)[None])
    module = fusion_module(augment(base, 64, 2))
    norms = {"llama": "input_layernorm", "gpt2": "ln_1", "gemma2": "input_layernorm"}
    if family in norms:
        norm = getattr(layer, norms[family])
        weight = norm.weight + 1 if family == "gemma2" else norm.weight
        assert_agree(module.norm.weight, weight)
        if family == "gpt2":
            assert_agree(module.norm.bias, norm.bias)
    else:  # no norm before it: the scale of what it reads
        scale = read[0].square().mean(-1).sqrt().median().item()
        assert_agree(module.norm.weight, torch.full((64,), scale))


@pytest.mark.parametrize(
    "make, extra",
    [
        (augmented, lambda name: False),
        (lambda: augmented().requires_grad_(True), lambda name: True),
        (tiny_model, lambda name: True),
    ],
)
def test_a_training_step_moves_what_it_should(make, extra):
    model = make().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert trained(model) == {name for name in before if ".image_fusion." in name or extra(name)}
    loss_of(model).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained(model)


def test_a_decoder_without_images_is_its_own_text_only_baseline():
    with pytest.raises(ValmError, match="num_images must be from 1 to 64, got 0"):
        augment(tiny_llama(), IMAGE_DIM, 0)


def test_a_trainer_trains_it_with_its_default_arguments(tmp_path):
    model = augmented()
    images = random_images(1, 9)
    row = {"input_ids": random_ids(1, 9)[0], "labels": random_ids(1, 9)[0], "image_index": images["image_index"][0]}

    def collate(rows):
        return default_data_collator(rows) | {"image_pool": images["image_pool"]}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=0.1
    )
    assert arguments.remove_unused_columns
    before = loss_of(model).item()
    Trainer(model, arguments, train_dataset=[row] * 8, data_collator=collate).train()
    assert loss_of(model.eval()).item() != before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_agree(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "make, reentrant",
    [
        (augmented, False),
        (augmented, True),
        (partial(tiny_model, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), True),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(make, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(model).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert_agree(gradients[1][name], gradient)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(make):
    model = augmented()
    made, expected = make(model), logits(model)
    assert torch.equal(logits(made), expected)
    with torch.no_grad():
        fusion_module(made).logit_bias_delta.add_(1.0)
    assert not torch.equal(logits(made), expected)
    assert torch.equal(logits(model), expected)


@each_model
@pytest.mark.parametrize("way", ["bfloat16", "autocast", "float64"])
def test_other_precisions_give_the_same_loss(way, make):
    model = make()
    expected = loss_of(model).item()
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
    else:
        loss = loss_of(model.to(getattr(torch, way)))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    # bfloat16 has 8 bits: a relative error of 2^-8 a rounding, in a handful of layers
    assert loss.item() == pytest.approx(expected, rel=1e-6 if way == "float64" else 8 * 2**-8)


@pytest.mark.parametrize("of_base, of_fusion", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_a_fusion_of_another_type_than_its_base_learns(of_base, of_fusion, base):
    """Such as float32, to train it in small steps beside a base in bfloat16."""
    model = augmented(base)
    expected = loss_of(model).item()
    module = fusion_module(model.to(getattr(torch, of_base))).to(getattr(torch, of_fusion))
    out = model(random_ids(2, 9), **random_images(2, 9))
    assert out.logits.dtype == getattr(torch, of_base)
    loss = loss_of(model)
    loss.backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in module.parameters())
    assert loss.item() == pytest.approx(expected, rel=8 * 2**-8)


@pytest.mark.parametrize("start", [-10.0, -3.0])
def test_the_score_bias_learns_in_16_bits_as_in_32(start):
    """Near -10 the numbers of bfloat16 are 0.0625 apart."""
    ids, images = random_ids(2, 9, seed=1), random_images(2, 9)
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        model = augment(tiny_llama().to(dtype), IMAGE_DIM, IMAGES, logit_bias=start).train()
        optimizer = torch.optim.AdamW(fusion_module(model).parameters(), lr=1e-3, weight_decay=0)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, **images, labels=ids).loss.backward()
            optimizer.step()
        moved.append(fusion_module(model)(images["image_pool"]).logit_bias.detach().float() - start)
    torch.testing.assert_close(moved[0].abs(), torch.full_like(moved[0], 3e-3), rtol=0.1, atol=0)
    torch.testing.assert_close(moved[1], moved[0], rtol=0.1, atol=0)


def test_models_that_cannot_are_refused_and_left_as_they_were():
    with pytest.raises(ValmError, match="already takes images"):
        augment(augmented(), 8, 2)
    message = r"layer -2 of Qwen3NextForCausalLM has no attention .*; layers with one attention: 1, 3"
    with pytest.raises(ValmError, match=message):
        augment(tiny("qwen3_next"), 8, 2, -2)
    doge = tiny("doge")
    ids = torch.arange(3, 9)[None]
    expected, names = doge(ids).logits, set(doge.state_dict())
    with pytest.raises(ValmError, match="not one softmax"):
        augment(doge, 8, 2)
    assert set(doge.state_dict()) == names and torch.equal(doge(ids).logits, expected)

    class Mine(LlamaForCausalLM):
        pass

    with pytest.raises(ValmError, match="no causal language model of transformers itself"):
        augment(Mine(tiny_llama().config), 8, 2)


GIVEN = {"image_pool": torch.zeros(3, 24), "image_index": torch.zeros(2, 5, 3, dtype=torch.int64)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_pool": torch.zeros(3, 24)}, "must be given together"),
        (GIVEN | {"image_pool": torch.zeros(7, 25)}, r"image_dim = 24\), got \(7, 25\)"),
        (GIVEN | {"image_index": torch.zeros(2, 4, 3).long()}, "image_index must have shape"),
        (GIVEN | {"image_index": torch.full((2, 5, 3), 3)}, "image_index must be -1"),
        (GIVEN | {"output_attentions": True}, r"output_attentions.*call fusion_attention\(\)"),
        (GIVEN | {"attention_mask": torch.ones(2, 4, 5, 5)}, "one attention_mask for all heads, got"),
        (GIVEN | {"attention_mask": torch.full((2, 1, 5, 5), -1.5)}, "of 0 and -inf, got other biases"),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        augmented()(random_ids(2, 5), **arguments)


def test_a_mask_of_numbers_hides_as_one_of_bools():
    model, ids, images = augmented(), random_ids(2, 5), random_images(2, 5)
    for hidden in (-torch.inf, torch.finfo(torch.float32).min, -1e4):
        mask = torch.full((2, 1, 5, 5), hidden).triu(1)
        assert_agree(model(ids, **images, attention_mask=mask).logits, model(ids, **images).logits)


@each_model
def test_hidden_states_and_embeddings_are_the_bases(make):
    model, ids, images = make(), random_ids(2, 5), random_images(2, 5)
    out = model(ids, **images, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    embeds = model.get_input_embeddings()(ids)
    assert_agree(model(inputs_embeds=embeds, **images).logits, out.logits)
    model.set_retriever(HashRetriever())
    with pytest.raises(ValueError, match="needs token ids"):
        model(inputs_embeds=embeds)


@pytest.mark.slow  # half a minute of compilation
def test_an_attention_without_masks_is_refused_by_the_forward_too():
    """set_attn_implementation, from_pretrained and load_adapter take it, and a window would be lost."""
    AttentionInterface.register("without_masks", sdpa_attention_forward)
    model = augmented(tiny_llama)
    model.set_attn_implementation("without_masks")
    message = 'attn_implementation="without_masks", whose masks the fusion layer cannot read'
    with pytest.raises(ValmError, match=message):
        logits(model)
    model.set_attn_implementation("eager")
    assert logits(model).isfinite().all()


@pytest.mark.slow
@each_model
def test_it_compiles_to_one_graph(make):
    model = make().train(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, images = random_ids(2, 9), random_images(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    holes = mask.clone()
    holes[0, 4] = 0
    for attention_mask in (None, mask, holes):
        expected = model(ids, attention_mask=attention_mask, **images).logits
        present = slice(None) if attention_mask is None else attention_mask.bool()
        assert_agree(compiled(ids, attention_mask=attention_mask, **images).logits[present], expected[present])
    compiled(ids, **images).logits.sum().backward()
    assert fusion_module(model).norm.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize(
    "make, holes",
    [
        (lambda: augmented(lambda seed: tiny_llama(seed, num_hidden_layers=2)), True),
        pytest.param(tiny_model, False, marks=pytest.mark.slow),
    ],
)
def test_a_batch_is_one_graph(make, holes):
    model, ids, images = make(), random_ids(2, 9), random_images(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[0, 4] = 0
    given = {"attention_mask": mask} if holes else {}
    seen = mask.bool() if holes else slice(None)
    found = torch.compile(model, fullgraph=True, backend="eager")(ids, **given, **images).logits
    assert_agree(found[seen], model(ids, **given, **images).logits[seen])


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_sees_the_images_of_a_retriever_that_is_set_later():
    model, ids = augmented(), random_ids(2, 9)
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="has no retriever and was given no images"):
        without = compiled(ids).logits
    model.set_retriever(HashRetriever())
    with_images = compiled(ids).logits
    assert_agree(with_images, model(ids).logits)
    assert (with_images - without).abs().max() > 1e-2
    model.set_retriever(None)
    assert_agree(compiled(ids).logits, without)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_weights_are_there_when_they_are_read(tmp_path, offload):
    model = augmented()
    expected = logits(model)
    arguments = {"offload_dir": tmp_path} if offload is disk_offload else {}
    offload(model, execution_device=torch.device("cpu"), **arguments)
    assert fusion_module(model).k_bias.device.type == "meta"
    assert_agree(logits(model), expected)


def with_hook(path):
    def replace(model):
        add_hook_to_module(model.get_submodule(path), ModelHook())

    return replace


def compiled_forward(model):  # as Accelerator.prepare of autocast leaves it too
    model.forward = torch.compile(model.forward, backend="eager")


@torch.no_grad()
@pytest.mark.parametrize(
    "replace",
    [
        lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
        pytest.param(compiled_forward, marks=pytest.mark.slow),
        with_hook("model.layers.0"),
        with_hook("model.layers.1"),
        with_hook("model.layers.1.self_attn"),
    ],
)
def test_a_base_whose_forward_was_replaced_sees_images(replace):
    model = tiny_llama()
    replace(model)
    opened_up(model)
    assert torch.equal(logits(model), logits(opened_up(tiny_llama())))


def test_an_offloaded_base_is_refused():
    model = tiny_llama()
    cpu_offload(model, execution_device=torch.device("cpu"))
    message = r"weights of this LlamaForCausalLM are offloaded: augment the model, .* before"
    with pytest.raises(ValmError, match=message):
        opened_up(model)
    assert type(model) is LlamaForCausalLM and not any("image_fusion" in name for name, _ in model.named_modules())


@torch.no_grad()
def test_later_hooks_change_nothing():
    model = opened_up(tiny_llama())
    expected = logits(model)
    for path in ("", "model.layers.1", "model.layers.1.self_attn"):
        with_hook(path)(model)
    assert torch.equal(logits(model), expected)


@torch.no_grad()
def test_models_made_of_one_config_stay_apart(tmp_path):
    config = tiny_llama().config
    first, second = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    assert first.config is second.config
    augment(first, IMAGE_DIM, IMAGES)
    assert type(second.config) is LlamaConfig and not hasattr(second.config, "fusion")
    assert first.model.config is first.model.layers[0].mlp.config is first.config
    second.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    augment(second, IMAGE_DIM, 1)
    assert [model.config.fusion["num_images"] for model in (first, second)] == [IMAGES, 1]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*quantized tensor creation")
def test_a_quantised_base_is_refused():
    base = torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear}, dtype=torch.qint8)
    message = r"q_proj of the model is a Linear of torch\.ao, .* augment the model, .* before quant"
    with pytest.raises(ValmError, match=message):
        opened_up(base)
