"""Finds a model's images as its decoder begins to read."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from valm.errors import ValmError
from valm.model.attention import IMAGE_ARGUMENTS
from valm.model.config import NOT_SAVED, FusionOptions
from valm.model.documents import check_in_a_graph, mask_of_tokens, restarts, split_rows, told_apart
from valm.model.image_arguments import check_call, check_images
from valm.model.positions import cache_of, named_arguments
from valm.model.probe import keeps_apart
from valm.model.retrieval_cache import retrieval_state, with_retrieval
from valm.retrieval.min_score import cut
from valm.retrieval.retriever import BlindRetriever, ImageRetriever, NoImages, Retrieved
from valm.retrieval.source import ImageSource, open_retriever, open_tokenizer

# Rows that a vocabulary may have beyond its tokenizer's tokens, as it is padded to a multiple of 128 at most.
PADDED_ROWS = 127


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
    _number = 0  # of the retrievers that were set: a cache knows by it whose images its tokens saw
    _warned = False
    _keeps_apart: bool | None = None  # None: not tried yet

    def __init__(self, config: Any):
        self.config = config
        self.options = FusionOptions(**config.fusion)

    def change(self, name: str, value: Any) -> None:
        """Sets an option of the fusion, here and in the config.

        Raises:
            ValmError: the value is invalid.
        """
        self.options = replace(self.options, **{name: value})
        self.config.fusion = self.config.fusion | {name: value}
        self.config.name_or_path = NOT_SAVED  # the folder has the option as it was

    # ---- the hooks ----

    def put_on(self, part: nn.Module) -> None:
        """Puts the hooks on a part of the model that may be called with token ids."""
        names = tuple(inspect.signature(type(part).forward).parameters)[1:]  # without self
        part.register_forward_pre_hook(partial(self.before, names), with_kwargs=True)
        part.register_forward_hook(self.after, with_kwargs=True)

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
        check_call(self.config, arguments)
        placed = self.place_text(decoder, arguments)
        images: Any = [placed.pop(name, None) for name in IMAGE_ARGUMENTS[:3]]
        if all(image is None for image in images):
            images = self.find_images(ids, mask, cache_of(arguments), arguments.get("position_ids"))
        else:
            shape = (ids if embeds is None else embeds).shape[:2]
            check_images(self.options, shape, *images)
            if images[1] is not None and isinstance(mask, Tensor) and mask.dim() == 2:  # padding sees none
                padding = mask_of_tokens(mask, cache_of(arguments), shape[1])[..., None] == 0
                images[1] = images[1].masked_fill(padding, -1)
        given = dict(zip(IMAGE_ARGUMENTS, images, strict=False))
        return (), placed | {name: image for name, image in given.items() if image is not None}

    def after(self, decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Puts the text of a pass that began without a cache into the cache that it returns, if it does. The retriever
        reads it again when the cache is used, so that a pass whose cache nobody uses costs nothing."""
        ids: Any = kwargs.get("input_ids")
        if self._retriever is None or ids is None or cache_of(kwargs) is not None:
            return
        for cache in output if isinstance(output, tuple) else output.values():
            if isinstance(cache, Cache):
                _keep_text(cache, ids, kwargs.get("attention_mask"), self._number)

    # ---- documents ----

    def place_text(self, decoder: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the decoder with those that say what each token sees of the text; errors as in
        `told_apart`."""
        if torch.compiler.is_compiling():
            caches = getattr(self.config.get_text_config(decoder=True), "use_cache", False)
            # an export that is not strict has no values to try it with
            untried = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
            known = not untried or self._keeps_apart is not None  # a graph that reads this has a guard on it
            check_in_a_graph(arguments, caches, lambda: known and tells_apart(self, decoder))
            return arguments
        return told_apart(decoder, arguments, lambda: self.tells_apart(decoder))

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

    # ---- images ----

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
        if torch.compiler.is_exporting():  # images of these tokens would become constants of the program
            raise ValueError(
                "an exported program cannot hold a retriever: give image_pool and image_index, or set_retriever(None)"
            )
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
            found = retriever.step(ids, retrieval_state(cache, retriever, len(ids), self._number), own)
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

    # ---- the retriever ----

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

    def set_retriever(self, retriever: ImageRetriever | None, chosen: bool = True) -> None:
        """See `ImageModel.set_retriever`. chosen: whether the caller chose the precision of the queries; only a chosen
        precision is noted."""
        other_images = None
        if retriever is not None:
            self._check_retriever(retriever)
            given = ImageSource.of_retriever(retriever)
            saved = ImageSource.of_config(self.config.retrieval)
            if given is not None:
                reading = given.precision if chosen else getattr(self.source, "reading_precision", None)
                given = replace(given, reading_precision=reading)
            if given is not None and saved is not None:
                other_images = saved.same_images(given)
                given = replace(given, precision=saved.precision)
            if other_images is not None:
                warnings.warn(other_images, stacklevel=3)
            if not isinstance(retriever, NoImages):
                self.source = given
        self.config.name_or_path = NOT_SAVED  # the folder may note other images, or none
        self._number += retriever is not self._retriever
        self._retriever, self.other_images, self._is_set = retriever, other_images, True

    def set_source(self, source: ImageSource) -> None:
        """Makes `source` what finds the images, which later retrievers are compared with."""
        self.source = source
        self.note_source()

    def note_source(self) -> None:
        """Puts what identifies the images into the config, which is about to be saved."""
        if self.source is not None:
            self.config.retrieval = self.source.identity()

    def open(self, source: ImageSource, tokenizer: Any, **how: Any) -> ImageRetriever:
        """What `source` says finds the images of this model, which reads with `tokenizer`.

        how: clip, allow_download, device and dtype, as in `open_encoder`. The default dtype is that of the retriever
            that the model was saved with, or else, of a blind model, whose images are its queries, and of one with a
            min_score, that of its training. Errors as in `valm.retrieval.source.open_retriever`.
        """
        options, min_score = self.options, self.options.min_score
        as_trained = options.blind or (min_score is not None and min_score > -1)
        return open_retriever(source, tokenizer, options.num_images, blind=options.blind, as_trained=as_trained, **how)

    def _open(self, source: ImageSource, folder: str, device: torch.device | None) -> None:
        try:
            place = self.config.name_or_path
            tokenizer = open_tokenizer(folder, self.config.base_place or place)
            self.set_retriever(self.open(source, tokenizer, device=device or "cpu"), chosen=False)
            self.config.name_or_path = place  # whose images these are
        except Exception as error:  # open_clip raises many kinds
            raise ValmError(
                f"the images of the model in {folder} cannot be retrieved: {str(error).splitlines()[0]}; set another "
                "retriever by set_retriever, or None for text alone"
            ) from error

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
def _keep_text(cache: Any, ids: Tensor, mask: Tensor | None, number: int) -> None:
    cache = with_retrieval(cache)
    cache.text, cache.retriever_number = (ids.clone(), None if mask is None else mask[:, : ids.shape[1]]), number


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
