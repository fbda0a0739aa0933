"""The routes that list models, in the form of the client's dialect."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from mlx_overlay_server.api.anthropic import answers as anthropic
from mlx_overlay_server.api.anthropic.errors import AnthropicErrorAnswer
from mlx_overlay_server.api.dialect import documented
from mlx_overlay_server.api.openai import answers as openai
from mlx_overlay_server.api.openai.errors import ErrorAnswer
from mlx_overlay_server.api.transport import answer
from mlx_overlay_server.service import Service

_Limit = Annotated[int, Query(ge=1, le=1000)]
_Cursor = Annotated[str | None, Query()]
_Version = Annotated[str | None, Header(alias="anthropic-version")]

_Error = ErrorAnswer | AnthropicErrorAnswer


def router(service: Service) -> APIRouter:
    """Return the routes, with and without `/v1`. Anthropic's clients are told by a header that they always send."""
    routes = APIRouter(tags=["Models"])

    @routes.get("/v1/models", responses=documented(openai.OpenAIModelList | anthropic.AnthropicModelPage, _Error))
    @routes.get("/models", include_in_schema=False)
    async def models(
        limit: _Limit = 20, after_id: _Cursor = None, before_id: _Cursor = None, anthropic_version: _Version = None
    ) -> Response:
        """List every model, from folders and cache; for Anthropic's clients in pages."""
        listed = await service.models()
        if anthropic_version is not None:
            return answer(anthropic.model_page(listed, limit=limit, after_id=after_id, before_id=before_id))
        return answer(openai.model_list(listed))

    @routes.get("/anthropic/v1/models", responses=documented(anthropic.AnthropicModelPage, AnthropicErrorAnswer))
    async def pages(limit: _Limit = 20, after_id: _Cursor = None, before_id: _Cursor = None) -> Response:
        """List every model, in pages."""
        listed = await service.models()
        return answer(anthropic.model_page(listed, limit=limit, after_id=after_id, before_id=before_id))

    @routes.get(
        "/v1/models/{model_id:path}", responses=documented(openai.OpenAIModel | anthropic.AnthropicModel, _Error)
    )
    @routes.get("/models/{model_id:path}", include_in_schema=False)
    async def model(model_id: str, anthropic_version: _Version = None) -> Response:
        """Describe one model."""
        listed = await service.model(model_id)
        return answer(openai.model_info(listed) if anthropic_version is None else anthropic.model_info(listed))

    @routes.get(
        "/anthropic/v1/models/{model_id:path}", responses=documented(anthropic.AnthropicModel, AnthropicErrorAnswer)
    )
    async def anthropic_model(model_id: str) -> Response:
        """Describe one model, in Anthropic's shape."""
        return answer(anthropic.model_info(await service.model(model_id)))

    return routes
