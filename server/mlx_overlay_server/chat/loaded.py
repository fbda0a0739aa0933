"""A loaded model as everything outside the engine sees it: its tokenizer and its limits, and no MLX array."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What is used of `mlx_lm.tokenizer_utils.TokenizerWrapper`."""

    has_chat_template: bool
    has_thinking: bool
    has_tool_calling: bool
    think_start: str | None
    think_end_tokens: tuple[int, ...] | None
    tool_call_start: str | None
    tool_call_end: str | None
    tool_parser: Any
    response_initial_state: str | None
    chat_template: Any
    eos_token_ids: set[int]
    detokenizer: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]: ...
    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool, **kwargs: Any) -> str: ...


@dataclass(frozen=True, eq=False)
class Loaded:
    """A resident model."""

    key: str
    """Names it in the engine; another load of the same folder has another key."""
    path: str
    tokenizer: Tokenizer
    machine: Any
    """mlx_lm's TextStateMachine: splits text at think and tool-call marks."""
    nbytes: int
    """Of its weights, in memory."""
    vocab_size: int
    context: int | None
    """Tokens that prompt and answer may have together, as its config says."""
    defaults: Mapping[str, Any]
    """Its generation_config.json."""
    longest_token: int = 1 << 20
    """Characters of the longest token: a text has at least so many tokens as that goes into it."""
    processor: Any = None
    """mlx_lm's image processor; None: the model takes no images."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def detokenizer(self) -> Any:
        """mlx-lm's streaming detokenizer, for one answer; where it has but a slow one, the tokenizers library's."""
        made = self.tokenizer.detokenizer
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        if type(made).__name__ == "NaiveStreamingDetokenizer" and inner is not None:
            return _Detokenizer(inner)
        return made

    @functools.cached_property
    def _grammar_tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        # The wrapped tokenizer: mlx_lm's wrapper is none of transformers' classes.
        inner = self.tokenizer._tokenizer  # type: ignore[attr-defined]  # noqa: SLF001
        return from_tokenizer(inner, n_vocab=self.vocab_size, eos_token=sorted(self.tokenizer.eos_token_ids))

    @property
    def grammar_tokenizer(self) -> Any:
        """llguidance's view of the vocabulary, made at first use (up to a second). Raises ValueError."""
        with self._lock:
            return self._grammar_tokenizer

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, which need be no whole character."""
        text = self.tokenizer.convert_ids_to_tokens([token])[0]
        if text is None:  # a row of the output that no token has
            return b""
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):  # byte fallback, as in Llama 2
            return bytes([int(text[3:5], 16)])
        whole = self.tokenizer.decode([token])
        if "\ufffd" in whole and all(char in _BYTE_OF for char in text):  # a part of a character, in byte-level BPE
            return bytes(_BYTE_OF[char] for char in text)
        return whole.encode()


class _Detokenizer:
    """As mlx-lm's, whose naive one decodes the whole line anew for each token."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._text = ""
        self._unfinished: list[int] = []
        """Tokens of a character that is not complete."""

    def add_token(self, token: int) -> None:
        """One more."""
        self._unfinished.append(token)
        if text := self._stream.step(self._tokenizer, token):
            self._text += text
            self._unfinished.clear()

    def finalize(self) -> None:
        """There are no more."""
        if self._unfinished:
            self._text += self._tokenizer.decode(self._unfinished, skip_special_tokens=False)
            self._unfinished.clear()

    @property
    def last_segment(self) -> str:
        """The text since it was last asked for."""
        text, self._text = self._text, ""
        return text


def _byte_of() -> dict[str, int]:
    """Byte-level BPE's characters; printable bytes stand for themselves (openai/gpt-2, encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_of()
