"""Tool calls whose arguments are tags, as Qwen3-Coder, MiniMax and GLM write them, and where such a call ends.

A value is a text as it is: white space in it matters, and it may hold such tags itself, as in a file about tool calls.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlx_overlay_server.chat.opening import SPACE, WRAPPER, bare, declared_name
from mlx_overlay_server.chat.requests import Tool

_FUNCTION = re.compile(rf"<{SPACE}(?:function|invoke)(?:=|\s+name=)\s*[\"']?([^\s\"'<>]+)[\"']?\s*>")
FUNCTION_END = re.compile(rf"</{SPACE}(?:function|invoke)>")
_PARAMETER = re.compile(rf"<{SPACE}param(?:eter)?(?:=|\s+name=)\s*[\"']?([^\"'<>]+?)[\"']?(?:\s+string=\"\w+\")?\s*>")
_KEY = re.compile(r"<(?:longcat_)?arg_key>\s*([^<>]+?)\s*(?:</\w+>\s*)?<(?:longcat_)?arg_value>")
_BETWEEN = re.compile(rf"(?:\s|{WRAPPER})*")


class _Form(NamedTuple):
    """How a value begins and ends: patterns."""

    begin: re.Pattern[str]
    end: re.Pattern[str]
    after: re.Pattern[str]
    """What follows the end of a value."""
    tag: re.Pattern[str]
    """Where any tag of the form begins."""


_TAGGED = _Form(
    _PARAMETER,
    re.compile(rf"</{SPACE}param(?:eter)?>"),
    re.compile(rf"\s*(?:<{SPACE}param|</?{SPACE}(?:function|invoke)\b|\Z)"),
    re.compile(rf"</?{SPACE}(?:param(?:eter)?|function|invoke)\b"),
)
_KEYED = _Form(
    _KEY,
    re.compile(r"</(?:longcat_)?arg_value>"),
    re.compile(r"\s*(?:<(?:longcat_)?arg_key>|\Z)"),
    re.compile(r"</?(?:longcat_)?arg_"),
)
_LITERALS = {"true": True, "false": False, "null": None, "none": None}


def is_open(text: str) -> bool:
    """Return whether a call with tags has a value that still goes on where its text ends so far."""
    if keys := _count(_KEY, text):
        return keys > _count(_KEYED.end, text)
    if _count(_PARAMETER, text) <= _count(_TAGGED.end, text):
        return False
    # The end of its function ends a parameter, too, unless the function stands in the parameter's value.
    ends = [found.end() for found in FUNCTION_END.finditer(text)]
    return not ends or bool(text[ends[-1] :].strip()) or _count(_FUNCTION, text) > len(ends)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))


def tagged(text: str, declared: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of calls with a tag for the function and one for each parameter.

    Raises ValueError or LookupError where the text is anything else, or calls a tool that was not declared.
    """
    reading = _Reading(text)
    while reading.rest():
        head = reading.take(_FUNCTION)
        if head is None:
            raise ValueError("this is no call")
        properties = _properties(head[1], declared)
        yield head[1], reading.object() or reading.parameters(properties)


def keyed(text: str, declared: Mapping[str, Tool]) -> Iterator[tuple[str, Any]]:
    """Yield (name, arguments) of a call with tags for keys and values. Raises as `tagged` does."""
    first = _KEY.search(text)
    if first is None:
        raise ValueError("this is no call")
    name = bare(text[: first.start()])
    properties, arguments, reading = _properties(name, declared), {}, _Reading(text[first.start() :])
    while key := reading.take(_KEY):
        arguments[key[1]] = converted(reading.value(_KEYED), properties.get(key[1]))
    if reading.rest():
        raise ValueError("this is no call, or one with something else in it")
    yield name, arguments


class _Reading:
    """A text and how far it has been read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._is_balanced = True
        """Whether each value had its closing tag so far; they are not searched for again, which bounds the time."""

    def rest(self) -> str:
        """Return what is still to be read, without marks around it."""
        return bare(self._text[self._at :])

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Read what a pattern matches after white space and marks."""
        found = pattern.match(self._text, _BETWEEN.match(self._text, self._at).end())  # type: ignore[union-attr]
        if found is not None:
            self._at = found.end()
        return found

    def object(self) -> str:
        """Read a function's arguments that are an object and not tags, as text; '' where they are tags."""
        if not self._text[self._at :].lstrip().startswith("{"):
            return ""
        start, end = self._at, FUNCTION_END.search(self._text, self._at)
        self._at = end.end() if end else len(self._text)
        return self._text[start : end.start() if end else self._at].strip()

    def parameters(self, properties: Mapping[str, Any]) -> dict[str, Any]:
        """Read a function's parameters, and its end."""
        arguments = {}
        while tag := _TAGGED.tag.search(self._text, self._at):
            self._at = tag.start()
            if parameter := self.take(_PARAMETER):
                arguments[parameter[1]] = converted(self.value(_TAGGED), properties.get(parameter[1]))
            elif self.take(FUNCTION_END) or _FUNCTION.match(self._text, self._at):
                return arguments
            else:  # a parameter without a name, or an end of nothing
                self._at = tag.end()
        return arguments

    def value(self, form: _Form) -> str:
        """Read a value and its closing tag; where that is missing, up to the next tag.

        It is the tag that makes as many closing tags as opening ones, if what follows is what may follow a value.
        """
        start = at = self._at
        opened = 1
        for end in form.end.finditer(self._text, start) if self._is_balanced else ():
            opened += sum(1 for _ in form.begin.finditer(self._text, at, end.start())) - 1
            self._at = at = end.end()
            if opened <= 0 and form.after.match(self._text, at):
                value = self._text[start : end.start()]
                # Qwen3-Coder writes its tags on lines of their own.
                is_framed = value.startswith("\n") or value.count("\n") == 1
                return value.removeprefix("\n").removesuffix("\n") if is_framed else value
        self._is_balanced = False
        tag = form.tag.search(self._text, start)
        self._at = tag.start() if tag else len(self._text)
        value = self._text[start : self._at].removeprefix("\n").removesuffix("\n")
        self.take(form.end)
        return value


def _properties(name: str, declared: Mapping[str, Tool]) -> Mapping[str, Any]:
    properties = (declared[declared_name(name, declared)].parameters or {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}


def converted(text: str, schema: Any) -> Any:
    """Return a value's text as its schema has it: text where it may be text."""
    kinds = _kinds(schema)
    word = text.strip().lower()
    if "string" in kinds:
        return None if "null" in kinds and word == "null" else text
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        value = _LITERALS.get(word, text)
    if value == text and kinds & {"array", "object"}:  # as Python writes it
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    return text if not kinds and not isinstance(value, dict | list) else value


def _kinds(schema: Any) -> set[str]:
    """Return the types that a schema names; none: it leaves that open."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    kinds = {kind for kind in (given if isinstance(given, list) else [given]) if isinstance(kind, str)}
    if isinstance(choices := schema.get("enum"), list) and any(isinstance(choice, str) for choice in choices):
        kinds.add("string")
    for several in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(several) or () if isinstance(schema.get(several), list) else ():
            kinds |= _kinds(each)
    return kinds
