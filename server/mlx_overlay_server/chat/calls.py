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

from mlx_overlay_server.chat import tagged
from mlx_overlay_server.chat.events import ToolCall
from mlx_overlay_server.chat.opening import MARK, NAMES, SEPARATOR, bare, declared_name
from mlx_overlay_server.chat.requests import Tool, described

LONGEST = 1 << 17
"""Characters of a text that other forms than the model's own are looked for in."""

_ARGUMENTS = ("arguments", "parameters", "args", "input", "tool_input")
_LITERALS = {"true": True, "false": False, "null": None}
_CLOSERS = "}])>`,; \t\r\n"
"""What may follow a call: brackets too many, and what stands between calls."""
_MARKS = re.compile(rf"(?:\s|{MARK})+")
_HEADED = re.compile(rf"(?:function<｜tool▁sep｜>)?([\w.:-]+)\s*(?:{SEPARATOR}\s*)?(?=\{{)")
_QUOTE = '<|"|>'
_QUOTED = re.compile(r"<\|\"\|>(.*?)<\|\"\|>|<escape>(.*?)<escape>", re.S)
"""Texts as Gemma quotes them."""
_BEGIN = re.compile(rf"[\[{{]|[\w.:-]+\s*(?:{SEPARATOR}\s*)?[({{]")
"""Pattern of how a call begins whose texts are quoted."""
_STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)
_BRACKET = re.compile(r"[{}\[\]<>\"]")
_GEMMA = re.compile(r"call:([\w.:-]+?)\{(.*)\}", re.DOTALL)

Parser = Callable[[str, list[dict[str, Any]]], Any]
"""A parser of mlx-lm's: (text of a block, tools in OpenAI's form) -> one call or a list of them. It raises anything."""

Form = Callable[[str, Mapping[str, Tool]], Iterator[tuple[str, Any]]]
"""A way to write calls: (text, declared tools) -> names and arguments. It raises errors of a few kinds."""


class _NoCall(ValueError):
    """The text is no call whose meaning is certain."""


def read(text: str, tools: Sequence[Tool], parse: Parser, *, opening: str | None = None) -> list[ToolCall]:
    """Return the calls in the text between two marks; [] when it is none that can be made.

    `parse` is the model's own parser. `opening` is the model's mark for a call: in the text, it begins another one.
    """
    declared = {tool.name: tool for tool in tools}
    if not declared:
        return []
    # mlx-lm's parsers strip a value in tags of its white space, and end it at the first tag in it.
    if calls := _read(text, (tagged.tagged, tagged.keyed), declared):
        return calls
    try:
        given = parse(text, [described(tool) for tool in tools])
        calls = [_call(each["name"], each["arguments"], declared) for each in _as_list(given)]
    except Exception:  # noqa: BLE001 - parsers meet whatever a model says
        calls = []
    if calls:
        return _fuller(calls, unmarked(text, tools), declared)
    parts = [part for part in text.split(opening) if part.strip()] if opening else [text]
    if len(parts) > 1:
        found = [read(part, tools, parse) for part in parts]
        return [call for each in found for call in each] if all(found) else []
    return unmarked(text, tools)


def _fuller(calls: list[ToolCall], others: list[ToolCall], declared: Mapping[str, Tool]) -> list[ToolCall]:
    """Return what a model's own parser has read, or another reading of the same calls that lost less of them.

    Parsers leave out what they do not understand: a parameter without a closing mark, or the second of two calls.
    """
    if [call.name for call in calls] != [call.name for call in others[: len(calls)]]:
        return calls
    kept, found = (sum(len(json.loads(call.arguments)) for call in each) for each in (calls, others))
    fits = all(_fits(call, declared) for call in calls)
    return others if not fits or (len(others), found) > (len(calls), kept) else calls


