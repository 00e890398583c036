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
    """The keys of `model_cfg` that are read here."""

    embed_dim: Annotated[int, Field(ge=1)]
    text_cfg: dict[str, Any]
    vision_cfg: dict[str, Any]


class OpenClipConfig(TypedDict):
    """The keys of open_clip_config.json that are read here."""

    model_cfg: ModelConfig


def in_own_precision(device: torch.device) -> torch.autocast:
    """Without an autocast around: image vectors and queries, and what is cached of them, must not depend on one."""
    return torch.autocast(device.type, enabled=False)


class Clip:
    """An open_clip model in eval mode, with the tokenizer its text tower was trained with.

    open_clip finds the EOT, whose state is the text feature, in one of two ways: the largest id of the row
    (`pool_type` "argmax", the default) or `text_cfg.eos_id` (`pool_type` "eos"). With a tokenizer that disagrees it
    would silently pool another token.

    Args:
        model: any open_clip model (`CLIP`, `CustomTextCLIP`), used in its own precision and on its own device.
        tokenizer: CLIP's BPE or a pruned one (valm/clip/tokenizer.py); its bos is SOT and its eos is EOT.
        model_cfg: the `model_cfg` that built the model, as in open_clip's own config files.

    Raises:
        ValmError: the tokenizer does not fit the model.
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
        self.source = source  # what `load` finds it by: set by `load` and `save`
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
        """A CLIP with random weights: to train, or to test with.

        Args:
            model_cfg: `model_cfg` of an open_clip config, or the name of one of open_clip's architectures. Its
                vocabulary size is set to the tokenizer's, and its pooling too if EOT is not the largest id.
            tokenizer: by default CLIP's own, with 49,408 tokens.
            preprocess_cfg: mean, std, interpolation, ... as in open_clip's config files.

        Raises:
            TypeError: preprocess_cfg has another key.
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
            source: a folder in open_clip's format (`open_clip_config.json`, the weights, and `tokenizer.json` unless it
                is CLIP's own), also written `local-dir:FOLDER`; nothing is downloaded for it. Or
                `hf-hub:ORGANISATION/MODEL`, or `ARCHITECTURE:WEIGHTS` from open_clip's list
                (`ViT-B-32:laion2b_s34b_b79k`), which open_clip downloads.

        Raises:
            ValmError: it does not exist, is damaged, reads text with a tokenizer other than CLIP's, or has weights that
                were trained with another activation than the architecture's.
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
                    f"no CLIP at {source!r}: it is neither a folder, nor hf-hub:ORGANISATION/MODEL, nor one of "
                    f"open_clip's ARCHITECTURE:WEIGHTS{known}"
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
            raise ValmError(f"{folder / CONFIG_FILE} names {outside[0]}: a CLIP folder must have all that it needs")
        with library_errors(f"the CLIP {folder}"):
            if (files / "tokenizer.json").exists():
                tokenizer = open_tokenizer(files)
            else:
                tokenizer = _default_tokenizer(config["model_cfg"], str(folder))
            model = open_clip.create_model(f"local-dir:{files}", device=device, require_pretrained=True)
            return cls(model, tokenizer, config["model_cfg"], config.get("name", folder.resolve().name), str(folder))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes open_clip's own folder format and the tokenizer; `open_clip.create_model("local-dir:FOLDER")`
        reads it too. Killed at any point, `load` loads the old CLIP or the new one."""
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
            images: PIL images of any size and mode, which are read as those of a knowledge base (`read_image`); or the
                (n, 3, H, W) tensor that `transform` made of RGB images.

        Raises:
            ValueError: an image that `read_image` refuses.
        """
        if not isinstance(images, torch.Tensor):
            images = torch.stack([self.transform(read_image(image)) for image in images])
        images = images.to(self.device, self.model.logit_scale.dtype)
        with in_own_precision(self.device):
            return F.normalize(self.model.encode_image(images).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str], keep: Literal["beginning", "end"] = "beginning") -> torch.Tensor:
        """Text features as CLIP was trained (the state at EOT), (n, E) float32, L2-normalised.

        A text longer than the context is cut to its first `context_length - 2` tokens, or its last.

        Raises:
            ValueError: a single text instead of a list.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of texts, got a text; give [{texts[:20]!r}]")
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
        """Moves this CLIP and returns it. A `ContextEncoder` made of it before stays on the old device."""
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
        """SHA-256 over the names, types, shapes and bytes of the weights, and over both configurations: the same
        weights with another activation or image transform are another CLIP.

        Computed once: call it only when training is over.
        """
        configs = json.dumps([self.model_cfg, self.preprocess_cfg()], sort_keys=True)
        digest = hashlib.sha256(configs.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # as bytes, because numpy has no bfloat16; flat, because a scalar has no axis to view
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def preprocess_cfg(self) -> dict[str, Any]:
        """The image transform, as open_clip's configuration files have it."""
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
                f"the tokenizer of {self.name} has {vocabulary} tokens, its text tower only {self.model.vocab_size}"
            )
        if pool_type == "argmax" and eot != vocabulary - 1:
            raise ValmError(
                f"{self.name} pools the text at the largest id (pool_type argmax), but EOT is {eot} of {vocabulary} "
                f"tokens; set text_cfg pool_type to eos and eos_id to {eot}"
            )
        if pool_type == "eos" and text_cfg.get("eos_id") != eot:
            raise ValmError(f"text_cfg eos_id of {self.name} is {text_cfg.get('eos_id')}, but EOT is {eot}")


def _default_tokenizer(model_cfg: dict[str, Any], name: str) -> PreTrainedTokenizerFast:
    """CLIP's own tokenizer, if the open_clip configuration names no other."""
    text_cfg = model_cfg.get("text_cfg", {})
    other = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    if other:
        raise ValmError(
            f"{name} reads text with the tokenizer of {other}; only CLIPs with CLIP's own BPE are supported"
        )
    return clip_tokenizer()
