"""`POST /v1/embeddings`: its body, its answer, and its route."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from mlx_overlay_server.api.dialect import CLIENT_GONE, client_of, documented
from mlx_overlay_server.api.fields import Count, ModelBody
from mlx_overlay_server.api.openai import errors as openai
from mlx_overlay_server.api.openai.errors import ErrorAnswer
from mlx_overlay_server.api.openai.wire import Prompts
from mlx_overlay_server.api.transport import dumps, refusal, unless_gone
from mlx_overlay_server.encoding.requests import EmbedRequest
from mlx_overlay_server.errors import Field as FieldName
from mlx_overlay_server.errors import InvalidRequest, ServerError
from mlx_overlay_server.service import Encodings, Service
from mlx_overlay_server.ticket import Ticket
from mlx_overlay_server.turns import turn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]

NAMES: Mapping[FieldName, str | None] = {
    **dict.fromkeys(openai.NAMES),
    "model": "model",
    "texts": "input",
    "prompt": "prompt_name",
}
"""The names of fields of the shared request."""

MAX_TEXTS = 2048
"""Texts of one request, as at OpenAI."""
_STEP_NUMBERS = 1 << 14
"""Numbers that are encoded as JSON before others have their turn on the event loop: some milliseconds."""


class EmbeddingsRequest(ModelBody):
    """The body."""

    input: Prompts
    dimensions: Count | None = None
    encoding_format: Literal["float", "base64"] | None = None
    prompt_name: str | None = None
    """Which of the model's own prompts goes before each text, as in sentence-transformers."""
    truncate: bool | None = None
    """Whether to cut the end of a text that is too long, instead of refusing it."""
    user: str | None = None

    def decoded(self) -> EmbedRequest:
        """Return the request that all dialects share. Raises InvalidRequest."""
        given: Any = self.input
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        if len(given) > MAX_TEXTS:
            raise InvalidRequest(f"{len(given)} texts are more than {MAX_TEXTS}", param="input")
        if "" in given:
            raise InvalidRequest(f"entry {given.index('')} of the input is empty", param="input")
        texts = tuple(text if isinstance(text, str) else tuple(text) for text in given)
        return EmbedRequest(self.model, texts, self.prompt_name, bool(self.truncate))


class Embedding(TypedDict):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | Annotated[str, Field(description="The numbers in single precision, as base64.")]


class EmbeddingUsage(TypedDict):
    """The number of tokens of all texts; there are no others."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """The answer."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def shortened(rows: Rows, dimensions: int | None) -> Rows:
    """Return vectors with their first numbers alone, at unit length; None: as they are. Raises InvalidRequest."""
    if dimensions is None:
        return rows
    if dimensions > rows.shape[1]:
        text = f"the model's vectors have {rows.shape[1]} numbers; `dimensions` can be no more than that"
        raise InvalidRequest(text, param="dimensions")
    import numpy as np

    kept = rows[:, :dimensions]
    unit: Rows = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), np.float32(1e-12))
    return unit


async def encoded(rows: Rows, model: str, tokens: int, *, is_base64: bool) -> bytes:
    """Encode the answer, in steps between which others have their turn."""
    size = rows.shape[1]
    # Nine digits tell any two numbers of single precision apart.
    pattern = "[" + ",".join(["%.9g"] * size) + "]"
    entries: list[bytes] = []
    for index, row in enumerate(rows):
        if index and index % max(1, _STEP_NUMBERS // size) == 0:
            await asyncio.sleep(0)
        if is_base64:
            vector = '"' + base64.b64encode(row.astype("<f4").tobytes()).decode() + '"'
        else:
            vector = pattern % tuple(row.tolist())
        entries.append(f'{{"object":"embedding","index":{index},"embedding":{vector}}}'.encode())
    usage: Mapping[str, int] = {"prompt_tokens": tokens, "total_tokens": tokens}
    rest = dumps({"model": model, "usage": usage})
    return b'{"object":"list","data":[' + b",".join(entries) + b"]," + rest[1:]


def refuse(error: ServerError) -> Response:
    """Return the response that refuses a request."""
    return refusal(error, openai.encode_error(error, NAMES))


def router(service: Service) -> APIRouter:
    """Return the route, with and without `/v1`."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/embeddings", responses=documented(EmbeddingList, ErrorAnswer))
    @routes.post("/embeddings", include_in_schema=False)
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Return a vector for each text."""
        await turn()
        body.name(service.default_model)
        made: Encodings | None = await unless_gone(
            request, service.encode(body.decoded(), Ticket(client=client_of(request)))
        )
        if made is None:
            return Response(status_code=CLIENT_GONE)
        rows = shortened(made.rows, body.dimensions)
        content = await encoded(rows, body.model, made.tokens, is_base64=body.encoding_format == "base64")
        return Response(content, media_type="application/json")

    return routes
