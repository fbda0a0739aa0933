"""Constrained answers: what a request's format or tool choice allows, as grammars of llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import ChatRequest, Tool
from mlx_overlay_server.errors import Field, InvalidRequest

# One way to write each value: else a small model can go on with white space for ever.
_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be. It does not hold for reasoning."""

    grammar: str
    """For llguidance.LLMatcher."""
    after: tuple[int, ...] = ()
    """Holds once these tokens were generated, which end the reasoning that the prompt has opened; (): at once."""
    unless: int | None = None
    """The token that opens reasoning, which may come instead of the first."""
    ends: tuple[int, ...] = ()
    """What ends the reasoning that `unless` opened."""
    field: Field | None = None
    """The request's field that asks for it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long an answer may reason: then the mark that ends it is forced."""

    tokens: int
    is_open: bool
    """Whether the prompt has opened the reasoning already."""
    opens: tuple[int, ...]
    ends: tuple[int, ...]


def budget(model: Loaded, request: ChatRequest, *, is_reasoning: bool) -> Budget | None:
    """The limit on an answer's reasoning; None: none, or a model that has no marks for it."""
    tokenizer = model.tokenizer
    if request.reasoning_budget is None or not tokenizer.think_start or not tokenizer.think_end_tokens:
        return None
    opens = tokenizer.encode(tokenizer.think_start, add_special_tokens=False)
    return Budget(request.reasoning_budget, is_reasoning, tuple(opens), tuple(tokenizer.think_end_tokens))


def constraint(model: Loaded, request: ChatRequest, *, is_reasoning: bool) -> Constraint | None:
    """What holds for the answer to a request; None: anything. Raises InvalidRequest for what cannot be enforced."""
    if is_forced(request):
        field: Field = "tools"
        grammar = _calls([tool for tool in request.tools if request.choice.name in (None, tool.name)])
    elif request.format is not None:
        field = "format"
        grammar = _json(request.format.schema, _call_opening(model, request))
    else:
        return None
    _check(model, grammar, field)
    tokenizer = model.tokenizer
    ends = tuple(tokenizer.think_end_tokens or ())
    if is_reasoning:
        return Constraint(grammar, after=ends, field=field)
    opening = tokenizer.encode(tokenizer.think_start, add_special_tokens=False) if tokenizer.think_start else []
    is_possible = request.thinking is not False and len(opening) == 1
    return Constraint(grammar, unless=opening[0] if is_possible else None, ends=ends, field=field)


def is_forced(request: ChatRequest) -> bool:
    """Whether the answer as a whole must be a tool call."""
    return request.choice.mode == "required" and bool(request.tools)


def _call_opening(model: Loaded, request: ChatRequest) -> list[str]:
    """What opens a call that may come instead of an answer, as terms of a grammar: as text, and as a token."""
    mark = model.tokenizer.tool_call_start
    if not mark or not request.tools or request.choice.mode == "none":
        return []
    tokens = model.tokenizer.encode(mark, add_special_tokens=False)
    return [json.dumps(mark), *(f"<[{token}]>" for token in tokens if len(tokens) == 1)]


def _json(schema: Mapping[str, Any] | None, call_opening: Sequence[str]) -> str:
    options = _with_options(schema or {"type": "object"})
    if not call_opening:
        return json.dumps({"grammars": [{"json_schema": options}]})
    rules = (
        "start: answer | call",
        f"answer: %json {json.dumps(options)}",
        f"call: ({' | '.join(call_opening)}) /(?s:.*)/",
    )
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}]})


def _calls(tools: Sequence[Tool]) -> str:
    """One call of one of the tools, as {"name": …, "arguments": …}: each tool's schema has `$defs` of its own."""
    rules = [f"start: {' | '.join(f'call_{number}' for number in range(len(tools)))}"]
    for number, tool in enumerate(tools):
        schema = {"type": "object", "additionalProperties": False, **(tool.parameters or {})}
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        rules += [
            f'call_{number}: {head} arguments_{number} "}}"',
            f"arguments_{number}: %json {json.dumps(_with_options(schema))}",
        ]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}]})


def _with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"x-guidance": _OPTIONS, **{key: value for key, value in schema.items() if key != "$schema"}}


def _check(model: Loaded, grammar: str, field: Field) -> None:
    from llguidance import LLMatcher

    try:
        tokenizer = model.grammar_tokenizer
    except ValueError as error:
        raise InvalidRequest(f"answers of this model cannot be constrained: {error}", field=field) from None
    if problem := LLMatcher.validate_grammar(grammar, tokenizer):
        raise InvalidRequest(f"this schema cannot be enforced: {problem.splitlines()[0]}", field=field)
