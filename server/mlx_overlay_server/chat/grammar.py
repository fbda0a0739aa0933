"""Constrained answers: a request's format or tool choice as a grammar of llguidance."""

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
    """A grammar that an answer must follow. It does not apply to reasoning."""

    grammar: str
    """The grammar in JSON, for llguidance.LLMatcher."""
    after: tuple[int, ...] = ()
    """Tokens that end the reasoning which the prompt has opened: the grammar applies after them; (): at once."""
    unless: int | None = None
    """The token that opens reasoning, and may come first; None: the answer must follow the grammar from its start."""
    ends: tuple[int, ...] = ()
    """Tokens that end the reasoning that `unless` opened."""
    stops: tuple[int, ...] = ()
    """Tokens that end an answer. While it is owed they close the reasoning instead, or nothing would follow it."""
    field: Field | None = None
    """The request's field that asks for the grammar."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on an answer's reasoning, after which its closing mark is forced."""

    tokens: int
    is_open: bool
    """Whether the prompt has opened the reasoning already."""
    opens: tuple[int, ...]
    ends: tuple[int, ...]


def budget(model: Loaded, request: ChatRequest, *, is_reasoning: bool) -> Budget | None:
    """Return the limit on an answer's reasoning; None without one, or when the model has no marks for reasoning."""
    tokenizer = model.tokenizer
    if request.reasoning_budget is None or not tokenizer.think_start or not tokenizer.think_end_tokens:
        return None
    opens = tokenizer.encode(tokenizer.think_start, add_special_tokens=False)
    return Budget(request.reasoning_budget, is_reasoning, tuple(opens), tuple(tokenizer.think_end_tokens))


def constraint(model: Loaded, request: ChatRequest, *, is_reasoning: bool) -> Constraint | None:
    """Return the constraint on a request's answer, if any. Raises InvalidRequest for one that cannot be enforced."""
    if is_forced(request):
        field: Field = "tools"
        grammar = _calls([tool for tool in request.tools if request.choice.name in (None, tool.name)])
    elif request.format is not None:
        field = "format"
        grammar = _json(request.format.schema, _call_opening(model, request))
    else:
        return None
    tokenizer = model.tokenizer
    ends = tuple(tokenizer.think_end_tokens or ())
    stops = tuple(sorted(tokenizer.eos_token_ids))
    if is_reasoning:
        return Constraint(grammar, after=ends, stops=stops, field=field)
    opening = tokenizer.encode(tokenizer.think_start, add_special_tokens=False) if tokenizer.think_start else []
    is_possible = request.thinking is not False and len(opening) == 1
    return Constraint(grammar, unless=opening[0] if is_possible else None, ends=ends, stops=stops, field=field)


def is_forced(request: ChatRequest) -> bool:
    """Return whether the whole answer must be a tool call."""
    return request.choice.mode == "required" and bool(request.tools)


def _call_opening(model: Loaded, request: ChatRequest) -> list[str]:
    """Return the openings of a tool call that may replace the answer, as terms of a grammar: text, and a token."""
    mark = model.tokenizer.tool_call_start
    if not mark or not request.tools or request.choice.mode == "none" or not model.has_own_calls:
        return []  # a model that was not trained on the mark would use it to escape from the grammar
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
    """Return the grammar of one call of one tool, {"name": …, "arguments": …}; each schema keeps its own `$defs`."""
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


def compiled(constraint: Constraint, model: Loaded) -> Any:
    """Compile a grammar: return an llguidance.LLMatcher at its start, to be copied for each answer.

    Takes seconds for the largest schemas, for most of which other threads can run. Raises InvalidRequest for what
    cannot be enforced, and for a grammar that no text matches, as that of a schema which only refers to itself.
    """
    from llguidance import LLMatcher
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    try:
        tokenizer = model.grammar_tokenizer
    except ValueError as error:
        raise InvalidRequest(f"answers of this model cannot be constrained: {error}", field=constraint.field) from None
    matcher = LLMatcher(tokenizer, constraint.grammar, log_level=0)
    fill_next_token_bitmask(matcher, allocate_token_bitmask(1, tokenizer.vocab_size), 0)  # shows more errors
    if matcher.is_error():
        problem = matcher.get_error().splitlines()[0]
        raise InvalidRequest(f"this schema cannot be enforced: {problem}", field=constraint.field)
    return matcher
