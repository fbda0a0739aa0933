"""`POST /v1/rerank` (Jina, Cohere's first API) and `/v2/rerank` (Cohere): body, answer and routes."""

from __future__ import annotations

import math
import uuid
from typing import Annotated, Literal, NotRequired

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from mlx_overlay_server.api.dialect import CLIENT_GONE, client_of, documented
from mlx_overlay_server.api.fields import Body, Count, ModelBody
from mlx_overlay_server.api.rerank.errors import RerankErrorAnswer
from mlx_overlay_server.api.transport import answer, unless_gone
from mlx_overlay_server.encoding.requests import RankRequest
from mlx_overlay_server.service import Encodings, Service
from mlx_overlay_server.ticket import Ticket
from mlx_overlay_server.turns import turn

MAX_DOCUMENTS = 2048
"""Documents of one request."""


class Document(Body):
    """A document that is an object."""

    text: str


class RerankRequest(ModelBody):
    """The body."""

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Count | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Count | None = None
    instruction: str | None = None
    """What the query is for, for models that take it."""
    truncate: bool | None = None
    """Whether to cut the end of a document that is too long; false: refuse it."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The documents' texts."""
        return tuple(each if isinstance(each, str) else each.text for each in self.documents)

    def decoded(self) -> RankRequest:
        """Return the request that all dialects share."""
        is_cut = self.truncate is not False
        return RankRequest(self.model, self.query, self.texts, self.instruction, self.max_tokens_per_doc, is_cut)


class RankedDocument(TypedDict):
    """A document of the request."""

    text: str


class Ranked(TypedDict):
    """A document's place in the ranking."""

    index: int
    """In the request."""
    relevance_score: float
    """From 0 to 1."""
    document: NotRequired[RankedDocument]


class RerankUsage(TypedDict):
    """The number of tokens of all pairs of query and document."""

    prompt_tokens: int
    total_tokens: int


class ApiVersion(TypedDict):
    """Cohere's name for a form of answers."""

    version: Literal["1", "2"]


class Tokens(TypedDict):
    """Cohere's count of tokens."""

    input_tokens: int
    output_tokens: int


class Meta(TypedDict):
    """What Cohere's clients read beside the results."""

    api_version: ApiVersion
    tokens: Tokens


class Ranking(TypedDict):
    """The answer."""

    id: str
    model: str
    results: list[Ranked]
    """The most relevant first."""
    usage: RerankUsage
    meta: Meta


def ranking(body: RerankRequest, made: Encodings, *, version: Literal["1", "2"]) -> Ranking:
    """Return the answer. Jina, whose API is the first, returns the documents unless it is told not to."""
    scores = [_sigmoid(float(row[0])) for row in made.rows]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    has_documents = version == "1" if body.return_documents is None else body.return_documents
    results: list[Ranked] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if has_documents:
        for each, text in zip(results, [body.texts[index] for index in order], strict=True):
            each["document"] = {"text": text}
    return {
        "id": str(uuid.uuid4()),
        "model": body.model,
        "results": results,
        "usage": {"prompt_tokens": made.tokens, "total_tokens": made.tokens},
        "meta": {
            "api_version": {"version": version},
            "tokens": {"input_tokens": made.tokens, "output_tokens": 0},
        },
    }


def _sigmoid(logit: float) -> float:
    """Return the probability that a logit stands for."""
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))


def router(service: Service) -> APIRouter:
    """Return the routes; `/rerank` is the first."""
    routes = APIRouter(tags=["Rerank"])

    @routes.post("/v1/rerank", responses=documented(Ranking, RerankErrorAnswer))
    @routes.post("/rerank", include_in_schema=False)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Rank documents by how well they answer a query."""
        return await ranked(body, request, "1")

    @routes.post("/v2/rerank", responses=documented(Ranking, RerankErrorAnswer))
    async def rerank_again(body: RerankRequest, request: Request) -> Response:
        """Rank documents by how well they answer a query; the answer holds none of them."""
        return await ranked(body, request, "2")

    async def ranked(body: RerankRequest, request: Request, version: Literal["1", "2"]) -> Response:
        await turn()
        body.name(service.default_model)
        made: Encodings | None = await unless_gone(
            request, service.encode(body.decoded(), Ticket(client=client_of(request)))
        )
        return Response(status_code=CLIENT_GONE) if made is None else answer(ranking(body, made, version=version))

    return routes
