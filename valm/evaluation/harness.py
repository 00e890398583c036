"""VaLM in lm-evaluation-harness: `valm lm-eval run --model valm --model_args pretrained=FOLDER,kb=FOLDER --tasks ...`

`ValmLM` extends the harness's Hugging Face class, which does batching, caching, chat templates and logging.
`write_tasks` writes the sets of `valm eval` as tasks of the harness.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from valm.errors import ValmError

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import setup_logging
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is needed for this: pip install -e '.[harness]' ({error})") from error

from valm.clip.execution import QUERY_DTYPES
from valm.clip.tokenizer import beginning_with_bos
from valm.evaluation.controls import images_fingerprint, switch_images
from valm.evaluation.questions import FAIR, PUBLISHED
from valm.evaluation.scorers import CausalScorer, digest
from valm.evaluation.sets import SETS
from valm.model.checkpoint import load
from valm.text import nearest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook

# What the harness's tasks share, one file for choices and another for texts.
SHARED = Path(__file__).parent / "tasks"
# The commands of the harness that search for tasks.
WITH_TASKS = ("run", "ls", "validate")
# A key in the harness's cache that is no hash of a request.
FINGERPRINT = "fingerprint of valm"
# Arguments with which the harness's class loads a model; they have no effect on a loaded model.
OF_LOADING = (
    *("tokenizer", "revision", "subfolder", "dtype", "use_fast_tokenizer", "peft", "delta", "autogptq", "gptqmodel"),
    *("gguf_file", "parallelize", "tp_plan", "max_memory_per_gpu", "max_cpu_memory", "offload_folder"),
)


@register_model("valm")
class ValmLM(HFLM):
    """A VaLM or an augmented decoder, also a query control (Blind) or a text-only baseline (K = 0).

    Args:
        pretrained, base, kb, clip, allow_download: as in `valm.load`, which calls the first argument `folder`.
        retrieval: "on", "off" (no images) or "random" (random images of the knowledge base).
        replace: a folder of images that every token with retrieved images sees instead.
        image_seed: random seed for the random images.
        min_score: replaces the model's score threshold (`ImageModel.set_min_score`).
        query_dtype: float32, bfloat16 or int8, as in `valm.load`.
        device: as in `valm.load`; by default, a GPU if torch finds one.
        arguments: of the harness's Hugging Face class for a loaded model: batch_size, max_length, add_bos_token, ...

    Raises:
        ValmError: an argument is unknown or has no effect; the model cannot be loaded or cannot see such images.
    """

    add_bos_token: bool | None

    def __init__(
        self,
        pretrained: str,
        *,
        base: str | None = None,
        kb: str | None = None,
        clip: str | None = None,
        allow_download: bool = False,
        retrieval: str = "on",
        replace: str | None = None,
        image_seed: int = 0,
        min_score: float | None = None,
        query_dtype: str | None = None,
        device: str | None = None,
        **arguments: Any,
    ):
        _check_names(arguments)
        # cuda:0 is the default of the harness's command line on every machine
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            warnings.warn(f"torch has no GPU here: the model runs on the CPU, not on {device}", stacklevel=2)
            device = "cpu"
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        found: dict[str, Any] = {"base": base, "kb": kb, "clip": clip, "allow_download": allow_download}
        if query_dtype not in (None, *QUERY_DTYPES):
            raise ValmError(f"query_dtype must be one of {', '.join(QUERY_DTYPES)}, got {query_dtype!r}")
        found["query_dtype"] = None if query_dtype is None else getattr(torch, query_dtype)
        model, tokenizer = load(pretrained, device=device, **found)
        if min_score is not None:
            model.set_min_score(min_score)
        self._scorer = CausalScorer(model, tokenizer, "valm")
        switch_images(model, retrieval, replace=replace, seed=image_seed)
        self._replace = replace
        super().__init__(pretrained=model, tokenizer=beginning_with_bos(tokenizer), **arguments)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """As in the base class; called with the cache of `--use_cache`, whose keys depend only on the requests. Raises
        ValmError if the answers in the cache belong to other weights, another knowledge base or other images."""
        super().set_cache_hook(cache_hook)
        cache = cache_hook.dbdict
        if cache is None:
            return
        # besides the model's arguments, which are part of the cache's name
        replaced = None if self._replace is None else images_fingerprint(self._replace)
        own = digest([self._scorer.fingerprint, replaced])
        if cache.get(FINGERPRINT) != own:
            if len(cache) > 0:
                raise ValmError(
                    f"the answers in the cache {cache.filename} belong to other weights, images or settings than this "
                    "model's: delete it, or name another cache (--use_cache)"
                )
            cache[FINGERPRINT] = own

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As in the base class, without a bos before the text: the first window begins with bos in any case."""
        add_bos_token, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = add_bos_token


def _check_names(arguments: dict[str, Any]) -> None:
    """Rejects unknown arguments, which the harness's class ignores."""
    own, base = (dict(inspect.signature(of).parameters) for of in (ValmLM.__init__, HFLM.__init__))
    known = {*own, *base} - {"self", "arguments", "kwargs", *OF_LOADING}
    for name in arguments:
        if name in OF_LOADING:
            raise ValmError(f"the model argument {name} has no effect on a model that `valm.load` loads: leave it out")
        if name not in known:
            raise ValmError(f"the model has no argument {name}{nearest(name, sorted(known))}")


def write_tasks(folder: Path) -> list[str]:
    """Writes a task file for each set and protocol into `folder` and returns the tasks' names: valm_SET, and
    valm_SET_published, to be run with add_bos_token=False. LAMBADA is missing, because the harness contains it; so are
    perplexities per token, which it cannot compute."""
    names = []
    for one in SETS.values():
        for protocol in one.protocols if one.group != "lm" else (FAIR,):
            if one.name == "lambada":
                continue
            names.append(f"valm_{one.name}" + ("_published" if protocol == PUBLISHED else ""))
            task = {
                "task": names[-1],
                "include": str(SHARED / ("_text.yaml" if one.group == "lm" else "_choice.yaml")),
                "dataset_kwargs": {"task": one.name, "protocol": protocol},
                "metadata": {"version": 1.0},
            }
            (folder / f"{names[-1]}.yaml").write_text(json.dumps(task))  # JSON is valid YAML
    return names


def run(arguments: list[str]) -> None:
    """Runs the harness's command line, with the model "valm" and the tasks of `write_tasks`. Raises ValmError if a task
    does not exist, or the model's arguments are invalid."""
    own_tasks = any(argument.partition("=")[0] == "--include_path" for argument in arguments)
    if arguments and arguments[0] in WITH_TASKS and not own_tasks:
        with TemporaryDirectory() as folder:
            write_tasks(Path(folder))
            run([*arguments, "--include_path", folder])
        return
    setup_logging()
    before, sys.argv = sys.argv, ["valm lm-eval", *arguments]
    try:
        cli = HarnessCLI()
        parsed = cli.parse_args()
        if getattr(parsed, "use_cache", None):  # otherwise the harness would find scores for other arguments
            parsed.use_cache += f"-{digest([str(parsed.model_args)])[:16]}"
        cli.execute(parsed)
    except ValueError as error:
        if "Tasks not found" not in str(error):
            raise
        raise ValmError(f"{error}; `valm lm-eval ls tasks` lists them") from error
    finally:
        sys.argv = before
