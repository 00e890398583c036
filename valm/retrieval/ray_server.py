"""A server of images for several processes of a machine, as a Ray actor: CLIP and the index are in memory once.

A client splits its text into segments itself (`ContextReader`) and sends them whole, so the server has no state of any
client: it may be restarted, and a client that dies leaves nothing behind. Each client waits for its answer before it
asks again. What has arrived while the server was busy is answered in one batch.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from valm.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import QUERIES, ContextEncoder, ContextReader, ReadingState, TextInput
from valm.retrieval.faiss_index import open_index
from valm.retrieval.index_parameters import IndexParameters
from valm.retrieval.retriever import CACHE_TOKENS, Retrieved, Retriever, VectorIndex
from valm.retrieval.segments import Run
from valm.shards.ray import MAX_RETRIES, connect, free_tasks, import_ray
from valm_kernels import TopK

# The knowledge base ray:NAME is that of the server NAME.
PREFIX = "ray:"
NAMESPACE = "valm"
# Segments of several clients that are answered together: some 8,000 tokens, which the text tower reads in one call.
BATCH_SEGMENTS = 128
# Requests in the server at once; further ones wait in their clients.
MAX_REQUESTS = 256


def server_name(kb: str | os.PathLike | None) -> str | None:
    """NAME of a `kb` that is ray:NAME; None for a folder or None."""
    name = "" if kb is None else os.fspath(kb)
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


class About(NamedTuple):
    """What a server says of itself.

    Attributes:
        path, fingerprint: of its knowledge base.
        parameters: of its faiss index, None for exact search.
        text: of its CLIP.
        dtype: precision of its text tower.
        clip: where its CLIP was loaded from.
    """

    path: Path
    fingerprint: str
    parameters: IndexParameters | None
    text: TextInput
    dtype: torch.dtype
    clip: str | None


class RetrievalServer:
    """The server `name` of the Ray cluster that this machine is part of, or that RAY_ADDRESS names.

    Raises:
        ValmError: there is no such server.
        ImportError: ray is not installed.
    """

    def __init__(self, name: str):
        self.name = name
        try:
            connect("auto")
            self._actor = import_ray().get_actor(name, namespace=NAMESPACE)
        except (ValmError, ValueError) as error:
            reason = f" ({error})" if isinstance(error, ValmError) else ""
            raise ValmError(f"there is no server {name!r}{reason}; {self._remedy}") from error

    @classmethod
    def start(
        cls,
        kb: str | os.PathLike,
        name: str,
        address: str,
        *,
        clip: str | None = None,
        allow_download: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        cpus: int = 1,
        gpus: float = 0,
    ) -> RetrievalServer:
        """Starts the server `name` of the knowledge base in folder `kb`.

        It ends with this process. If it crashes, Ray restarts it.

        Args:
            address, cpus, gpus: as in `RayRun`.
            clip, allow_download: as in `ImageKnowledgeBase.load_clip`.
            device: of the text tower and the index.
            dtype: of the text tower, as for `ContextEncoder`.

        Raises:
            ValmError: as `RayRun` and `Retriever`; or there is a server `name` already.
            ImportError: ray is not installed.
        """
        # for a cluster that is started here: at Ray's low priority a busy machine would let all clients wait
        os.environ.setdefault("RAY_worker_niceness", "0")
        connect(address)
        ray = import_ray()
        if free_tasks(cpus, gpus) == 0:  # Ray would wait for a machine to join
            raise ValmError(
                f"no machine of the Ray cluster has the {cpus} cores and {gpus} GPUs that the server asks for; ask for "
                "less"
            )
        if clip is not None and os.path.isdir(clip):
            clip = os.path.abspath(clip)  # the actor has another working directory
        lasting = {"max_restarts": MAX_RETRIES, "max_task_retries": MAX_RETRIES, "max_concurrency": MAX_REQUESTS}
        actor = ray.remote(_Server).options(name=name, namespace=NAMESPACE, num_cpus=cpus, num_gpus=gpus, **lasting)
        try:
            actor = actor.remote(Path(kb).absolute(), clip, allow_download, device, dtype)
        except ValueError as error:
            raise ValmError(f"the Ray cluster has a server {name!r} already: give another name") from error
        server = cls(name)
        server._actor = actor  # the actor lives as long as its first handle
        server.about  # noqa: B018 - waits until it is open
        return server

    def __reduce__(self) -> tuple[Any, ...]:
        return RetrievalServer, (self.name,)

    @property
    def _remedy(self) -> str:
        return f"start it with `valm serve KB --name {self.name}`"

    def ask(self, method: str, *arguments: Any) -> Any:
        """What `method` of the actor returns for `arguments`; waits for it, however many others ask.

        Raises:
            ValmError: the server is gone, or raised it.
        """
        ray = import_ray()
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValmError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise ValmError(
                f"the server {self.name!r} is gone ({type(error).__name__}); {self._remedy} and run this again"
            ) from error

    @functools.cached_property
    def about(self) -> About:
        """What the server says of itself; waits until it has opened all. Errors as `ask`."""
        return self.ask("about")

    def retriever(
        self, tokenizer: PreTrainedTokenizerFast, k: int, query: str = "eot", *, blind: bool = False
    ) -> ServedRetriever:
        """The retriever of `k` images for a model that reads with `tokenizer`.

        Raises:
            ValmError: the model is blind or asks by itself (`query` "self"); or as `ServedRetriever`.
        """
        if blind or query not in QUERIES:
            kind = "blind" if blind else "one with a query head"
            raise ValmError(f"a server searches by CLIP's queries, and this model is {kind}: give a folder as kb")
        kb = ImageKnowledgeBase.open(self.about.path)
        return ServedRetriever(ServedEncoder(self, tokenizer, query), kb, k)

    def wait(self) -> None:
        """Waits for the end of the server, which is an error as in `ask`."""
        self.ask("wait")


class ServedIndex:
    """The index of a server. `parameters` are those of its faiss index, None for exact search."""

    def __init__(self, server: RetrievalServer):
        self.server = server
        self.parameters = server.about.parameters

    def search(self, queries: Tensor, k: int) -> TopK:
        """The `k` best for each query (..., E), by (score falling, id rising)."""
        found = self.server.ask("search", queries.float().cpu().numpy(), k)
        return TopK(*(torch.tensor(array, device=queries.device) for array in found))


class ServedEncoder(ContextReader):
    """Reads text into segments, which a server encodes.

    Raises:
        ValmError: the tokenizer cannot be used (`Alignment`), or the server is gone.
    """

    def __init__(self, server: RetrievalServer, tokenizer: PreTrainedTokenizerFast, query: str):
        super().__init__(server.about.text, tokenizer=tokenizer, query=query)
        self.server = server

    @functools.cached_property
    def clip(self) -> Clip:
        """The CLIP, loaded into this process: for images from elsewhere, explanations and a search by words.

        Raises:
            ValmError: it is missing.
        """
        about = self.server.about
        return ImageKnowledgeBase.open(about.path).load_clip(about.clip)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Queries (B, T, E), encoded in this process: for explanations."""
        dtype = self.server.about.dtype
        encoder = ContextEncoder(self.clip, tokenizer=self.tokenizer, query=self.query, dtype=dtype)
        return encoder(input_ids, attention_mask)


