"""Tool calls as models really write them: mlx-lm's parser first, then other forms whose meaning is certain.

A call is certain when a tool of its name was declared and its arguments fit that tool. Everything else is no call.
"""

from __future__ import annotations

import ast
import json
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlx_overlay_server.chat.events import ToolCall
from mlx_overlay_server.chat.requests import Tool, described

LONGEST = 1 << 17
"""Characters of a text that other forms than the model's own are looked for in."""

_NAMES = ("name", "function", "tool", "tool_name", "function_name")
_ARGUMENTS = ("arguments", "parameters", "args", "input", "tool_input")
_LITERALS = {"true": True, "false": False, "null": None}
_CLOSERS = "}])>`,; \t\r\n"
"""What may follow a call: brackets too many, and what stands between calls."""
_WRAPPERS = ("tool_call", "tool_calls", "tools", "function_call", "function_calls", "|tool_call|", "|python_tag|")
"""Marks of other models' forms, which models write that have seen them."""
_WRAPPER = "|".join((*(rf"</?{re.escape(each)}>" for each in _WRAPPERS), r"\[/?TOOL_CALLS\]", r"```\w*"))
_FIRST = re.compile(_WRAPPER)
_LAST = re.compile(rf"(?:{_WRAPPER})\Z")
_TAGGED = re.compile(
    r"<(?:function|invoke)(?:=|\s+name=)\s*[\"']?([^\s\"'<>]+)[\"']?\s*>(.*?)(?=</?(?:function|invoke)\b|\Z)", re.S
)
_TAG = re.compile(
    r"<(?:parameter|param)(?:=|\s+name=)\s*[\"']?([^\"'<>]+?)[\"']?\s*>(.*?)(?=</?(?:parameter|param)\b|\Z)", re.S
)
_HEADED = re.compile(r"([\w.:-]+)\s*(?:(?:\[ARGS\]|:)\s*)?(?=\{)")
_PREFIXED = re.compile(r"(?:functions|tools|default_api)\.(.+?)(?::\d+)?")

Parser = Callable[[str, list[dict[str, Any]]], Any]
"""A parser of mlx-lm's: (text of a block, tools in OpenAI's form) -> one call or a list of them. It raises anything."""


class _NoCall(ValueError):
    """The text is no call whose meaning is certain."""


def read(text: str, tools: Sequence[Tool], parse: Parser, *, opening: str | None = None) -> list[ToolCall]:
    """Return the calls in the text between two marks; [] when it is none that can be made.

    `parse` is the model's own parser. `opening` is the model's mark for a call: in the text, it begins another one.
    """
    declared = {tool.name: tool for tool in tools}
    if not declared:
        return []
    try:
        given = parse(text, [described(tool) for tool in tools])
        calls = [_call(each["name"], each["arguments"], declared) for each in _as_list(given)]
    except Exception:  # noqa: BLE001 - parsers meet whatever a model says
        calls = []
    if calls:
        return calls
    parts = [part for part in text.split(opening) if part.strip()] if opening else [text]
    if len(parts) > 1:
        found = [read(part, tools, parse) for part in parts]
        return [call for each in found for call in each] if all(found) else []
    return unmarked(text, tools)