def enforced(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Return what a grammar has made a model write as calls; [] where it was cut short."""
    declared = {tool.name: tool for tool in tools}
    try:
        return [_call(each["name"], each["arguments"], declared) for each in _as_list(json.loads(text))]
    except (ValueError, TypeError, LookupError, RecursionError):
        return []


def unmarked(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """Return the calls that a text without the model's own marks consists of; [] when it is anything else."""
    return _read(
        text, (_json, tagged.tagged, tagged.keyed, _headed, _python, _unquoted), {tool.name: tool for tool in tools}
    )


def _read(text: str, forms: Sequence[Form], declared: Mapping[str, Tool]) -> list[ToolCall]:
    """Return the calls that a text consists of, in the first of some forms that fits; [] for none."""
    text = bare(text)
    if not declared or len(text) > LONGEST:
        return []
    for form in forms:
        try:
            calls = [_fitting(call, declared) for call in form(text, declared)]
        except (ValueError, TypeError, LookupError, AttributeError, SyntaxError, RecursionError, MemoryError):
            continue
        if calls:
            return calls
    return []


def is_open(text: str) -> bool:
    """Return whether a call, up to a closing mark, has a value that goes on there, so that the mark belongs to it."""
    if len(text) > LONGEST:
        return False
    if quotes := text.count(_QUOTE) + text.count("<escape>"):
        return quotes % 2 == 1
    text = bare(text)
    if _BEGIN.match(text):
        return any(quote in _STRING.sub("", text) for quote in "\"'")
    return tagged.is_open(text)


def is_marks(text: str) -> bool:
    """Return whether a text consists of marks for calls, with nothing between them."""
    return bool(text.strip()) and _MARKS.fullmatch(text) is not None


def before_text(text: str, tools: Sequence[Tool]) -> tuple[list[ToolCall], str]:
    """Return the calls in JSON or tags that a text begins with, and the text after them; ([], text) without one."""
    start = bare(text)
    ends = [found.end() for found in tagged.FUNCTION_END.finditer(start)] if start.startswith("<") else []
    if ends:
        calls = unmarked(start[: ends[-1]], tools)
        return (calls, start[ends[-1] :]) if calls else ([], text)
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(start)
    except (ValueError, RecursionError):
        return [], text
    calls = unmarked(start[:end], tools) if start[end : end + 1] in ("\n", "\r") else []
    return (calls, start[end:]) if calls else ([], text)


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
        text = bare(text[end:])


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
    name = next((value[key] for key in NAMES if isinstance(value.get(key), str)), None)
    if name is not None:
        keys = [key for key in _ARGUMENTS if key in value]
        if len(keys) > 1 or (not keys and len(value) > 1):
            raise _NoCall
        yield name, value[keys[0]] if keys else None
        return
    ((name, arguments),) = value.items()  # {"find": {…}}
    yield name, arguments


def _headed(text: str, _: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of calls that are a name and then an object."""
    text = _QUOTED.sub(lambda found: json.dumps(found[1] if found[1] is not None else found[2]), text)
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
        text = bare(text[end:])


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
    if name == "print" and name not in declared:  # Gemma 3's way to see what a call returns
        (inner,) = node.args
        if not isinstance(inner, ast.Call):
            raise _NoCall
        return _python_call(inner, declared)
    arguments = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if None in arguments:  # **kwargs
        raise _NoCall
    if node.args:  # only where there is one thing that it can be
        (value,) = node.args
        schema = declared[declared_name(name, declared)].parameters or {}
        (key,) = schema.get("required") or schema["properties"]
        arguments = {key: _value(value), **arguments}
    return name, arguments


def _unquoted(text: str, declared: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of a call in Gemma 4's form whose texts lack their quotes: `call:find{city:New York}`.

    It is certain where each key is one that the tool declares, and no value has brackets or quotes.
    """
    found = _GEMMA.fullmatch(text)
    if found is None:
        raise _NoCall
    properties = (declared[declared_name(found[1], declared)].parameters or {})["properties"]
    keys = "|".join(map(re.escape, properties))
    parts = re.split(rf"(?:^|,)\s*({keys}):", found[2])
    values = [part.strip().removeprefix(_QUOTE).removesuffix(_QUOTE) for part in parts[2::2]]
    if parts[0].strip() or len(set(parts[1::2])) < len(values) or any(_BRACKET.search(value) for value in values):
        raise _NoCall
    yield (
        found[1],
        {key: tagged.converted(value, properties[key]) for key, value in zip(parts[1::2], values, strict=True)},
    )


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
    if not _fits(call, declared):
        raise _NoCall
    return call


def _fits(call: ToolCall, declared: Mapping[str, Tool]) -> bool:
    """Return whether a call has the arguments that its tool requires, and no others than it has."""
    schema = declared[call.name].parameters or {}
    properties, required = schema.get("properties"), schema.get("required")
    keys = json.loads(call.arguments).keys()
    if isinstance(required, list) and not set(required) <= keys:
        return False
    is_open = schema.get("additionalProperties") or schema.get("patternProperties")
    return is_open or not (isinstance(properties, dict) and properties and keys - properties.keys())


def _call(name: Any, arguments: Any, declared: Mapping[str, Tool]) -> ToolCall:
    """Return the event of a call. Raises an error of some kind for what is none, and for undeclared tools."""
    if arguments is None or arguments == "":  # as some models call a tool that needs none
        if (declared[declared_name(name, declared)].parameters or {}).get("required"):
            raise _NoCall
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except ValueError:
            arguments = _nearly_json(arguments)
    if not isinstance(arguments, dict):
        raise _NoCall
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", declared_name(name, declared), written)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
