"""Conversation to prompt, as the model's own template writes it. No MLX, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_overlay_server.chat import tool_text
from mlx_overlay_server.chat.images import placed, shown
from mlx_overlay_server.chat.loaded import Loaded, Shown, Tokenizer
from mlx_overlay_server.chat.requests import OURS, ChatRequest, Image, Message, Tool, described
from mlx_overlay_server.errors import Field, InvalidRequest, PromptTooLong

_VERBOSITY = {"low": "Keep your answers short.", "high": "Answer in detail."}
"""Sentences for templates that have no setting for how much an answer says."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model reads it."""

    tokens: tuple[int, ...]
    is_reasoning: bool = False
    """Whether the template has opened a reasoning block already."""
    system: int = 0
    """Tokens at its start that come from system messages and tools, which other conversations share."""
    continues_text: bool = False
    """Whether it ends in the text of an assistant message that the answer goes on with."""
    images: tuple[Any, ...] = ()
    """Pixel values, one array for each image, for mlx-lm."""
    shown: Shown | None = None
    """What the model sees of the images, for mlx-vlm."""

    @property
    def has_images(self) -> bool:
        """Whether there are images in it."""
        return bool(self.images) or self.shown is not None


def render(model: Loaded, request: ChatRequest, limit: int | None = None) -> Prompt:
    """Return the tokens of a conversation, as the model's own template writes it. Raises InvalidRequest.

    A text that must have more tokens than `limit` is refused before megabytes of it are tokenized.
    """
    tokenizer = model.tokenizer
    if not tokenizer.has_chat_template and request.chat_template is None:
        raise InvalidRequest(f"{request.model} has no chat template; use /v1/completions", field="model")
    if not request.messages:  # dialects may drop empty messages
        raise InvalidRequest("all messages are empty", field="messages")
    images = [part for message in request.messages for part in message.content if isinstance(part, Image)]
    if images and not model.sees:
        raise InvalidRequest(f"{request.model} does not take images", param=images[0].where)
    tools = request.tools if request.choice.mode != "none" else ()
    kwargs = _template_kwargs(tokenizer, request)
    messages = _with_verbosity(request, kwargs)
    continues = request.continues and request.messages[-1].role == "assistant" and not request.messages[-1].calls
    text, system = _apply(tokenizer, messages, tools, kwargs, continues=continues)
    pixels: tuple[Any, ...] = ()
    tokens: list[int] | None = None
    seen: Shown | None = None
    if images:
        try:
            if model.vision is not None:
                tokens, seen = shown(model.vision, text, images)
            else:
                text, pixels = placed(model, text, images)
        except ValueError as error:  # its template leaves one out, or a text holds the mark of one
            raise InvalidRequest(f"the model cannot place the images: {error}", field="messages") from None
        system = ""
    check_unicode(text, "messages")
    check_length(model, text, limit, "messages")
    if tokens is None:
        tokens = tokenizer.encode(text, add_special_tokens=False)
    return Prompt(
        tuple(tokens),
        is_reasoning=_opens_reasoning(tokenizer, text),
        system=_common(tokenizer.encode(system, add_special_tokens=False), tokens) if system else 0,
        continues_text=continues and bool(request.messages[-1].text),
        images=tuple(pixels),
        shown=seen,
    )


def check_length(model: Loaded, text: str, limit: int | None, field: Field) -> None:
    """Raises PromptTooLong for a text that cannot have as few tokens as `limit`."""
    fewest = len(text) // model.longest_token
    if limit is not None and fewest > limit:
        raise PromptTooLong(f"prompt is too long: at least {fewest} tokens > {limit} maximum", field=field)