class ServedRetriever(Retriever):
    """A `Retriever` whose text tower and index are in a server: `RetrievalServer.retriever` makes it.

    It finds the images that a `Retriever` in this process would find, to the rounding of queries (`ContextEncoder`).
    For `step` the server reads the segment anew, as it has no cache of keys and values.

    Args:
        encoder, kb, k, cache_tokens: as in `Retriever`; both sides have a cache.
        index: none but the server's.

    Raises:
        ValmError: the server has another knowledge base or index, the knowledge base has fewer than `k` images, or the
            server is gone.
    """

    def __init__(
        self,
        encoder: ServedEncoder,
        kb: ImageKnowledgeBase,
        k: int,
        index: VectorIndex | None = None,
        cache_tokens: int = CACHE_TOKENS,
    ):
        server = encoder.server
        if kb.fingerprint != server.about.fingerprint or not isinstance(index, ServedIndex | None):
            raise ValmError(
                f"the server {server.name!r} searches {server.about.path} as that was when it started, and nothing "
                "else: start it again, or give the folder of the knowledge base"
            )
        self._open(encoder, kb, k, index or ServedIndex(server), cache_tokens, torch.device("cpu"))

    def start(self, batch: int) -> Any:
        """The state that `step` continues from, for `batch` rows of text; it has `reorder(beam_idx)`."""
        return ReadingState(batch)

    def step(self, input_ids: Tensor, state: Any, attention_mask: Tensor | None = None) -> Retrieved:
        """Images for the next tokens (B, T) of each row; `state` has the earlier ones."""
        runs = self.encoder.further_runs(input_ids, state, attention_mask)
        return self._pooled(*self._nearest_to(runs, input_ids.shape))

    def _nearest_to(self, runs: list[Run], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ids = torch.full((*shape, self.k), -1)
        scores = torch.full((*shape, self.k), -torch.inf)
        if runs:
            found = self.encoder.server.ask("find", [run.key() for run in runs], self.k, self.encoder.query)
            places = [(run.row, position) for run in runs for position in run.positions()]
            row, position = torch.tensor(places).T
            ids[row, position], scores[row, position] = map(torch.tensor, found)  # copies: Ray's arrays are read-only
        return ids, scores


class _Request(NamedTuple):
    keys: Sequence[bytes]
    k: int
    query: str
    answer: Future[tuple[np.ndarray, np.ndarray]]


class _Server:
    """The actor. Its event loop receives requests while its one thread answers earlier ones.

    The first call opens CLIP and index, so that what is wrong with them is an error of that call.
    """

    def __init__(
        self, path: Path, clip: str | None, allow_download: bool, device: str | torch.device, dtype: torch.dtype
    ):
        self._path, self._source, self._allow_download = path, clip, allow_download
        self._device, self._dtype = torch.device(device), dtype
        self._retriever = functools.cache(self._open_retriever)
        self._waiting: deque[_Request] = deque()
        self._thread = ThreadPoolExecutor(1)

    async def about(self) -> About:
        return await self._in_turn(self._about)

    async def find(self, keys: Sequence[bytes], k: int, query: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores (n, K) of the n wanted queries of the segments `keys` (`Run.key`), one after the other."""
        request = _Request(keys, k, query, Future())
        self._waiting.append(request)
        self._thread.submit(self._answer_next)
        return await asyncio.wrap_future(request.answer)

    async def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids (..., K) for queries (..., E)."""
        return await self._in_turn(self._search, queries, k)

    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def _in_turn(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    @functools.cached_property
    def _kb(self) -> ImageKnowledgeBase:
        return ImageKnowledgeBase.open(self._path)

    @functools.cached_property
    def _clip(self) -> Clip:
        return self._kb.load_clip(self._source, allow_download=self._allow_download).to(self._device)

    @functools.cached_property
    def _index(self) -> VectorIndex:
        return open_index(self._kb, self._device)

    def _encoder(self, query: str) -> ContextEncoder:
        return ContextEncoder(self._clip, query=query, dtype=self._dtype)

    def _open_retriever(self, k: int, query: str) -> Retriever:
        return Retriever(self._encoder(query), self._kb, k, self._index)

    def _about(self) -> About:
        parameters = getattr(self._index, "parameters", None)
        text = self._encoder("eot").text
        return About(self._kb.path, self._kb.fingerprint, parameters, text, self._dtype, self._clip.source)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = self._index.search(torch.tensor(queries, device=self._device), k)
        return scores.cpu().numpy(), ids.cpu().numpy()

    def _answer_next(self) -> None:
        """Answers the first request that waits, if any still does, and those behind it that fit into its batch."""
        batch: list[_Request] = []
        segments = 0
        while self._waiting:
            request = self._waiting[0]
            segments += len(request.keys)
            if batch and (segments > BATCH_SEGMENTS or (request.k, request.query) != (batch[0].k, batch[0].query)):
                break
            batch.append(self._waiting.popleft())
        # a request whose client was interrupted is cancelled
        self._answer([request for request in batch if request.answer.set_running_or_notify_cancel()])

    def _answer(self, batch: list[_Request]) -> None:
        if not batch:
            return
        try:
            found = self._find(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for request in batch:  # what is wrong with one is not the others' error
                self._answer([request])
            return
        for request, arrays in zip(batch, found, strict=True):
            request.answer.set_result(arrays)

    def _find(self, batch: list[_Request]) -> list[tuple[np.ndarray, np.ndarray]]:
        runs = [Run.of_key(key, row) for row, key in enumerate(key for request in batch for key in request.keys)]
        counts = torch.tensor([len(run.positions()) for run in runs])  # (S,)
        longest = int(counts.max())
        ids, scores = self._retriever(batch[0].k, batch[0].query).find_runs(runs, (len(runs), longest))  # (S, L, K)
        wanted = torch.arange(longest) < counts[:, None]  # (S, L)
        sizes = [int(part.sum()) for part in counts.split([len(request.keys) for request in batch])]
        parts = ids.cpu()[wanted].split(sizes), scores.cpu()[wanted].split(sizes)  # (n, K) of each request
        return [(ids.numpy(), scores.numpy()) for ids, scores in zip(*parts, strict=True)]
