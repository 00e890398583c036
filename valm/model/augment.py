"""`valm.augment`: makes one layer of a pretrained decoder attend to images too."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.generation import GenerationMixin

from valm.errors import ValmError
from valm.model.attention import (
    IMPLEMENTATION,
    FusionOptions,
    ImageFusion,
    TextLimits,
    read_limits,
    subclass,
    visible_keys,
    visual_attention_class,
    visual_layer_class,
)
from valm.model.config_file import MODEL_TYPE, NO_WEIGHTS, WEIGHTS_KEY, reads_images
from valm.model.documents import mask_of_tokens, padding_apart, restarts
from valm.model.image_model import ImageModel, ImageOptions
from valm.model.packing import keeps_apart
from valm.model.probe import Probe, attention_path, decoder_layers, default_layer, in_mode, not_on_images, probe
from valm.model.sketch import named_weights, project, quantisation, sketch
from valm.model.weights import fusion_weights

_Config: Any = object  # for a type checker, the config class behind the mixin

# Attention implementations of the other layers whose masks the fusion layer can read.
READABLE = ("sdpa", "eager")
# A key is hidden from here on in a mask that is added to the scores; libraries write -inf, the least number or -1e4.
HIDDEN = -1e3
RESTART_IN_A_GRAPH = (
    "position_ids restart, so there are several documents in a row, which a compiled model keeps apart only without an "
    "attention_mask and with use_cache=False"
)


def augment(
    model: PreTrainedModel,
    image_dim: int,
    num_images: int,
    layer: int | None = None,
    *,
    logit_bias: float = -10.0,
    unfreeze: str = "",
    blind: bool = False,
    score_scale: float | None = None,
    min_score: float | None = None,
) -> AugmentedCausalLM:
    """Makes one layer of a pretrained decoder attend to images too, in one softmax with the text.

    The model itself is changed and returned. Its class, config and parameters stay those of its family; the attention
    of the layer gets one more child, `image_fusion`. Closed images (a very negative logit bias) and text alone give
    the logits of the original. Images come as the arguments `image_pool` (U, E) and `image_index` (B, T, K) of forward,
    or from `set_retriever`. After Wang et al., "Visually-Augmented Language Modeling", section 2.3.

    Args:
        model: a causal language model of transformers, loaded, with attention implementation "sdpa" or "eager".
        image_dim: E, dimension of an image vector.
        num_images: K, images per token, from 1 to 64. 0 makes the text-only twin: what `unfreeze` names trains, nothing
            is new and no image is taken. Its layer computes as that of its twin does: without attention dropout.
        layer: which layer, negative from the end. None: the layer before the last; where that has no attention with
            keys of its own, the last layer that has one, which a warning names.
        logit_bias: initial value of the number that each head adds to its scores of images. At -10 the pretrained
            logits move by about their rounding, and there is still a gradient that can open the heads.
        unfreeze: what trains besides the new parameters: "" nothing, "block" the layer, "all" everything.
        blind: each token's one image is its own retrieval query (Blind-VaLM); needs num_images = 1.
        score_scale: initial value of a learned weight on the retrieval score, one for all heads, added to the image's
            attention scores. None: retrieval scores are not used.
        min_score: a token whose best image has a lower retrieval score sees none (`valm.retrieval.min_score`); None:
            every token but the first of a document sees K.

    Returns:
        The model.

    Raises:
        ValmError: an argument has an invalid value, or the family cannot be augmented, or the model was dispatched,
            prepared or compiled before, or what would train is quantised; the message says why.
    """
    if isinstance(model, ImageModel):
        raise ValmError(f"this {type(model).__name__} takes images already")
    if getattr(transformers, type(model).__name__, None) is not type(model) or not isinstance(model, GenerationMixin):
        raise ValmError(f"{type(model).__name__} is no causal language model of transformers itself")
    check_readable(model.config)
    check_own_forwards(model)  # before it runs, which the hooks of a base that was offloaded may not let it do here
    if layer is None:
        layer = default_layer(model)
        if layer != -2:
            alone = len(decoder_layers(model)) == 1
            reason = "the model has one layer" if alone else "layer -2 has no attention with keys of its own"
            warnings.warn(f"{reason}, so layer {layer} is the fusion layer", stacklevel=2)
    check_own_forwards(model, layer)
    found = probe(model, layer)
    options = FusionOptions(
        architecture=type(model).__name__,
        image_dim=image_dim,
        num_images=num_images,
        layer=layer,
        **{name: getattr(found, name) for name in ("width", "heads", "kv_heads", "key_dim", "value_dim")},
        logit_bias=logit_bias,
        blind=blind,
        unfreeze=unfreeze,
        sketch={},
        score_scale=score_scale,
        min_score=min_score,
    )
    check_trained_weights(model, options)
    options = replace(options, sketch=sketch(project(model)))  # last: it reads every weight
    _attach_checked(model, options, found)
    return _with_class(model, options)


def become_augmented(model: PreTrainedModel, options: FusionOptions) -> AugmentedCausalLM:
    """`augment` with known options, for a model whose weights are still to be loaded."""
    attach(model, options)
    return _with_class(model, options)


def check_own_forwards(model: PreTrainedModel, layer: int | None = None) -> None:
    """Checks that the modules whose classes change run the forward of their class: the model and, of `layer` if it is
    known, the layer and its attention.

    One that the instance has itself, as accelerate's hooks and torch.compile leave it, is bound to the class of before:
    it would go on without images, in silence.

    Raises:
        ValmError: one does not, or there is no such layer.
    """
    changing: list[nn.Module] = [model]
    if layer is not None:
        path = attention_path(model, layer)
        block = decoder_layers(model)[layer]
        changing += [block, block.get_submodule(path)]
    for name, module in model.named_modules():
        if module in changing and "forward" in vars(module):
            raise ValmError(
                f"the forward of {name or 'the model'} ({type(module).__name__}) was replaced, as by a device_map, "
                "Accelerator.prepare or torch.compile, and would read no images: augment the model first, or load its "
                "adapter, and then dispatch, prepare or compile it; a whole augmented folder may be loaded with a "
                "device_map"
            )


def check_trained_weights(model: PreTrainedModel, options: FusionOptions) -> None:
    """Checks that the weights of the base that train besides the fusion, which an adapter of them has too, can.

    Raises:
        ValmError: one is quantised.
    """
    if not options.unfreeze:
        return
    for name, _, weight in named_weights(model if options.unfreeze == "all" else decoder_layers(model)[options.layer]):
        if kind := quantisation(weight):
            raise ValmError(
                f"unfreeze={options.unfreeze!r} trains {name}, but that is quantised ({kind}): do not quantise it when "
                "the base is loaded (llm_int8_skip_modules of bitsandbytes, modules_to_not_convert of torchao), or "
                'augment with unfreeze=""'
            )


def _with_class(model: PreTrainedModel, options: FusionOptions) -> AugmentedCausalLM:
    _own_config(model)
    _keep_place(model)
    # the class of this object, as the user holds it, and so do its optimizer, its hooks and PEFT
    model.config.valm = asdict(options)
    config_class = type(model.config)
    model.config.__class__ = augmented_config_class(config_class)
    model.__class__ = augmented_class(type(model), config_class)
    freeze(model, options)
    assert isinstance(model, AugmentedCausalLM)
    return model


def _own_config(model: PreTrainedModel) -> None:
    """Gives a model and its modules a copy of their config: two models made from one share it."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            vars(module)["config"] = own


