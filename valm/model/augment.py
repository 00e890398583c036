"""`valm.augment`: makes one layer of a pretrained decoder attend to images too."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.generation import GenerationMixin

from valm.errors import ValmError
from valm.model.attention import (
    IMAGE_ARGUMENTS,
    IMPLEMENTATION,
    ImageFusion,
    ImageHook,
    TextLimits,
    check_mathematics,
    joint_weights,
    read_limits,
    visible_keys,
    visual_layer_class,
)
from valm.model.config import NOT_SAVED, VALM, FusionOptions, augmented_config_class, reads_images
from valm.model.image_arguments import check_readable
from valm.model.image_finder import ImageFinder
from valm.model.image_model import ImageModel
from valm.model.private_names import check_overridden, with_attention
from valm.model.probe import Probe, attention_path, decoder_layers, in_mode, not_on_images, probe
from valm.model.sketch import quantisation, sketch
from valm.model.subclasses import subclass


def augment(
    model: PreTrainedModel,
    image_dim: int,
    num_images: int,
    layer: int | None = None,
    *,
    logit_bias: float = -10.0,
    blind: bool = False,
    min_score: float | None = None,
) -> AugmentedCausalLM:
    """Makes one layer of a pretrained decoder attend to text and images in one softmax.

    The model is changed in place. It keeps its class, config and parameters; the layer's attention gains a child module
    `image_fusion`, whose parameters are the only ones that train: all others are frozen. Images come from the arguments
    `image_pool` (U, E) and `image_index` (B, T, K) of forward, or from `set_retriever`. Without images, the logits are
    those of the original model; with the default `logit_bias`, they are nearly so until training. After Wang et al.,
    "Visually-Augmented Language Modeling", section 2.3.

    Args:
        model: a causal language model of transformers, loaded, with attn_implementation "sdpa" or "eager".
        image_dim: E, dimension of an image vector.
        num_images: K, images per token, from 1 to 64.
        layer: index of the layer, negative from the end. None: the second-to-last layer; if that layer computes no
            keys of its own, the last layer that does, which a warning names.
        logit_bias: initial bias that each head adds to its scores of images. At -10 the pretrained logits change by
            about their rounding error, and the gradient can still open the heads.
        blind: makes the query control (Blind-VaLM): each token's retrieval query replaces its image. Needs
            num_images = 1.
        min_score: score threshold: a token whose best image has a lower retrieval score sees no image
            (`valm.retrieval.min_score`). None: every token but a document's first sees K images.

    Returns:
        The model.

    Raises:
        ValmError: an argument is invalid, or the family cannot be augmented.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = valm.augment(AutoModelForCausalLM.from_pretrained("base"), image_dim=512, num_images=4)
        >>> pool, index = torch.randn(10, 512), torch.randint(10, (1, 3, 4))  # 10 images; 4 for each of 3 tokens
        >>> model(torch.tensor([[1, 2, 3]]), image_pool=pool, image_index=index).logits.shape
        torch.Size([1, 3, ...])
    """
    if isinstance(model, ImageModel):
        raise ValmError(f"this {type(model).__name__} already takes images")
    if getattr(transformers, type(model).__name__, None) is not type(model) or not isinstance(model, GenerationMixin):
        raise ValmError(f"{type(model).__name__} is no causal language model of transformers itself")
    check_readable(model.config)
    check_loaded(model)
    found = probe(model, layer)
    options = FusionOptions(
        architecture=type(model).__name__,
        image_dim=image_dim,
        num_images=num_images,
        layer=found.layer,
        **{name: getattr(found, name) for name in ("width", "heads", "kv_heads", "key_dim", "value_dim")},
        logit_bias=logit_bias,
        blind=blind,
        min_score=min_score,
        layer_drops_images=found.layer_drops_images,
    )
    if layer is None and found.layer != -2:
        alone = len(decoder_layers(model)) == 1
        reason = "the model has one layer" if alone else "layer -2 has no attention with keys of its own"
        warnings.warn(f"{reason}, so layer {found.layer} is the fusion layer", stacklevel=2)
    options = replace(options, sketch=sketch(model))  # last: it reads every weight
    _attach_checked(model, options, found)
    return _with_class(model, options)


def check_loaded(model: PreTrainedModel) -> None:
    """Raises ValmError if accelerate has offloaded weights."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValmError(
            f"weights of this {type(model).__name__} are offloaded: augment the model, or load its adapter, before "
            "dispatch_model; an augmented model saved whole may be loaded with a device_map"
        )


