"""Models that can be evaluated: causal language models with or without images, masked models, CLIP's text tower."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from valm.clip.clip import CONFIG_FILE as CLIP_CONFIG_FILE
from valm.clip.clip import Clip
from valm.clip.tokenizer import begin_id
from valm.errors import ValmError
from valm.evaluation.controls import switch_images
from valm.evaluation.language import last_word, token_log_probs
from valm.evaluation.questions import FAIR, Documents, Questions
from valm.evaluation.scoring import (
    Progress,
    answer_log_probs,
    answer_tokens,
    check_single_tokens,
    check_writable,
    equal_lengths,
    last_tokens,
)
from valm.model.adapter import is_adapter
from valm.model.checkpoint import ModelConfig
from valm.model.config import MODEL_TYPE
from valm.model.image_model import ImageModel
from valm.model.opening import Opening
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever
from valm.store.files import read_json
from valm.store.folders import current_files
from valm.store.pretrained import CONFIG_FILE, from_pretrained

# Texts of one batch.
BATCH_SIZE = 32


class NotApplicable(ValmError):
    """A model does not support a kind of question; the message says why."""


class Scorer:
    """A model that can be evaluated.

    Attributes:
        kind: what the tables call it.
        sees_images: whether `switch` has an effect.
        retrieves: whether other images can replace its images; not for a blind model.
        query_dtype: the precision of CLIP's text tower if it computes the queries, else None.
    """

    kind: str
    sees_images: bool = False
    retrieves: bool = False
    query_dtype: torch.dtype | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the scores depend on, except the questions."""
        raise NotImplementedError

    def switch(self, retrieval: str, replace: str | os.PathLike | None) -> None:
        """Sets which images the model sees, as `switch_images` does."""

    @torch.no_grad()
    def answers(self, asked: Questions, progress: Progress = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of the candidates after the prompts, (items, prompts, candidates), -inf if an item has
        fewer candidates; and without a prompt, (candidates,), or None if the model has none or the candidates differ.
        Raises NotApplicable if the model does not support such questions."""
        of_candidates = defaultdict(list)
        for item, candidates in enumerate(asked.candidates_of_items):
            of_candidates[candidates].append(item)
        shape = (len(asked.texts), len(asked.texts[0]), max(map(len, of_candidates)))
        scores = torch.full(shape, -torch.inf)
        for candidates, items in of_candidates.items():
            texts = [text for item in items for text in asked.texts[item]]
            found = self._scores(texts, candidates, asked.fair, progress)
            scores[items, :, : len(candidates)] = found.view(len(items), shape[1], -1)
        return scores, self._alone(asked.candidates) if asked.candidates else None

    def _scores(
        self, prompts: Sequence[str], candidates: Sequence[str], fair: bool, progress: Progress
    ) -> torch.Tensor:
        """Scores (prompts, candidates)."""
        raise NotImplementedError

    def _alone(self, candidates: Sequence[str]) -> torch.Tensor | None:
        """Log-probability (candidates,) of each answer without a prompt."""
        return None

    def documents(self, asked: Documents, progress: Progress = None) -> dict[str, np.ndarray]:
        """For each text, (texts,) float64 each: the `nats` of all `tokens`, and the numbers of tokens, `words` and
        `bytes`. For last words also their `word_nats`, and `known`: whether each of their tokens was the likeliest.
        Raises NotApplicable if the model does not support it."""
        raise NotApplicable(f"{self.kind} computes no probability of a text")


def _writable(tokenizer: Any, candidates: Sequence[str], tokens: Sequence[Sequence[int]], fair: bool) -> None:
    """Raises NotApplicable if the model cannot write these answers."""
    try:
        check_writable(tokenizer, candidates, tokens)
        if not fair:
            check_single_tokens(candidates, tokens)
    except ValmError as error:
        raise NotApplicable(str(error)) from error


class CausalScorer(Scorer):
    """A causal language model of transformers, with or without images."""

    def __init__(self, model: Any, tokenizer: Any, kind: str):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.kind = kind
        self._retriever: Any = None
        if isinstance(model, ImageModel):
            self.sees_images = model.fusion_options.num_images > 0
            self.retrieves = model.fusion_options.retrieves
        if self.sees_images:
            self._retriever = model.retriever  # `switch` may replace it
            encoder = getattr(self._retriever, "encoder", None)
            self.query_dtype = encoder.tower.dtype if isinstance(encoder, ContextEncoder) else None

    @property
    def fingerprint(self) -> str:
        own = model_fingerprint(self.model, self.tokenizer)
        if not self.sees_images:
            return own
        retriever = self._retriever
        settings: list[Any] = [own, type(retriever).__name__]
        encoder = getattr(retriever, "encoder", None)
        if isinstance(encoder, ContextEncoder):
            settings += [encoder.clip.weights_hash, encoder.query_settings]
            settings.append(encoder.alignment is not None and encoder.alignment.one_document)
        if isinstance(retriever, Retriever):
            index = getattr(retriever.index, "parameters", None)
            settings += [retriever.kb.fingerprint, retriever.k, str(index)]
        return digest(settings)

    def switch(self, retrieval: str, replace: str | os.PathLike | None) -> None:
        if self.sees_images:
            self.model.set_retriever(self._retriever)
            switch_images(self.model, retrieval, replace=replace)

    def _scores(
        self, prompts: Sequence[str], candidates: Sequence[str], fair: bool, progress: Progress
    ) -> torch.Tensor:
        _writable(self.tokenizer, candidates, answer_tokens(self.tokenizer, candidates), fair)
        return answer_log_probs(
            self.model, self.tokenizer, prompts, candidates, bos=fair, batch_size=BATCH_SIZE, progress=progress
        )

    def _alone(self, candidates: Sequence[str]) -> torch.Tensor:
        """The log-probability of each answer at the beginning of a text."""
        tokenized = answer_tokens(self.tokenizer, candidates)
        texts = [[begin_id(self.tokenizer), *tokens] for tokens in tokenized]
        return torch.stack([row.sum() for row in token_log_probs(self.model, texts, BATCH_SIZE)[0]]).float()

    def documents(self, asked: Documents, progress: Progress = None) -> dict[str, np.ndarray]:
        """fair: each text follows SOT. published: each text follows eos and ends with eos, as fairseq reads it; for
        last words, nothing precedes the text, and only the last token counts."""
        fair = asked.protocol == FAIR
        lengths: tuple[int, ...] = ()
        if asked.last_word:
            tokens, lengths = zip(*(last_word(self.tokenizer, text) for text in asked.texts), strict=True)
        else:
            tokens = self.tokenizer(list(asked.texts), add_special_tokens=False, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        read = [[begin_id(self.tokenizer), *ids] if fair else [eos, *ids, eos] for ids in tokens]
        log_probs, best = token_log_probs(self.model, read, BATCH_SIZE, progress)
        found: dict[str, list[float]] = {
            "nats": [-row.sum().item() for row in log_probs],
            "tokens": [len(row) for row in log_probs],
            "words": [len(text.split()) for text in asked.texts],
            "bytes": [len(text.encode()) for text in asked.texts],
        }
        if asked.last_word:
            if not fair:
                lengths = (1,) * len(tokens)
                log_probs, best = token_log_probs(self.model, tokens, BATCH_SIZE)
            found["word_nats"] = [-row[-length:].sum().item() for row, length in zip(log_probs, lengths, strict=True)]
            found["known"] = [bool(row[-length:].all()) for row, length in zip(best, lengths, strict=True)]
        return {name: np.array(values, float) for name, values in found.items()}


class MaskedScorer(Scorer):
    """A masked language model. The prompt is followed by one mask for each token of the answer and a full stop. The
    score is the sum of the tokens' log-probabilities at the masks."""

    kind = "masked language model"

    def __init__(self, model: Any, tokenizer: Any):
        if tokenizer.mask_token_id is None:
            raise ValmError(f"the tokenizer of {model.config.name_or_path} names no mask token")
        self.model = model.eval()
        self.tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model, self.tokenizer)

    def _scores(
        self, prompts: Sequence[str], candidates: Sequence[str], fair: bool, progress: Progress
    ) -> torch.Tensor:
        tokenizer = self.tokenizer
        answers = tokenizer([" " + answer for answer in candidates], add_special_tokens=False)["input_ids"]
        _writable(tokenizer, candidates, answers, fair)
        stop = tokenizer(".", add_special_tokens=False)["input_ids"]
        frame = tokenizer("")["input_ids"]  # [CLS] [SEP]
        first, last = frame[: len(frame) // 2], frame[len(frame) // 2 :]
        context = _mask_positions(self.model)
        room = context - max(map(len, answers)) - len(stop) - len(frame)
        read = last_tokens(tokenizer(list(prompts), add_special_tokens=False)["input_ids"], room, context)
        of_length = defaultdict(list)
        for number, ids in enumerate(answers):
            of_length[len(ids)].append(number)
        scores = torch.empty(len(prompts), len(candidates))
        for length, members in of_length.items():
            masks = [tokenizer.mask_token_id] * length
            texts = [[*first, *ids, *masks, *stop, *last] for ids in read]
            wanted = torch.tensor([answers[number] for number in members], device=self.model.device)
            for rows in equal_lengths(texts, BATCH_SIZE):
                batch = torch.tensor([texts[row] for row in rows], device=self.model.device)
                outputs = self.model(batch)
                logits = outputs.get("logits", outputs.get("prediction_logits"))
                log_probs = logits.float().log_softmax(-1)  # (b, T, V)
                at = torch.stack([(row == tokenizer.mask_token_id).nonzero()[-length:, 0] for row in batch])
                of_masks = log_probs.gather(1, at[..., None].expand(-1, -1, log_probs.shape[-1]))  # (b, length, V)
                found = of_masks[:, torch.arange(length), wanted].sum(-1)  # (b, members)
                scores[torch.tensor(rows)[:, None], torch.tensor(members)] = found.cpu()
                if progress:
                    progress(len(rows) / len(of_length))
        return scores

    def _alone(self, candidates: Sequence[str]) -> torch.Tensor:
        return self._scores([""], candidates, True, None)[0]

    def documents(self, asked: Documents, progress: Progress = None) -> dict[str, np.ndarray]:
        raise NotApplicable(f"a {self.kind} computes no probability of a text")


def _mask_positions(model: Any) -> int:
    """The maximum number of tokens that a masked model reads. RoBERTa-like models count positions after padding's."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    offsets = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return model.config.max_position_embeddings - max(offsets, default=0)


class ClipScorer(Scorer):
    """CLIP's text tower. An answer's score is the similarity of the answer to the prompt, on CLIP's own scale."""

    kind = "CLIP's text tower"

    def __init__(self, clip: Clip):
        self.clip = clip

    @property
    def fingerprint(self) -> str:
        return digest(["clip", self.clip.weights_hash, self.clip.tokenizer.backend_tokenizer.to_str()])

    def _scores(
        self, prompts: Sequence[str], candidates: Sequence[str], fair: bool, progress: Progress
    ) -> torch.Tensor:
        answers = self.clip.encode_texts(list(candidates))  # (candidates, E)
        rows = []
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = list(prompts[start : start + BATCH_SIZE])
            rows.append(self.clip.encode_texts(batch, keep="end") @ answers.T)
            if progress:
                progress(len(batch))
        return (torch.cat(rows) * self.clip.model.logit_scale.exp()).log_softmax(-1).cpu()


def open_scorer(source: str, settings: Opening) -> Scorer:
    """The model in the folder `source`, or with that Hugging Face name if the settings allow a download.

    The model may be what `valm.load` loads (kb, clip, query_dtype and min_score apply only to those), a causal or
    masked language model of transformers, or a CLIP in open_clip's format.

    Raises:
        ValmError: the model is none of these, or cannot be loaded.
    """
    check_source(source, settings.allow_download)
    folder = Path(source)
    if (folder / CLIP_CONFIG_FILE).is_file():
        return ClipScorer(Clip.load(source, device=settings.opened_device()))
    if is_adapter(folder) or ((folder / CONFIG_FILE).is_file() and _model_type(folder) == MODEL_TYPE):
        return _open_valm(source, settings)
    return _open_transformers(source, settings.allow_download, settings.opened_device())


def check_source(source: str, allow_download: bool) -> None:
    """Raises ValmError if there is no such folder, or it contains no model."""
    folder = Path(source)
    if not Path(folder).is_dir():
        if not allow_download:
            raise ValmError(f"there is no model folder {source}; a model's name on a hub needs --allow-download")
    elif not is_adapter(folder) and not any((folder / name).is_file() for name in (CONFIG_FILE, CLIP_CONFIG_FILE)):
        raise ValmError(f"the folder {source} contains no model: there is neither {CONFIG_FILE} nor {CLIP_CONFIG_FILE}")


def _open_transformers(source: str, allow_download: bool, device: torch.device) -> Scorer:
    """A causal or masked language model of transformers."""

    what = f"the language model {source}"

    def opened(loader: Any, **options: Any) -> Any:
        return from_pretrained(loader, source, what, local_files_only=not allow_download, **options)

    def whole(loader: Any) -> Any:
        """The model in float32, in which every model is evaluated."""
        model, report = opened(loader, output_loading_info=True)
        if missing := sorted(map(str, report["missing_keys"])):
            raise ValmError(f"{what} contains no weights for {missing[0]}: it is incomplete or no language model")
        return model.float().to(device)

    config = opened(AutoConfig)
    architecture = (config.architectures or [""])[0]
    tokenizer = opened(AutoTokenizer)
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")) and architecture not in _CAUSAL:
        # VisualBERT predicts its masks only in its pretraining class
        known = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        loader: Any = AutoModelForMaskedLM if known else AutoModelForPreTraining
        return MaskedScorer(whole(loader), tokenizer)
    model = whole(AutoModelForCausalLM)
    return CausalScorer(model, tokenizer, f"causal language model ({type(model).__name__})")


_CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) - {"BertLMHeadModel"}


