"""Conversation to prompt, and tokens back to events. No MLX, no HTTP: a tokenizer, its template and its marks."""

from __future__ import annotations

import codecs
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.errors import InvalidRequest, PromptTooLong
from server.events import Event, FinishReason, Logprobs, Reasoning, Text, TokenLogprob, ToolCall
from server.models import Loaded, Tokenizer
from server.requests import ChatRequest, Image, Message, Tool

_OURS = frozenset({"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
                   "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
                   "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"})  # fmt: skip

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
"""What the dialects know. Pillow reads more, some by starting other programs."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads."""

    tokens: tuple[int, ...]
    is_reasoning: bool = False
    """The template has opened the reasoning already."""
    system: int = 0
    """How many tokens at its start come from system messages and tools: what other conversations share."""
    images: tuple[Any, ...] = ()
    """Pixel values, one array an image."""


# To tokens -----------------------------------------------------------------------------------------------------


def render(model: Loaded, request: ChatRequest, limit: int | None = None) -> Prompt:
    """The tokens of a conversation, as the model's own template writes it. Raises InvalidRequest.

    A text that must have more tokens than `limit` is refused before megabytes of it are cut into tokens.
    """
    tokenizer = model.tokenizer
    if not tokenizer.has_chat_template:
        raise InvalidRequest(f"{request.model} has no chat template; use /v1/completions", param="model")
    if not request.messages:  # of empty ones, a dialect may leave none
        raise InvalidRequest("no message says anything", param="messages")
    images = [part for message in request.messages for part in message.content if isinstance(part, Image)]
    if images and model.processor is None:
        raise InvalidRequest(f"{request.model} does not take images", param=images[0].where)
    tools = request.tools if request.choice.mode != "none" else ()
    kwargs = _template_kwargs(tokenizer, request)
    continues = request.continues and request.messages[-1].role == "assistant" and not request.messages[-1].calls
    text, system = _apply(tokenizer, request.messages, tools, kwargs, continues=continues)
    pixels: tuple[Any, ...] = ()
    if images:
        try:
            text, pixels = model.processor(text, images=[_pixels(image) for image in images])
        except ValueError as error:  # its template leaves one out, or a text holds the mark of one
            raise InvalidRequest(f"the model cannot place the images: {error}", param="messages") from None
        system = ""
    check_unicode(text, "messages")
    check_length(model, text, limit, "messages")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return Prompt(
        tuple(tokens),
        is_reasoning=_opens_reasoning(tokenizer, text),
        system=_common(tokenizer.encode(system, add_special_tokens=False), tokens) if system else 0,
        images=tuple(pixels),
    )


def check_length(model: Loaded, text: str, limit: int | None, param: str) -> None:
    """Raises PromptTooLong for a text that cannot have as few tokens as `limit`."""
    fewest = len(text) // model.longest_token
    if limit is not None and fewest > limit:
        raise PromptTooLong(f"prompt is too long: at least {fewest} tokens > {limit} maximum", param=param)


def check_unicode(text: str, param: str) -> None:
    """Raises InvalidRequest for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("is no valid Unicode text", param=param) from None


def _apply(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    kwargs: dict[str, Any],
    *,
    continues: bool = False,
) -> tuple[str, str]:
    """The conversation's text, and that of its system messages and tools alone ('' where that cannot be told).

    Templates differ in what they take (one system message, at the start; turns that alternate). A conversation that
    one refuses as it is gets a plainer form, which says the same.
    """
    given = [_described(tool) for tool in tools] or None

    ending = {"continue_final_message": True} if continues else {"add_generation_prompt": True}

    def text(turns: Sequence[Message], **ending: bool) -> str:
        plain = [_as_dict(turn) for turn in turns]
        return tokenizer.apply_chat_template(plain, tools=given, tokenize=False, **ending, **kwargs)

    problem: Exception | None = None
    for form in (_merged_system(messages), _alternating(messages), _without_system(messages)):
        try:
            whole = text(form, **ending)
        except Exception as error:  # noqa: BLE001 - templates are programs that come with the model
            problem = problem or error
            continue
        systems = [turn for turn in form if turn.role == "system"][:1]
        if not (systems or given) or form[: len(systems)] != systems:
            return whole, ""
        try:
            return whole, text([*systems, Message("user", ("",))], add_generation_prompt=False)
        except Exception:  # noqa: BLE001 - as above; only the reuse of its KV cache needs it
            return whole, ""
    raise InvalidRequest(f"the model's chat template refuses these messages: {problem}", param="messages")


def _merged_system(messages: Sequence[Message]) -> list[Message]:
    """Leading system messages as one."""
    first = next((at for at, turn in enumerate(messages) if turn.role != "system"), len(messages))
    if first == 0:
        return list(messages)
    return [Message("system", ("\n\n".join(turn.text for turn in messages[:first]),)), *messages[first:]]


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """Later system messages as the user's, and neighbours of one role as one."""
    merged: list[Message] = []
    for at, turn in enumerate(_merged_system(messages)):
        if at and turn.role == "system":
            turn = replace(turn, role="user")
        if merged and merged[-1].role == turn.role and turn.role in ("user", "assistant") and not merged[-1].calls:
            last = merged[-1]
            merged[-1] = replace(
                turn,
                content=(*last.content, "\n\n", *turn.content),
                reasoning="\n\n".join(filter(None, (last.reasoning, turn.reasoning))),
            )
        else:
            merged.append(turn)
    return merged


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The system message as the start of the user's first."""
    turns = _alternating(messages)
    if turns and turns[0].role == "system":
        turns[0] = replace(turns[0], role="user")
    return _alternating(turns)


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as templates expect it, which is OpenAI's form with arguments as objects."""
    content: Any = message.text
    if any(isinstance(part, Image) for part in message.content):
        content = [
            {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part} for part in message.content
        ]
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.calls
        ]
    if message.call_id is not None:
        turn["tool_call_id"] = message.call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _described(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description or ""}
    function["parameters"] = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _template_kwargs(tokenizer: Tokenizer, request: ChatRequest) -> dict[str, Any]:
    """What a template is told beside the messages. Raises InvalidRequest for what it does not know."""
    kwargs = dict(request.template_kwargs)
    if ours := sorted(_OURS & kwargs.keys()):
        raise InvalidRequest(f"`{ours[0]}` is not the request's to set", param=f"chat_template_kwargs.{ours[0]}")
    source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if request.effort is not None and "reasoning_effort" in source:
        kwargs.setdefault("reasoning_effort", request.effort)
    elif request.effort is not None and tokenizer.has_thinking:  # it can be on or off
        kwargs.setdefault("enable_thinking", request.effort not in ("none", "minimal"))
    elif request.effort is not None and not request.is_effort_optional and request.effort != "none":
        raise InvalidRequest(f"{request.model} knows no reasoning effort; leave it out", param="reasoning_effort")
    if request.thinking is not None:
        kwargs.setdefault("enable_thinking", request.thinking)
    return kwargs


