"""mlx-lm's tokenizers, their detokenizers, and what llguidance makes of them: a part of `mlx`.

What the docstring of `mlx` says holds here, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from mlx_overlay_server.chat import harmony
from mlx_overlay_server.engine import mlx  # noqa: F401 - before anything else imports mlx-lm

# isort: split
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer
from mlx_lm.tool_parsers import json_tools


def prepare_tokenizer(tokenizer: Any) -> bool:
    """Make a tokenizer that mlx-lm has loaded ready for calls from several threads, and for tool calls.

    Return whether the model's own form of tool calls is known.
    """
    tokenizer.model_max_length = 1 << 60  # transformers would log a warning for long prompts; the server refuses them
    tokenizer.encode("")  # the first call may change the tokenizer's settings
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() >= harmony.TOKENS and not tokenizer.response_transitions:
        tokenizer._response_format = harmony.RESPONSE_FORMAT  # noqa: SLF001 - the wrapper takes them in __init__ alone
        tokenizer.eos_token_ids |= {vocabulary[end] for end in harmony.ENDS}
        _read_calls(tokenizer, harmony.parse_tool_call, harmony.CALL_START, harmony.CALL_END)
    if tokenizer.has_tool_calling:
        return True
    # The server writes tools into the prompt itself then, and asks for this form.
    _read_calls(tokenizer, json_tools.parse_tool_call, json_tools.tool_call_start, json_tools.tool_call_end)
    return False


def _read_calls(tokenizer: Any, parser: Callable[..., Any], start: str, end: str) -> None:
    tokenizer._tool_parser = parser  # noqa: SLF001 - as above
    tokenizer._tool_call_start = start  # noqa: SLF001
    tokenizer._tool_call_end = end  # noqa: SLF001


def backend(tokenizer: Any) -> Any:
    """Return the tokenizers library's own object of a tokenizer; None: it is none of that library's."""
    return getattr(tokenizer, "backend_tokenizer", None)


def own_detokenizer(tokenizer: Any) -> Any:
    """Return what mlx-lm copies for each answer; None where `StreamDetokenizer` takes its place.

    That is where mlx-lm has only its naive detokenizer, which decodes the whole line anew for each token.
    """
    made = tokenizer._detokenizer  # noqa: SLF001 - it is made at once; the public property copies it
    return None if isinstance(made, NaiveStreamingDetokenizer) and backend(tokenizer) is not None else made


def copied_detokenizer(made: Any) -> Any:
    """Return a new streaming detokenizer like another one."""
    own = copy.copy(made)
    own.reset()
    return own


def detokenizer(tokenizer: Any) -> Any:
    """Return a new streaming detokenizer for one answer."""
    made = own_detokenizer(tokenizer)
    return StreamDetokenizer(backend(tokenizer)) if made is None else copied_detokenizer(made)


def grammar_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """Return llguidance's view of a tokenizer's vocabulary; takes up to a second. Raises ValueError."""
    from llguidance import LLTokenizer

    inner = backend(tokenizer)
    if inner is None:
        raise ValueError("only tokenizers of the tokenizers library are supported")
    return LLTokenizer(plain_json(inner), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids))


def plain_json(inner: Any) -> str:
    """Return an object of the tokenizers library as it writes it, without padding and truncation."""
    own = copy.copy(inner)
    own.no_padding()
    own.no_truncation()
    return str(own.to_str())


class StreamDetokenizer:
    """The tokenizers library's stream of text, with the methods of mlx-lm's detokenizers that the server uses."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._text = ""
        self._unfinished: list[int] = []
        """Tokens of a character that is not complete."""

    def add_token(self, token: int) -> None:
        """Read one more token."""
        self._unfinished.append(token)
        if text := self._stream.step(self._tokenizer, token):
            self._text += text
            self._unfinished.clear()

    def finalize(self) -> None:
        """Turn the tokens of a character that stays incomplete into text: no token follows."""
        if self._unfinished:
            self._text += self._tokenizer.decode(self._unfinished, skip_special_tokens=False)
            self._unfinished.clear()

    @property
    def last_segment(self) -> str:
        """The text since this was last read."""
        text, self._text = self._text, ""
        return text
