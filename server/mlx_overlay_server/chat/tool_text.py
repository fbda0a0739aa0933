"""Tools, calls and results as text, for models whose chat template has no place for them.

The form is Qwen 2.5's, which many models have seen: tools as JSON in the system message, calls as JSON between the
marks that the reader looks for, results in the user's turn. docs/requests.md documents it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from mlx_overlay_server.chat.loaded import Tokenizer
from mlx_overlay_server.chat.requests import Call, Image, Message, Tool, described


def can_write(tokenizer: Tokenizer) -> bool:
    """Return whether a model's calls, as the reader parses them, are JSON between two marks."""
    if not (tokenizer.tool_call_start and tokenizer.tool_call_end):
        return False
    call = {"name": "f", "arguments": {"x": 1}}
    try:
        return bool(tokenizer.tool_parser(json.dumps(call), []) == call)
    except Exception:  # noqa: BLE001 - mlx-lm's parsers raise what they like for another form than theirs
        return False


def written(messages: Sequence[Message], tools: Sequence[Tool], tokenizer: Tokenizer) -> list[Message]:
    """Return a conversation with the same content, in which tools, calls and results are text."""
    turns: list[Message] = []
    for turn in messages:
        if turn.role == "tool":
            result: tuple[str | Image, ...] = ("<tool_response>\n", *turn.content, "\n</tool_response>")
            if turns and turns[-1].role == "user" and _is_result(turns[-1]):
                turns[-1] = replace(turns[-1], content=(*turns[-1].content, "\n", *result))
            else:
                turns.append(Message("user", result))
        elif turn.calls:
            calls = "\n".join(_call(call, tokenizer) for call in turn.calls)
            between = ("\n",) if turn.text else ()
            turns.append(replace(turn, content=(*turn.content, *between, calls), calls=()))
        else:
            turns.append(turn)
    if tools:
        at = next((at for at, turn in enumerate(turns) if turn.role != "system"), len(turns))
        turns.insert(at, Message("system", (_instructions(tools, tokenizer),)))
    return turns


def _is_result(turn: Message) -> bool:
    return turn.content[:1] == ("<tool_response>\n",)


def _call(call: Call, tokenizer: Tokenizer) -> str:
    text = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
    return f"{tokenizer.tool_call_start}\n{text}\n{tokenizer.tool_call_end}"


def _instructions(tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
    opening, closing = tokenizer.tool_call_start, tokenizer.tool_call_end
    signatures = "\n".join(json.dumps(described(tool), ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{signatures}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{opening}{closing} XML tags:\n"
        f'{opening}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{closing}'
    )
