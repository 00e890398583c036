"""Finds a model's images as its decoder begins to read."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.cache_utils import Cache

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.attention import IMAGE_ARGUMENTS
from valm.model.config import FusionOptions
from valm.model.documents import mask_of_tokens, padding_apart, restarts, split_rows
from valm.model.positions import CACHE_ARGUMENTS, named_arguments
from valm.model.private_names import attention_of
from valm.model.probe import keeps_apart
from valm.model.retrieval_cache import retrieval_state, with_retrieval
from valm.retrieval.min_score import cut
from valm.retrieval.retriever import BlindRetriever, ImageRetriever, NoImages, Retrieved, Retriever
from valm.retrieval.source import ImageSource, open_encoder
from valm.store.folders import current_files
from valm.store.pretrained import from_pretrained

# Rows that a vocabulary may have beyond its tokenizer's tokens, as it is padded to a multiple of 128 at most.
PADDED_ROWS = 127
# Attention implementations whose masks the fusion layer can read.
READABLE = ("sdpa", "eager")
# A key is hidden from here on in a mask that is added to the scores; libraries write -inf, the least number or -1e4.
HIDDEN = -1e3
RESTART_IN_A_GRAPH = (
    "position_ids restart, so there are several documents in a row, which a compiled model keeps apart only without an "
    "attention_mask and with use_cache=False"
)
MIXED = "position_ids restart, but this {decoder} does not keep documents in a row apart: give each a row of its own"


class ImageFinder:
    """Hooks of a decoder, which check the images that it is given, or find them, and tell documents apart.

    Whoever runs the decoder gets images: its own model, or a library that calls `model.base_model`.

    Args:
        config: the model's, with the options of its fusion.
    """

    strict = False
    # says that the images come from another knowledge base than the model was saved with; None otherwise
    other_images: str | None = None
    # what finds the images, opened on first use unless a retriever was set
    source: ImageSource | None = None
    folder: str | None = None  # of the model, with its tokenizer
    _retriever: ImageRetriever | None = None
    _is_set = False
    _warned = False
    _keeps_apart: bool | None = None  # None: not tried yet

    def __init__(self, config: Any):
        self.config = config

    def put_on(self, part: nn.Module) -> None:
        """Puts the hooks on a part of the model that may be called with token ids."""
        names = tuple(inspect.signature(type(part).forward).parameters)[1:]  # without self
        part.register_forward_pre_hook(partial(self.before, names), with_kwargs=True)
        part.register_forward_hook(self.after, with_kwargs=True)

    @property
    def options(self) -> FusionOptions:
        return FusionOptions(**self.config.fusion)

    def before(
        self, names: tuple[str, ...], decoder: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call with images, and with what keeps documents apart. Errors as in the methods below."""
        arguments = named_arguments(names, args, kwargs)
        ids: Any = arguments.get("input_ids")
        embeds: Any = arguments.get("inputs_embeds")
        if ids is None and embeds is None:  # of a part that has the decoder's name
            return args, kwargs
        mask: Any = arguments.get("attention_mask")
        self.check(arguments)
        placed = self.place_text(decoder, arguments)
        images: Any = [placed.pop(name, None) for name in IMAGE_ARGUMENTS[:3]]
        if all(image is None for image in images):
            images = self.find_images(ids, mask, cache_of(arguments), arguments.get("position_ids"))
        else:
            shape = (ids if embeds is None else embeds).shape[:2]
            images = self.given_images(shape, mask, cache_of(arguments), *images)
        given = dict(zip(IMAGE_ARGUMENTS, images, strict=False))
        return (), placed | {name: image for name, image in given.items() if image is not None}

    def check(self, arguments: dict[str, Any]) -> None:
        """Checks arguments that the fusion layer cannot read.

        Raises:
            ValueError: `output_attentions`, which has no place for weights of images; a mask for each head, or with
                biases; or image_slots alone.
            ValmError: the model's attention implementation has other masks.
        """
        check_readable(self.config)
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
        if arguments.get("image_slots") is not None and arguments.get("image_index") is None:
            raise ValueError("image_slots must be given together with image_pool and image_index")

    def place_text(self, decoder: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the decoder with those that say what each token sees of the text.

        Documents in a row are told apart by positions that restart. transformers sees that without a mask and without a
        cache only, and would otherwise mix them in silence.

        Raises:
            ValueError: there are several documents in a row and a cache; or gaps inside of them, by which transformers
                would split them; or the family mixes them.
        """
        positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
        cache, use_cache = cache_of(arguments), arguments.get("use_cache")
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
            elif not tells_apart(self, decoder):
                mixed = MIXED.format(decoder=type(decoder).__name__)
                torch._assert_async(~restarts(positions, mask).begins.any(), mixed)
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
        if not self.tells_apart(decoder):
            raise ValueError(MIXED.format(decoder=type(decoder).__name__))
        if mask is not None:
            positions = padding_apart(positions, mask)
        return arguments | {"position_ids": positions, "attention_mask": None, "use_cache": False}

    def tells_apart(self, decoder: Any) -> bool:
        """Whether the decoder keeps documents in a row apart by their positions, which is tried once."""
        if self._keeps_apart is None:
            self._keeps_apart = keeps_apart(decoder, self._without_images(decoder.forward))
        return self._keeps_apart

    def _without_images(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a decoder, with no images on purpose: inside it may be another one that would look for them."""
        options = self.options

        @wraps(forward)
        def read(input_ids: Tensor, **arguments: Any) -> Any:
            none = {
                "image_pool": torch.zeros(0, options.image_dim, device=input_ids.device),
                "image_index": input_ids.new_full((*input_ids.shape, options.num_images), -1),
            }
            return forward(input_ids=input_ids, **arguments, **(none if options.num_images > 0 else {}))

        return read

    # ---- images that are given ----

    def given_images(
        self, shape: torch.Size, mask: Any, cache: Any, pool: Tensor | None, index: Tensor | None, scores: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """image_pool, image_index and image_scores that were given for tokens of `shape` (B, T); padding sees none.

        Raises:
            ValueError: they do not fit.
        """
        self.check_images(shape, pool, index, scores)
        if index is not None and isinstance(mask, Tensor) and mask.dim() == 2:
            index = index.masked_fill(mask_of_tokens(mask, cache, shape[1])[..., None] == 0, -1)
        return pool, index, scores

    def check_images(self, shape: torch.Size, pool: Tensor | None, index: Tensor | None, scores: Tensor | None) -> None:
        """Checks image_pool, image_index and image_scores against the model and the batch's `shape` (B, T).

        Raises:
            ValueError: they do not fit.
        """
        if (pool is None) != (index is None):
            raise ValueError("image_pool and image_index must be given together")
        options = self.options
        if scores is not None and not options.scored:
            raise ValueError(
                "image_scores was given to a model that does not use retrieval scores: make it with score_scale"
            )
        if pool is None or index is None:
            if scores is not None:
                raise ValueError("image_scores must be given together with image_pool and image_index")
            return
        if options.num_images == 0:
            raise ValueError("image_pool was given to a model with num_images = 0 (GPT-2*), which sees no images")
        if pool.dim() != 2 or pool.shape[1] != options.image_dim:
            raise ValueError(
                f"image_pool must have shape (U, image_dim = {options.image_dim}), got {tuple(pool.shape)}"
            )
        if index.dim() != 3 or index.shape[:2] != shape:
            raise ValueError(
                f"image_index must have shape (B, T, K), (B, T) = {tuple(shape)}, got {tuple(index.shape)}"
            )
        if scores is None:
            if options.scored and pool.shape[0] > 0:
                raise ValueError("image_scores must be given with the images: this model uses their retrieval scores")
            return
        if scores.shape != index.shape or not scores.is_floating_point():
            raise ValueError(
                f"image_scores must be float with the shape of image_index, {tuple(index.shape)}, got {scores.dtype} "
                f"with {tuple(scores.shape)}"
            )

    # ---- images that are found ----

    def find_images(
        self, ids: Tensor | None, mask: Any, cache: Any, positions: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """image_pool (U, E), image_index and image_scores (B, T, K) of the tokens `ids` (B, T), by the retriever.

        The scores are None for a model that does not use them. All three are None, with a warning, if the model has no
        retriever. `cache` has the state of the earlier tokens. Without one, the retriever reads each document of a row
        by itself, where `positions` tell them apart.

        Raises:
            ValueError: there is no retriever and the model is `strict`; or the retriever did not read all the tokens in
                the cache.
        """
        # a compiled graph holds for this value, and is made anew where a retriever is set later
        if self._retriever is None and not finds_images(self, None if ids is None else ids.device):
            return None, None, None
        return self._find_images(ids, mask, cache, positions)

    @torch.compiler.disable
    def _find_images(
        self, ids: Tensor | None, mask: Any, cache: Any, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        retriever = self._retriever
        assert retriever is not None
        if ids is None:
            raise ValueError(
                "the retriever reads token ids, got inputs_embeds only: give image_pool and image_index too"
            )
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"beside a retriever attention_mask must have two dimensions (B, T), got {mask.dim()}: give image_pool "
                "and image_index too"
            )
        own = None if mask is None else mask_of_tokens(mask, cache, ids.shape[1])
        if cache is None:
            found = _each_document(retriever, ids, own, positions)
        else:
            found = retriever.step(ids, retrieval_state(cache, retriever, len(ids)), own)
            cache.num_retrieved += ids.shape[1]
        seen = self.seen(found, ids.device)
        return seen.image_pool, seen.image_index, seen.scores if self.options.scored else None

    def seen(self, found: Retrieved, device: torch.device) -> Retrieved:
        """Those of the images `found` that the model sees, without what its min_score cuts, on its device."""
        index, scores = cut(found.image_index, found.scores, self.options.min_score)
        return Retrieved(found.image_pool.to(device), index.to(device), found.image_ids.to(device), scores.to(device))

    def arguments(self, seen: Retrieved) -> dict[str, Tensor]:
        """The arguments of the model's forward that have these images; one with K = 0 takes none."""
        if self.options.num_images == 0:
            return {}
        images = {"image_pool": seen.image_pool, "image_index": seen.image_index}
        return images | {"image_scores": seen.scores} if self.options.scored else images

    def after(self, decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Puts the text of a pass that began without a cache into the cache that it returns, if it does. The retriever
        reads it again when the cache is used, so that a pass whose cache nobody uses costs nothing."""
        ids: Any = kwargs.get("input_ids")
        if self._retriever is None or ids is None or cache_of(kwargs) is not None:
            return
        for cache in output if isinstance(output, tuple) else output.values():
            if isinstance(cache, Cache):
                _keep_text(cache, ids, kwargs.get("attention_mask"))

    def open_retriever(self, device: torch.device | None) -> ImageRetriever | None:
        """What was set, or else what the folder of the model says, opened on first use; None where it says no place.

        Raises:
            ValmError: what it names is missing or does not fit.
        """
        source, folder = self.source, self.folder
        if self._is_set or source is None or folder is None or self.options.num_images == 0:
            return self._retriever
        if source.knowledge_base is not None or source.clip is not None:
            self._open(source, folder, device)
        return self._retriever

    def set_retriever(self, retriever: ImageRetriever | None) -> None:
        """See `ImageModel.set_retriever`."""
        other_images = None
        if retriever is not None:
            self._check_retriever(retriever)
            given = ImageSource.of_retriever(retriever)
            saved = ImageSource.of_config(self.config.retrieval)
            if given is not None and saved is not None:
                other_images = saved.same_images(given)
                given = replace(given, precision=saved.precision)
            if other_images is not None:
                warnings.warn(other_images, stacklevel=3)
            if not isinstance(retriever, NoImages):
                self.source = given
        self._retriever, self.other_images, self._is_set = retriever, other_images, True

    def set_source(self, source: ImageSource) -> None:
        """Makes `source` what finds the images, which later retrievers are compared with."""
        self.source = source
        self.note_source()

    def note_source(self) -> None:
        """Puts what identifies the images into the config, which is about to be saved."""
        if self.source is not None:
            self.config.retrieval = self.source.identity()

    def _check_retriever(self, retriever: Any) -> None:
        """Checks that a retriever is for this model.

        Raises:
            ValmError: it is not.
        """
        options = self.options
        if options.blind != isinstance(retriever, BlindRetriever) and not isinstance(retriever, NoImages):
            kind = "a BlindRetriever" if options.blind else "a Retriever"
            raise ValmError(
                f"this model needs {kind} (blind={options.blind} in its config), got a {type(retriever).__name__}"
            )
        for name, found, option in (("k", retriever.k, "num_images"), ("dim", retriever.dim, "image_dim")):
            if found != getattr(options, option):
                raise ValmError(
                    f"retriever.{name} is {found}, but this model was made for {getattr(options, option)} "
                    f"({option} in its config): give it the retriever or knowledge base that it was trained with"
                )
        encoder = getattr(retriever, "encoder", None)
        tokens = getattr(encoder, "tokenizer", ())
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        # an encoder that was given none reads ids as CLIP's, and those of another tokenizer would pass for them
        guessed = getattr(encoder, "own_tokenizer", False) and vocabulary - len(tokens) > PADDED_ROWS
        if len(tokens) > vocabulary or guessed:
            raise ValmError(
                f"the retriever's encoder reads {len(tokens)} tokens, and this model has {vocabulary}: give its "
                "ContextEncoder the model's tokenizer (tokenizer=)"
            )

    def open(
        self,
        source: ImageSource,
        tokenizer: Any,
        *,
        clip: str | None = None,
        allow_download: bool = False,
        **of_tower: Any,
    ) -> ImageRetriever:
        """What `source` says finds the images of this model, which reads with `tokenizer`.

        Args:
            clip, allow_download: as in `open_encoder`.
            of_tower: device and dtype, as in `open_encoder`; but the default dtype of a blind model, whose images are
                its queries, and of one with a min_score is that of its training.

        Raises:
            ValmError: the knowledge base or the CLIP is missing or damaged, or they do not belong together; or the text
                tower cannot have this precision.
        """
        place: Any = source.clip
        if place is None or not self.options.blind:
            missing = source.missing()
            if source.knowledge_base is None:
                raise ValmError(missing or "a model that is not blind needs a knowledge base: give it as kb (--kb)")
            place = ImageKnowledgeBase.open(source.knowledge_base)
        of_tower |= {"overlap": source.overlap, "min_tokens": source.min_tokens}
        min_score = self.options.min_score
        if source.precision is not None and (self.options.blind or (min_score is not None and min_score > -1)):
            of_tower["dtype"] = of_tower.get("dtype") or getattr(torch, source.precision)
        encoder = open_encoder(place, source.query, tokenizer, clip=clip, allow_download=allow_download, **of_tower)
        return BlindRetriever(encoder) if self.options.blind else Retriever(encoder, place, self.options.num_images)

    def _open(self, source: ImageSource, folder: str, device: torch.device | None) -> None:
        files = current_files(Path(folder))
        has_tokenizer = (files / "tokenizer_config.json").is_file()
        tokenizer_of = files if has_tokenizer else self.config.name_or_path
        try:
            what = f"the tokenizer in {tokenizer_of}"
            tokenizer: Any = from_pretrained(AutoTokenizer, tokenizer_of, what, local_files_only=True)
        except ValmError as error:
            raise ValmError(
                f"the images of the model in {folder} cannot be retrieved: no tokenizer can be loaded from "
                f"{tokenizer_of}; save one there by tokenizer.save_pretrained, or set a retriever by set_retriever"
            ) from error
        try:
            self.set_retriever(self.open(source, tokenizer, device=device or "cpu"))
        except Exception as error:  # open_clip raises many kinds
            raise ValmError(
                f"the images of the model in {folder} cannot be retrieved: {str(error).splitlines()[0]}; set another "
                "retriever by set_retriever, or None for text alone"
            ) from error

    def say_that_images_are_missing(self) -> None:
        """Warns once that the model has no images; silent if it takes none.

        Raises:
            ValueError: the model is `strict`.
        """
        options = self.options
        if options.num_images == 0:
            return
        message = (
            f"this model takes {options.num_images} images a token, but has no retriever and was given none: set one "
            "by set_retriever, or give image_pool and image_index"
        )
        if self.strict:
            raise ValueError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message + ". It reads the text alone now.", stacklevel=5)


def check_readable(config: Any) -> None:
    """Checks that the fusion layer can read the masks that the model of this config makes.

    Raises:
        ValmError: its attention has others, or none, as where a window is an argument.
    """
    implementation = attention_of(config.get_text_config(decoder=True))
    if implementation not in READABLE:
        raise ValmError(
            f'the model has attn_implementation="{implementation}", whose masks the fusion layer cannot read: load it '
            f"with {' or '.join(map(repr, READABLE))}, or set_attn_implementation"
        )


@torch.compiler.assume_constant_result
def finds_images(finder: ImageFinder, device: torch.device | None) -> bool:
    """Whether there is a retriever; warns if not. A compiled graph evaluates this while tracing."""
    if finder.open_retriever(device) is not None:
        return True
    finder.say_that_images_are_missing()
    return False


@torch.compiler.assume_constant_result
def tells_apart(finder: ImageFinder, decoder: Any) -> bool:
    """`ImageFinder.tells_apart`, while a graph is traced."""
    return finder.tells_apart(decoder)


@torch.compiler.disable
def _keep_text(cache: Any, ids: Tensor, mask: Tensor | None) -> None:
    with_retrieval(cache).text = ids.clone(), None if mask is None else mask[:, : ids.shape[1]]


def cache_of(arguments: dict[str, Any]) -> Any:
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def _each_document(retriever: ImageRetriever, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Retrieved:
    """The images of rows (B, T) in which documents begin where `positions` (B or 1, T) restart."""
    if positions is not None and positions.dim() == 2:
        begins = restarts(positions.expand_as(ids), mask).begins
        if begins.any():
            split = split_rows(ids, mask, begins)
            found = retriever(split.ids, split.mask)
            row, column = split.row.to(found.image_index.device), split.column.to(found.image_index.device)
            return found._replace(image_index=found.image_index[row, column], scores=found.scores[row, column])
    return retriever(ids, mask)
