"""Tokens back to events: one answer, read as it comes. No MLX, no HTTP."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_overlay_server.chat import calls
from mlx_overlay_server.chat.events import Event, FinishReason, Logprobs, Reasoning, Text, TokenLogprob, ToolCall
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.opening import Opening
from mlx_overlay_server.chat.requests import Tool

_TOKEN = re.compile(r"<\|\w+\|>")
"""Pattern of what most vocabularies write their marks like; no part of a text."""
MOST_MARKS = 256
"""Closing marks that an argument may hold: at each, the call is looked at anew."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token that the engine has drawn."""

    id: int
    logprob: TokenLogprob | None = None


class StopStrings:
    """Cuts a text at the first stop string in it, and holds back text that may be the beginning of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Read more text, and return what is certain to belong to the answer; '' once `found` is set."""
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
        """Return the text that was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
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
        is_formatted: bool = False,
        continues_text: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`has_marks`: False for plain completions. `is_call`: the whole answer is a tool call in JSON, by grammar.

        `is_formatted`: the request gives the form of the answer's text, which is no call whatever it looks like.
        `continues_text`: the prompt ends in text that the answer goes on with, so a space at its start belongs to it.
        `min_tokens`: stop strings count only after so many tokens.
        """
        self._model = model
        self._detokenizer = model.detokenizer()
        if continues_text:  # detokenizers drop a space at the start of a text
            for letter in model.letter:
                self._detokenizer.add_token(letter)
            _ = self._detokenizer.last_segment
        self._stops = StopStrings(stop)
        self._least = min_tokens
        # A grammar rules headers out, but for that of a call, and what goes on has its own already.
        has_header = has_marks and not (is_call or continues_text) and (not is_formatted or bool(tools))
        self._name = (model.tokenizer.response_initial_state if has_header else None) or "normal"
        """The part that the last text belongs to: normal, reasoning, tool, or one that names the addressee."""
        if is_reasoning:
            self._name = "reasoning"
        self._state = model.marks.make_state(self._name) if has_marks else None
        self._head: str | None = ""
        """Text before the first mark in a part that is not the answer; None once there was a mark."""
        self._tools = tools if has_marks else ()
        self._is_parallel = is_parallel
        self._is_call = is_call
        self._call = ""
        self._is_call_in_reasoning = False
        self._marks_in_call = 0
        """Closing marks in `_call` that seem to stand in an argument, as in a file about tool calls."""
        self._may_hold_marks = bool(self._tools) and model.tokenizer.response_initial_state is None
        self._opening = _opening(self._tools) if not (is_call or is_formatted or continues_text) else None
        """Recognizes a call without the model's marks; None where there can be none."""
        self._unmarked = ""
        """Text that is held back while it may be such a call."""
        self._has_begun = False
        """Whether the answer has begun as text: then only a call with marks of some kind is one."""
        self._stray = StrayMarks(model.tokenizer.tool_call_end or "" if self._tools else "")
        self._calls = 0
        self._is_after_mark = is_reasoning
        self._line_ends = ""
        """Line ends of reasoning that are held back: those before the closing mark belong to the template."""
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()
        """Log probabilities of tokens whose text is held back, each with the length of the text up to it."""
        self._halves: list[TokenLogprob] = []
        """Log probabilities of tokens that end inside a character, whose text is not known yet."""
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = self._released = 0
        self._events: list[Event] = []
        self.tokens = 0
        self.reasoning_tokens = 0
        self.reason: FinishReason | None = None
        self.stop_sequence: str | None = None

    def feed(self, tokens: Iterable[Token], finish: FinishReason | None = None) -> list[Event]:
        """Read some tokens and return their events; `finish`: why the last ends the answer. Stops at `reason`."""
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
        released = self._stops.feed(text) if self.tokens > self._least else text
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
        self._flush()
        if self._head:  # no mark came: it is the answer, as where a grammar leaves no room for one
            self._say(self._head)
        if self.reason is not None:
            return
        is_cut = reason != "stop"
        if self._is_call:
            self._emit_calls(calls.enforced(self._call, self._tools))
        elif self._name == "tool" and not (is_cut and self._tools):  # else it is part of a call, and left out
            self._end_call(is_closed=False)  # some templates have no closing mark: the end of the turn is one
        self._end_unmarked(is_cut=is_cut)
        self._emit_text(self._stray.finish())
        self.reason = self.reason or ("tool_calls" if self._calls and reason == "stop" else reason)

    def _split(self, text: str) -> None:
        """Sort text into answer, reasoning and tool calls."""
        if self._state is None:
            self._say(text)
        elif text:
            state, segments = self._model.marks.split(self._state, text)
            if len(segments) > 1 and len(text) > 1:  # letter by letter, each mark is at the end of what is split
                for letter in text:
                    self._split(letter)
                return
            self._state = state
            for name, piece in segments:
                if name != self._name:
                    self._pass_mark(name)
                self._take(self._name, piece)

    def _flush(self) -> None:
        """Take the text that is held since it may become a mark, now that nothing follows."""
        if self._state is not None:
            self._state, held, _ = self._model.marks.flush(self._state)
            if not self._tools or len(held) == 1:  # longer, it is half a mark
                self._take(self._name, held)

    def _pass_mark(self, name: str) -> None:
        if self.reason is not None:
            return
        if self._name == "tool" and self._may_hold_marks and name == "normal" and calls.is_open(self._call):
            self._call += self._model.tokenizer.tool_call_end or ""
            self._state = self._model.marks.make_state(self._name)
            self._marks_in_call += 1
            self._may_hold_marks = self._marks_in_call < MOST_MARKS
            return
        before, self._name, self._head = self._name, name, None
        self._is_after_mark, self._line_ends = True, ""
        if name == "tool":
            self._is_call_in_reasoning = before == "reasoning"
            self._end_unmarked(is_cut=False)
        if before == "tool":
            if self._tools and self._is_call_in_reasoning and name == "normal":  # its closing mark is still to come
                self._name = "reasoning"
                self._state = self._model.marks.make_state(self._name)
            self._end_call()

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
        if self._opening is not None:
            self._unmarked += text
            if self._has_begun or not self._opening.may_follow(self._unmarked):
                at = self._opening.start(self._unmarked)
                text, self._unmarked = self._unmarked[:at], self._unmarked[at:]
                self._has_begun = self._has_begun or bool(text.strip())
            else:
                return
        self._emit_text(self._stray.feed(text))

    def _end_unmarked(self, *, is_cut: bool) -> None:
        """Emit what was held back since a call may begin there: calls, or text. Part of a call is left out."""
        text, self._unmarked = self._unmarked, ""
        if not text:
            return
        assert self._opening is not None  # noqa: S101 - nothing else holds text back
        if (is_cut and self._opening.is_part(text)) or (
            calls.is_marks(text) and (self._calls or self._name == "tool")  # marks around those of a call
        ):
            return
        found, rest = ([], text) if is_cut else (calls.unmarked(text, self._tools), "")
        if not found and not is_cut:
            found, rest = calls.before_text(text, self._tools)
        if found:
            self._emit_calls(found)
            self._is_after_mark = True
        if self.reason is None:
            self._emit_text(self._stray.feed(rest))

    def _emit_text(self, text: str) -> None:
        if self._is_after_mark:  # white space between a mark and the answer is the template's
            text = text.lstrip()
        if text:
            self._is_after_mark = False
            self._emit(Text(text))

    def _emit(self, event: Text | Reasoning) -> None:
        """Emit an event, merged into the last one of its kind: a client gets one piece per step, not one per token."""
        last = self._events[-1] if self._events else None
        if isinstance(last, Text | Reasoning) and type(last) is type(event):
            self._events[-1] = type(event)(last.text + event.text)
        else:
            self._events.append(event)

    def _end_call(self, *, is_closed: bool = True) -> None:
        """Emit the calls in the text between two marks; what is none is emitted as text, so that nothing is lost."""
        text, self._call = self._call, ""
        tokenizer, rest = self._model.tokenizer, ""
        start, end = tokenizer.tool_call_start, tokenizer.tool_call_end or ""
        has_marks, self._marks_in_call = self._marks_in_call > 0, 0
        # An argument that nothing closed has no marks in it.
        is_whole = not (has_marks and calls.is_open(text))
        found = calls.read(text, self._tools, tokenizer.tool_parser, opening=start) if is_whole else []
        if not found and not is_closed and not has_marks:
            found, rest = calls.before_text(text, self._tools)
        if not found and has_marks:
            self._end_each_call(text + (end if is_closed else ""), is_closed=is_closed)
        elif found:
            self._emit_calls(found)
            self._is_after_mark = True
            if self.reason is None:
                self._emit_text(rest.replace(start or "\0", ""))
        elif self._tools:
            text = _TOKEN.sub("", text.replace(start or "\0", ""))
            if self._name == "reasoning":
                self._think(text)
            else:
                self._emit_text(self._stray.feed(text))
        else:  # no mark of a call means anything
            self._is_after_mark = False
            self._emit_text(f"{start}{text}{end if is_closed else ''}")

    def _end_each_call(self, text: str, *, is_closed: bool) -> None:
        """Read a text again in which each closing mark closes a call."""
        self._may_hold_marks = False
        self._call, _, rest = text.partition(self._model.tokenizer.tool_call_end or "")
        self._name = "reasoning" if self._is_call_in_reasoning else "normal"
        self._state = self._model.marks.make_state(self._name)
        self._is_after_mark, self._line_ends = True, ""
        self._end_call()
        self._split(rest)
        if not is_closed:
            self._flush()
            if self._name == "tool":
                self._end_call(is_closed=False)

    def _emit_calls(self, found: Sequence[ToolCall]) -> None:
        self._events += found if self._is_parallel else found[:1]
        self._calls += len(found)
        if found and not self._is_parallel:
            self.reason = "tool_calls"


class StrayMarks:
    """Removes a closing mark that closes nothing, and holds back text that may be the beginning of one."""

    def __init__(self, mark: str) -> None:
        """`mark`: ''  for none."""
        self._mark = mark
        self._held = ""

    def feed(self, text: str) -> str:
        """Read more text, and return what is certain to be text."""
        if not self._mark:
            return text
        text = (self._held + text).replace(self._mark, "")
        keep = _overlap(text, self._mark)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text that was held back, now that nothing follows; half a mark is none."""
        held, self._held = self._held, ""
        return held if len(held) == 1 else ""


def _opening(tools: Sequence[Tool]) -> Opening | None:
    try:
        return Opening(tools)
    except ValueError:
        return None
