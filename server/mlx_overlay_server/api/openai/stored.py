"""Chat completions that were asked for with `store`, and their routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, TypeVar, cast

from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from mlx_overlay_server.api.dialect import documented
from mlx_overlay_server.api.fields import Body, Json
from mlx_overlay_server.api.newest import Newest, Page, page_of
from mlx_overlay_server.api.openai.answers import ChatCompletion
from mlx_overlay_server.api.openai.errors import ErrorAnswer
from mlx_overlay_server.api.openai.messages import ChatMessage
from mlx_overlay_server.api.transport import answer, dumps

Order = Literal["asc", "desc"]
Limit = Annotated[int, Query(ge=1, le=100)]
Route = TypeVar("Route")


class DeletedCompletion(TypedDict):
    """The answer to `DELETE /v1/chat/completions/{completion_id}`."""

    id: str
    object: Literal["chat.completion.deleted"]
    deleted: bool


class MetadataUpdate(Body):
    """`POST /v1/chat/completions/{completion_id}`."""

    metadata: dict[str, str] | None


class StoredChat(NamedTuple):
    """A chat completion, and the messages that it answers."""

    completion: ChatCompletion
    messages: list[Json]


class ChatStore:
    """The newest chat completions that clients wanted to be stored."""

    def __init__(self) -> None:
        self._kept: Newest[StoredChat] = Newest("chat completion")

    def put(self, completion: ChatCompletion, messages: Sequence[ChatMessage], metadata: Json | None) -> None:
        """Keep a completion."""
        completion["metadata"] = metadata or {}
        id_ = completion["id"]
        stored = StoredChat(completion, [_message(each, f"{id_}-{at}") for at, each in enumerate(messages)])
        self._kept.put(id_, stored, len(dumps(stored)))

    def get(self, id_: str) -> StoredChat:
        """Find a completion. Raises NotFound."""
        return self._kept.get(id_)

    def delete(self, id_: str) -> None:
        """Forget a completion. Raises NotFound."""
        self._kept.delete(id_)

    def update(self, id_: str, metadata: dict[str, str] | None) -> ChatCompletion:
        """Give a completion other metadata, and return it. Raises NotFound."""
        stored = self._kept.get(id_)
        stored.completion["metadata"] = metadata or {}
        self._kept.put(id_, stored, len(dumps(stored)))
        return stored.completion

    def found(self, model: str | None, metadata: Json) -> list[Json]:
        """Return the completions of a model with some metadata, the oldest first; None: of any model."""
        completions = [stored.completion for stored in self._kept.all()]
        return [
            cast("Json", each)
            for each in completions
            if model in (None, each["model"]) and metadata.items() <= each["metadata"].items()
        ]


def add_routes(routes: APIRouter, store: ChatStore) -> None:
    """Add the routes of stored completions, each with and without `/v1`."""

    @routes.get("/v1/chat/completions", responses=documented(Page, ErrorAnswer))
    @routes.get("/chat/completions", include_in_schema=False)
    async def list_(
        request: Request, *, model: str | None = None, after: str | None = None, limit: Limit = 20, order: Order = "asc"
    ) -> Response:
        """List stored chat completions; `metadata[key]=value` chooses among them."""
        query = request.query_params.items()
        metadata = {name[len("metadata[") : -1]: value for name, value in query if name.startswith("metadata[")}
        found = store.found(model, metadata)
        return answer(page_of(found, after=after, limit=limit, is_reversed=order == "desc"))

    @routes.get("/v1/chat/completions/{completion_id}", responses=documented(ChatCompletion, ErrorAnswer))
    @routes.get("/chat/completions/{completion_id}", include_in_schema=False)
    async def retrieve(completion_id: str) -> Response:
        """Return a stored chat completion."""
        return answer(store.get(completion_id).completion)

    @routes.get("/v1/chat/completions/{completion_id}/messages", responses=documented(Page, ErrorAnswer))
    @routes.get("/chat/completions/{completion_id}/messages", include_in_schema=False)
    async def messages(
        completion_id: str, *, after: str | None = None, limit: Limit = 20, order: Order = "asc"
    ) -> Response:
        """List the messages that a stored chat completion answers."""
        found = store.get(completion_id).messages
        return answer(page_of(found, after=after, limit=limit, is_reversed=order == "desc"))

    @routes.post("/v1/chat/completions/{completion_id}", responses=documented(ChatCompletion, ErrorAnswer))
    @routes.post("/chat/completions/{completion_id}", include_in_schema=False)
    async def update(completion_id: str, body: MetadataUpdate) -> Response:
        """Give a stored chat completion other metadata."""
        return answer(store.update(completion_id, body.metadata))

    @routes.delete("/v1/chat/completions/{completion_id}", responses=documented(DeletedCompletion, ErrorAnswer))
    @routes.delete("/chat/completions/{completion_id}", include_in_schema=False)
    async def delete(completion_id: str) -> Response:
        """Forget a stored chat completion."""
        store.delete(completion_id)
        deleted: DeletedCompletion = {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}
        return answer(deleted)


def _message(message: ChatMessage, id_: str) -> Json:
    """Return a message as stored completions list it: parts of its content apart from plain text."""
    plain = message.model_dump(exclude_none=True)
    content = plain.get("content")
    is_text = isinstance(content, str)
    return {**plain, "id": id_, "content": content if is_text else None, "content_parts": None if is_text else content}
