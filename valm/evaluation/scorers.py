"""Models that can be evaluated: causal language models with and without images, masked ones, CLIP's text tower."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from valm.evaluation.choice import check_single_tokens
from valm.evaluation.controls import switch_images
from valm.evaluation.language import last_word, token_log_probs
from valm.evaluation.questions import FAIR, Documents, Questions
from valm.evaluation.scoring import (
    Progress,
    answer_log_probs,
    answer_tokens,
    check_writable,
    counting,
    equal_lengths,
)
from valm.model.adapter import ADAPTER_FILE, is_adapter
from valm.model.checkpoint import ModelConfig, load
from valm.model.config import MODEL_TYPE
from valm.model.image_model import ImageModel
from valm.retrieval.context import ContextEncoder
from valm.retrieval.min_score import set_min_score
from valm.retrieval.retriever import Retriever
from valm.store.files import is_file, is_folder, read_json
from valm.store.folders import current_files
from valm.store.pretrained import CONFIG_FILE, from_pretrained

# Texts of one batch.
BATCH_SIZE = 32


class NotApplicable(ValmError):
    """A model does not support a kind of question; the message says why."""


@dataclass(frozen=True)
class DocumentScore:
    """nats: of all `tokens` together. word_nats: of the last word, of `word_tokens` tokens; known: whether each of them
    was the likeliest. All three are 0 if no last word is asked for."""

    nats: float
    tokens: int
    words: int
    bytes: int
    word_nats: float = 0.0
    word_tokens: int = 0
    known: bool = False


class Scorer(Protocol):
    """A model that can be evaluated.

    Attributes:
        kind: its kind, for the tables.
        fingerprint: SHA-256 over everything that its scores depend on, except the questions.
        sees_images: whether `switch` changes something.
        retrieves: whether its images can be replaced by others; those of a blind model cannot.
        query_dtype: the precision of CLIP's text tower where that writes its queries, else None. Asked before `switch`.
    """

    kind: str

    @property
    def fingerprint(self) -> str: ...

    @property
    def sees_images(self) -> bool: ...

    @property
    def retrieves(self) -> bool: ...

    @property
    def query_dtype(self) -> torch.dtype | None: ...

    def switch(self, retrieval: str, replace: str | os.PathLike | None) -> None:
        """Sets which images it sees, as `switch_images`."""
        ...

    def answers(self, asked: Questions, progress: Progress) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of the candidates, (items, prompts, candidates), and without a prompt, (candidates,) or
        None if the model has none.

        Raises:
            NotApplicable: the model does not support such questions.
        """
        ...

    def documents(self, asked: Documents, progress: Progress) -> list[DocumentScore]:
        """The likelihood of each text.

        Raises:
            NotApplicable: the model does not support it.
        """
        ...


