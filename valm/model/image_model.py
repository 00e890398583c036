"""A causal language model that takes images: its retriever, and saving it with what identifies them."""

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
from valm.retrieval.source import ImageSource, write_places
from valm.store.files import set_mode
from valm.store.folders import ADAPTER, PLACES_FILE, finish_save
from valm.store.pretrained import CONFIG_FILE

# Arguments of `save_pretrained` that are for an upload.
OF_UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")

# In transformers' card of a model that has none.
TEMPLATE = "This model card has been automatically generated."

_Base: Any = object  # for a type checker, the model class behind the mixin


class ImageModel(_Base):
    """Mixin of a causal language model that takes images, passed to `forward` or found by a retriever.

    A model that takes images but gets none and has no retriever warns once; with `strict = True` it raises ValueError
    each time. Pass an empty `image_pool` and an `image_index` of -1 to run without images on purpose.

    Threads may share a model in eval mode: `forward`, `generate` and `fusion_attention` may run at once. Training,
    `augment`, `set_retriever`, `to` and saving need the model alone.
    """

    finder: ImageFinder  # a hook of its decoder

    @property
    def fusion_options(self) -> FusionOptions:
        """Which images the model takes, and where."""
        return self.finder.options

    @property
    def strict(self) -> bool:
        """Whether a missing retriever is an error."""
        return self.finder.strict

    @strict.setter
    def strict(self, value: bool) -> None:
        self.finder.strict = value

    @property
    def other_images(self) -> str | None:
        """Says that the images come from another knowledge base than the model was saved with; None otherwise."""
        return self.finder.other_images

    @property
    def retriever(self) -> ImageRetriever | None:
        """What finds the images when `forward` gets none: set by `set_retriever`, or else noted with the model and
        opened on first use.

        Raises:
            ValmError: what is noted is missing or does not fit.
        """
        return self.finder.open_retriever(self.device)

    def set_retriever(self, retriever: ImageRetriever | None) -> None:
        """Sets what finds the images of every token; a blind model takes a `BlindRetriever`. None removes it.
        With `NoImages` any model reads the text alone.

        A model that was trained or saved with another knowledge base warns.

        Raises:
            ValmError: the retriever differs from the model in kind (blind or not), number or dimension of images, reads
                more tokens than the model has, was given no tokenizer though the model's vocabulary is not CLIP's, or
                differs from the model's own in its CLIP.
        """
        self.finder.set_retriever(retriever)

    def set_min_score(self, value: float | None) -> None:
        """Sets the retrieval score below which a token sees no images (`valm.retrieval.min_score`). None: every token
        but the first of a document sees K. It is saved with the model.

        Images that are given to `forward` are seen as they are.

        Raises:
            ValmError: it is not finite, or the model retrieves no images.
        """
        self.finder.change("min_score", value)

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
        other = retriever.with_k(value)
        self.finder.change("num_images", value)
        self.finder.set_retriever(other, chosen=False)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, which `generate_batch` calls too.

        Raises:
            ValmError: the model has a retriever.
            ValueError: it has none and is `strict`.
        """
        if finds_images(self.finder, self.device):  # the batching thread would keep its errors to itself
            raise ValmError(
                "continuous batching (generate_batch) reads several texts in one row, which a retriever cannot follow: "
                "call generate(), or set_retriever(None) for text alone"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def read_places(self, folder: str | os.PathLike) -> None:
        """Reads where the images are from beside the model in `folder`; a name on a hub has no such file.

        Raises:
            ValmError: that file is damaged, or the config's retrieval.
        """
        self.finder.folder = os.path.abspath(folder) if os.path.isdir(folder) else None
        self.finder.source = ImageSource.of_config(self.config.retrieval, self.finder.folder)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, where the images are (`write_places`), and a model card (`write_card`).

        What would be loaded in the place of this model is removed: an adapter, and older weights in another number of
        files. Of a model with adapters of transformers' own (`add_adapter`) these alone are saved, as of any model.

        Raises:
            ValmError: PEFT has put an adapter into the model that is not merged.
        """
        if has_own_adapters(self):  # there is no model beside them, so nothing is older
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if beside := next((name for name, _ in self.named_modules() if name.endswith(".base_layer")), None):
            raise ValmError(
                f"PEFT has put an adapter beside {beside.removesuffix('.base_layer')}, and no class would open the "
                "folder: merge it by merge_and_unload, or save it by the save_pretrained of PEFT's model"
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
            # as the umask says, not for their owner alone
            mode = stat.S_IMODE((Path(save_directory) / CONFIG_FILE).stat().st_mode)
            for weights in Path(save_directory).glob("model*.safetensors"):
                set_mode(weights, mode)
            write_places(self.finder.source, save_directory)
            write_card(self, save_directory)
            if upload.pop("push_to_hub", False):  # as a copy, without the places
                sizes = {name: options[name] for name in ("max_shard_size", "token") if name in options}
                self.push_to_hub(upload.pop("repo_id", Path(save_directory).name), **upload, **sizes)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Of `push_to_hub`, which has put the repository's card into the copy, or transformers' template of one."""
        (Path(working_dir) / PLACES_FILE).unlink(missing_ok=True)
        card = Path(working_dir) / CARD_FILE
        if TEMPLATE in card.read_text("utf-8"):
            card.unlink()
        write_card(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _remove_older_weights(folder: Path) -> None:
    """Of weights in one file and of an index of several, removes the older: the file would be loaded first."""
    kinds = [folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME]
    if all(file.is_file() for file in kinds):
        min(kinds, key=lambda file: file.stat().st_mtime_ns).unlink()
