"""Retrieves a model's images when `forward` gets none: shared by VaLM and augmented decoders."""

from __future__ import annotations

import functools
import inspect
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.cache_utils import Cache
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from valm.errors import ValmError
from valm.model.card import write_card
from valm.model.config import check_min_score
from valm.model.documents import mask_of_tokens, restarts, split_rows
from valm.retrieval.context import ContextCache
from valm.retrieval.min_score import cut
from valm.retrieval.note import RetrievalNote, open_encoder
from valm.retrieval.retriever import BlindRetriever, ImageRetriever, NoImages, Retrieved, Retriever
from valm.store.pretrained import CONFIG_FILE, from_pretrained
from valm.store.whole_folder import ADAPTER, NOTE, finish_save
from valm_kernels import MAX_IMAGES
from valm_kernels.atomic_files import set_mode

# Rows that a vocabulary may have beyond its tokenizer's tokens, as it is padded to a multiple of 128 at most.
PADDED_ROWS = 127
# Arguments of `save_pretrained` that are for an upload.
OF_UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")

_Base: Any = object  # for a type checker, the model class behind the mixin


class ImageOptions(NamedTuple):
    """num_images: K, images per token; 0 = none. image_dim: E. blind, min_score: see `ValmConfig`. scored: whether the
    model uses the retrieval scores of its images."""

    num_images: int
    image_dim: int
    blind: bool
    scored: bool = False
    min_score: float | None = None


