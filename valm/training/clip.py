"""Training a CLIP on images with captions: open_clip's model class, loss and checkpoint format (Radford et al. 2021).

transformers' Trainer runs the loop, not open_clip_train, which is a program. Its data need webdataset and pandas, its
checkpoints are pickles, and a CLIP of few images overfits at its fixed limit of the logit scale, 100.

By default half of the captions are cut after a random word. A language model retrieves images in the middle of a
sentence, and a CLIP that has never seen a prefix does not find them there.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import random
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from open_clip import ClipLoss, list_models
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast, TrainingArguments

from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.encode import decoded_batches, decoding_workers, end_with_parent
from valm.knowledge_base.records import Encoding, Record
from valm.knowledge_base.sources import Source
from valm.progress import progress_bar
from valm.store.files import cannot_read, is_transient, read_json
from valm.text import nearest, one_line, printable
from valm.training.callbacks import ended_by_signals, show_progress
from valm.training.clip_plan import MAX_LOGIT_SCALE, SMALL
from valm.training.image_trainer import ImageTrainer, newest_checkpoint, step_of
from valm.training.train import training_arguments

log = logging.getLogger(__name__)

# The model `SMALL`.
SMALL_CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 2, "width": 128, "head_width": 32},
        "text_cfg": {"context_length": 32, "layers": 2, "width": 128, "heads": 4},
    },
    "preprocess_cfg": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}
# Random views are taken from images shrunk to this multiple of the view's side ...
SHRUNK = 1.5
# ... which stay in memory up to this number of bytes. Beyond it, every view decodes its image.
SHRUNK_BYTES = 2 << 30
# Batch size of a frozen image tower.
CACHE_BATCH = 64
# Checkpoints of a training: a kill loses at most 1/SAVES of the steps.
SAVES = 20


def train_clip(
    clip: Clip,
    batches: Iterable[tuple[Tensor, list[str]]],
    *,
    steps: int,
    lr: float,
    max_logit_scale: float = MAX_LOGIT_SCALE,
    progress: str | None = "CLIP",
    folder: Path | None = None,
) -> list[float]:
    """Trains the parameters of `clip` that require gradients, in place, and returns the loss of every step.

    AdamW; the learning rate rises for a tenth of the steps and falls as a cosine (one cycle); gradients are clipped at
    1. Afterwards the model is in eval mode without gradients.

    Args:
        clip: for example from `Clip.create`, with `clip.model.requires_grad_(True)`; its image tower may be locked.
        batches: at least `steps` batches of images (B, 3, H, W), as the vision tower takes them, and B texts. If the
            training resumes, the batches after those that it has read.
        max_logit_scale: limit of the learned temperature.
        progress: name of the progress bar; None shows no bar.
        folder: for a checkpoint after each twentieth of the steps (SAVES) and on Ctrl-C or SIGTERM. The training
            resumes from the newest complete checkpoint there. None writes no checkpoint.

    Raises:
        ValmError: a loss is not finite, `clip` is on another GPU than the first, or as in `ImageTrainer.train`.
        KeyboardInterrupt: Ctrl-C or SIGTERM ended the training, with a checkpoint in `folder`.
    """
    if clip.device.index:
        raise ValmError(f"a CLIP trains on the first GPU, got {clip.device}: choose a GPU with CUDA_VISIBLE_DEVICES")
    vars(clip).pop("weights_hash", None)  # the hash of the old weights
    model = _Contrast(clip.model, max_logit_scale)
    optimizer = torch.optim.AdamW(_trained(model), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    # with 10 steps and pct_start 0.1, OneCycleLR would divide by 0
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.11 if steps == 10 else 0.1)
    last = None if folder is None else newest_checkpoint(folder)
    remaining = itertools.islice(batches, steps if last is None else steps - step_of(last))
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = _arguments(folder or nowhere, clip, steps, lr, save=folder is not None)
        with torch.random.fork_rng(devices=[]):  # the Trainer seeds the global generator
            training = _ClipTrainer(
                model=model,
                args=arguments,
                train_dataset=({"images": images, "ids": clip.token_ids(texts)} for images, texts in remaining),
                optimizers=(optimizer, schedule),
            )
        show_progress(training, progress or "", progress is not None)
        with nullcontext() if folder is None else ended_by_signals(training):
            training.train(last)
    model.limit_scale()
    clip.model.eval().requires_grad_(False)
    return training.losses()


def _arguments(folder: str | Path, clip: Clip, steps: int, lr: float, *, save: bool) -> TrainingArguments:
    arguments: Any = training_arguments(
        folder,
        max_steps=steps,
        learning_rate=lr,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="steps" if save else "no",
        save_steps=max(1, steps // SAVES),
        save_total_limit=1,
        ignore_data_skip=True,
        use_cpu=clip.device.type == "cpu",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would contrast parts of a batch
    return arguments


class _ClipTrainer(ImageTrainer):
    """An `ImageTrainer` whose dataset is an iterable of batches."""

    def get_train_dataloader(self) -> Any:
        """Takes the batches of `CaptionedImages` as they are."""
        return self.train_dataset


class _Contrast(nn.Module):
    """A CLIP for the Trainer: its output is the loss of a batch."""

    def __init__(self, clip_model: Any, max_logit_scale: float):
        super().__init__()
        self.clip, self.max_scale, self.contrast = clip_model, math.log(max_logit_scale), ClipLoss()
        self._frozen = list(_frozen(clip_model))  # found once: the Trainer calls train() at every step

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """The contrastive loss of images (B, 3, H, W) and token ids (B, T)."""
        self.limit_scale()
        found, texts = self.clip.encode_image(images, normalize=True), self.clip.encode_text(ids, normalize=True)
        return {"loss": self.contrast(found, texts, self.clip.logit_scale.exp())}

    @torch.no_grad()
    def limit_scale(self) -> None:
        self.clip.logit_scale.clamp_(max=self.max_scale)

    def train(self, mode: bool = True) -> Any:
        """As in PyTorch, but frozen parts stay in eval mode: a frozen batch norm updates no statistics."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of `module` that have parameters, none of them trained."""
    if any(True for _ in module.parameters()) and not _trained(module):
        yield module
    else:
        for child in module.children():
            yield from _frozen(child)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def new_clip(
    model: str | Path | None, image_tower: Clip | None = None, tokenizer: PreTrainedTokenizerFast | None = None
) -> Clip:
    """A CLIP to be trained, with random weights except for a frozen `image_tower` (LiT, Zhai et al. 2022).

    Args:
        model: SMALL, the name of an open_clip architecture, or a JSON file with a `model_cfg` as in open_clip's
            configuration files (the object itself, or under that key). None: the model of `image_tower`.
        image_tower: CLIP whose image tower is copied and frozen.
        tokenizer: by default, CLIP's own.

    Raises:
        ValmError: there is no such model, or its image tower differs from `image_tower`.
    """
    config: dict[str, Any] | str
    preprocess: dict[str, Any] = {}
    if model is None:
        if image_tower is None:
            raise ValmError("give a model, an image tower, or both")
        config = image_tower.model_cfg
    elif model == SMALL:
        config, preprocess = SMALL_CONFIG["model_cfg"], SMALL_CONFIG["preprocess_cfg"]
    elif Path(model).suffix == ".json":
        found = read_json(Path(model), "the CLIP configuration", dict[str, Any], "give a model_cfg of open_clip's form")
        config, preprocess = found.get("model_cfg", found), found.get("preprocess_cfg", {})
    elif (config := str(model)) not in list_models():
        known = f"give {SMALL}, one of open_clip.list_models(), or a JSON file"
        raise ValmError(f"there is no CLIP architecture {model}: {known}{nearest(config, [SMALL, *list_models()])}")
    if image_tower is not None:
        preprocess = dict(image_tower.model.visual.preprocess_cfg)
        preprocess.pop("size", None)
    try:
        clip = Clip.create(config, tokenizer, preprocess_cfg=preprocess)
    except ValmError:
        raise
    except Exception as error:  # open_clip raises many types for odd values
        raise ValmError(f"open_clip cannot make the CLIP {model}: {str(error) or type(error).__name__}") from error
    clip.model.requires_grad_(True)
    if image_tower is not None:
        try:
            clip.model.visual.load_state_dict(image_tower.model.visual.state_dict())
        except RuntimeError as error:
            raise ValmError(
                f"the image tower of {image_tower.name} does not fit {model}: {str(error).splitlines()[-1].strip()}"
            ) from error
        _check_same_tower(clip, image_tower, model)
        # freeze_bn_stats would replace timm's BatchNormAct2d with a batch norm without activation (open_clip 3.3)
        clip.model.lock_image_tower()
    return clip


