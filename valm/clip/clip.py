"""A CLIP: an open_clip model, its tokenizer and its image transform."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import Field
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast
from typing_extensions import TypedDict

from valm.clip.read_image import read_image
from valm.clip.tokenizer import clip_tokenizer, open_tokenizer
from valm.errors import ValmError
from valm.store.files import read_json, write_json
from valm.store.folders import current_files, replaced_files
from valm.store.pretrained import library_errors
from valm_kernels.json_files import check_regular

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TEXT_BATCH = 256


class ModelConfig(TypedDict):
    """The keys of `model_cfg` that this module reads."""

    embed_dim: Annotated[int, Field(ge=1)]
    text_cfg: dict[str, Any]
    vision_cfg: dict[str, Any]


class OpenClipConfig(TypedDict):
    """The keys of open_clip_config.json that this module reads."""

    model_cfg: ModelConfig


def in_own_precision(device: torch.device) -> torch.autocast:
    """Turns off autocast, on which image vectors, queries and their caches must not depend."""
    return torch.autocast(device.type, enabled=False)


class Clip:
    """An open_clip model in eval mode, with the tokenizer its text tower was trained with. Open it with `Clip.load`.

    The text feature is the state at EOT. open_clip finds EOT as the largest id of the row (`pool_type` "argmax", the
    default) or as `text_cfg.eos_id` (`pool_type` "eos"). If the tokenizer disagreed, open_clip would silently pool
    another token, so this class checks it.

    Args:
        model: any open_clip model (`CLIP`, `CustomTextCLIP`), used in its own precision and on its own device.
        tokenizer: CLIP's BPE, complete or pruned (valm/clip/tokenizer.py); its bos is SOT and its eos is EOT.
        model_cfg: the `model_cfg` that built the model, as in open_clip's config files.
        name: a name for the model, in errors and knowledge bases.

    Raises:
        ValmError: the tokenizer does not fit the model.

    Example:
        >>> clip = valm.Clip.load("clip")
        >>> clip.encode_texts(["a red apple", "the blue sky"]).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        model_cfg: dict[str, Any],
        name: str = "clip",
        source: str | None = None,
    ):
        self.model: Any = model.eval().requires_grad_(False)  # open_clip has no types
        self.tokenizer = tokenizer
        self.model_cfg = model_cfg
        self.name = name
        self.source = source  # where `load` finds it: set by `load` and `save`
        self.transform = image_transform_v2(PreprocessCfg(**self.preprocess_cfg()), is_train=False)
        self._check_tokenizer()

    @classmethod
    def create(
        cls,
        model_cfg: dict[str, Any] | str,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        preprocess_cfg: dict[str, Any] | None = None,
        name: str = "clip",
    ) -> Clip:
        """A CLIP with random weights, for training or tests.

        Args:
            model_cfg: `model_cfg` of an open_clip config, or the name of an open_clip architecture. Its vocabulary size
                is set to the tokenizer's, and its pooling too if EOT is not the largest id.
            tokenizer: by default CLIP's own, with 49,408 tokens.
            preprocess_cfg: mean, std, interpolation, ... as in open_clip's config files.
            name: a name for the model, in errors and knowledge bases.

        Raises:
            TypeError: preprocess_cfg contains an unknown key.
            ValmError: open_clip does not know the architecture.
        """
        if isinstance(model_cfg, str):
            name, config = model_cfg, open_clip.get_model_config(model_cfg)
            if config is None:
                raise ValmError(f"open_clip has no architecture named {name!r}; see open_clip.list_models()")
        else:
            config = model_cfg
        tokenizer = tokenizer or clip_tokenizer()
        text_cfg = {**config["text_cfg"], "vocab_size": len(tokenizer)}
        if tokenizer.eos_token_id != len(tokenizer) - 1:
            text_cfg |= {"pool_type": "eos", "eos_id": tokenizer.eos_token_id}
        config = {**config, "text_cfg": text_cfg}
        arguments = {key: value for key, value in config.items() if key != "custom_text"}
        model = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**arguments)
        preprocess = PreprocessCfg(**{**(preprocess_cfg or {}), "size": model.visual.image_size})
        set_model_preprocess_cfg(model, asdict(preprocess))
        return cls(model, tokenizer, config, name)

    @classmethod
    def load(cls, source: str | os.PathLike, *, device: str | torch.device = "cpu") -> Clip:
        """Loads a CLIP in float32.

        Args:
            source: a folder in open_clip's format, also written `local-dir:FOLDER`: `open_clip_config.json`, the
                weights, and `tokenizer.json` unless it is CLIP's own. Nothing is downloaded for a folder. open_clip
                downloads `hf-hub:ORGANISATION/MODEL`, and `ARCHITECTURE:WEIGHTS` from its list
                (`ViT-B-32:laion2b_s34b_b79k`).
            device: where the model runs.

        Raises:
            ValmError: the CLIP does not exist, is damaged, reads text with a tokenizer other than CLIP's, or its
                weights were trained with another activation than the architecture's.
        """
        source = os.fspath(source)
        folder = Path(source.removeprefix("local-dir:"))
        if folder.is_dir():
            return cls._load_folder(folder, device)
        model_name, weights = source, None
        if not source.startswith("hf-hub:"):
            model_name, _, weights = source.partition(":")
            tags = open_clip.list_pretrained_tags_by_model(model_name)
            if weights not in tags:
                known = f"; weights of {model_name}: {', '.join(tags)}" if tags else ""
                raise ValmError(
                    f"no CLIP at {source!r}: it is not a folder, hf-hub:ORGANISATION/MODEL, or one of open_clip's "
                    f"ARCHITECTURE:WEIGHTS{known}"
                )
        with library_errors(f"the CLIP {source}"):
            model_cfg = open_clip.get_model_config(model_name)
            pretrained = open_clip.get_pretrained_cfg(model_name, weights) if weights else {}
            if pretrained.get("quick_gelu") and not model_cfg.get("quick_gelu"):  # open_clip only warns
                raise ValmError(
                    f"the weights {weights} were trained with QuickGELU, which {model_name} does not compute: load "
                    f"{model_name}-quickgelu:{weights}"
                )
            tokenizer = _default_tokenizer(model_cfg, source)
            model = open_clip.create_model(model_name, weights, device=device, require_pretrained=True)
        return cls(model, tokenizer, model_cfg, name=source, source=source)

    @classmethod
    def _load_folder(cls, folder: Path, device: str | torch.device) -> Clip:
        files = current_files(folder)
        for file in files.iterdir():  # open_clip looks for weights of several names
            if not file.name.startswith("."):  # an editor's links lead nowhere
                check_regular(file)
        config = read_json(
            files / CONFIG_FILE, "the CLIP configuration", OpenClipConfig, "give a CLIP folder of open_clip's"
        )
        model_cfg = config["model_cfg"]
        outside = [
            name
            for part, name in (("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_pretrained"))
            if model_cfg[part].get(name)
        ]
        if ":" in str(model_cfg["vision_cfg"].get("timm_model_name")):  # hf-hub:... or local-dir:...
            outside.append("timm_model_name")
        if outside:  # open_clip or timm would download it, or read it elsewhere
            raise ValmError(f"{folder / CONFIG_FILE} names {outside[0]}: a CLIP folder must contain all its files")
        with library_errors(f"the CLIP {folder}"):
            if (files / "tokenizer.json").exists():
                tokenizer = open_tokenizer(files)
            else:
                tokenizer = _default_tokenizer(config["model_cfg"], str(folder))
            model = open_clip.create_model(f"local-dir:{files}", device=device, require_pretrained=True)
            return cls(model, tokenizer, config["model_cfg"], config.get("name", folder.resolve().name), str(folder))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder in open_clip's format and the tokenizer. `open_clip.create_model("local-dir:FOLDER")` reads
        it too. If the process is killed, `load` loads the old or the new CLIP.

        Args:
            folder: created if missing.

        Raises:
            OSError: the folder cannot be written.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        config = {"name": self.name, "model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg()}
        with replaced_files(folder, "the CLIP") as temporary:
            save_file(tensors, temporary / WEIGHTS_FILE)
            self.tokenizer.save_pretrained(temporary)
            write_json(temporary / CONFIG_FILE, config)
        self.source = str(folder)

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Image features, (n, E) float32, L2-normalised, on the model's device.

        Args:
            images: PIL images of any size and mode, read as for a knowledge base (`read_image`), or the (n, 3, H, W)
                tensor that `transform` made of RGB images.

        Raises:
            ValueError: `read_image` rejects an image.
        """
        if not isinstance(images, torch.Tensor):
            images = torch.stack([self.transform(read_image(image)) for image in images])
        images = images.to(self.device, self.model.logit_scale.dtype)
        with in_own_precision(self.device):
            return F.normalize(self.model.encode_image(images).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str], keep: Literal["beginning", "end"] = "beginning") -> torch.Tensor:
        """Text features as CLIP was trained (the state at EOT), (n, E) float32, L2-normalised.

        Args:
            texts: a list of texts.
            keep: whether a text longer than the context keeps its first or its last `context_length - 2` tokens.

        Raises:
            ValueError: a single text instead of a list.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of texts, got a text: give [{texts[:20]!r}]")
        ids = self.token_ids(texts, keep).to(self.device)
        with in_own_precision(self.device):
            parts = [F.normalize(self.model.encode_text(part).float(), dim=-1) for part in ids.split(TEXT_BATCH)]
        return torch.cat(parts)

    def token_ids(self, texts: list[str], keep: Literal["beginning", "end"] = "beginning") -> torch.Tensor:
        """SOT, the text and EOT for each text, padded with EOT: (n, context_length) int64.

        open_clip pools the first EOT, and a causal text tower never sees the padding after it.
        """
        rows = torch.full((len(texts), self.context_length), self.tokenizer.eos_token_id, dtype=torch.int64)
        rows[:, 0] = self.tokenizer.bos_token_id
        for row, text in zip(rows, texts, strict=True):
            ids, most = self.tokenizer(text, add_special_tokens=False)["input_ids"], self.context_length - 2
            ids = ids[:most] if keep == "beginning" else ids[-most:]
            row[1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows

    def to(self, device: str | torch.device) -> Clip:
        """Moves this CLIP to `device` and returns it. A `ContextEncoder` made before stays on the old device."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def context_length(self) -> int:
        """Tokens that the text tower sees at once, SOT and EOT included."""
        return self.model.context_length

    @property
    def embed_dim(self) -> int:
        """E, the width of image and text features."""
        return self.model_cfg["embed_dim"]

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of the weights, and over both configurations: equal weights
        with another activation or image transform are another CLIP.

        It is computed once, so call it only after training.
        """
        configs = json.dumps([self.model_cfg, self.preprocess_cfg()], sort_keys=True)
        digest = hashlib.sha256(configs.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # as bytes, because numpy lacks bfloat16; flat, because a scalar has no axis to view
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def preprocess_cfg(self) -> dict[str, Any]:
        """The image transform, as in open_clip's configuration files."""
        known = {field.name for field in fields(PreprocessCfg)}
        return {key: value for key, value in self.model.visual.preprocess_cfg.items() if key in known}

    def _check_tokenizer(self) -> None:
        eot, vocabulary = self.tokenizer.eos_token_id, len(self.tokenizer)
        text_cfg = self.model_cfg["text_cfg"]
        pool_type = text_cfg.get("pool_type", "argmax")
        if self.tokenizer.bos_token_id is None or eot is None:
            raise ValmError(f"the tokenizer of {self.name} names no bos (SOT) or no eos (EOT) token")
        if vocabulary > self.model.vocab_size:
            raise ValmError(
                f"the tokenizer of {self.name} has {vocabulary} tokens, but its text tower only {self.model.vocab_size}"
            )
        if pool_type == "argmax" and eot != vocabulary - 1:
            raise ValmError(
                f"{self.name} pools the text at the largest id (pool_type argmax), but EOT is {eot} of {vocabulary} "
                f"tokens: set text_cfg pool_type to eos and eos_id to {eot}"
            )
        if pool_type == "eos" and text_cfg.get("eos_id") != eot:
            raise ValmError(f"text_cfg eos_id of {self.name} is {text_cfg.get('eos_id')}, but EOT is {eot}")


def _default_tokenizer(model_cfg: dict[str, Any], name: str) -> PreTrainedTokenizerFast:
    """CLIP's own tokenizer, if the open_clip configuration names no other tokenizer."""
    text_cfg = model_cfg.get("text_cfg", {})
    other = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    if other:
        raise ValmError(
            f"{name} reads text with the tokenizer of {other}, but only CLIPs with CLIP's own BPE are supported"
        )
    return clip_tokenizer()
