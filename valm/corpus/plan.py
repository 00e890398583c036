"""What a retrieval is: the options of `valm retrieve`, which are the fields of `RetrievalPlan`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from valm.clip.execution import CLIP_HELP, QUERY_DTYPES, Execution
from valm.errors import ValmError
from valm.options import REQUIRED, option

if TYPE_CHECKING:
    from valm.corpus.texts import TextCorpus

MAX_IMAGES = 64  # that of valm_kernels, whose import takes seconds


@dataclass(frozen=True, kw_only=True)
class RetrievalPlan(Execution):
    """What a retrieval is. Its fields are the options of `valm retrieve`, which says of each what it is (`valm retrieve
    --help`), and whose names the error messages use.

    Attributes:
        corpus: the texts whose images are retrieved.
        allow_download: load the CLIP from the hub that the knowledge base names.
    """

    corpus: TextCorpus
    allow_download: bool = False
    kb: str | os.PathLike = option("knowledge base", REQUIRED)
    out: str | os.PathLike = option("folder of the result; a killed retrieval resumes", REQUIRED)
    clip: str | None = option(CLIP_HELP)
    tokenizer: str | None = option(
        "the tokenizer of the model to be trained, where it is not CLIP's: folder or Hugging Face name"
    )
    images: int = option("images a token sees", 4, short="-k", least=1, below=MAX_IMAGES + 1)
    query: str = option("kind of the retrieval query", "eot", choices=["eot", "state"])
    scores: bool = option(
        "do not write the score of each image, which `valm train --min-score` and --score-scale need", True
    )
    query_dtype: str = option(
        "precision of CLIP's text tower; int8 needs a CPU with AVX2",
        "float32",
        choices=QUERY_DTYPES,
    )
    search_actors: int | None = option(
        "with --ray, spread the search over so many actors, which share the vectors; without, each process that does "
        "tasks opens the whole knowledge base or its index",
        least=1,
    )

    def check(self) -> None:
        """Checks the fields against each other; nothing is opened.

        Raises:
            ValmError: some do not go together.
        """
        if self.search_actors is not None and self.ray is None:
            raise ValmError("--search-actors are of a Ray cluster: give --ray too")