def _check_same_tower(clip: Clip, image_tower: Clip, model: str | Path | None) -> None:
    """Checks heads, pooling and activation, which have no weights but change the function."""
    size = clip.model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    copied, own = (tower.encode_images(pixels) for tower in (clip, image_tower))
    if not torch.allclose(copied.cpu(), own.cpu(), atol=1e-4):
        raise ValmError(
            f"the image tower of {image_tower.name} differs from {model} in its heads, pooling or activation "
            "(quick_gelu): leave --model out, or give it the vision_cfg and quick_gelu of the tower"
        )


class CaptionedImages(Dataset[tuple[Tensor, str] | None]):
    """The images of a source for training a CLIP, each with a random caption.

    Item (n, i) is image i in its n-th random view with its n-th random caption: pixels (3, H, W) and a text, or None
    for a damaged image. View and caption depend only on the seed, in every process. Reading an item raises ValmError
    on a transient error (`is_transient`).

    Args:
        records: as `captioned` returns them.
        clip: its image transform sets the size of the views, which show nearly the whole image, as in open_clip.
        prefixes: share of captions that are cut after a random word.
    """

    def __init__(self, records: list[Record], clip: Clip, seed: int, prefixes: float = 0.5):
        self.records = records
        self.transform = image_transform_v2(PreprocessCfg(**clip.preprocess_cfg()), is_train=True)
        self.seed = seed
        self.prefixes = prefixes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, str] | None:
        number, index = draw
        record = self.records[index]
        rng = random.Random(f"{self.seed} {number}")
        pixels = self._pixels(index, rng.getrandbits(63))
        if pixels is None:
            return None
        words = rng.choice(record.caption.split("\n")).split()
        if rng.random() < self.prefixes:
            words = words[: rng.randint(1, len(words))]
        return pixels, " ".join(words)

    def _pixels(self, index: int, view: int) -> Tensor | None:
        """Image `index` in one of its views; None if it is damaged."""
        record = self.records[index]
        try:
            image = record.read()
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would also seed accelerators: slower, and queued for each that is not in use yet
                torch.default_generator.manual_seed(view)
                return self.transform(image)
        except Exception as error:  # decoders raise many types for damaged bytes
            if is_transient(error):
                raise cannot_read(record.uri, error) from error
            return None

    def batches(self, size: int, *, skip: int = 0, workers: int = 0) -> Iterator[tuple[Tensor, list[str]]]:
        """Infinite batches of `size` different images. Every image comes once before any comes again, except for a
        remainder smaller than a batch.

        Args:
            skip: batches to skip, which a resumed training has read.
            workers: processes that decode.

        Raises:
            ValmError: `size` is below 2, or fewer than two images of a batch can be read.
        """
        size = min(size, len(self.records))
        if size < 2:
            raise ValmError(f"a CLIP learns from batches of two images or more, got {size}")
        loader = DataLoader(
            self,
            batch_sampler=itertools.islice(_draws(len(self.records), size, self.seed), skip, None),
            collate_fn=_stacked,
            num_workers=workers,
            worker_init_fn=end_with_parent,
            generator=torch.Generator(),  # seeding workers must not advance the global generator
        )
        for batch in loader:
            if batch is None:  # without an error, a resumed training would read other batches
                raise ValmError(
                    f"a CLIP learns from two images or more, but fewer of a batch of {size} can be read: remove "
                    "damaged images from the source, or give a larger batch size (--batch-size)"
                )
            yield batch