def check_unicode(text: str, field: Field) -> None:
    """Raises InvalidRequest for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("not valid Unicode text: half a surrogate pair", field=field) from None


def _apply(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    kwargs: dict[str, Any],
    *,
    continues: bool = False,
) -> tuple[str, str]:
    """Return a conversation's text, and the text of its system messages and tools alone ('' when it is not known).

    Tools, calls and results that the template would drop without a word become text of the conversation.
    """
    template = _Template(tokenizer, kwargs, {"continue_final_message" if continues else "add_generation_prompt": True})
    if not (tools or any(turn.calls or turn.role == "tool" for turn in messages)):
        return template.written(messages, ())
    can_write = tool_text.can_write(tokenizer)
    try:
        native = template.written(messages, tools)
    except InvalidRequest:
        if not can_write:
            raise
    else:
        dropped = template.dropped(messages, tools, native[0])
        if dropped is None:
            return native
        if not can_write:
            field: Field = "tools" if dropped == "tools" else "messages"
            raise InvalidRequest(f"the model's chat template has no place for {dropped}; leave them out", field=field)
    return template.written(tool_text.written(messages, tools, tokenizer), ())


@dataclass(frozen=True, slots=True)
class _Template:
    """A model's chat template with the arguments of one request."""

    tokenizer: Tokenizer
    kwargs: Mapping[str, Any]
    ending: Mapping[str, bool]
    """How the prompt ends: with the opening of a new answer, or inside the last message."""

    def written(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[str, str]:
        """Return a conversation's text, and the text of its system messages and tools alone ('' when not known).

        Raises InvalidRequest when the template refuses every form of the messages.
        """
        form, whole = self._first_form(messages, tools)
        systems = [turn for turn in form if turn.role == "system"][:1]
        if not (systems or tools) or form[: len(systems)] != systems:
            return whole, ""
        try:
            return whole, self._text([*systems, Message("user", ("",))], tools, {"add_generation_prompt": False})
        except Exception:  # noqa: BLE001 - templates are programs; only the reuse of the KV cache needs this text
            return whole, ""

    def dropped(self, messages: Sequence[Message], tools: Sequence[Tool], whole: str) -> str | None:
        """Return the name of what is missing from a conversation's text; None when nothing is.

        It is missing when another one in its place makes no difference to the text.
        """
        others: dict[str, tuple[Sequence[Message], Sequence[Tool]]] = {}
        if tools:
            others["tools"] = messages, ()
        if any(turn.calls for turn in messages):
            others["tool calls"] = [_with_other_calls(turn) for turn in messages], tools
        if any(turn.role == "tool" and turn.content for turn in messages):
            others["tool results"] = [_with_other_result(turn) for turn in messages], tools
        for name, other in others.items():
            try:
                if self._first_form(*other)[1] == whole:
                    return name
            except InvalidRequest:  # it makes a difference
                continue
        return None

    def _first_form(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[Message], str]:
        """Return the first form of a conversation that the template takes, and its text. Raises InvalidRequest.

        Templates differ in what they take (one system message, at the start; turns that alternate). A conversation that
        a template refuses, or whose system messages it drops, is tried again in plainer forms with the same content.
        """
        problem: Exception | None = None
        for form in (_merged_system(messages), _alternating(messages), _without_system(messages)):
            try:
                text = self._text(form, tools, self.ending)
                if not self._drops_system(form, tools, text):
                    return form, text
            except Exception as error:  # noqa: BLE001 - templates are programs that come with the model
                problem = problem or error
        if type(problem).__name__ == "TemplateSyntaxError":  # Jinja's, which only preparation processes import
            what = f"line {getattr(problem, 'lineno', '?')} of the chat template is not valid: {problem}"
            raise InvalidRequest(
                f"{what}; correct it in the model's folder, or set another in its profile", field="model"
            )
        raise InvalidRequest(f"the model's chat template refuses these messages: {problem}", field="messages")

    def _drops_system(self, form: Sequence[Message], tools: Sequence[Tool], text: str) -> bool:
        """Return whether a system message makes no difference to a conversation's text."""
        for at, turn in enumerate(form):
            if turn.role == "system" and turn.text.strip() and turn.text.strip() not in text:
                other = [*form[:at], replace(turn, content=("other ", *turn.content)), *form[at + 1 :]]
                if self._text(other, tools, self.ending) == text:
                    return True
        return False

    def _text(self, turns: Sequence[Message], tools: Sequence[Tool], ending: Mapping[str, bool]) -> str:
        given = [described(tool) for tool in tools] or None
        plain = [_as_dict(turn) for turn in turns]
        return self.tokenizer.apply_chat_template(plain, tools=given, tokenize=False, **ending, **self.kwargs)


def _with_other_calls(turn: Message) -> Message:
    return replace(turn, calls=tuple(replace(call, name=f"other_{call.name}") for call in turn.calls))


def _with_other_result(turn: Message) -> Message:
    return replace(turn, content=("other ", *turn.content)) if turn.role == "tool" else turn


def _merged_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the leading system messages merged into one."""
    first = _leading(messages)
    if first == 0:
        return list(messages)
    return [Message("system", ("\n\n".join(turn.text for turn in messages[:first]),)), *messages[first:]]


def _leading(messages: Sequence[Message]) -> int:
    """Return how many system messages a conversation begins with."""
    return next((at for at, turn in enumerate(messages) if turn.role != "system"), len(messages))


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with later system messages as user messages, and neighbours of one role merged."""
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
    """Return the messages with the system message at the start of the first user message."""
    turns = _alternating(messages)
    if turns and turns[0].role == "system":
        turns[0] = replace(turns[0], role="user")
    return _alternating(turns)


def _as_dict(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: OpenAI's form, with arguments as objects."""
    content: Any = message.text
    if any(isinstance(part, Image) for part in message.content):
        content = [
            {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part} for part in message.content
        ]
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.calls:
        if message.reasoning and message.text:
            turn["thinking"] = ""  # transformers gives reasoning this name, too, which gpt-oss's template refuses here
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.calls
        ]
    if message.call_id is not None:
        turn["tool_call_id"] = message.call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _template_kwargs(tokenizer: Tokenizer, request: ChatRequest) -> dict[str, Any]:
    """Return a template's arguments beside the messages. Raises InvalidRequest for those that it does not know."""
    kwargs = dict(request.template_kwargs)
    if ours := sorted(OURS & kwargs.keys()):
        raise InvalidRequest(f"the server sets `{ours[0]}` itself; leave it out", field="template_kwargs", key=ours[0])
    template = request.chat_template if request.chat_template is not None else tokenizer.chat_template
    source = template if isinstance(template, str) else ""
    if request.chat_template is not None:
        kwargs["chat_template"] = request.chat_template
    if request.effort is not None and "reasoning_effort" in source:
        kwargs.setdefault("reasoning_effort", request.effort)
    elif request.effort is not None and tokenizer.has_thinking:  # it can be on or off
        kwargs.setdefault("enable_thinking", request.effort not in ("none", "minimal"))
    elif request.effort is not None and not request.is_effort_optional and request.effort != "none":
        raise InvalidRequest(f"{request.model} has no reasoning effort to set; leave it out", field="effort")
    if request.thinking is not None:
        kwargs.setdefault("enable_thinking", request.thinking)
    if request.verbosity is not None and "verbosity" in source:
        kwargs.setdefault("verbosity", request.verbosity)
    return kwargs


def _with_verbosity(request: ChatRequest, kwargs: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return a request's messages, with a sentence on how much to say where the template has no setting for that."""
    sentence = _VERBOSITY.get(request.verbosity or "")
    if sentence is None or "verbosity" in kwargs:
        return request.messages
    leading = _leading(request.messages)
    return (*request.messages[:leading], Message("system", (sentence,)), *request.messages[leading:])


def _opens_reasoning(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether a prompt ends inside a reasoning block, as those of some reasoning models do.

    Only its very end counts: what a user quotes is not the model's own reasoning.
    """
    if tokenizer.response_initial_state is not None:
        return tokenizer.response_initial_state == "reasoning"
    return tokenizer.think_start is not None and text.rstrip().endswith(tokenizer.think_start)


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their start."""
    return next((at for at, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens))
