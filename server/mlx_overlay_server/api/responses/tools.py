"""The tools that a request to Responses offers, and the names they have to the model and to the client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mlx_overlay_server.api.fields import Json, Part
from mlx_overlay_server.chat import requests
from mlx_overlay_server.errors import InvalidRequest


class ToolParam(Part):
    """A tool of any type; those that OpenAI's servers would run are left out of the prompt."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    tools: list[ToolParam] | None = None


class Origin(NamedTuple):
    """A tool as the client knows it."""

    name: str
    namespace: str | None = None
    is_custom: bool = False
    """Whether it takes plain text; to the model it is a function of one string, `input`."""


class Tools:
    """The functions that the model may call. Those of namespaces have names that are distinct from all others."""

    def __init__(self, params: Iterable[ToolParam]) -> None:
        """Collect functions and custom tools, nested ones too. Raises InvalidRequest for one without a name."""
        found: dict[str, requests.Tool] = {}
        self._origins: dict[str, Origin] = {}
        """The model's name for a tool -> the client's."""
        flat = list(_flat(params))
        taken = {tool.name for namespace, tool in flat if namespace is None}
        for namespace, tool in flat:
            if tool.name is None:
                raise InvalidRequest("a function tool has no name", param="tools")
            name = tool.name
            while namespace is not None and name in taken:
                name = f"{namespace}__{name}"
            taken.add(name)
            parameters = tool.parameters
            if tool.type == "custom":
                parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
            self._origins[name] = Origin(tool.name, namespace, tool.type == "custom")
            found[name] = requests.Tool(name, tool.description, parameters)
        self.tools = tuple(found.values())

    def named(self, namespace: str | None, name: str) -> str:
        """Return the model's name for a function of a namespace."""
        if namespace is None:
            return name
        origins = self._origins.items()
        return next((ours for ours, each in origins if (each.namespace, each.name) == (namespace, name)), name)

    def origin(self, name: str) -> Origin:
        """Return the tool that the model calls by a name; it may be none of the request's."""
        return self._origins.get(name, Origin(name))


def _flat(params: Iterable[ToolParam], namespace: str | None = None) -> Iterator[tuple[str | None, ToolParam]]:
    for tool in params:
        if tool.type in ("function", "custom"):
            yield namespace, tool
        elif tool.type == "namespace":
            yield from _flat(tool.tools or (), tool.name)