def _opens_reasoning(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a prompt ends inside a reasoning block, as templates of reasoning models have it.

    Only its very end counts: what a user quotes is not the model's own reasoning.
    """
    if tokenizer.response_initial_state is not None:
        return tokenizer.response_initial_state == "reasoning"
    return tokenizer.think_start is not None and text.rstrip().endswith(tokenizer.think_start)


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    return next((at for at, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens))


def _pixels(image: Image) -> Any:
    """An RGB array of height x width x 3 bytes. Raises InvalidRequest."""
    import io

    import numpy as np
    from PIL import Image as Pillow  # only models that see need it

    try:
        return np.asarray(Pillow.open(io.BytesIO(image.data), formats=_FORMATS).convert("RGB"))
    except Exception:  # noqa: BLE001 - decoders meet whatever is sent
        raise InvalidRequest("is no image that can be read", param=image.where) from None


# From tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token as the engine hands it over."""

    id: int
    logprob: TokenLogprob | None = None


class StopStrings:
    """Cuts a text at the first of some strings, and never gives out the beginning of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What may be given out of the text so far; nothing after `found` is set."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        # The stop that is complete first: what is generated after it must not change the answer.
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Reader:
    """Reads one answer: tokens in, events out. Text passes detokenizer, stop strings and the model's own marks."""

    def __init__(
        self,
        model: Loaded,
        *,
        stop: Sequence[str] = (),
        is_reasoning: bool = False,
        has_marks: bool = True,
        tools: Sequence[Tool] = (),
        is_parallel: bool = True,
        is_call: bool = False,
    ) -> None:
        """`has_marks`: not so for plain completions. `is_call`: a grammar makes the whole answer a call, as JSON."""
        self._model = model
        self._detokenizer = model.detokenizer()
        self._stops = StopStrings(stop)
        self._name = "normal" if is_call or not has_marks else model.tokenizer.response_initial_state or "normal"
        """The state that text was last in: normal, reasoning, tool, or one whose text says who is spoken to."""
        if is_reasoning:
            self._name = "reasoning"
        self._state = model.machine.make_state(self._name) if has_marks else None
        self._head: str | None = ""
        """Text before the first mark that is not the answer's; None: there was a mark."""
        self._tools = [_described(tool) for tool in tools]
        self._is_parallel = is_parallel
        self._is_call = is_call
        self._call = ""
        self._calls = 0
        self._is_after_mark = is_reasoning
        self._line_ends = ""
        """Of reasoning: held back, since those before the closing mark belong to the template."""
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()
        """Log probabilities of tokens whose text is not out yet, with how long the text is with each."""
        self._halves: list[TokenLogprob] = []
        """Those of tokens that end inside of a character, whose text is not known yet."""
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = self._released = 0
        self._events: list[Event] = []
        self.tokens = 0
        self.reasoning_tokens = 0
        self.reason: FinishReason | None = None
        self.stop_sequence: str | None = None

    def feed(self, tokens: Iterable[Token], finish: FinishReason | None = None) -> list[Event]:
        """Read some tokens; `finish` says that they are the last. Once `reason` is set, nothing more is read."""
        for token in tokens:
            if self.reason is not None:
                break
            self.tokens += 1
            self.reasoning_tokens += self._name == "reasoning"
            self._detokenizer.add_token(token.id)
            self._read(self._detokenizer.last_segment, token.logprob)
        if self.reason is None and finish is not None:
            self._detokenizer.finalize()
            self._read(self._detokenizer.last_segment, None)
            self._finish(finish)
        events, self._events = self._events, []
        return events

    def _read(self, text: str, logprob: TokenLogprob | None) -> None:
        self._length += len(text)
        if logprob is not None:
            self._halves.append(logprob)
            self._bytes.decode(logprob.data)
            if not self._bytes.getstate()[0]:  # else the rest of a character comes with a later token
                self._settle_logprobs()
        released = self._stops.feed(text)
        self._released += len(released)
        self._split(released)
        self._release_logprobs()
        if self._stops.found is not None and self.reason is None:
            self.stop_sequence = self._stops.found
            self._finish("stop_sequence")

    def _settle_logprobs(self) -> None:
        self._waiting += [(self._length, logprob) for logprob in self._halves]
        self._halves.clear()

    def _release_logprobs(self) -> None:
        ready = []
        while self._waiting and self._waiting[0][0] <= self._released:
            ready.append(self._waiting.popleft()[1])
        if ready:
            self._events.append(Logprobs(tuple(ready)))

    def _finish(self, reason: FinishReason) -> None:
        rest = self._stops.finish()
        self._released += len(rest)
        self._split(rest)
        if reason != "stop_sequence":
            self._settle_logprobs()  # nothing follows
        self._release_logprobs()
        if self._state is not None:
            self._take(self._name, self._state[3])  # what might have become a mark
        if self._head:  # no mark came: it is the answer, as where a grammar leaves no room for one
            self._say(self._head)
        if self.reason is not None:
            return
        if self._is_call:
            self._end_call(_json_calls)
        elif self._name == "tool" and reason == "length":
            self._say(f"{self._model.tokenizer.tool_call_start}{self._call}")  # cut short, but not lost
        elif self._name == "tool":  # some templates have no closing mark: the end of the turn is one
            self._end_call(self._model.tokenizer.tool_parser, is_closed=False)
        self.reason = self.reason or ("tool_calls" if self._calls and reason == "stop" else reason)

    def _split(self, text: str) -> None:
        """Sort text into answer, reasoning and calls."""
        if self._state is None:
            self._say(text)
        elif text:
            self._state, segments = self._model.machine.split(self._state, text)
            for name, piece in segments:
                if name != self._name:
                    self._pass_mark(name)
                self._take(name, piece)

    def _pass_mark(self, name: str) -> None:
        before, self._name, self._head = self._name, name, None
        self._is_after_mark, self._line_ends = True, ""
        if before == "tool":
            self._end_call(self._model.tokenizer.tool_parser)

    def _take(self, name: str, text: str) -> None:
        if self.reason is not None:
            return
        if name == "tool" or (self._is_call and name == "normal"):
            self._call += text
        elif name == "reasoning":
            self._think(text)
        elif name == "normal":
            self._say(text)
        elif self._head is not None:
            self._head += text

    def _think(self, text: str) -> None:
        text = self._line_ends + (text.lstrip("\n") if self._is_after_mark else text)
        said = text.rstrip("\n")
        self._line_ends = text[len(said) :]
        if said:
            self._is_after_mark = False
            self._emit(Reasoning(said))

    def _say(self, text: str) -> None:
        if self._is_after_mark:  # white space between a mark and the answer is the template's
            text = text.lstrip()
        if text:
            self._is_after_mark = False
            self._emit(Text(text))

    def _emit(self, event: Text | Reasoning) -> None:
        """Add to the last event where it is of the same kind: a client gets one piece a turn, not one a token."""
        last = self._events[-1] if self._events else None
        if isinstance(last, Text | Reasoning) and type(last) is type(event):
            self._events[-1] = type(event)(last.text + event.text)
        else:
            self._events.append(event)

    def _end_call(self, parse: Callable[[str, list[dict[str, Any]]], Any], *, is_closed: bool = True) -> None:
        """A call's text is complete. What is no call is said as text: nothing the model writes is lost."""
        text, self._call = self._call, ""
        tokenizer = self._model.tokenizer
        try:
            parsed = parse(text, self._tools) if self._tools else None
            calls = [_as_call(each) for each in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # noqa: BLE001 - parsers meet whatever a model says
            self._is_after_mark = False
            opening = "" if self._is_call else tokenizer.tool_call_start
            closing = "" if self._is_call or not is_closed else tokenizer.tool_call_end or ""
            self._say(f"{opening}{text}{closing}")
            return
        calls = calls if self._is_parallel else calls[:1]
        self._events += calls
        self._calls += len(calls)
        if not self._is_parallel:
            self.reason = "tool_calls"


def _json_calls(text: str, _: object) -> Any:
    return json.loads(text)


def _as_call(parsed: Any) -> ToolCall:
    """A call as parsers give it. Raises for anything else."""
    name, arguments = parsed["name"], parsed["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError("a call has a name and an object of arguments")
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False))
