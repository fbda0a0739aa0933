"""The list of models, in the shape that the client's dialect has for it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from mlx_overlay_server.api.anthropic import wire as anthropic
from mlx_overlay_server.api.openai import wire as openai
from mlx_overlay_server.api.transport import answer
from mlx_overlay_server.service import Service

_Limit = Annotated[int, Query(ge=1, le=1000)]
_Cursor = Annotated[str | None, Query()]
_Version = Annotated[str | None, Header(alias="anthropic-version")]


def router(service: Service) -> APIRouter:
    """Routes with and without `/v1`; Anthropic's clients are known by the header that they always send."""
    routes = APIRouter(tags=["Models"])

    @routes.get("/v1/models")
    @routes.get("/models", include_in_schema=False)
    async def models(
        limit: _Limit = 20, after_id: _Cursor = None, before_id: _Cursor = None, anthropic_version: _Version = None
    ) -> Response:
        """Every model there is, folders and cache merged; for Anthropic's clients in pages."""
        listed = await service.models()
        if anthropic_version is not None:
            return anthropic.page(listed, limit=limit, after_id=after_id, before_id=before_id)
        return answer({"object": "list", "data": [openai.model_info(each) for each in listed]})

    @routes.get("/anthropic/v1/models")
    async def pages(limit: _Limit = 20, after_id: _Cursor = None, before_id: _Cursor = None) -> Response:
        """Every model there is, in pages."""
        return anthropic.page(await service.models(), limit=limit, after_id=after_id, before_id=before_id)

    @routes.get("/v1/models/{model_id:path}")
    @routes.get("/models/{model_id:path}", include_in_schema=False)
    async def model(model_id: str, anthropic_version: _Version = None) -> Response:
        """One model."""
        listed = await service.model(model_id)
        return answer(openai.model_info(listed) if anthropic_version is None else anthropic.model_info(listed))

    @routes.get("/anthropic/v1/models/{model_id:path}")
    async def anthropic_model(model_id: str) -> Response:
        """One model, in Anthropic's shape."""
        return answer(anthropic.model_info(await service.model(model_id)))

    return routes
