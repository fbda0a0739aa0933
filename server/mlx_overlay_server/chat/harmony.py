"""Harmony, the form of gpt-oss's answers, which mlx-lm does not read: a turn of several messages, each with a header.

    <|channel|>analysis<|message|>reasoning<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>
    <|start|>assistant<|channel|>final<|message|>answer<|return|>

The prompt ends in `<|start|>assistant`. What stands in a header beside these is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TOKENS = frozenset({"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"})
"""The tokens that tell models of this form."""
ENDS = ("<|call|>", "<|return|>")
"""Those that end an answer."""
CALL_START, CALL_END = "<|channel|>commentary to=", "<|call|>"

_NEXT = [("<|end|>", "header"), ("<|start|>", "header")]
_CHANNEL = ("<|channel|>", "channel")
_TEXT = ("<|message|>", "normal")
RESPONSE_FORMAT = {
    "initial_state": "header",
    "transitions": {
        "header": [_CHANNEL, (" to=functions.", "tool"), _TEXT],
        "channel": [("to=", "tool"), ("analysis<|message|>", "reasoning"), _TEXT],
        "reasoning": [_CHANNEL, *_NEXT],
        "normal": [_CHANNEL, *_NEXT],
        "tool": _NEXT,
    },
}
"""The parts of an answer and what leads from one to another, as mlx-lm's templates say it."""

_CALL = re.compile(r"([\w.:-]+)\s*(?:<\|channel\|>\w*)?\s*(?:<\|constrain\|>)?\w*\s*<\|message\|>(\{.*)", re.DOTALL)


def parse_tool_call(text: str, _: Any = None) -> Mapping[str, Any]:
    """Return the call in a message to a function, as mlx-lm's parsers do. Raises ValueError."""
    found = _CALL.fullmatch(text.strip())
    if found is None:
        raise ValueError("this is no call")
    return {"name": found[1], "arguments": found[2]}  # as text, which need not be quite JSON
