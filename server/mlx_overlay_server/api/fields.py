"""The base of all request bodies: they refuse unknown fields and name the field that is wrong."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticKnownError

from mlx_overlay_server.chat.requests import Image
from mlx_overlay_server.errors import InvalidRequest


def _is_no_boolean(kind: Literal["int_type", "float_type"]) -> BeforeValidator:
    """Return what refuses true and false, which pydantic, as Python, takes for 1 and 0."""

    def check(given: object) -> object:
        if isinstance(given, bool):
            raise PydanticKnownError(kind)
        return given

    return BeforeValidator(check)


Whole = Annotated[int, _is_no_boolean("int_type")]
"""A whole number; it may also come as 5.0 or "5", as in forms."""
Number = Annotated[float, _is_no_boolean("float_type")]
Token = Annotated[int, Field(strict=True)]
"""A token's id. Requests may have very many, so no function of Python's looks at each."""
Temperature = Annotated[Number, Field(ge=0, le=2)]
Share = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Count = Annotated[Whole, Field(ge=1, le=1 << 31)]
Seed = Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)]
Json = dict[str, Any]

MAX_STOPS = 16


class Body(BaseModel):
    """A request body: a field that is not listed is refused, so that nothing is accepted and ignored."""

    model_config = ConfigDict(extra="forbid", strict=False)


class ModelBody(Body):
    """A request to a model; without a name, it goes to the server's default model."""

    model: Annotated[str, BeforeValidator(lambda given: "" if given is None else given)] = ""

    def name(self, default: str | None) -> None:
        """Fill in the name that is missing. Raises InvalidRequest where there is no default."""
        if not self.model and default is None:
            raise InvalidRequest("`model`: field required", param="model")
        self.model = self.model or default or ""


class Part(BaseModel):
    """A part of a conversation: clients send back what other servers put there, which asks for nothing."""

    model_config = ConfigDict(extra="ignore")


def wrong_field(errors: Sequence[Mapping[str, Any]], body: object) -> InvalidRequest:
    """Return pydantic's complaint about the first wrong field, as one line that names the field.

    Of a field that may have several types, it is the innermost complaint: the one about the type it nearly has.
    """
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    places = [_place(error, body) for error in same]
    place, error = max(
        zip(places, same, strict=True), key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type"))
    )
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if error["type"] == "extra_forbidden":
        text = f"`{name}` is not supported by this server"
    elif error["type"] == "none_required" or error.get("ctx", {}).get("expected") == "False":
        text = f"`{name}` is not supported by this server; leave it out"
    elif error["type"] == "union_tag_invalid":
        known = error["ctx"]
        text = f"`{name}`: this server does not take the type {known['tag']!r}, but {known['expected_tags']}"
    elif error["type"] == "json_invalid":
        return InvalidRequest("the body is not valid JSON", code="invalid_json")
    elif not name:
        return InvalidRequest("send a JSON object, with Content-Type: application/json", code="invalid_json")
    else:
        text = f"`{name}`: {error['msg'][:1].lower()}{error['msg'][1:]}"
    return InvalidRequest(text, param=name or None)


def _place(error: Mapping[str, Any], body: object) -> list[str | int]:
    """Return the path to an error in a body: its `loc` without the names of the types that were tried."""
    if error["loc"][0] != "body":  # of the address
        return [*error["loc"][1:]]
    place: list[str | int] = []
    here: Any = body
    for at, part in enumerate(error["loc"][1:], 2):
        is_list = isinstance(here, list) and isinstance(part, int)
        if part < len(here) if is_list else isinstance(here, dict) and part in here:
            here = here[part]
        elif error["type"] != "missing" or at != len(error["loc"]):
            continue
        place.append(part)
    return place


def image(url: str, where: str) -> Image:
    """Decode an image from a data URL, whose place in the request is `where`. Raises InvalidRequest.

    Other URLs are not fetched: a client could make the server reach places that it should not.
    """
    head, separator, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not separator:
        raise InvalidRequest("images are taken as data URLs (data:image/png;base64,…) only", param=where)
    try:
        return Image(base64.b64decode(data, validate=True), where)
    except (binascii.Error, ValueError):
        raise InvalidRequest("the image's base64 cannot be decoded", param=where) from None
