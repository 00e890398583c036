"""`RetrievalPlan`: the options of `valm retrieve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from valm.clip.execution import CLIP_HELP, QUERY_DTYPES, Execution
from valm.errors import ValmError
from valm.options import REQUIRED, option

if TYPE_CHECKING:
    from valm.corpus.texts import TextCorpus

MAX_IMAGES = 64  # as in valm_kernels, whose import takes seconds


@dataclass(frozen=True, kw_only=True)
class RetrievalPlan(Execution):
    """The options of `valm retrieve` (`valm retrieve --help` explains them). Errors name the fields as options.

    Attributes:
        corpus: the texts whose images are retrieved.
        allow_download: load the CLIP from the hub that the knowledge base names.
        scores: write the score of each image, which a score threshold needs.

    Raises:
        ValmError: a field has a wrong value.

    Example:
        >>> from valm.corpus.plan import RetrievalPlan
        >>> from valm.corpus.texts import TextCorpus
        >>> plan = RetrievalPlan(corpus=TextCorpus(["corpus.txt"]), kb="kb", out="retrieved", images=2)
        >>> plan.query, plan.query_dtype
        ('eot', 'float32')
    """

    corpus: TextCorpus
    allow_download: bool = False
    scores: bool = True
    kb: str | os.PathLike = option("folder of the knowledge base", REQUIRED)
    out: str | os.PathLike = option("folder for the result; a killed retrieval resumes", REQUIRED)
    clip: str | None = option(CLIP_HELP)
    tokenizer: str | None = option(
        "tokenizer of the model that you will train, if it is not CLIP's: a folder or Hugging Face name"
    )
    images: int = option("images that each token sees", 4, short="-k", least=1, below=MAX_IMAGES + 1)
    query: str = option(
        "retrieval query: CLIP's feature of the text so far (eot), or its text tower's state at the token (state)",
        "eot",
        choices=["eot", "state"],
    )
    query_dtype: str = option(
        "precision of CLIP's text tower; int8 needs a CPU with AVX2",
        "float32",
        choices=QUERY_DTYPES,
    )
    search_actors: int | None = option(
        "with --ray, number of actors that share the vectors and search them; by default each worker process opens the "
        "whole knowledge base or its index",
        least=1,
    )

    def check(self) -> None:
        """Checks the fields against each other, without opening a file.

        Raises:
            ValmError: two fields do not go together.
        """
        if self.search_actors is not None and self.ray is None:
            raise ValmError("--search-actors needs a Ray cluster: give --ray too")