class RetrievalCache(Cache):
    """A cache that also holds the retriever's state and where documents began, and reorders both with the beams."""

    retrieval: ContextCache | None = None
    # ids and mask (B, T) of the text that a model read before it returned this cache; `retrieval` begins with it
    text: tuple[Tensor, Tensor | None] | None = None
    num_retrieved = 0  # tokens that `retrieval` has read
    # of a VaLM: the first key (B,) int32 of the document being read, behind so many tokens
    first_keys: Mapping[int, Tensor] = MappingProxyType({})
    is_croppable = False
    plain_class: Any = None  # of a class that `retrieval_cache_class` made: what it was made of

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # such a class cannot be imported by its name
        return reduced if self.plain_class is None else (_empty_cache, (self.plain_class,), *reduced[2:])

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises: the retriever's state cannot be rolled back."""
        raise NotImplementedError(
            f"a {type(self).__name__} with a retriever's state cannot be cropped, so assisted decoding does not work"
        )

    def reset(self) -> None:
        super().reset()
        self.retrieval = self.text = None
        self.num_retrieved, self.first_keys = 0, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any tensor of integers will do
        # MiniMax's states of linear attention, which its class reorders in batch_select_indices only; [] is none
        states: list[Any] = getattr(self, "linear_cache", [])
        for layer, state in enumerate(states):
            if isinstance(state, Tensor):
                states[layer] = state[beam_idx.to(state.device)]
        self.reorder_state(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.reorder_state(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Always raises: a cache does not know how many rows it has."""
        raise NotImplementedError("a cache with a retriever's state repeats its rows by reorder_cache only")

    def reorder_state(self, rows: Tensor) -> None:
        """What `reorder_cache` does beside the keys and values."""
        if self.retrieval is not None:
            self.retrieval.reorder(rows)
        if self.text is not None:
            ids, mask = self.text
            at = rows.to(ids.device)
            self.text = ids[at], None if mask is None else mask[at]
        self.first_keys = {past: keys[rows.to(keys.device)] for past, keys in self.first_keys.items()}


@functools.cache
def retrieval_cache_class(cache_class: Any) -> Any:
    """`cache_class` with a retriever's state."""
    return type(cache_class.__name__, (RetrievalCache, cache_class), {"plain_class": cache_class})


def _empty_cache(plain_class: Any) -> Any:
    """The cache whose state pickle sets."""
    made = retrieval_cache_class(plain_class)
    return made.__new__(made)


def with_retrieval(cache: Any) -> RetrievalCache:
    """`cache` itself, whose class becomes one with a retriever's state: `generate` and the user hold this object, and
    reorder it by its methods."""
    if not isinstance(cache, RetrievalCache):
        plain: Any = type(cache)
        cache.__class__ = retrieval_cache_class(plain)
    return cache


class ImageModel(_Base):
    """Mixin of a causal language model that takes images, passed to `forward` or found by a retriever.

    A model that takes images but gets none and has no retriever warns once; with `strict = True` it raises ValueError
    each time. Pass an empty `image_pool` and an `image_index` of -1 to run without images on purpose.

    Threads may share a model in eval mode: `forward`, `generate` and `fusion_attention` may run at once. Training,
    `augment`, `set_retriever`, `to` and saving need the model alone.
    """

    strict = False
    # says that the images come from another knowledge base than the model was saved with; None otherwise
    other_images: str | None = None
    _retriever: ImageRetriever | None = None
    # folder of the note on retrieval, absolute: the one the model was loaded from
    _note_folder: str | None = None
    _note_ignored = False
    _warned = False

    @property
    def image_options(self) -> ImageOptions:
        """Which images the model takes."""
        raise NotImplementedError

    @property
    def retriever(self) -> ImageRetriever | None:
        """What finds the images when `forward` gets none: set by `set_retriever`, or else noted in the model's folder
        and opened on first use.

        Raises:
            ValmError: what the folder notes is missing or does not fit.
        """
        if self._retriever is None and self.image_options.num_images > 0 and not self._note_ignored:
            note = self._note()
            if note is not None:
                self._open(note)
        return self._retriever

    def set_retriever(self, retriever: ImageRetriever | None) -> None:
        """Sets what finds the images of every token; a blind model takes a `BlindRetriever`. None removes it.
        With `NoImages` any model reads the text alone. A `Retriever` gets the model's `min_score`, in a copy.

        A model that was loaded with a note on retrieval warns if the images come from another knowledge base.

        Raises:
            ValmError: the retriever differs from the model in kind (blind or not), number or dimension of images, or
                `min_score`, reads more tokens than the model has, was given no tokenizer though the model's vocabulary
                is not CLIP's, or differs from the note in its CLIP.
        """
        other_images = None
        if retriever is not None:
            retriever = self.with_own_min_score(retriever)
            options = self.image_options
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
            saved = self._note()
            given = None if saved is None else RetrievalNote.of_retriever(retriever)
            if saved is not None and given is not None:
                other_images = saved.other_images(given)
                if other_images is not None:
                    warnings.warn(other_images, stacklevel=2)
        self._retriever, self.other_images = retriever, other_images
        self._note_ignored = True

    def set_min_score(self, value: float | None) -> None:
        """Sets the retrieval score below which a token sees no images (`valm.retrieval.min_score`). None: every token
        but the first of a document sees K. It is saved with the model.

        Images that are given to `forward` are seen as they are.

        Raises:
            ValmError: it is not finite, or the model retrieves no images.
        """
        options = self.image_options
        check_min_score(value, options.num_images, options.blind)
        self.keep_min_score(value)
        retriever: Any = self._retriever
        if hasattr(retriever, "with_min_score"):
            self._retriever = retriever.with_min_score(value)

    def keep_min_score(self, value: float | None) -> None:
        """Puts it into the config."""
        raise NotImplementedError

    def set_num_images(self, value: int) -> None:
        """Sets K, the images that a token sees from now on; no weight depends on it. It is saved with the model.

        Raises:
            ValmError: the model has no knowledge base, or that has fewer images, or a token cannot see so many.
            TypeError: the number is no int.
        """
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"the number of images must be an int, got {value!r}")
        retriever = self.retriever
        if not isinstance(retriever, Retriever):
            raise ValmError("this model retrieves no images from a knowledge base, so their number cannot be set")
        if value > MAX_IMAGES:
            raise ValmError(f"a token sees {MAX_IMAGES} images at most, got {value:,}")
        self._retriever = retriever.with_k(value)
        self.keep_num_images(value)

    def keep_num_images(self, value: int) -> None:
        """Puts it into the config."""
        raise NotImplementedError

    def with_own_min_score(self, retriever: Any) -> Any:
        """`retriever`, with the model's `min_score` if it can have one.

        Raises:
            ValmError: it has another one.
        """
        expected, found = self.image_options.min_score, getattr(retriever, "min_score", None)
        if found == expected or not hasattr(retriever, "with_min_score"):
            return retriever
        if found is not None:
            raise ValmError(
                f"the retriever's min_score is {found}, but the model's is {expected}: call model.set_min_score, or "
                "leave it out of the retriever"
            )
        return retriever.with_min_score(expected)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, which `generate_batch` calls too.

        Raises:
            ValmError: the model has a retriever.
            ValueError: it has none and is `strict`.
        """
        if finds_images(self):  # the batching thread would keep its errors to itself
            raise ValmError(
                "continuous batching (generate_batch) reads several texts in one row, which a retriever cannot follow: "
                "call generate(), or set_retriever(None) for text alone"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`; the folder has the note on what finds the images."""
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if pretrained_model_name_or_path is not None:
            model.note_in(Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or ""))
        return found

    def note_in(self, folder: str | os.PathLike) -> None:
        """Reads the note on what finds the images from `folder`, wherever the process works later. A name on a hub has
        none."""
        self._note_folder = os.path.abspath(folder) if os.path.isdir(folder) else None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, the note on what finds the images, and a model card (`write_card`).

        What would be loaded in the place of this model is removed: an adapter, and older weights in another number of
        files. With push_to_hub the note and the card are uploaded too. Of a model with adapters of transformers' own
        (`add_adapter`) these alone are saved, as of any model.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # there is no model beside them, so nothing is older
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
        more = given.pop("kwargs", {})
        options = given | more
        upload = {name: options.pop(name) for name in (*OF_UPLOAD, "push_to_hub") if name in options}
        is_main_process = options.get("is_main_process", True)
        if is_main_process:
            finish_save(save_directory)
        super().save_pretrained(**options)
        if is_main_process:
            _remove_older_weights(Path(save_directory))
            for adapter in Path(save_directory).glob(ADAPTER):
                adapter.unlink()
            # as the umask says, not for their owner alone
            mode = stat.S_IMODE((Path(save_directory) / CONFIG_FILE).stat().st_mode)
            for weights in Path(save_directory).glob("model*.safetensors"):
                set_mode(weights, mode)
            self.save_note(save_directory)
            write_card(self, save_directory)
            if upload.pop("push_to_hub", False):  # which transformers would do without the note and the card
                sizes = {name: options[name] for name in ("max_shard_size", "token") if name in options}
                self.push_to_hub(upload.pop("repo_id", Path(save_directory).name), **upload, **sizes)

    def save_note(self, folder: str | os.PathLike, *, place: str | os.PathLike | None = None) -> None:
        """Writes the note on what finds the images, if a retriever is set that a file can describe. Else the folder has
        none: an older one is removed.

        Args:
            folder, place: as in `RetrievalNote.write`.
        """
        if self._note_is_gone():
            warnings.warn(
                f"{self._note_folder}, from which the model was loaded, is gone, and with it the note on what finds "
                "its images: set_retriever before it is saved",
                stacklevel=3,
            )
        note = RetrievalNote.of_retriever(self._retriever) if self._note_ignored else self._note()
        if note is None:
            (Path(folder) / NOTE).unlink(missing_ok=True)
        else:
            note.write(folder, place=place)

    def text_positions(self, arguments: dict[str, Any]) -> Tensor | None:
        """Positions (B or 1, T), in a forward pass, that restart where another document begins; None if none does."""
        raise NotImplementedError

    def find_images(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
        arguments: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """image_pool (U, E), image_index and image_scores (B, T, K) of the tokens `input_ids` (B, T), by the retriever.

        The scores are None for a model that does not use them. All three are None, with a warning, if the model has no
        retriever. `cache` has the state of the earlier tokens. Without one, the retriever reads each document of a row,
        as the `arguments` of the forward pass tell them apart, by itself.

        Raises:
            ValueError: there is no retriever and the model is `strict`; or the retriever did not read all the tokens in
                the cache.
        """
        # a compiled graph holds for this value, and is made anew where a retriever is set later
        if self._retriever is None and not finds_images(self):
            return None, None, None
        own = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._find_images(input_ids, attention_mask, cache, own | (arguments or {}))

    @torch.compiler.disable
    def _find_images(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Any, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        retriever = self.retriever
        assert retriever is not None
        if input_ids is None:
            raise ValueError(
                "the retriever reads token ids, got inputs_embeds only: give image_pool and image_index too"
            )
        mask = _mask_of(input_ids, attention_mask, cache)
        if cache is None:
            positions = self.text_positions(arguments)
            found = _each_document(retriever, input_ids, mask, positions)
        else:
            found = retriever.step(input_ids, _retrieval_state(with_retrieval(cache), retriever, len(input_ids)), mask)
            cache.num_retrieved += input_ids.shape[1]
        options, index, device = self.image_options, found.image_index, input_ids.device
        if options.min_score is not None and not hasattr(retriever, "with_min_score"):  # which has cut otherwise
            index, _ = cut(index, found.scores, options.min_score)
        scores = found.scores.to(device) if options.scored else None
        return found.image_pool.to(device), index.to(device), scores

    @torch.compiler.disable
    def keep_text(self, output: Any, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Puts the text of a forward pass that began without a cache into the cache that it returns, if it does.

        The retriever reads the text again when the cache is used, so that a pass whose cache nobody uses costs nothing.
        """
        values = output if isinstance(output, tuple) else output.values()
        for cache in values:
            if isinstance(cache, Cache):
                with_retrieval(cache).text = input_ids.clone(), _mask_of(input_ids, attention_mask, None)

    def check_images(self, shape: torch.Size, pool: Tensor | None, index: Tensor | None, scores: Tensor | None) -> None:
        """Checks image_pool, image_index and image_scores against the model and the batch's `shape`.

        Raises:
            ValueError: they do not fit.
        """
        if (pool is None) != (index is None):
            raise ValueError("image_pool and image_index must be given together")
        options = self.image_options
        if scores is not None and not options.scored:
            raise ValueError(
                "image_scores was given to a model that does not use retrieval scores: make it with "
                "image_score_scale_init (ValmConfig) or score_scale (valm.augment)"
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

    def _note_is_gone(self) -> bool:
        return not self._note_ignored and self._note_folder is not None and not os.path.isdir(self._note_folder)

    def _note(self) -> RetrievalNote | None:
        return RetrievalNote.read(self._note_folder) if self._note_folder else None

    def open_retriever(
        self,
        note: RetrievalNote,
        tokenizer: Any,
        *,
        clip: str | None = None,
        allow_download: bool = False,
        **of_tower: Any,
    ) -> ImageRetriever:
        """What `note` says finds the images of this model, which reads with `tokenizer`.

        Args:
            clip, allow_download: as in `open_encoder`.
            of_tower: device and dtype, as in `open_encoder`.

        Raises:
            ValmError: the knowledge base or the CLIP is missing or damaged, or they do not belong together; or the text
                tower cannot have this precision.
        """
        images = self.image_options
        of_clip: Any = {"clip": clip, "allow_download": allow_download}
        of_tower |= {"overlap": note.overlap, "min_tokens": note.min_tokens}
        if images.blind:
            place = note.open_knowledge_base() if note.clip is None else note.clip
            return BlindRetriever(open_encoder(place, note.query, tokenizer, **of_clip, **of_tower))
        kb = note.open_knowledge_base()
        return Retriever(open_encoder(kb, note.query, tokenizer, **of_clip, **of_tower), kb, images.num_images)

    def _open(self, note: RetrievalNote) -> None:
        assert self._note_folder is not None  # it has the note
        folder = Path(self._note_folder)
        source = folder if (folder / "tokenizer_config.json").is_file() else self.config.name_or_path
        try:
            tokenizer: Any = from_pretrained(AutoTokenizer, source, f"the tokenizer in {source}", local_files_only=True)
        except ValmError as error:
            raise ValmError(
                f"the images of the model in {folder} cannot be retrieved: no tokenizer can be loaded from {source}; "
                "save one there by tokenizer.save_pretrained, or set a retriever by set_retriever"
            ) from error
        try:
            self.set_retriever(self.open_retriever(note, tokenizer, device=self.device))
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
        options = self.image_options
        if options.num_images == 0:
            return
        message = (
            f"this model takes {options.num_images} images a token, but has no retriever and was given none: set one "
            "by set_retriever, or give image_pool and image_index"
        )
        if self._note_is_gone():
            message += (
                f"; {self._note_folder}, from which it was loaded, is gone, and with it any note on what finds its "
                "images"
            )
        if self.strict:
            raise ValueError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message + ". It reads the text alone now.", stacklevel=5)


def _remove_older_weights(folder: Path) -> None:
    """Of weights in one file and of an index of several, removes the older: the file would be loaded first."""
    kinds = [folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME]
    if all(file.is_file() for file in kinds):
        min(kinds, key=lambda file: file.stat().st_mtime_ns).unlink()


def _mask_of(input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor | None:
    """The attention mask (B, T) of `input_ids`, behind the tokens in `cache`, in that of all tokens."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"beside a retriever attention_mask must have two dimensions (B, T), got {attention_mask.dim()}: "
            "give image_pool and image_index too"
        )
    return None if attention_mask is None else mask_of_tokens(attention_mask, cache, input_ids.shape[1])


def _each_document(
    retriever: ImageRetriever, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> Retrieved:
    """The images of rows (B, T) in which documents begin where `positions` (B or 1, T) restart."""
    if positions is not None:
        begins = restarts(positions.expand_as(input_ids), mask).begins
        if begins.any():
            split = split_rows(input_ids, mask, begins)
            found = retriever(split.ids, split.mask)
            row, column = split.row.to(found.image_index.device), split.column.to(found.image_index.device)
            return found._replace(image_index=found.image_index[row, column], scores=found.scores[row, column])
    return retriever(input_ids, mask)


def _retrieval_state(cache: RetrievalCache, retriever: ImageRetriever, batch: int) -> ContextCache:
    """The retriever's state after the tokens in the cache.

    Raises:
        ValueError: the retriever has not read them.
    """
    if cache.retrieval is None:
        cache.retrieval = retriever.start(batch)
        if cache.text is not None:
            ids, mask = cache.text
            retriever.step(ids, cache.retrieval, mask)
            cache.text, cache.num_retrieved = None, ids.shape[1]
    if cache.num_retrieved != cache.get_seq_length():
        raise ValueError(
            f"the cache has {cache.get_seq_length()} tokens, but the retriever has read {cache.num_retrieved} of them: "
            "the others were read without a retriever or with images that were given; start with an empty cache"
        )
    return cache.retrieval


@torch.compiler.assume_constant_result
def finds_images(model: ImageModel) -> bool:
    """Whether the model has a retriever; warns if it lacks one. A compiled graph evaluates this while tracing."""
    if model.retriever is not None:
        return True
    model.say_that_images_are_missing()
    return False