class CausalScorer:
    """A causal language model of transformers, with or without images."""

    def __init__(self, model: Any, tokenizer: Any, kind: str):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.kind = kind
        self._retriever: Any = None

    @property
    def sees_images(self) -> bool:
        return isinstance(self.model, ImageModel) and self.model.fusion_options.num_images > 0

    @property
    def retrieves(self) -> bool:
        return isinstance(self.model, ImageModel) and self.model.fusion_options.retrieves

    @property
    def query_dtype(self) -> torch.dtype | None:
        encoder = getattr(self.model.retriever, "encoder", None) if self.sees_images else None
        return encoder.tower.dtype if isinstance(encoder, ContextEncoder) else None

    @property
    def fingerprint(self) -> str:
        own = model_fingerprint(self.model, self.tokenizer)
        if not self.sees_images:
            return own
        retriever: Any = self.model.retriever
        settings: list[Any] = [own, type(retriever).__name__]
        encoder = getattr(retriever, "encoder", None)
        if isinstance(encoder, ContextEncoder):
            settings += [encoder.query, encoder.clip.weights_hash, str(encoder.tower.dtype), encoder.segments]
            settings.append(encoder.alignment is not None and encoder.alignment.one_document)
        if isinstance(retriever, Retriever):
            index = getattr(retriever.index, "parameters", None)
            settings += [retriever.kb.fingerprint, retriever.k, str(index)]
        return digest(settings)

    def switch(self, retrieval: str, replace: str | os.PathLike | None) -> None:
        if self.sees_images:
            self._retriever = self._retriever or self.model.retriever  # an earlier switch may have replaced it
            self.model.set_retriever(self._retriever)
            switch_images(self.model, retrieval, replace=replace)

    def answers(self, asked: Questions, progress: Progress) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            check_writable(self.tokenizer, asked.candidates, answer_tokens(self.tokenizer, asked.candidates))
            if not asked.fair:
                check_single_tokens(self.tokenizer, asked.candidates)
        except ValmError as error:
            raise NotApplicable(str(error)) from error
        flat = [text for row in asked.texts for text in row]
        scores = answer_log_probs(
            self.model,
            self.tokenizer,
            flat,
            asked.candidates,
            bos=asked.fair,
            batch_size=BATCH_SIZE,
            progress=progress,
        )
        return scores.view(len(asked.texts), -1, len(asked.candidates)), self._alone(asked.candidates)

    def _alone(self, candidates: Sequence[str]) -> torch.Tensor:
        """(candidates,): log-probability of each answer at the beginning of a text."""
        tokenized = answer_tokens(self.tokenizer, candidates)
        texts = [[begin_id(self.tokenizer), *tokens] for tokens in tokenized]
        return torch.stack([row.sum() for row in token_log_probs(self.model, texts, BATCH_SIZE)[0]]).float()

    def documents(self, asked: Documents, progress: Progress) -> list[DocumentScore]:
        """fair: each text after SOT. published: each after eos and with eos at its end, as fairseq reads them; and the
        last token alone as the last word, with nothing before the text."""
        fair = asked.protocol == FAIR
        tokens, word_lengths = [], []
        for text in asked.texts:
            if asked.last_word:
                ids, length = last_word(self.tokenizer, text)
            else:
                ids, length = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], 0
            tokens.append(ids)
            word_lengths.append(length if fair else min(length, 1))
        eos = self.tokenizer.eos_token_id
        read = [[begin_id(self.tokenizer), *ids] if fair else [eos, *ids, eos] for ids in tokens]
        log_probs, best = token_log_probs(self.model, read, BATCH_SIZE, progress)
        word_log_probs, word_best = log_probs, best
        if asked.last_word and not fair:
            word_log_probs, word_best = token_log_probs(self.model, tokens, BATCH_SIZE)
        scores = []
        for row, text in enumerate(asked.texts):
            of_word = slice(len(word_log_probs[row]) - word_lengths[row], None)
            scores.append(
                DocumentScore(
                    nats=-log_probs[row].sum().item(),
                    tokens=len(log_probs[row]),
                    words=len(text.split()),
                    bytes=len(text.encode()),
                    word_nats=-word_log_probs[row][of_word].sum().item(),
                    word_tokens=word_lengths[row],
                    known=bool(word_lengths[row]) and bool(word_best[row][of_word].all()),
                )
            )
        return scores


