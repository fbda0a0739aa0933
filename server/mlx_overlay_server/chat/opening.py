"""Where a call begins that has no marks of the model's own: the marks of all models, and what follows them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from mlx_overlay_server.chat.requests import Tool

NAMES = ("name", "function", "tool", "tool_name", "function_name")
"""What models call the name of a tool in JSON."""
_WRAPPERS = """
    tool_call tool_calls tools tool_use tool_sep TOOLCALL function_call function_calls
    seed:tool_call minimax:tool_call longcat_tool_call atem:function_calls antml:function_calls
    |tool_call| |/tool_call| |tool_call |function_call| tool_call| start_function_call end_function_call
    |python_tag| |python_start| |python_end| |eom_id|
    |tool_call_start| |tool_call_end| |tool_calls_section_begin| |tool_calls_section_end| |tool_call_begin|
    |START_ACTION| |END_ACTION| |action_start| |plugin| |action_end| |tools_prefix| |tools_suffix|
    ｜DSML｜function_calls ｜DSML｜tool_calls
    ｜tool▁calls▁begin｜ ｜tool▁calls▁end｜ ｜tool▁call▁begin｜ ｜tool▁call▁end｜
"""
"""Marks of other models' forms, which models write that have seen them."""
MARK = "|".join((rf"</?(?:{'|'.join(map(re.escape, _WRAPPERS.split()))})>", r"\[/?TOOL_CALLS\]", "```tool_code"))
WRAPPER = rf"{MARK}|```\w*|functools(?=\s*\[)"
"""Pattern of what may stand around a call: marks, the fences of code, and Phi's word before a list."""
SPACE = r"(?:\w+:|｜DSML｜)?"
"""Pattern of what models put before the names of tags."""
SEPARATOR = r"(?:(?:\[CALL_ID\]\w+)?\[ARGS\]|:|<\|tool_call_argument_begin\|>|<｜tool▁sep｜>|```json)"
"""Pattern of what stands between a name and an object."""
PREFIX = r"(?:call:)?(?:(?:functions|tools|default_api|google:mcp)[.:])?"
"""Pattern of what models put before the name of a tool."""
_FIRST = re.compile(WRAPPER)
_LAST = re.compile(rf"(?:{WRAPPER})\Z")
_PREFIXED = re.compile(rf"{PREFIX}(.+?)(?::\d+|\.call)?")


def bare(text: str) -> str:
    """Return a text without the marks and fences around it; of a few, since each is looked for anew."""
    for _ in range(4):
        text = _LAST.sub("", text.strip())
        if first := _FIRST.match(text):
            text = text[first.end() :]
    return text.strip()


def declared_name(name: str, declared: Collection[str]) -> str:
    """Return the declared name that a model means. Raises ValueError."""
    if name in declared:
        return name
    prefixed = _PREFIXED.fullmatch(name)
    if prefixed is None or prefixed[1] not in declared:
        raise ValueError("no tool of that name was declared")
    return prefixed[1]


class Opening:
    """Recognizes where a text begins as a call does that has no marks of the model's, or may still become one."""

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
        known = (
            rf"(?(DEFINE)(?P<name>(?:function<｜tool▁sep｜>)?{PREFIX}(?:{names})))"  # once: it takes long to compile
        )
        name = "(?&name)"
        keys = "|".join(NAMES)
        quoted = rf"[\"']{name}[\"']"
        before = r"(?:[\"'](?:type|id|tool_call_id)[\"']\s*:\s*[\"'][\w-]*[\"']\s*,\s*)?"
        envelope = rf"{before}(?:[\"']?function[\"']?\s*:\s*\{{\s*)?"
        tag = rf"<{SPACE}(?:function|invoke)(?:=|\s+name=)\s*[\"']?{name}[\"']?\s*>"
        heads = (
            rf"(?:\[\s*)?\{{\s*{envelope}[\"']?(?:{keys})[\"']?\s*:\s*{quoted}",
            rf"(?:\[\s*)?\{{\s*{quoted}\s*:\s*\{{",
            rf"(?:\[\s*)?(?:print\s*\(\s*)?{name}(?:\.call)?\s*\(",
            rf"{name}(?::\d+)?\s*(?:{SEPARATOR}\s*)?\{{",
            rf"{name}\s*(?:<tool_sep>\s*)?<arg_key>",
            tag,
        )
        head = "|".join(heads)
        self._pattern = regex.compile(rf"{known}(?:\s|{WRAPPER})*(?:{head})")
        self._marked = regex.compile(rf"{known}(?:{tag}|(?:{MARK})(?:\s|{WRAPPER})*(?:{head}))")

    def may_follow(self, text: str) -> bool:
        """Return whether an answer that begins with a text, and what may come after it, can be a call."""
        return self._may_match(self._pattern.match(text, partial=True), text)

    def start(self, text: str) -> int:
        """Return where a call with marks begins in an answer that has begun, or may begin; its length for nowhere."""
        found = self._marked.search(text, partial=True)
        return found.start() if found is not None and self._may_match(found, text[found.start() :]) else len(text)

    def _may_match(self, found: Any, text: str) -> bool:
        return found is not None and (not found.partial or len(text) < self.LONGEST_HEAD)

    def is_part(self, text: str) -> bool:
        """Return whether a text that was cut short is part of a call: one of a declared tool, or with marks."""
        bare = text.strip()
        return self._pattern.match(text) is not None or (
            len(bare) > 1 and self._marked.match(bare, partial=True) is not None
        )