def _keep_place(model: PreTrainedModel) -> None:
    """Makes the folder that a model was opened from absolute: the process may work elsewhere when it is saved."""
    name = model.config.name_or_path
    if name and os.path.isdir(name):
        model.config.name_or_path = os.path.abspath(name)


def attach(model: PreTrainedModel, options: FusionOptions, found: Probe | None = None) -> None:
    """Adds the fusion to a layer; in a text-only twin it has no parameters, and attends to the text as its twin's does.

    LN_img starts as the layer's own input norm, `found`, so that the attention reads images at the scale of its text;
    with weight 1, closed images still moved the logits of SmolLM2.
    """
    block: Any = decoder_layers(model)[options.layer]
    attention = block.get_submodule(attention_path(model, options.layer))
    if options.num_images > 0:
        with torch.device(next(attention.parameters()).device):
            fusion = ImageFusion(options).to(model.dtype)
        if found is not None:
            with torch.no_grad():
                fusion.norm.weight.copy_(found.norm_weight)
                fusion.norm.bias.copy_(found.norm_bias)
        attention.image_fusion = fusion.train(attention.training)
    # the other layers' masks follow the model's own config, so this one may ask for another implementation
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = IMPLEMENTATION
    attention.has_tables = any("rotary" in name or "embed_positions" in name for name, _ in attention.named_buffers())
    # their classes, as modules around them would change the names of the weights, and transformers' checkpointing,
    # sharding and output recorders look for the layer's own class
    attention.__class__ = visual_attention_class(type(attention))
    block.__class__ = visual_layer_class(type(block))


