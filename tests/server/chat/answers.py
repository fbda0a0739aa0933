"""Answers that tests of the reader and the prompt share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from mlx_overlay_server.chat.requests import Tool

SCRIPT = (
    "<think>\nHm, ünits?\n\nYes.\n</think>\n\nIt is 5 €.\n"
    '<tool_call>\n{"name": "find", "arguments": {"ä": "</think> <b>"}}\n</tool_call>\n'
    "Done. <tool_call>nonsense</tool_call> !"
)

TOOLS = (Tool("find", None, None),)
LONGEST = 5


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Some bytes in pieces that tokens exist for."""
    ends = sorted({0, len(data), *(place for place in places if place < len(data))})
    pairs = itertools.pairwise(ends)
    return [data[at : min(at + LONGEST, stop)] for start, stop in pairs for at in range(start, stop, LONGEST)]
