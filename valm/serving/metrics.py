"""A server's measurements, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.responses import Response

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The measurements of one server; threads may share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("valm_requests", "answered HTTP requests", ["endpoint", "status"], **own)
        self.prompt_tokens = Counter("valm_prompt_tokens", "tokens of prompts that were read", **own)
        self.generated_tokens = Counter("valm_generated_tokens", "tokens that were generated", **own)
        self.searches = Counter("valm_searches", "tokens whose images were searched for", **own)
        self.waiting = Gauge("valm_waiting", "requests that wait for their turn", **own)
        self.batch = Histogram("valm_batch_rows", "answers that get a token at once", buckets=ROWS, **own)
        self.first_token = Histogram(
            "valm_first_token_seconds", "from a request to its first token", buckets=SECONDS, **own
        )
        self.token = Histogram("valm_token_seconds", "of each further token", buckets=SECONDS, **own)

    async def page(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