class MaskedScorer:
    """A masked language model: the answer stands as one mask for each of its tokens after the prompt, with a full stop
    behind it, and its score is the sum of the log-probabilities of its tokens at the masks."""

    kind = "masked language model"
    sees_images = False
    retrieves = False
    query_dtype = None

    def __init__(self, model: Any, tokenizer: Any):
        if tokenizer.mask_token_id is None:
            raise ValmError(f"the tokenizer of {model.config.name_or_path} names no mask token")
        self.model = model.eval()
        self.tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model, self.tokenizer)

    def switch(self, retrieval: str, replace: str | os.PathLike | None) -> None:
        pass

    @torch.no_grad()
    def answers(self, asked: Questions, progress: Progress) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat = [text for row in asked.texts for text in row]
        scores = self._scores([*flat, ""], asked.candidates, asked.fair, progress)
        return scores[:-1].view(len(asked.texts), -1, len(asked.candidates)), scores[-1]

    def _scores(
        self, prompts: Sequence[str], candidates: Sequence[str], fair: bool, progress: Progress
    ) -> torch.Tensor:
        """(prompts, candidates)"""
        tokenizer = self.tokenizer
        answers = tokenizer([" " + answer for answer in candidates], add_special_tokens=False)["input_ids"]
        try:
            check_writable(tokenizer, candidates, answers)
            if not fair:
                check_single_tokens(tokenizer, candidates)
        except ValmError as error:
            raise NotApplicable(str(error)) from error
        stop = tokenizer(".", add_special_tokens=False)["input_ids"]
        frame = tokenizer("")["input_ids"]  # [CLS] [SEP]
        first, last = frame[: len(frame) // 2], frame[len(frame) // 2 :]
        room = _mask_positions(self.model) - max(map(len, answers)) - len(stop) - len(frame)
        read = [ids[-room:] for ids in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
        of_length = defaultdict(list)
        for number, ids in enumerate(answers):
            of_length[len(ids)].append(number)
        scores = torch.empty(len(prompts), len(candidates))
        with counting(progress, len(prompts)) as advance:
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
                    advance(len(rows) / len(of_length))
        return scores

    def documents(self, asked: Documents, progress: Progress) -> list[DocumentScore]:
        raise NotApplicable("a masked language model has no probability of a text")


def _mask_positions(model: Any) -> int:
    """The most tokens that a masked model reads; those of RoBERTa's kind count positions from behind padding's."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    offsets = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return model.config.max_position_embeddings - max(offsets, default=0)


class ClipScorer:
    """CLIP's text tower: an answer's score is the similarity of its text and the prompt's, on CLIP's own scale."""

    kind = "CLIP's text tower"
    sees_images = False
    retrieves = False
    query_dtype = None

    def __init__(self, clip: Clip):
        self.clip = clip

    @property
    def fingerprint(self) -> str:
        return digest(["clip", self.clip.weights_hash, self.clip.tokenizer.backend_tokenizer.to_str()])

    def switch(self, retrieval: str, replace: str | os.PathLike | None) -> None:
        pass

    @torch.no_grad()
    def answers(self, asked: Questions, progress: Progress) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat = [text for row in asked.texts for text in row]
        answers = self.clip.encode_texts(list(asked.candidates))  # (candidates, E)
        rows = []
        with counting(progress, len(flat)) as advance:
            for start in range(0, len(flat), BATCH_SIZE):
                batch = flat[start : start + BATCH_SIZE]
                rows.append(self.clip.encode_texts(batch, keep="end") @ answers.T)
                advance(len(batch))
        scores = (torch.cat(rows) * self.clip.model.logit_scale.exp()).log_softmax(-1)
        return scores.cpu().view(len(asked.texts), -1, len(asked.candidates)), None

    def documents(self, asked: Documents, progress: Progress) -> list[DocumentScore]:
        raise NotApplicable("CLIP's text tower has no probability of a text")


def open_scorer(
    source: str,
    *,
    kb: str | os.PathLike | None = None,
    clip: str | None = None,
    allow_download: bool = False,
    device: str | torch.device = "cpu",
    query_dtype: torch.dtype | None = None,
    min_score: float | None = None,
) -> Scorer:
    """The model in the folder `source`, or of that Hugging Face name where `allow_download`.

    It may be what `valm.load` loads (kb, clip, query_dtype and min_score are of such models), a causal or masked
    language model of transformers, or a CLIP in open_clip's format.

    Raises:
        ValmError: it is none of them, or cannot be loaded.
    """
    folder = Path(source)
    if is_file(folder / CLIP_CONFIG_FILE):
        return ClipScorer(Clip.load(source, device=device))
    where = {"kb": kb, "clip": clip, "allow_download": allow_download, "device": device, "query_dtype": query_dtype}
    if is_adapter(folder):
        return _open_valm(source, where, min_score)
    if not is_folder(folder) and not allow_download:
        raise ValmError(f"there is no model folder {source}; a model's name on a hub needs --allow-download")
    if is_file(folder / CONFIG_FILE) and _model_type(folder) == MODEL_TYPE:
        return _open_valm(source, where, min_score)
    return _open_transformers(source, allow_download, device)


def _open_transformers(source: str, allow_download: bool, device: str | torch.device) -> Scorer:
    """A causal or masked language model of transformers."""

    what = f"the language model {source}"

    def opened(loader: Any, **options: Any) -> Any:
        return from_pretrained(loader, source, what, local_files_only=not allow_download, **options)

    def whole(loader: Any) -> Any:
        """In float32, as every model is evaluated."""
        model, report = opened(loader, output_loading_info=True)
        if missing := sorted(map(str, report["missing_keys"])):
            raise ValmError(f"{what} has no weights for {missing[0]}: it is no language model, or not all of one")
        return model.float().to(device)

    config = opened(AutoConfig)
    architecture = (config.architectures or [""])[0]
    tokenizer = opened(AutoTokenizer)
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")) and architecture not in _CAUSAL:
        # VisualBERT predicts its masks only in the class that it was pretrained with
        known = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        loader: Any = AutoModelForMaskedLM if known else AutoModelForPreTraining
        return MaskedScorer(whole(loader), tokenizer)
    model = whole(AutoModelForCausalLM)
    return CausalScorer(model, tokenizer, f"causal language model ({type(model).__name__})")


_CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) - {"BertLMHeadModel"}


def _model_type(folder: Path) -> Any:
    try:
        return read_json(folder / CONFIG_FILE, "the config", ModelConfig).get("model_type")
    except (ValmError, OSError):  # which transformers will explain
        return None


def _open_valm(source: str, where: dict[str, Any], min_score: float | None) -> CausalScorer:
    if where.get("kb") is not None and _sees_no_images(Path(source)):
        warnings.warn(f"{source} sees no images, so the knowledge base (--kb) is not for it", stacklevel=2)
        where = where | {"kb": None}
    model, tokenizer = load(source, **where)
    model.float()  # as all others
    if min_score is not None:
        set_min_score(model, min_score, source)
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
    """Whether a model of `valm` in a folder is a twin without images."""
    file = current_files(folder) / (ADAPTER_FILE if is_adapter(folder) else CONFIG_FILE)
    config = read_json(file, "the config", dict[str, Any], "save the model again")
    return config.get("fusion", {}).get("num_images") == 0


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """SHA-256 over the config, the tokenizer, and the names, types, shapes and bytes of the weights."""
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    roles = tokenizer.special_tokens_map  # which token begins a text is not in the backend
    found = hashlib.sha256(json.dumps([config, tokenizer.backend_tokenizer.to_str(), roles], default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
