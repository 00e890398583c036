"""The config of a model with images: its base's config, the fusion's options, and what identifies its images."""

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

# The model_type in the file; in memory, model_type is the base's.
MODEL_TYPE = "valm"
# The entry of a config in which transformers looks for the name of the weights. A model with images stores a sentence
# there, so a class of transformers raises that sentence instead of loading the model without its images.
WEIGHTS_KEY = "transformers_weights"
NO_WEIGHTS = (
    "this model takes images, which only its own class loads: use valm.load or, after `import valm`, "
    "AutoModelForCausalLM"
)
# The name_or_path of a model with images whose present state is in no folder. If TRL opens a second model by that name,
# such as DPO's reference, it raises this sentence instead of loading the base or a model with other images.
NOT_SAVED = (
    "no folder has this model with its images: give TRL ref_model= and processing_class=, or save it and load it again"
)
# Whether a class that takes images is loading the weights, rather than another class with its config.
reads_images: ContextVar[bool] = ContextVar("reads_images", default=False)

FUSION_SCALES = ("head_dim", "embed_dim")
# The architecture of a VaLM, which is trained as a whole, also as a text-only baseline.
VALM = "VaLMForCausalLM"

_Config: Any = object  # for type checkers: the mixin's base class


@dataclass(frozen=True)
class FusionOptions:
    """Options that rebuild the fusion of a saved model: the `fusion` entry of its config.

    Args:
        architecture: class of the model in transformers, or VALM.
        image_dim: E, dimension of an image vector.
        num_images: K, images per token; 0 in a VaLM that is a text-only baseline, which has no fusion.
        layer: index of the fusion layer, as given (negative from the end).
        width: C, dimension of the attention's input.
        heads, kv_heads, key_dim, value_dim: Hq, Hkv, Dk and Dv, as the attention passes them to the interface.
        logit_bias: initial value of the bias that each head adds to its image scores.
        blind: each token's retrieval query replaces its image (Blind-VaLM, Ontalvilla et al. 2024).
        min_score: score threshold: a token whose best image has a lower retrieval score sees no image, with blind not
            its query; None = no threshold.
        fusion_scale: "head_dim" scales scores in the fusion layer as its family does; "embed_dim" by 1/sqrt(C), as the
            published code does (3.5 times flatter with 12 heads).
        norm_eps: epsilon of LN_img.
        layer_drops_images: the layer does not pass unknown arguments on to its attention (`VisualLayer`).
        sketch: of the base model (`valm.model.sketch`), by which an adapter recognises its base.

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
    min_score: float | None = None
    fusion_scale: str = "head_dim"
    norm_eps: float = 1e-5
    layer_drops_images: bool = False
    sketch: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("image_dim", "width", "heads", "kv_heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValmError(f"{name} must be at least 1, got {getattr(self, name)}")
        fewest = 0 if self.architecture == VALM else 1
        if not fewest <= self.num_images <= MAX_IMAGES:
            raise ValmError(f"num_images must be from {fewest} to {MAX_IMAGES}, got {self.num_images}")
        if self.blind and self.num_images != 1:
            raise ValmError(f"blind needs num_images = 1 (the query is the one image), got {self.num_images}")
        if self.fusion_scale not in FUSION_SCALES:
            known = ", ".join(map(repr, FUSION_SCALES))
            raise ValmError(f"fusion_scale must be one of {known}, got {self.fusion_scale!r}")
        for name in ("logit_bias", "min_score"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                raise ValmError(f"{name} must be a finite number, got {value!r}")
        if self.min_score is not None and self.num_images == 0:
            raise ValmError("min_score is for a model that sees images, but num_images is 0: set it to None")

    @property
    def retrieves(self) -> bool:
        """Whether tokens see images from a knowledge base."""
        return self.num_images > 0 and not self.blind


class AugmentedConfig(_Config):
    """Mixin of the config of a model with images. It adds to the base's config:

    - `fusion`: the `FusionOptions`, as a dict;
    - `retrieval`: what identifies its images (`RetrievalSource.identity`), or None;
    - `base_place`: folder or name of the model that was augmented, in memory only; None if the model was loaded whole.

    In memory, model_type is the base's. In the file it is "valm" and the base's config is nested: without this package,
    loading then fails by that name instead of loading the base without its images.
    """

    fusion: dict[str, Any]
    retrieval: dict[str, Any] | None = None
    base_place: str | None = None
    auto_map: ClassVar[dict[str, str]] = {}  # no remote code; TRL reads it for classes outside transformers
    wrapped_class: type  # class of the base's config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """`PreTrainedConfig.from_pretrained`. It also accepts the base's own config, because PEFT opens that with the
        augmented model's config class, to look up the base's vocabulary. Raises ValmError if the config belongs to
        another model."""
        found = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if not isinstance(config, cls) and type(config) is not cls.wrapped_class:
            raise ValmError(
                f"{pretrained_model_name_or_path} contains the config of a {config.model_type}, expected an augmented "
                f"{cls.model_type}"
            )
        return found

    @property
    def transformers_weights(self) -> str | None:
        """The name of the weights, which `from_pretrained` of any class looks up: only a class with images gets it. The
        weights of a text-only baseline are an ordinary model of its family."""
        return NO_WEIGHTS if self.fusion["num_images"] > 0 and not reads_images.get() else None

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without `base_place`. PEFT's card names the base model by `_name_or_path`."""
        found = super().to_dict()
        found.pop("base_place", None)
        if found.get("_name_or_path") == NOT_SAVED:
            found["_name_or_path"] = self.base_place or ""
        return found

    def to_diff_dict(self) -> dict[str, Any]:
        base = super().to_diff_dict()
        if base.get("architectures"):  # also if the config was loaded
            base["architectures"] = [self.fusion["architecture"]]
        own = {name: value for name in ("fusion", "retrieval") if (value := base.pop(name, None)) is not None}
        # our class reads base_config, any other class reads the entries next to it
        no_weights = {WEIGHTS_KEY: NO_WEIGHTS} if self.fusion["num_images"] > 0 else {}
        return {"model_type": MODEL_TYPE, **no_weights, "base_config": base | no_weights, **own}


