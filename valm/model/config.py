"""The config of a model with images: that of its base, the options of the fusion, and what identifies its images."""

from __future__ import annotations

import inspect
import math
import os
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, GPT2Config

from valm.errors import ValmError
from valm.model.subclasses import subclass
from valm.text import nearest
from valm_kernels import MAX_IMAGES

# The model_type in the file; in memory it is the base's.
MODEL_TYPE = "valm"
# The entry of a config in which transformers looks for the name of its weights. In the file of a model with images it
# has this sentence, so a class of transformers raises it instead of loading the model without its images.
WEIGHTS_KEY = "transformers_weights"
NO_WEIGHTS = (
    "this model takes images, which only its own class reads: load it by valm.load or, after `import valm`, by "
    "AutoModelForCausalLM"
)
# The name_or_path of a model with images that no folder has as it is. Where TRL would open a second model by that name,
# such as the reference of DPO, it raises this sentence instead of opening a model with other images, or the base.
NOT_SAVED = (
    "no folder has this model with its images: give TRL ref_model= and processing_class=, or save it and load it again"
)
# Whether a class that takes images is reading the weights, and not another class that was given its config.
reads_images: ContextVar[bool] = ContextVar("reads_images", default=False)

FUSION_SCALES = ("head_dim", "embed_dim")
# What trains besides the fusion: nothing, its layer, or everything.
UNFREEZE = ("", "block", "all")

_Config: Any = object  # for a type checker, the config class behind the mixin