def _draws(images: int, size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Infinite batches of (number of the draw, image). All images come once before any comes again, except for a
    remainder smaller than a batch."""
    generator = torch.Generator().manual_seed(seed)
    numbers = itertools.count()
    while True:
        order = torch.randperm(images, generator=generator).tolist()
        for start in range(0, images - size + 1, size):
            yield [(next(numbers), image) for image in order[start : start + size]]


class CachedImages(CaptionedImages):
    """As `CaptionedImages`, with the frozen image tower's features instead of images (LiT, Zhai et al. 2022).

    The features are computed once, without random views, and `clip` trains on them within `cached`. Damaged images are
    left out.

    Args:
        clip: from `new_clip` with an image tower.
    """

    def __init__(self, records: list[Record], clip: Clip, seed: int, prefixes: float = 0.5, *, progress: bool = True):
        super().__init__(records, clip, seed, prefixes)
        self.clip = clip
        found = self._computed(progress)
        self.records = [record for record, features in zip(records, found, strict=True) if features is not None]
        self.features = [features for features in found if features is not None]  # F of each image

    @torch.no_grad()
    def _computed(self, progress: bool) -> list[Tensor | None]:
        """F of each image, None if it is damaged."""
        visual = self.clip.model.visual
        frozen = (visual.trunk if _has_projection(visual) else visual).eval()
        features: list[Tensor | None] = []
        with progress_bar(total=len(self.records), desc="image tower", unit="image", shown=progress) as bar:
            for batch, pixels in decoded_batches(self.records, self.clip, Encoding(CACHE_BATCH, thumbnails=0)):
                computed: Iterator[Tensor] = iter(())
                if len(pixels):
                    # depthwise convolutions take half as long in this format on a CPU
                    inputs = pixels.to(self.clip.device, memory_format=torch.channels_last)
                    computed = iter(frozen(inputs).cpu())
                features += [None if decoded.reason else next(computed) for decoded in batch]
                bar.update(len(batch))
        damaged = [record.uri for record, found in zip(self.records, features, strict=True) if found is None]
        if damaged:
            log.warning(
                f"{len(damaged):,} of {len(features):,} images cannot be read and are skipped, such as "
                f"{printable(damaged[0])}"
            )
        return features

    def _pixels(self, index: int, view: int) -> Tensor:
        return self.features[index]

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Within the block, the image tower of the CLIP takes these features instead of images."""
        visual = self.clip.model.visual
        owner, name = (visual, "trunk") if _has_projection(visual) else (self.clip.model, "visual")
        frozen = getattr(owner, name)
        setattr(owner, name, nn.Identity())
        try:
            yield
        finally:
            setattr(owner, name, frozen)


def _has_projection(visual: nn.Module) -> bool:
    """Whether an image tower is timm's: open_clip freezes its trunk and trains its projection."""
    return isinstance(visual, TimmModel)


def _stacked(items: list[tuple[Tensor, str] | None]) -> tuple[Tensor, list[str]] | None:
    """A batch of the images that could be read; None if fewer than two, which allow no contrast."""
    whole = [item for item in items if item is not None]
    if len(whole) < 2:
        return None
    return torch.stack([pixels for pixels, _ in whole]), [text for _, text in whole]


def captioned(source: Source) -> list[Record]:
    """The images of a source that have a caption; a warning counts skipped images. Images of a Hugging Face dataset are
    held in memory, undecoded. Raises ValmError if the source contains fewer than two images with captions."""
    records, unreadable, images = [], [], 0
    for record in source.images():
        if record.source is None:
            unreadable.append(f"{record.uri} ({record.reason})")
            continue
        images += 1
        if record.caption.strip():
            records.append(record)
    if unreadable:
        log.warning(
            f"{len(unreadable):,} images or captions of the source could not be read and are skipped, such as "
            f"{printable(unreadable[0])}"
        )
    if len(records) < images and not hasattr(source, "remarks"):  # they say so
        log.warning(f"{images - len(records):,} of {images:,} images have no caption and are skipped")
    if len(records) < 2:
        raise ValmError(f"the source contains {len(records)} images with captions, but a CLIP needs two or more")
    return records


def shrunk(
    records: list[Record], clip: Clip, *, workers: int | None = None, progress: str | None = "shrink images"
) -> list[Record]:
    """The records with their images decoded once and shrunk to what the views of `clip` need (SHRUNK).

    Damaged images are skipped with a warning. If the images would take more than SHRUNK_BYTES, the records are returned
    unchanged, with a warning.

    Args:
        workers: processes that decode; None chooses by the number of images and cores.
        progress: name of the progress bar; None shows no bar.

    Raises:
        ValmError: reading an image raised a transient error (`is_transient`), or fewer than two images can be read.
    """
    size = clip.model.visual.image_size
    side = round(SHRUNK * (size if isinstance(size, int) else max(size)))
    needed = len(records) * side * side * 4 / 3 * 4  # photographs of 4:3, Pillow's 4 bytes per pixel
    if needed > SHRUNK_BYTES:
        log.warning(f"{len(records):,} images of {side} pixels take {needed / 1e9:.0f} GB: each step decodes its own")
        return records
    if workers is None:
        workers = decoding_workers(len(records))
    loader = DataLoader(
        _Shrinker(records, side),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    kept, damaged = [], []
    with progress_bar(total=len(records), desc=progress, unit="image", shown=progress is not None) as bar:
        for record, (image, reason, transient) in zip(records, loader, strict=True):
            if transient:
                raise cannot_read(record.uri, reason)
            if image is None:
                damaged.append(f"{record.uri} ({reason})")
            else:
                kept.append(dataclasses.replace(record, source=image, offset=0, size=None))
            bar.update()
    if damaged:
        log.warning(f"{len(damaged):,} of {len(records):,} images cannot be read and are skipped, such as {damaged[0]}")
    if len(kept) < 2:
        raise ValmError("hardly any image of the source can be read, and a CLIP needs two or more in a batch")
    return kept


class _Shrinker(Dataset[tuple[Image.Image | None, str, bool]]):
    """The image of each record, its shorter side at most `side` pixels; or why it cannot be read, and whether the error
    is transient."""

    def __init__(self, records: list[Record], side: int):
        self.records, self.side = records, side

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Image.Image | None, str, bool]:
        try:
            image = self.records[index].read()
        except Exception as error:  # decoders raise many types for damaged bytes
            return None, one_line(str(error)) or type(error).__name__, is_transient(error)
        scale = self.side / min(image.size)
        if scale < 1:
            width, height = (round(scale * length) for length in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image, "", False