def become_augmented(model: PreTrainedModel, options: FusionOptions) -> AugmentedCausalLM:
    """`augment` with known options, for a model whose fusion weights are not loaded yet."""
    attach(model, options)
    return _with_class(model, options)


def _with_class(model: PreTrainedModel, options: FusionOptions) -> AugmentedCausalLM:
    _own_config(model)
    model.config.base_place, model.config.name_or_path = _absolute(model.config.name_or_path), NOT_SAVED
    # change the class of this object, which the user, its optimizer, its hooks and PEFT refer to
    model.config.fusion = asdict(options)
    config_class = type(model.config)
    model.config.__class__ = augmented_config_class(config_class)
    model.__class__ = augmented_class(type(model), config_class)
    assert isinstance(model, AugmentedCausalLM)
    model.add_finder()
    freeze(model)
    return model


def _own_config(model: PreTrainedModel) -> None:
    """Gives a model and its modules a copy of their config, which models made from one config share."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            vars(module)["config"] = own


def _absolute(place: str | None) -> str | None:
    """The absolute path of the folder a model was opened from, since the working directory may change before saving."""
    return os.path.abspath(place) if place and os.path.isdir(place) else place


def attach(model: PreTrainedModel, options: FusionOptions, found: Probe | None = None) -> None:
    """Adds the fusion to a layer. In a VaLM without images the fusion has no parameters and attends to text only.

    LN_img starts as the layer's own input norm (`found`), so that images reach the attention at the scale of its text.
    With weight 1, images still moved the logits of SmolLM2 at the initial bias.
    """
    check_overridden()
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
    if options.fusion_scale == "embed_dim":
        attention.scaling = options.width**-0.5
    # the masks follow the model's config, so this layer's config may name another implementation
    own_config = attention.config
    attention.config = with_attention(own_config, IMPLEMENTATION)
    attention.register_forward_pre_hook(ImageHook(attention, own_config), with_kwargs=True)
    if options.layer_drops_images:
        block.__class__ = visual_layer_class(type(block))


def _attach_checked(model: PreTrainedModel, options: FusionOptions, found: Probe) -> None:
    """`attach`, then `check_mathematics` of the layer. Raises ValmError if the layer computes something else."""
    attention: Any = decoder_layers(model)[options.layer].get_submodule(attention_path(model, options.layer))
    own_config = attention.config
    attention.config = with_attention(own_config, IMPLEMENTATION)
    try:
        with in_mode(attention, training=False):
            check_mathematics(attention, own_config, found.calls)
    except ValmError:
        raise
    except Exception as error:  # of the family's own code
        raise not_on_images(attention, error) from error
    finally:
        attention.config = own_config
    attach(model, options, found)


def freeze(model: PreTrainedModel) -> None:
    """Freezes all parameters but those of the fusion, and of these the quantised ones."""
    model.requires_grad_(False)
    for parameter in fusion_module(model).parameters():
        parameter.requires_grad_(quantisation(parameter) is None)


def fusion_module(model: nn.Module) -> ImageFusion:
    """The `image_fusion` of an augmented model."""
    return next(module for module in model.modules() if isinstance(module, ImageFusion))


def fusion_layer(model: Any) -> int:
    """Index of the layer that sees images. Raises ValmError if the model has none."""
    if isinstance(model, AugmentedCausalLM):
        return model.fusion_options.layer % len(decoder_layers(model))
    raise ValmError(f"{type(model).__name__} has no fusion layer: give a layer")


class AugmentedCausalLM(ImageModel):
    """Mixin of a causal language model with a layer that sees images; `augment` puts it in front of the class."""

    config_class: type
    finder_class: Any = ImageFinder

    def __init_subclass__(cls, **kwargs: Any):
        """Gives `forward` the base's signature and the image arguments, which the Trainer and generate() look up."""
        super().__init_subclass__(**kwargs)
        if AugmentedCausalLM in cls.__bases__:
            for name, images in (("forward", IMAGE_ARGUMENTS), ("prepare_inputs_for_generation", ())):
                setattr(cls, name, _with_arguments(getattr(AugmentedCausalLM, name), getattr(super(), name), images))

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        """As in the base class. Raises ValmError if the config is the base's, without a fusion."""
        if not isinstance(config, self.config_class):
            raise ValmError(
                f"{config.name_or_path or 'the config'} is the config of a {config.model_type}, expected an augmented "
                f"{config.model_type}: load the model with AutoModelForCausalLM and augment it"
            )
        config = copy.copy(config)  # `set_min_score` and saving change it
        super().__init__(config, *args, **kwargs)
        attach(self, FusionOptions(**config.fusion))
        self.add_finder()

    def add_finder(self) -> None:
        """Hooks the finder to the modules that may be called with token ids: the base model, and the decoder inside it,
        which some classes (OPT) call directly."""
        self.finder = self.finder_class(self.config)
        parts = dict.fromkeys(part for part in (self.base_model, self.get_decoder()) if part is not self)
        for part in parts or (self,):
            self.finder.put_on(part)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained` for a model that was saved whole. Raises ValmError if the weights contain
        no image_fusion, or the file that says where the images are is damaged."""
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
                f"the weights in {pretrained_model_name_or_path} contain no {sorted(missing)[0]}, so they do not "
                "belong to the config there: save the model again"
            )
        if model.fusion_options.architecture != VALM:
            freeze(model)
        model.config.name_or_path = _absolute(model.config.name_or_path)
        if pretrained_model_name_or_path is not None:
            model.read_places(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return (model, info) if with_info else model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with images; it takes the base's arguments and these.

        Args:
            input_ids: (B, T) int64 token ids.
            image_pool: (U, E) float, the image vectors of this batch, each once.
            image_index: (B, T, K) int32 or int64, rows of the pool for each token, -1 = no image.
            attention_mask: (B, T) int64, 0 at padding.
            position_ids: (B, T) int64. Where they restart in a row, a new document begins, which sees no earlier one.
            labels: (B, T) int64, the tokens themselves; -100 is ignored.

        Returns:
            The base's output: `logits` (B, T, V) in the model's dtype, and with labels `loss`.

        Raises:
            ValueError: the images do not fit the model or the batch; `output_attentions` is set; the mask differs
                between heads or contains biases; or a row holds several documents and a cache is used.

        Example:
            >>> model, tokenizer = valm.load("model")
            >>> options = model.fusion_options
            >>> pool = torch.randn(10, options.image_dim)  # U = 10 images
            >>> index = torch.randint(10, (1, 3, options.num_images))  # K of them for each of 3 tokens
            >>> model(torch.tensor([[1, 2, 3]]), image_pool=pool, image_index=index).logits.shape
            torch.Size([1, 3, ...])
        """
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def fusion_attention(
        self,
        input_ids: Tensor,
        image_pool: Tensor | None = None,
        image_index: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fusion layer's attention weights, materialised: for plots and explanations of short texts.

        The arguments are those that `forward` takes. Without images, the weights cover the text only.

        Returns:
            The weights over text (B, H, T, T) and over images (B, H, T, K), at least float32. For each head and token
            they sum to 1, or to less if the family has an attention sink. A model that runs its layers several times
            (HRM) returns the weights of the last run.

        Example:
            >>> model, tokenizer = valm.load("model")
            >>> pool = torch.randn(10, model.fusion_options.image_dim)
            >>> index = torch.randint(10, (1, 3, model.fusion_options.num_images))
            >>> text, images = model.fusion_attention(torch.tensor([[1, 2, 3]]), pool, index)
            >>> torch.allclose(text.sum(-1) + images.sum(-1), torch.ones(()))
            True
        """
        options = self.fusion_options
        images = {"image_pool": image_pool, "image_index": image_index}
        if options.num_images > 0 and image_pool is None:
            images["image_pool"] = torch.zeros(0, options.image_dim, device=input_ids.device)
            images["image_index"] = torch.full((*input_ids.shape, 0), -1, device=input_ids.device)
        found: list[tuple[Tensor, Tensor]] = []
        self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            read_weights=lambda *arguments: found.append(joint_weights(*arguments)),
            **{name: image for name, image in images.items() if image is not None},
        )
        return found[-1]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, with the base's arguments; the retriever finds the images of each new token.

        Returns:
            Token ids (B, T + new tokens) int64, or what `return_dict_in_generate` asks for.

        Raises:
            ValueError: images are given (only a retriever can find images for new tokens); or assisted decoding or
                prompt lookup is asked for (the retriever's state cannot be rolled back).

        Example:
            >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
            >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4).shape
            torch.Size([1, 7])
        """
        if any(kwargs.get(name) is not None for name in IMAGE_ARGUMENTS):
            raise ValueError(
                "generate() takes no image_pool or image_index, since each new token needs its own images: set a "
                "retriever with set_retriever"
            )
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base's inputs with images and, for a static cache, the limits of the text. `generate` does not compile
        this method, so the retriever can run here and the mask can be read. Shapes stay the same at every token."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("cache")  # not the argument: Phi-3 drops its cache when its rotation changes
        static = isinstance(cache, StaticCache)
        if static:
            inputs["text_limits"] = self._text_limits(inputs.get("attention_mask"))
        if cache is not None and kwargs.get("image_index") is None and self.retriever is not None:
            mask = kwargs.get("attention_mask")
            found = self.finder.find_images(inputs.get("input_ids"), mask, cache, None)
            inputs |= {name: tensor for name, tensor in zip(IMAGE_ARGUMENTS, found, strict=False) if tensor is not None}
            if static and inputs["input_ids"].shape[1] == 1:
                inputs["image_pool"] = _padded_pool(inputs["image_pool"], inputs["image_index"].numel())
        return inputs

    def _text_limits(self, masks: Any) -> TextLimits | None:
        """The limits of the fusion layer's text, from `generate`'s mask or its masks by type of layer."""
        if isinstance(masks, dict):
            types = self.config.get_text_config(decoder=True).layer_types
            masks = masks.get(types[self.fusion_options.layer])
        if not isinstance(masks, Tensor) or masks.dim() != 4:
            return None
        seen = visible_keys(masks)
        limits = read_limits(seen)
        if limits is None or seen is None:
            return None
        # give all limits in every step, so that the graph is compiled once
        batch, num_queries, num_keys = seen.shape
        first_key, seqlens = limits
        if first_key is None:
            first_key = torch.zeros(batch, num_queries, dtype=torch.int32, device=seen.device)
        if seqlens is None:
            seqlens = torch.full((batch,), num_keys, dtype=torch.int32, device=seen.device)
        return TextLimits(first_key, seqlens)


def _with_arguments(method: Any, base: Any, more: Sequence[str]) -> Any:
    """A copy of `method` with the signature of `base` and `more` keyword arguments."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    parameters = dict(inspect.signature(base).parameters)
    for name in more:
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)
    made: Any = call
    made.__signature__ = inspect.Signature(ordered)
    # its own code object: torch.compile counts by code objects how often it compiles again
    made.__code__ = made.__code__.replace(co_name=base.__qualname__)
    return made


def _padded_pool(pool: Tensor, rows: int) -> Tensor:
    """The pool, padded to at least `rows` rows (the most different images that the tokens can see)."""
    return F.pad(pool, (0, 0, 0, max(0, rows - pool.shape[0])))


def augmented_class(base: Any, config_class: Any) -> Any:
    """The augmented class of a model class for configs of `config_class`. Some families have their own config class but
    another family's model class (EXAONE uses LlamaForCausalLM)."""

    config_class_with_images = augmented_config_class(config_class)
    return subclass(AugmentedCausalLM, base, augmented_class, config_class, config_class=config_class_with_images)


def transformers_class(name: str) -> type[PreTrainedModel]:
    """The causal language model of transformers with this name. Raises ValmError if there is none."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel) or not issubclass(found, GenerationMixin):
        raise ValmError(f"transformers {transformers.__version__} has no causal language model {name!r}")
    return found
