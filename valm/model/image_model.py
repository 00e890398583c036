"""A causal language model that takes images: its retriever, and saving it with what identifies its images."""

from __future__ import annotations

import inspect
import os
import stat
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from valm.errors import ValmError
from valm.model.card import CARD_FILE, write_card
from valm.model.config import FusionOptions
from valm.model.image_finder import ImageFinder, finds_images
from valm.model.private_names import has_own_adapters
from valm.retrieval.retriever import ImageRetriever, Retriever
from valm.retrieval.source import RetrievalSource, write_places
from valm.store.files import set_mode
from valm.store.folders import ADAPTER, PLACES_FILE, finish_save
from valm.store.pretrained import CONFIG_FILE

# Arguments of `save_pretrained` for uploads.
OF_UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")

# Part of the card that transformers writes for a model without a card.
TEMPLATE = "This model card has been automatically generated."

_Base: Any = object  # for type checkers: the mixin's base class


class ImageModel(_Base):
    """Mixin of a causal language model that takes images, passed to `forward` or found by a retriever.

    If the model gets no images and has no retriever, it warns once; with `strict = True` it raises ValueError each
    time. Pass an empty `image_pool` and an `image_index` of -1 to run without images on purpose.

    Threads may share a model in eval mode: `forward`, `generate` and `fusion_attention` may run at the same time. While
    one thread trains, augments, moves or saves the model or sets its retriever, no other thread may use it.
    """

    finder: ImageFinder  # a hook of its decoder

    @property
    def fusion_options(self) -> FusionOptions:
        """Which images the model takes, and where."""
        return self.finder.options

    @property
    def strict(self) -> bool:
        """Whether a missing retriever raises an error instead of a warning."""
        return self.finder.strict

    @strict.setter
    def strict(self, value: bool) -> None:
        self.finder.strict = value

    @property
    def other_images(self) -> str | None:
        """A message if the images come from another knowledge base than the model was saved with, else None."""
        return self.finder.other_images

    @property
    def retriever(self) -> ImageRetriever | None:
        """Finds the images when `forward` gets none: the retriever from `set_retriever`, or else the retriever that was
        saved with the model, opened on first use. Raises ValmError if the saved knowledge base or CLIP is missing or
        does not fit."""
        return self.finder.open_retriever(self.device)

    def set_retriever(self, retriever: ImageRetriever | None) -> None:
        """Sets the retriever that finds the images of every token.

        A warning is raised if the model was trained or saved with another knowledge base.

        Args:
            retriever: a `Retriever`; a `BlindRetriever` for a blind model; `NoImages` to read only text; None removes
                the retriever.

        Raises:
            ValmError: the retriever does not fit the model: its kind (blind or not), the number or dimension of its
                images, its tokenizer's vocabulary or its CLIP.

        Example:
            >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
            >>> retriever = model.retriever
            >>> model.set_retriever(None)  # the model warns and reads only text
            >>> model.set_retriever(retriever)
            >>> model.retriever is retriever
            True
        """
        self.finder.set_retriever(retriever)

    def set_min_score(self, value: float | None) -> None:
        """Sets the score threshold, which is saved with the model. Images that are given to `forward` ignore it.

        Args:
            value: a token whose best image has a lower retrieval score sees no image (`valm.retrieval.min_score`).
                None: every token but a document's first sees K images.

        Raises:
            ValmError: the threshold is not finite, or the model retrieves no images.

        Example:
            >>> model, tokenizer = valm.load("model")
            >>> model.set_min_score(0.2)
            >>> model.fusion_options.min_score
            0.2
        """
        if self.fusion_options.blind:
            raise ValmError("a blind model retrieves no images: its score threshold is set when it is made")
        self.finder.change("min_score", value)

    def set_num_images(self, value: int) -> None:
        """Sets K, the number of images that each token sees. K is saved with the model; no weight depends on it.

        Args:
            value: from 1 to 64, at most the number of images in the knowledge base.

        Raises:
            ValmError: the model has no knowledge base, or K is out of range.
            TypeError: K is no int.

        Example:
            >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
            >>> model.set_num_images(3)
            >>> model.retriever.k
            3
        """
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"the number of images must be an int, got {value!r}")
        retriever = self.retriever
        if not isinstance(retriever, Retriever):
            raise ValmError(
                "this model retrieves no images from a knowledge base, so their number cannot be set: load it with kb"
            )
        other = retriever.with_k(value)
        self.finder.change("num_images", value)
        self.finder.set_retriever(other, chosen=False)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; `generate_batch` calls it too.

        Raises:
            ValmError: the model has a retriever.
            ValueError: the model has no retriever and is `strict`.
        """
        if finds_images(self.finder, self.device):  # errors in the batching thread would not reach the caller
            raise ValmError(
                "continuous batching (generate_batch) reads several texts in one row, which a retriever cannot follow: "
                "call generate(), or call set_retriever(None) to read only text"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def read_places(self, folder: str | os.PathLike) -> None:
        """Loads the paths of the images that were saved with the model in `folder`; a name on a hub has none. Raises
        ValmError if the file of paths or the config's retrieval is damaged."""
        self.finder.folder = os.path.abspath(folder) if os.path.isdir(folder) else None
        self.finder.source = RetrievalSource.of_config(self.config.retrieval, self.finder.folder)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`; also writes the paths of the images and a model card.

        Files that would be loaded instead of this model are removed: an adapter, and older weights in another number of
        files. If the model has transformers' own adapters (`add_adapter`), only they are saved, as for any model.

        Raises:
            ValmError: the model contains an adapter of PEFT that is not merged.
        """
        if has_own_adapters(self):  # no weights of the model are written, so none become older
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if beside := next((name for name, _ in self.named_modules() if name.endswith(".base_layer")), None):
            raise ValmError(
                f"PEFT has added an adapter to {beside.removesuffix('.base_layer')}, and no class could load the "
                "folder: merge it with merge_and_unload, or save it with the save_pretrained of PEFT's model"
            )
        given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
        more = given.pop("kwargs", {})
        options = given | more
        upload = {name: options.pop(name) for name in (*OF_UPLOAD, "push_to_hub") if name in options}
        is_main_process = options.get("is_main_process", True)
        self.finder.note_source()
        if is_main_process:
            finish_save(save_directory)
        super().save_pretrained(**options)
        if is_main_process:
            _remove_older_weights(Path(save_directory))
            for adapter in Path(save_directory).glob(ADAPTER):
                adapter.unlink()
            # with the umask's permissions, not only for their owner
            mode = stat.S_IMODE((Path(save_directory) / CONFIG_FILE).stat().st_mode)
            for weights in Path(save_directory).glob("model*.safetensors"):
                set_mode(weights, mode)
            write_places(self.finder.source, save_directory)
            write_card(self, save_directory)
            if upload.pop("push_to_hub", False):  # a copy without the paths
                sizes = {name: options[name] for name in ("max_shard_size", "token") if name in options}
                self.push_to_hub(upload.pop("repo_id", Path(save_directory).name), **upload, **sizes)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Called by `push_to_hub` after it put the repository's card, or transformers' template, into the copy."""
        (Path(working_dir) / PLACES_FILE).unlink(missing_ok=True)
        card = Path(working_dir) / CARD_FILE
        if TEMPLATE in card.read_text("utf-8"):
            card.unlink()
        write_card(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _remove_older_weights(folder: Path) -> None:
    """If the folder contains weights in one file and an index of several files, removes the older: one file is loaded
    before an index."""
    kinds = [folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME]
    if all(file.is_file() for file in kinds):
        min(kinds, key=lambda file: file.stat().st_mtime_ns).unlink()