def _attach_checked(model: PreTrainedModel, options: FusionOptions, found: Probe) -> None:
    """`attach` with a check of the layer's mathematics; undone if the check raises."""
    block: Any = decoder_layers(model)[options.layer]
    attention = block.get_submodule(attention_path(model, options.layer))
    own_config = attention.config
    attach(model, options, found)
    try:
        with in_mode(attention, training=False):
            attention.check_mathematics(own_config, found.calls)
    except Exception as error:
        attention.config = own_config
        del attention.has_tables
        if options.num_images > 0:
            del attention.image_fusion
        attention.__class__, block.__class__ = type(attention).wrapped_class, type(block).wrapped_class
        if isinstance(error, ValmError):
            raise
        raise not_on_images(attention, error) from error  # of the family's own code


def freeze(model: PreTrainedModel, options: FusionOptions) -> None:
    """Freezes all parameters that do not train according to `options`, and what is quantised."""
    model.requires_grad_(False)
    trained: list[nn.Module] = []
    if options.unfreeze:
        trained.append(model if options.unfreeze == "all" else decoder_layers(model)[options.layer])
    if options.num_images > 0:
        trained.append(fusion_module(model))
    for module in trained:
        for parameter in module.parameters():
            parameter.requires_grad_(quantisation(parameter) is None)


def fusion_module(model: nn.Module) -> ImageFusion:
    """The `image_fusion` of an augmented model."""
    return next(module for module in model.modules() if isinstance(module, ImageFusion))