def _model_type(folder: Path) -> Any:
    try:
        return read_json(folder / CONFIG_FILE, "the config", ModelConfig).get("model_type")
    except (ValmError, OSError):  # transformers will explain it
        return None


def _open_valm(source: str, settings: Opening) -> CausalScorer:
    if settings.kb is not None and _sees_no_images(Path(source)):
        warnings.warn(f"{source} sees no images, so it ignores the knowledge base (--kb)", stacklevel=2)
        settings = replace(settings, kb=None)
    model, tokenizer = settings.load(source)
    model.float()  # as all other models
    options = model.fusion_options
    if options.blind:
        kind = "blind: its own query is each token's image"
    elif options.num_images:
        kind = f"{options.num_images} images a token"
    else:
        kind = "no images (K = 0)"
    if options.min_score is not None:
        kind += f" with a retrieval score from {options.min_score:.4g}"
    if options.num_images and model.retriever is not None and model.other_images is not None:
        kind += f"; {model.other_images}"
    return CausalScorer(model, tokenizer, f"{type(model).__name__}, {kind}")


def _sees_no_images(folder: Path) -> bool:
    """Whether a folder contains a text-only baseline of `valm`."""
    if is_adapter(folder):
        return False
    config = read_json(current_files(folder) / CONFIG_FILE, "the config", dict[str, Any], "save the model again")
    return config.get("fusion", {}).get("num_images") == 0


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """SHA-256 over the config, the tokenizer, and the names, types, shapes and bytes of the weights."""
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    roles = tokenizer.special_tokens_map  # the backend does not know which token begins a text
    found = hashlib.sha256(json.dumps([config, tokenizer.backend_tokenizer.to_str(), roles], default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