def augmented_config_class(base: Any) -> Any:
    return subclass(AugmentedConfig, base, augmented_config_class)


class ValmConfig(AugmentedConfig, GPT2Config):  # type: ignore[misc]  # from_pretrained takes them as keywords
    """The config of a VaLM: a GPT-2 with one layer that also attends to images (Wang et al. 2022, section 2.3).

    Takes every argument of `GPT2Config`, and these. The defaults are the paper's.

    Args:
        image_dim: E, dimension of an image vector. If it differs from the model's width, an input projection is added.
        num_images: K, images per token. 0 makes the text-only baseline (GPT-2*), without image parameters.
        layer: index of the fusion layer, negative from the end.
        fusion_scale: "head_dim" scales the fusion layer's scores by 1/sqrt(D) as GPT-2 does; "embed_dim" by 1/sqrt(C),
            as the published code does.
        blind: makes the query control (Blind-VaLM): each token's retrieval query replaces its image.
        logit_bias: initial bias of each head's image scores; 0 as published. At -10, images have almost no weight at
            first.
        min_score: score threshold: a token whose best image has a lower retrieval score sees no image; None: no
            threshold.

    Raises:
        ValmError: an argument does not exist or is invalid.

    Example:
        >>> config = valm.ValmConfig(n_layer=4, n_embd=128, n_head=8, image_dim=512, num_images=4)
        >>> model = valm.VaLMForCausalLM(config)
        >>> model.fusion_options.layer
        -2
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
                architecture=VALM,
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
                min_score=min_score,
                fusion_scale=fusion_scale,
                norm_eps=self.layer_norm_epsilon,
            )
        )


def _check_names(names: Any) -> None:
    """Checks names of arguments, because transformers accepts any name and would ignore a misspelt one. Raises
    ValmError if there is no such argument."""
    known = {*inspect.signature(ValmConfig).parameters, *(field.name for field in fields(GPT2Config))}
    known |= {*GPT2Config.attribute_map, "attn_implementation", "experts_implementation"}
    for name in names:
        if name not in known and not hasattr(GPT2Config, name):  # a property, such as num_labels
            raise ValmError(f"ValmConfig has no argument {name}{nearest(name, known)}")


def config_from_dict(content: dict[str, Any], **kwargs: Any) -> Any:
    """The config that `AugmentedConfig` wrote as `content`; arguments as in `PreTrainedConfig.from_dict`. Raises
    ValmError if `content` is no such config."""
    base, fusion = content.get("base_config"), content.get("fusion")
    if not isinstance(base, dict) or not isinstance(fusion, dict) or base.get("model_type") not in CONFIG_MAPPING:
        raise ValmError("the config contains no base_config and fusion, so it is no config of a model with images")
    try:
        options = FusionOptions(**fusion)
    except (TypeError, ValmError) as error:
        raise ValmError(f"the config's fusion does not fit: {error}") from error
    base = {key: base[key] for key in base if key != WEIGHTS_KEY}
    result = CONFIG_MAPPING[base["model_type"]].from_dict(base, **kwargs)
    made = result[0] if isinstance(result, tuple) else result  # a tuple also contains unused arguments
    made.__class__ = ValmConfig if options.architecture == VALM else augmented_config_class(type(made))
    made.fusion = fusion
    # TRL opens a model by the class that `architectures` names, if transformers has it, else by AutoModelForCausalLM
    if made.architectures:
        made.architectures = [f"Augmented{options.architecture}"]
    if "retrieval" in content:
        made.retrieval = content["retrieval"]
    return result