class AugmentedConfig(_Config):
    """Mixin of an augmented model's config: the config of its base, with the fusion's options as `valm`.

    In memory the model_type is the base's. In the file it is "valm" and the base's config is nested, so that without
    this package loading fails by that name, instead of loading the base without its images.
    """

    valm: dict[str, Any]
    wrapped_class: type  # of the base's config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """`PreTrainedConfig.from_pretrained`, also of the base's own config: PEFT looks up the base's vocabulary there
        by the class of the config that the augmented model has.

        Raises:
            ValmError: it is the config of another model.
        """
        found = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if not isinstance(config, cls) and type(config) is not cls.wrapped_class:
            raise ValmError(
                f"{pretrained_model_name_or_path} holds the config of a {config.model_type}, expected that of an "
                f"augmented {cls.model_type}"
            )
        return found

    @property
    def transformers_weights(self) -> str | None:
        """What `from_pretrained` of any class of transformers looks for, such as that of AutoModel: none but an
        augmented class finds the weights."""
        return None if self.valm["num_images"] == 0 or reads_images.get() else NO_WEIGHTS

    def to_diff_dict(self) -> dict[str, Any]:
        base = super().to_diff_dict()
        fusion = base.pop("valm")
        # the base's own class reads base_config, any other what stands beside it
        no_weights = {WEIGHTS_KEY: NO_WEIGHTS} if fusion["num_images"] > 0 else {}
        return {"model_type": MODEL_TYPE, **no_weights, "base_config": base | no_weights, "fusion": fusion}


def augmented_config_class(base: Any) -> Any:
    return subclass(AugmentedConfig, base, augmented_config_class)


def check_readable(config: Any) -> None:
    """Checks that the fusion layer can read the masks that the model of this config makes.

    Raises:
        ValmError: its attention has others, or none, as where a window is an argument.
    """
    implementation = config.get_text_config(decoder=True)._attn_implementation
    if implementation not in READABLE:
        raise ValmError(
            f'the model has attn_implementation="{implementation}", whose masks the fusion layer cannot read: load it '
            f"with {' or '.join(map(repr, READABLE))}, or set_attn_implementation"
        )


def config_from_dict(config: dict[str, Any], **kwargs: Any) -> Any:
    """The config of an augmented model in what `AugmentedConfig` wrote; arguments as in `PreTrainedConfig.from_dict`.

    Raises:
        ValmError: it is not one.
    """
    base = config.get("base_config")
    fusion = config.get("fusion")
    if not isinstance(base, dict) or not isinstance(fusion, dict):
        raise ValmError("the config has no base_config and fusion: it is not that of an augmented model")
    try:
        options = FusionOptions(**fusion)
    except (TypeError, ValmError) as error:
        raise ValmError(f"the config's fusion does not fit: {error}") from error
    model_class = transformers_class(options.architecture)
    base = {key: base[key] for key in base if key != WEIGHTS_KEY}
    result = transformers.CONFIG_MAPPING[base["model_type"]].from_dict(base, **kwargs)
    made = result[0] if isinstance(result, tuple) else result  # beside it the arguments that were not used
    config_class = type(made)
    made.__class__ = augmented_config_class(config_class)
    made.valm = fusion
    AutoModelForCausalLM.register(type(made), augmented_class(model_class, config_class), exist_ok=True)
    return result


def transformers_class(name: str) -> type[PreTrainedModel]:
    """The causal language model of transformers with this name.

    Raises:
        ValmError: there is none.
    """
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel) or not issubclass(found, GenerationMixin):
        raise ValmError(f"transformers {transformers.__version__} has no causal language model {name!r}")
    return found


class AugmentedCausalLM(ImageModel):
    """Mixin of a causal language model with a layer that sees images; `augment` puts it in front of the class."""

    forward_names: tuple[str, ...]  # of the arguments of the class behind
    config_class: type
    _keeps_apart: bool | None = None  # None: not tried yet
    opened_whole = False  # so that name_or_path is the place of this model, and not of its base

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        """As that of the base.

        Raises:
            ValmError: the config is that of the base, without a fusion.
        """
        if not isinstance(config, self.config_class):
            raise ValmError(
                f"{config.name_or_path or 'the config'} holds the config of a {config.model_type}, expected that of an "
                f"augmented {config.model_type}: load it by AutoModelForCausalLM, and augment it"
            )
        super().__init__(config, *args, **kwargs)
        attach(self, self.fusion_options)

    @property
    def fusion_options(self) -> FusionOptions:
        return FusionOptions(**self.config.valm)

    @property
    def image_options(self) -> ImageOptions:
        options = self.fusion_options
        scored = options.score_scale is not None
        return ImageOptions(options.num_images, options.image_dim, options.blind, scored, options.min_score)

    def keep_min_score(self, value: float | None) -> None:
        self.config.valm["min_score"] = value

    def keep_num_images(self, value: int) -> None:
        self.config.valm["num_images"] = value

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained` of a whole folder.

        Raises:
            ValmError: the weights have no image_fusion.
        """
        with_info = kwargs.pop("output_loading_info", False)
        token = reads_images.set(True)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        finally:
            reads_images.reset(token)
        missing = [key for key in info["missing_keys"] if ".image_fusion." in key]
        if missing:
            raise ValmError(
                f"the weights in {pretrained_model_name_or_path} have no {sorted(missing)[0]}: they are not those of "
                "its config"
            )
        freeze(model, model.fusion_options)
        model.opened_whole = True
        _keep_place(model)
        return (model, info) if with_info else model

    def forward(
        self,
        *args: Any,
        image_pool: Tensor | None = None,
        image_index: Tensor | None = None,
        image_scores: Tensor | None = None,
        image_slots: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward, with images.

        Args:
            image_pool: (U, E) float, the image vectors of this batch, each once.
            image_index: (B, T, K) int32 or int64 rows of the pool for each of these tokens, -1 = none.
            image_scores: (B, T, K) float, the retrieval score of each image; of a model with `score_scale` only, which
                needs it beside images.
            image_slots: `valm_kernels.sort_image_slots(image_index, U)` beside images, so that the backward on CUDA
                need not sort; image_index must be -1 at padding then.
            position_ids: where they restart in a row, another document begins, which sees none before it.

        Raises:
            ValueError: images that do not fit; `output_attentions`, which has no place for weights of images; a mask
                for each head, or with biases; or several documents in a row and a cache.
        """
        check_readable(self.config)
        arguments = dict(zip(self.forward_names, args, strict=False)) | kwargs
        mask: Any = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
            raise ValueError("the fusion layer reads one attention_mask for all heads, and got one for each")
        added = isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point()
        if added and not torch.compiler.is_compiling() and ((mask != 0) & (mask > HIDDEN)).any():
            raise ValueError("the fusion layer reads an attention_mask of 0 and -inf, and got other biases")
        asked = arguments.get("output_attentions")
        if asked or (asked is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions: the fusion layer has one softmax over text and images; call fusion_attention()"
            )
        if image_slots is not None and image_index is None:
            raise ValueError("image_slots must be given together with image_pool and image_index")
        placed = self.place_text(arguments)
        input_ids: Any = arguments.get("input_ids")
        embeds: Any = arguments.get("inputs_embeds")
        began_here = False  # the retriever's text begins with these tokens, and no cache has its state
        if image_pool is None and image_index is None and image_scores is None:
            cache: Any = arguments.get("cache", arguments.get("past_key_values"))
            image_pool, image_index, image_scores = self.find_images(input_ids, mask, cache, arguments)
            began_here = cache is None and image_index is not None
        else:
            shape = (input_ids if embeds is None else embeds).shape[:2]
            self.check_images(shape, image_pool, image_index, image_scores)
            if image_index is not None and isinstance(mask, Tensor) and mask.dim() == 2:  # padding sees none
                present = mask_of_tokens(mask, arguments.get("cache", arguments.get("past_key_values")), shape[1])
                image_index = image_index.masked_fill(present[..., None] == 0, -1)
        more = {"image_scores": image_scores, "image_slots": image_slots}
        given = {name: tensor for name, tensor in more.items() if tensor is not None}
        output = super().forward(**placed, **given, image_pool=image_pool, image_index=image_index)
        if began_here:
            self.keep_text(output, input_ids, mask)
        return output

    def place_text(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward pass with those that say what each token sees of the text.

        Documents in a row are told apart by positions that restart. transformers sees that without a mask and without a
        cache only, and would otherwise mix them in silence.

        Raises:
            ValueError: there are several documents in a row and a cache; or gaps inside of them, by which transformers
                would split them; or the family mixes them.
        """
        positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
        cache: Any = arguments.get("cache", arguments.get("past_key_values"))
        use_cache = arguments.get("use_cache")
        if positions is None or positions.dim() != 2:
            return arguments
        length = positions.shape[1]
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < length):
            return arguments
        compiling, on_cpu = torch.compiler.is_compiling(), positions.device.type == "cpu"
        if length == 1 and (compiling or cache is None or not on_cpu):  # no step of `generate` waits for a GPU
            return arguments
        whole = mask
        if mask is not None:
            positions, mask = torch.broadcast_tensors(positions, mask_of_tokens(mask, cache, length))
        if compiling:  # a graph cannot look
            by_default = getattr(self.config.get_text_config(decoder=True), "use_cache", False)
            if mask is not None or cache is not None or (by_default if use_cache is None else use_cache):
                torch._assert_async(~restarts(positions, mask).begins.any(), RESTART_IN_A_GRAPH)
            return arguments
        past = 0 if cache is None else int(cache.get_seq_length())
        text_before = None
        if past > 0:
            everywhere = positions.new_ones(len(positions), dtype=torch.bool)
            text_before = everywhere if whole is None else whole[:, :past].bool().any(1)
        found = restarts(positions, mask, text_before)
        restart, odd = torch.stack([found.begins.any(), found.odd]).tolist()
        if not restart:
            return arguments
        if cache is not None or use_cache:
            raise ValueError(
                "position_ids restart, so there are several documents in a row, which a cache cannot hold: call with "
                "use_cache=False and without a cache, or give one document a row"
            )
        if odd:
            raise ValueError(
                "position_ids restart, so there are several documents in a row, and one has a gap in its positions or "
                "padding inside it, where it would be split: give it a row of its own"
            )
        if not self.keeps_documents_apart:
            raise ValueError(
                f"position_ids restart, but this {type(self).__name__} does not keep documents in a row apart by them: "
                "give each a row of its own"
            )
        if mask is not None:
            positions = padding_apart(positions, mask)
        return arguments | {"position_ids": positions, "attention_mask": None, "use_cache": False}

    def text_positions(self, arguments: dict[str, Any]) -> Tensor | None:
        """Positions (B or 1, T), in a forward pass, that restart where another document begins; None if none does."""
        positions = arguments.get("position_ids")
        return None if positions is None or positions.dim() != 2 else positions

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether documents in a row, whose positions restart, do not see each other (`keeps_apart`)."""
        if self._keeps_apart is None:
            self._keeps_apart = keeps_apart(self, super().forward)
        return self._keeps_apart

    @torch.no_grad()
    def fusion_attention(
        self,
        input_ids: Tensor,
        image_pool: Tensor | None = None,
        image_index: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_scores: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fusion layer's joint attention weights: over text (B, H, T, T) and over images (B, H, T, K).

        Both together sum to 1 for every token, or to less where the family has an attention sink. Arguments as in
        `forward`; without images the weights are those of the text alone. A model that goes through its layers several
        times (HRM) has those of the last time. Unlike `forward` this materialises the weights: use it for plots and
        explanations of short texts.
        """
        self.check_images(input_ids.shape, image_pool, image_index, image_scores)
        if self.image_options.num_images == 0:
            return fusion_weights(self, input_ids=input_ids, attention_mask=attention_mask)
        if image_pool is None or image_index is None:
            image_pool = torch.zeros(0, self.image_options.image_dim, device=input_ids.device)
            image_index = torch.full((*input_ids.shape, 0), -1, device=input_ids.device)
        images = {"image_pool": image_pool, "image_index": image_index, "image_scores": image_scores}
        return fusion_weights(self, input_ids=input_ids, attention_mask=attention_mask, **images)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`; the retriever finds the images of each new token.

        Raises:
            ValueError: image_pool, image_index or image_scores, which say nothing of the tokens to come.
        """
        if any(kwargs.get(name) is not None for name in ("image_pool", "image_index", "image_scores")):
            raise ValueError(
                "generate() takes no image_pool, image_index or image_scores, as each new token has images of its own: "
                "set a retriever by set_retriever"
            )
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base's, with images and, in a static cache, the limits of the text: here, outside what `generate`
        compiles, where the retriever can run and the mask can be read. All shapes of the next tokens are constant."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("cache")  # not what came: Phi-3 drops its cache where its rotation changes
        static = isinstance(cache, StaticCache)
        if static:
            inputs |= self.place_in_static_cache(inputs, kwargs.get("attention_mask"))
        if self.retriever is not None and cache is not None:
            found = self.find_images(inputs.get("input_ids"), kwargs.get("attention_mask"), cache)
            inputs["image_pool"], inputs["image_index"], inputs["image_scores"] = found
            if static and inputs["input_ids"].shape[1] == 1:
                inputs["image_pool"] = _padded_pool(inputs["image_pool"], inputs["image_index"].numel())
        return inputs

    def place_in_static_cache(self, inputs: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
        """What `place_text` adds to the `inputs` of a pass with a static cache. mask: (B, P + T), that of the text."""
        return {"text_limits": self._text_limits(inputs.get("attention_mask"))}

    def _text_limits(self, masks: Any) -> TextLimits | None:
        """The limits of the fusion layer's text in the masks for `generate`: one, or one for each type of layer."""
        if isinstance(masks, dict):
            types = self.config.get_text_config(decoder=True).layer_types
            masks = masks.get(types[self.fusion_options.layer])
        if not isinstance(masks, Tensor) or masks.dim() != 4:
            return None
        seen = visible_keys(masks)
        limits = read_limits(seen)
        if limits is None or seen is None:
            return None
        # all of them in every step, so that a compiled graph stays the same
        batch, num_queries, num_keys = seen.shape
        first_key, seqlens = limits.first_key, limits.cache_seqlens
        if first_key is None:
            first_key = torch.zeros(batch, num_queries, dtype=torch.int32, device=seen.device)
        if seqlens is None:
            seqlens = torch.full((batch,), num_keys, dtype=torch.int32, device=seen.device)
        return TextLimits(first_key, seqlens)


def _padded_pool(pool: Tensor, rows: int) -> Tensor:
    """The pool with at least so many rows, as many as the tokens can have different images."""
    return F.pad(pool, (0, 0, 0, max(0, rows - pool.shape[0])))


def augmented_class(base: Any, config_class: Any) -> Any:
    """The augmented class of a model class for configs of `config_class`: families that are another's by their
    mathematics have a config class of their own, and that one's model class (EXAONE, LlamaForCausalLM)."""

    # the Trainer and generate() look for arguments by their names
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return AugmentedCausalLM.forward(self, *args, **kwargs)

    parameters = dict(inspect.signature(base.forward).parameters)
    names = tuple(parameters)[1:]  # without self
    for name in ("image_pool", "image_index", "image_scores", "image_slots"):
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)
    vars(forward)["__signature__"] = inspect.Signature(ordered)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return AugmentedCausalLM.prepare_inputs_for_generation(self, *args, **kwargs)

    vars(prepare_inputs_for_generation)["__signature__"] = inspect.signature(base.prepare_inputs_for_generation)
    return subclass(
        AugmentedCausalLM,
        base,
        augmented_class,
        config_class,
        forward=forward,
        forward_names=names,
        prepare_inputs_for_generation=prepare_inputs_for_generation,
        config_class=augmented_config_class(config_class),
    )
