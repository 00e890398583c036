"""Finds a model's images whenever its decoder is called."""

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
from valm.retrieval.source import RetrievalSource, open_retriever, open_tokenizer

# A vocabulary may exceed its tokenizer by this many rows, since it is padded to a multiple of at most 128.
PADDED_ROWS = 127


class ImageFinder:
    """Hooks of a decoder that check the images it is given, or find them, and keep documents apart.

    The decoder sees images no matter who calls it: its model, or a library that calls `model.base_model`.

    Args:
        config: the model's config, with the options of its fusion.
    """

    strict = False
    # a message if the images come from another knowledge base than the model was saved with, else None
    other_images: str | None = None
    # says how to find the images; opened on first use unless a retriever was set
    source: RetrievalSource | None = None
    folder: str | None = None  # of the model, with its tokenizer
    _retriever: ImageRetriever | None = None
    _is_set = False
    _number = 0  # counts set retrievers, so that a cache knows which retriever's images its tokens saw
    _warned = False
    _keeps_apart: bool | None = None  # None: not tried yet

    def __init__(self, config: Any):
        self.config = config
        self.options = FusionOptions(**config.fusion)

    def change(self, name: str, value: Any) -> None:
        """Sets an option of the fusion, here and in the config. Raises ValmError if the value is invalid."""
        self.options = replace(self.options, **{name: value})
        self.config.fusion = self.config.fusion | {name: value}
        self.config.name_or_path = NOT_SAVED  # the folder contains the old value

    # ---- the hooks ----

    def put_on(self, part: nn.Module) -> None:
        """Puts the hooks on a part of the model that may be called with token ids."""
        names = tuple(inspect.signature(type(part).forward).parameters)[1:]  # without self
        part.register_forward_pre_hook(partial(self.before, names), with_kwargs=True)
        part.register_forward_hook(self.after, with_kwargs=True)

    def before(
        self, names: tuple[str, ...], decoder: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Adds images and what keeps documents apart to the arguments of a call. Errors as in the methods below."""
        arguments = named_arguments(names, args, kwargs)
        ids: Any = arguments.get("input_ids")
        embeds: Any = arguments.get("inputs_embeds")
        if ids is None and embeds is None:  # a module with the decoder's name that is no decoder
            return args, kwargs
        mask: Any = arguments.get("attention_mask")
        check_call(self.config, arguments)
        placed = self.place_text(decoder, arguments)
        images: Any = [placed.pop(name, None) for name in IMAGE_ARGUMENTS]
        if all(image is None for image in images):
            images = self.find_images(ids, mask, cache_of(arguments), arguments.get("position_ids"))
        else:
            shape = (ids if embeds is None else embeds).shape[:2]
            check_images(self.options, shape, *images)
            if images[1] is not None and isinstance(mask, Tensor) and mask.dim() == 2:  # padding sees none
                padding = mask_of_tokens(mask, cache_of(arguments), shape[1])[..., None] == 0
                images[1] = images[1].masked_fill(padding, -1)
        given = dict(zip(IMAGE_ARGUMENTS, images, strict=True))
        return (), placed | {name: image for name, image in given.items() if image is not None}

    def after(self, decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """If a pass without a cache returns a cache, stores the text there. The retriever reads the text again when the
        cache is used, so a pass whose cache nobody uses costs nothing."""
        ids: Any = kwargs.get("input_ids")
        if self._retriever is None or ids is None or cache_of(kwargs) is not None:
            return
        for cache in output if isinstance(output, tuple) else output.values():
            if isinstance(cache, Cache):
                _keep_text(cache, ids, kwargs.get("attention_mask"), self._number)

    # ---- documents ----

    def place_text(self, decoder: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the decoder, with those that limit what each token sees of the text. Errors as in
        `told_apart`."""
        if torch.compiler.is_compiling():
            caches = getattr(self.config.get_text_config(decoder=True), "use_cache", False)
            # a non-strict export provides no values to try it with
            untried = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
            known = not untried or self._keeps_apart is not None  # a graph that reads this has a guard on it
            check_in_a_graph(arguments, caches, lambda: known and tells_apart(self, decoder))
            return arguments
        return told_apart(decoder, arguments, lambda: self.tells_apart(decoder))

    def tells_apart(self, decoder: Any) -> bool:
        """Whether the decoder keeps documents in a row apart by their positions. The result of a test run, cached."""
        if self._keeps_apart is None:
            self._keeps_apart = keeps_apart(decoder, self._without_images(decoder.forward))
        return self._keeps_apart

    def _without_images(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a decoder with an empty pool of images, so that no hook inside it looks for images."""
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
    ) -> tuple[Tensor | None, Tensor | None]:
        """Retrieves image_pool (U, E) and image_index (B, T, K) for the tokens `ids` (B, T).

        Both are None, with a warning, if the model has no retriever. `cache` holds the retriever's state after earlier
        tokens. Without a cache, the retriever reads the documents that `positions` tell apart separately.

        Raises:
            ValueError: there is no retriever and the model is `strict`; or the retriever did not read all the tokens in
                the cache.
        """
        # a compiled graph is guarded by this value, and compiled again if a retriever is set later
        if self._retriever is None and not finds_images(self, None if ids is None else ids.device):
            return None, None
        if torch.compiler.is_exporting():  # the images would become constants of the program
            raise ValueError(
                "an exported program cannot contain a retriever: give image_pool and image_index, or call "
                "set_retriever(None)"
            )
        return self._find_images(ids, mask, cache, positions)

    @torch.compiler.disable
    def _find_images(
        self, ids: Tensor | None, mask: Any, cache: Any, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        retriever = self._retriever
        assert retriever is not None
        if ids is None:
            raise ValueError(
                "the retriever needs token ids, got only inputs_embeds: give image_pool and image_index too"
            )
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"with a retriever, attention_mask must have two dimensions (B, T), got {mask.dim()}: give image_pool "
                "and image_index too"
            )
        own = None if mask is None else mask_of_tokens(mask, cache, ids.shape[1])
        if cache is None:
            found = _each_document(retriever, ids, own, positions)
        else:
            found = retriever.step(ids, retrieval_state(cache, retriever, len(ids), self._number), own)
            cache.num_retrieved += ids.shape[1]
        seen = self.seen(found, ids.device)
        return seen.image_pool, seen.image_index

    def seen(self, found: Retrieved, device: torch.device) -> Retrieved:
        """The images in `found` that reach the model's score threshold (min_score), on its device."""
        index, scores = cut(found.image_index, found.scores, self.options.min_score)
        return Retrieved(found.image_pool.to(device), index.to(device), found.image_ids.to(device), scores.to(device))

    def arguments(self, seen: Retrieved) -> dict[str, Tensor]:
        """The image arguments of the model's forward; empty if K = 0."""
        if self.options.num_images == 0:
            return {}
        return {"image_pool": seen.image_pool, "image_index": seen.image_index}

    def say_that_images_are_missing(self) -> None:
        """Warns once that the model gets no images, unless it takes none. Raises ValueError if the model is
        `strict`."""
        options = self.options
        if options.num_images == 0:
            return
        message = (
            f"this model takes {options.num_images} images a token, but has no retriever and was given no images: call "
            "set_retriever, or give image_pool and image_index"
        )
        if self.strict:
            raise ValueError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message + ". It reads only the text now.", stacklevel=5)

    # ---- the retriever ----

    def open_retriever(self, device: torch.device | None) -> ImageRetriever | None:
        """The retriever that was set, or else the one that the model's folder describes, opened on first use. None if
        the folder describes none. Raises ValmError if the knowledge base or CLIP is missing or does not fit."""
        source, folder = self.source, self.folder
        if self._is_set or source is None or folder is None or self.options.num_images == 0:
            return self._retriever
        if source.knowledge_base is not None or source.clip is not None:
            self._open(source, folder, device)
        return self._retriever

    def set_retriever(self, retriever: ImageRetriever | None, chosen: bool = True) -> None:
        """See `ImageModel.set_retriever`. chosen: whether the caller chose the precision of the queries, which is then
        saved with the model."""
        other_images = None
        if retriever is not None:
            self._check_retriever(retriever)
            given = RetrievalSource.of_retriever(retriever)
            saved = RetrievalSource.of_config(self.config.retrieval)
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
        self.config.name_or_path = NOT_SAVED  # the folder may describe other images, or none
        self._number += retriever is not self._retriever
        self._retriever, self.other_images, self._is_set = retriever, other_images, True

    def set_source(self, source: RetrievalSource) -> None:
        """Sets what finds the images, and what later retrievers are compared with."""
        self.source = source
        self.note_source()

    def note_source(self) -> None:
        """Puts what identifies the images into the config before it is saved."""
        if self.source is not None:
            self.config.retrieval = self.source.identity()

    def open(self, source: RetrievalSource, tokenizer: Any, **how: Any) -> ImageRetriever:
        """The retriever that `source` describes, for this model and its `tokenizer`.

        how: clip, allow_download, device and dtype, as in `open_encoder`. The default dtype is the precision of the
            retriever that the model was saved with. If none was saved, a blind model, whose images are its queries,
            and a model with a min_score use the precision of their training. Errors as in
            `valm.retrieval.source.open_retriever`.
        """
        options, min_score = self.options, self.options.min_score
        how |= {"blind": options.blind, "threshold": min_score is not None}
        how["as_trained"] = options.blind or (min_score is not None and min_score > -1)
        return open_retriever(source, tokenizer, options.num_images, **how)

    def _open(self, source: RetrievalSource, folder: str, device: torch.device | None) -> None:
        try:
            place = self.config.name_or_path
            tokenizer = open_tokenizer(folder, self.config.base_place or place)
            self.set_retriever(self.open(source, tokenizer, device=device or "cpu"), chosen=False)
            self.config.name_or_path = place  # the images are those of this folder
        except Exception as error:  # open_clip raises many kinds
            raise ValmError(
                f"the images of the model in {folder} cannot be retrieved: {str(error).splitlines()[0]}; set another "
                "retriever with set_retriever, or None to read only text"
            ) from error

    def _check_retriever(self, retriever: Any) -> None:
        """Raises ValmError if a retriever does not fit this model."""
        options = self.options
        if options.blind != isinstance(retriever, BlindRetriever) and not isinstance(retriever, NoImages):
            kind = "a BlindRetriever" if options.blind else "a Retriever"
            raise ValmError(
                f"this model needs {kind} (blind={options.blind} in its config), got a {type(retriever).__name__}"
            )
        if isinstance(retriever, BlindRetriever) and options.min_score is not None and retriever.kb is None:
            raise ValmError("this blind model has a score threshold: give its BlindRetriever the knowledge base (kb)")
        for name, found, option in (("k", retriever.k, "num_images"), ("dim", retriever.dim, "image_dim")):
            if found != getattr(options, option):
                raise ValmError(
                    f"retriever.{name} is {found}, but this model was made for {getattr(options, option)} "
                    f"({option} in its config): use the retriever or knowledge base that it was trained with"
                )
        encoder = getattr(retriever, "encoder", None)
        tokens = getattr(encoder, "tokenizer", ())
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        # an encoder without the model's tokenizer would silently read the model's ids as CLIP's
        guessed = getattr(encoder, "own_tokenizer", False) and vocabulary - len(tokens) > PADDED_ROWS
        if len(tokens) > vocabulary or guessed:
            raise ValmError(
                f"the retriever's encoder has {len(tokens)} tokens, but this model has {vocabulary}: pass the model's "
                "tokenizer to its ContextEncoder (tokenizer=)"
            )


@torch.compiler.assume_constant_result
def finds_images(finder: ImageFinder, device: torch.device | None) -> bool:
    """Whether there is a retriever; warns if not. A compiled graph evaluates this function while tracing."""
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