@dataclass(frozen=True)
class FusionOptions:
    """Options that rebuild the fusion of a saved model: the `fusion` entry of its config.

    Args:
        architecture: class of the model in transformers, or VaLMForCausalLM.
        image_dim: E, dimension of an image vector.
        num_images: K, images per token; 0 in a text-only twin, which has no fusion.
        layer: index of the fusion layer, as given (negative from the end).
        width: C, dimension of the attention's input.
        heads, kv_heads, key_dim, value_dim: Hq, Hkv, Dk and Dv, as the attention passes them to the interface.
        logit_bias: initial value of the bias that each head adds to its image scores.
        blind: each token sees its own retrieval query as its one image (Blind-VaLM, Ontalvilla et al. 2024).
        unfreeze: what trained besides the fusion: "", "block" or "all".
        score_scale: initial value of the scale of the retrieval scores; None = they are not used.
        min_score: a token whose best image has a lower retrieval score sees none; None = no cut.
        fusion_scale: "head_dim" scales scores in the fusion layer as its family does; "embed_dim" by 1/sqrt(C), as the
            published code does (3.5 times flatter with 12 heads).
        norm_eps: of LN_img.
        layer_drops_images: the layer does not hand unknown arguments on to its attention (`VisualLayer`).
        sketch: of the base model (`valm.model.sketch`), by which an adapter recognises it.

    Raises:
        ValmError: a value is invalid, or two do not go together.
    """

    architecture: str
    image_dim: int
    num_images: int
    layer: int
    width: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    logit_bias: float
    blind: bool
    unfreeze: str
    score_scale: float | None = None
    min_score: float | None = None
    fusion_scale: str = "head_dim"
    norm_eps: float = 1e-5
    layer_drops_images: bool = False
    sketch: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("image_dim", "width", "heads", "kv_heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValmError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.num_images <= MAX_IMAGES:
            raise ValmError(f"num_images must be from 0 to {MAX_IMAGES}, got {self.num_images}")
        if self.blind and self.num_images != 1:
            raise ValmError(f"blind needs num_images = 1 (the query is the one image), got {self.num_images}")
        for name, allowed in (("unfreeze", UNFREEZE), ("fusion_scale", FUSION_SCALES)):
            if getattr(self, name) not in allowed:
                raise ValmError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name in ("logit_bias", "score_scale", "min_score"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                raise ValmError(f"{name} must be a finite number, got {value!r}")
        if self.num_images == 0 and not self.unfreeze:
            raise ValmError(
                "with num_images = 0 (the text-only twin) there are no new parameters: let "
                'unfreeze="block" or "all" train'
            )
        if self.score_scale is not None and self.num_images == 0:
            raise ValmError("score_scale scales the scores of images, but with num_images = 0 there are none")
        if self.min_score is not None and not self.retrieves:
            raise ValmError(
                f"min_score is of retrieved images, got num_images = {self.num_images}, blind = {self.blind}: set it "
                "to None"
            )

    @property
    def retrieves(self) -> bool:
        """Whether tokens see images of a knowledge base."""
        return self.num_images > 0 and not self.blind

    @property
    def scored(self) -> bool:
        """Whether the model uses the retrieval scores of its images."""
        return self.score_scale is not None


class AugmentedConfig(_Config):
    """Mixin of the config of a model with images: the config of its base, with

    - `fusion`: the `FusionOptions`, as a dict;
    - `retrieval`: what identifies its images (`ImageSource.identity`), or None;
    - `base_place`: folder or name of the model that was augmented, in memory only; None if the model was opened whole.

    In memory the model_type is the base's. In the file it is "valm" and the base's config is nested, so that without
    this package loading fails by that name, instead of loading the base without its images.
    """

    fusion: dict[str, Any]
    retrieval: dict[str, Any] | None = None
    base_place: str | None = None
    auto_map: ClassVar[dict[str, str]] = {}  # no remote code; TRL reads it of a class that transformers does not have
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
        """What `from_pretrained` of any class of transformers looks for, such as that of AutoModel: none but a class
        with images finds the weights. Those of a text-only twin are a model of its family."""
        return NO_WEIGHTS if self.fusion["num_images"] > 0 and not reads_images.get() else None

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without `base_place`; PEFT's card takes `_name_or_path` for the base model."""
        found = super().to_dict()
        found.pop("base_place", None)
        if found.get("_name_or_path") == NOT_SAVED:
            found["_name_or_path"] = self.base_place or ""
        return found

    def to_diff_dict(self) -> dict[str, Any]:
        base = super().to_diff_dict()
        if base.get("architectures"):  # the base's again, also of a config that was read
            base["architectures"] = [self.fusion["architecture"]]
        own = {name: value for name in ("fusion", "retrieval") if (value := base.pop(name, None)) is not None}
        # the base's own class reads base_config, any other what stands beside it
        no_weights = {WEIGHTS_KEY: NO_WEIGHTS} if self.fusion["num_images"] > 0 else {}
        return {"model_type": MODEL_TYPE, **no_weights, "base_config": base | no_weights, **own}


def augmented_config_class(base: Any) -> Any:
    return subclass(AugmentedConfig, base, augmented_config_class)


class ValmConfig(AugmentedConfig, GPT2Config):  # type: ignore[misc]  # from_pretrained takes them as keywords
    """GPT-2 with one block that also attends to retrieved images (Wang et al. 2022, section 2.3): the config of an
    augmented GPT-2, all of which trains.

    Takes every argument of `GPT2Config` and, as keywords, those of `FusionOptions` that follow, with the paper's
    defaults.

    Args:
        image_dim: dimension E of an image vector. When it is not the model's width, one input projection is added.
        num_images: K, the images per token. 0 is the baseline GPT-2*: a GPT-2 without any image parameters.
        layer: index of the fusion layer, negative from the end; the paper puts it last but one.
        fusion_scale, blind, score_scale, min_score: see `FusionOptions`.
        logit_bias: 0 as published; -10 starts with the images closed.

    Raises:
        ValmError: there is no such argument, or it has an invalid value.
    """

    wrapped_class = GPT2Config

    def __init__(
        self,
        image_dim: int = 768,
        num_images: int = 4,
        layer: int = -2,
        fusion_scale: str = "head_dim",
        blind: bool = False,
        logit_bias: float = 0.0,
        score_scale: float | None = None,
        min_score: float | None = None,
        **kwargs: Any,
    ):
        _check_names(kwargs)
        super().__init__(**kwargs)
        if not -self.n_layer <= layer < self.n_layer:
            raise ValmError(f"layer must name one of the {self.n_layer} blocks, got {layer}")
        head_dim, rest = divmod(self.n_embd, self.n_head)
        if rest:
            raise ValmError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        self.fusion = asdict(
            FusionOptions(
                architecture="VaLMForCausalLM",
                image_dim=image_dim,
                num_images=num_images,
                layer=layer,
                width=self.n_embd,
                heads=self.n_head,
                kv_heads=self.n_head,
                key_dim=head_dim,
                value_dim=head_dim,
                logit_bias=logit_bias,
                blind=blind,
                unfreeze="all",
                score_scale=score_scale,
                min_score=min_score,
                fusion_scale=fusion_scale,
                norm_eps=self.layer_norm_epsilon,
            )
        )


def _check_names(names: Any) -> None:
    """Checks names of arguments: transformers takes any name, and a misspelt one would change nothing.

    Raises:
        ValmError: there is no such argument.
    """
    known = {*inspect.signature(ValmConfig).parameters, *(field.name for field in fields(GPT2Config))}
    known |= {*GPT2Config.attribute_map, "attn_implementation", "experts_implementation"}
    for name in names:
        if name not in known and not hasattr(GPT2Config, name):  # a property, such as num_labels
            raise ValmError(f"ValmConfig has no argument {name}{nearest(name, known)}")


def config_from_dict(content: dict[str, Any], **kwargs: Any) -> Any:
    """The config in what `AugmentedConfig` wrote; arguments as in `PreTrainedConfig.from_dict`.

    Raises:
        ValmError: it is not one.
    """
    base, fusion = content.get("base_config"), content.get("fusion")
    if not isinstance(base, dict) or not isinstance(fusion, dict) or base.get("model_type") not in CONFIG_MAPPING:
        raise ValmError("the config has no base_config and fusion: it is not that of a model with images")
    try:
        options = FusionOptions(**fusion)
    except (TypeError, ValmError) as error:
        raise ValmError(f"the config's fusion does not fit: {error}") from error
    base = {key: base[key] for key in base if key != WEIGHTS_KEY}
    result = CONFIG_MAPPING[base["model_type"]].from_dict(base, **kwargs)
    made = result[0] if isinstance(result, tuple) else result  # beside it the arguments that were not used
    made.__class__ = ValmConfig if options.architecture == "VaLMForCausalLM" else augmented_config_class(type(made))
    made.fusion = fusion
    # TRL opens a model by the class that `architectures` names, if transformers has it, else by AutoModelForCausalLM
    if made.architectures:
        made.architectures = [f"Augmented{options.architecture}"]
    if "retrieval" in content:
        made.retrieval = content["retrieval"]
    return result