def enforced(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Return what a grammar has made a model write as calls; [] where it was cut short."""
    declared = {tool.name: tool for tool in tools}
    try:
        return [_call(each["name"], each["arguments"], declared) for each in _as_list(json.loads(text))]
    except (ValueError, TypeError, LookupError, RecursionError):
        return []


def unmarked(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Return the calls that a text without the model's own marks consists of; [] when it is anything else."""
    declared = {tool.name: tool for tool in tools}
    text = _bare(text)
    if not declared or len(text) > LONGEST:
        return []
    for form in (_json, _tagged, _headed, _python):
        try:
            calls = [_fitting(call, declared) for call in form(text, declared)]
        except (ValueError, TypeError, LookupError, AttributeError, SyntaxError, RecursionError, MemoryError):
            continue
        if calls:
            return calls
    return []


def before_text(text: str, tools: Sequence[Tool]) -> tuple[list[ToolCall], str]:
    """Return the call in JSON that a text begins with, and the text on the lines after it; ([], text) without one."""
    start = _bare(text)
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(start)
    except (ValueError, RecursionError):
        return [], text
    calls = unmarked(start[:end], tools) if start[end : end + 1] in ("\n", "\r") else []
    return (calls, start[end:]) if calls else ([], text)


class Opening:
    """Recognizes a text that begins as a call without marks does, and one that may still become such a text."""

    LONGEST_NAMES = 1 << 14
    """Characters that the names of all tools may have together: with more of them, the pattern gets too large."""

    LONGEST_HEAD = 1 << 12
    """Characters in which a call's name must be found."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        """Raises ValueError where the tools have no names, or too long ones, to look for."""
        import regex  # type: ignore[import-untyped] # unlike re, it knows that a text may still match

        if not 0 < sum(len(tool.name) for tool in tools) <= self.LONGEST_NAMES:
            raise ValueError("no names to look for")
        names = "|".join(regex.escape(tool.name) for tool in tools)
        name = rf"(?:(?:functions|tools|default_api)\.)?(?:{names})"
        keys = "|".join(_NAMES)
        quoted = rf"[\"']{name}[\"']"
        envelope = r"(?:[\"']type[\"']\s*:\s*[\"']function[\"']\s*,\s*)?(?:[\"']?function[\"']?\s*:\s*\{\s*)?"
        heads = (
            rf"(?:\[\s*)?\{{\s*{envelope}[\"']?(?:{keys})[\"']?\s*:\s*{quoted}",
            rf"(?:\[\s*)?\{{\s*{quoted}\s*:\s*\{{",
            rf"(?:\[\s*)?{name}\s*\(",
            rf"{name}(?::\d+)?\s*(?:(?:\[ARGS\]|:)\s*)?\{{",
            rf"<(?:function|invoke)(?:=|\s+name=)\s*[\"']?{name}[\"']?\s*>",
        )
        self._pattern = regex.compile(rf"(?:\s|{_WRAPPER})*(?:{'|'.join(heads)})")

    def may_follow(self, text: str) -> bool:
        """Return whether a text, with what may come after it, can be a call."""
        found = self._pattern.match(text, partial=True)
        return found is not None and (not found.partial or len(text) < self.LONGEST_HEAD)

    def is_whole(self, text: str) -> bool:
        """Return whether a text begins as a call of a declared tool, with nothing left to guess."""
        return self._pattern.match(text) is not None


def _bare(text: str) -> str:
    """Return a text without the marks and fences around it; of a few, since each is looked for anew."""
    for _ in range(4):
        text = _LAST.sub("", text.strip())
        if first := _FIRST.match(text):
            text = text[first.end() :]
    return text.strip()


def _json(text: str, declared: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of calls in JSON, several after each other or in a list; nearly JSON, too."""
    decoder = json.JSONDecoder(strict=False)
    while text := text.lstrip(_CLOSERS):
        if text[0] not in "{[":
            raise _NoCall
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            value, end = _nearly_json(text), len(text)
        for each in _as_list(value):
            yield from _shaped(each, declared)
        text = _bare(text[end:])


def _nearly_json(text: str) -> Any:
    """Return the value of a text that is JSON but for quotes, commas, names of constants or brackets at its end."""
    whole = text.rstrip() + _missing(text)
    try:
        return json.loads(whole, strict=False)
    except ValueError:
        return _value(_expression(whole))


def _missing(text: str) -> str:
    """Return the bracket that a text has opened and not closed. Raises _NoCall where more than one is missing."""
    opened: list[str] = []
    quote = ""
    is_escaped = False
    for letter in text:
        if quote:
            quote = "" if letter == quote and not is_escaped else quote
            is_escaped = letter == "\\" and not is_escaped
        elif letter == '"' or (letter == "'" and opened):
            quote = letter
        elif letter in "{[":
            opened.append("}" if letter == "{" else "]")
        elif letter in "}]" and (not opened or opened.pop() != letter):
            raise _NoCall
    if quote or len(opened) > 1:  # it was not written to its end
        raise _NoCall
    return "".join(opened)


def _shaped(value: Any, declared: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of what servers and models call a call."""
    if not isinstance(value, dict):
        raise _NoCall
    if isinstance(several := value.get("tool_calls"), list) and len(value) == 1:
        for each in several:
            yield from _shaped(each, declared)
        return
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
    if name is not None:
        (key,) = (key for key in _ARGUMENTS if key in value)
        yield name, value[key]
        return
    ((name, arguments),) = value.items()  # {"find": {…}}
    yield name, arguments


def _tagged(text: str, declared: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of calls whose parameters are tags, as Qwen3-Coder's and MiniMax's are."""
    if not text.startswith("<"):
        raise _NoCall
    for name, inside in _TAGGED.findall(text):
        tool = declared[_name(name, declared)]
        properties = (tool.parameters or {}).get("properties") or {}
        yield name, {key: _converted(value, properties.get(key)) for key, value in _TAG.findall(inside)}


def _converted(text: str, schema: Any) -> Any:
    """Return a parameter's text as its schema has it; text where it may be text."""
    text = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind in (None, "string"):
        return text
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return _LITERALS.get(text.strip().lower(), text)


def _headed(text: str, _: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of calls that are a name and then an object."""
    decoder = json.JSONDecoder(strict=False)
    while text := text.lstrip(_CLOSERS):
        head = _HEADED.match(text)
        if head is None:
            raise _NoCall
        text = text[head.end() :]
        try:
            arguments, end = decoder.raw_decode(text)
        except ValueError:
            arguments, end = _nearly_json(text), len(text)
        yield head[1], arguments
        text = _bare(text[end:])


def _python(text: str, declared: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of calls as Python writes them, one after the other or in a list."""
    for statement in _parsed(text).body:
        if not isinstance(statement, ast.Expr):
            raise _NoCall
        is_list = isinstance(statement.value, ast.List | ast.Tuple)
        for node in statement.value.elts if is_list else [statement.value]:  # type: ignore[attr-defined]
            if not isinstance(node, ast.Call):
                raise _NoCall
            yield _python_call(node, declared)


def _python_call(node: ast.Call, declared: Mapping[str, Tool]) -> tuple[str, Any]:
    name = ast.unparse(node.func)
    arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if None in arguments:  # **kwargs
        raise _NoCall
    if node.args:  # only where there is one thing that it can be
        (value,) = node.args
        (key,) = (declared[_name(name, declared)].parameters or {})["properties"]
        arguments = {key: _value(value), **arguments}
    return name, arguments


def _parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of escapes that Python does not have
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.parse(text)


def _expression(text: str) -> ast.expr:
    (statement,) = _parsed(text).body
    if not isinstance(statement, ast.Expr):
        raise _NoCall
    return statement.value


def _value(node: ast.expr | None) -> Any:
    """Return the value of a literal, in which names may be the constants of JSON, and keys without quotes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
        return node.value
    if isinstance(node, ast.Name):
        return _LITERALS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key.id if isinstance(key, ast.Name) else _value(key) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise _NoCall
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise _NoCall


def _fitting(given: tuple[str, Any], declared: Mapping[str, Tool]) -> ToolCall:
    """Return a call in another form than the model's own. Raises _NoCall where its arguments do not fit its tool."""
    call = _call(*given, declared)
    schema = declared[call.name].parameters or {}
    properties, required = schema.get("properties"), schema.get("required")
    keys = json.loads(call.arguments).keys()
    if isinstance(required, list) and not set(required) <= keys:
        raise _NoCall
    is_open = schema.get("additionalProperties") or schema.get("patternProperties")
    if isinstance(properties, dict) and properties and not is_open and keys - properties.keys():
        raise _NoCall
    return call


def _call(name: Any, arguments: Any, declared: Mapping[str, Tool]) -> ToolCall:
    """Return the event of a call. Raises an error of some kind for what is none, and for undeclared tools."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except ValueError:
            arguments = _nearly_json(arguments)
    if not isinstance(arguments, dict):
        raise _NoCall
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", _name(name, declared), written)


def _name(name: str, declared: Mapping[str, Tool]) -> str:
    """Return the declared name that a model means. Raises _NoCall."""
    if name in declared:
        return name
    prefixed = _PREFIXED.fullmatch(name)
    if prefixed is None or prefixed[1] not in declared:
        raise _NoCall
    return prefixed[1]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
