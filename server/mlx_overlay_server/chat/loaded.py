"""A loaded model as everything outside the engine sees it: its tokenizer and its limits, and no MLX array."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from hf_overlay import Task

from mlx_overlay_server.memory import NO_KV, KvSize


class Tokenizer(Protocol):
    """The part of `mlx_lm.tokenizer_utils.TokenizerWrapper` that is used outside the engine."""

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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]: ...
    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool, **kwargs: Any) -> str: ...


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text as they come."""

    @property
    def last_segment(self) -> str:
        """The text since this was last read."""

    def add_token(self, token: int) -> None: ...
    def finalize(self) -> None: ...


class Marks(Protocol):
    """Splits an answer's text at a model's marks for reasoning and tool calls: `mlx_lm.generate.TextStateMachine`.

    A state is opaque. Segments are (name of the part, text); text that may become a mark is held in the state.
    """

    def make_state(self, initial: str) -> Any: ...
    def split(self, state: Any, text: str) -> tuple[Any, list[tuple[str, str]]]: ...
    def flush(self, state: Any) -> tuple[Any, str, str]:
        """Return (state, the text that was held, name of its part)."""


class Shown(NamedTuple):
    """What a model sees of a prompt's images."""

    arrays: Mapping[str, Any]
    """NumPy arrays by the names that the model has for them."""
    identity: tuple[int, ...]
    """The prompt's tokens, with numbers of each image's own in place of its marks."""


class ImageProcessor(Protocol):
    """Turns images into what a model sees."""

    def shown(self, text: str, images: Sequence[Any]) -> tuple[list[int], Shown]:
        """Return the tokens of a prompt with images, which are Pillow's, and what the model sees of them.

        Raises ValueError where the text and the images do not go together.
        """


_LENGTHS = ("max_trained_positions", "max_position_embeddings", "max_sequence_length", "seq_length", "n_positions")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens prompt and answer may have together; None when a config.json does not say."""
    for part in (config, config.get("text_config")):
        for name in _LENGTHS:
            if isinstance(part, Mapping) and isinstance(part.get(name), int):
                return int(part[name])
    return None


@dataclass(frozen=True, eq=False)
class Loaded:
    """A resident model."""

    key: str
    """Names it in the engine; another load of the same folder has another key."""
    path: str
    """Its folder."""
    tokenizer: Tokenizer
    """In the server's process it may be a part of the tokenizer: `engine.tokenizers.AnswerTokenizer`."""
    marks: Marks
    detokenizer: Callable[[], Detokenizer]
    """Makes a detokenizer for one answer."""
    make_grammar_tokenizer: Callable[[], Any]
    """Makes llguidance's view of the vocabulary; use `grammar_tokenizer`, which makes it once."""
    nbytes: int
    """Bytes of its weights in memory."""
    vocab_size: int
    """Columns of its logits."""
    context: int | None
    """Tokens that prompt and answer may have together, as its config says or memory allows; None: nobody knows."""
    defaults: Mapping[str, Any]
    """Its generation_config.json."""
    letter: tuple[int, ...] = ()
    """The tokens of one letter: as a context, they show decoders that the next token does not begin a text."""
    whole: bytes = b""
    """The whole tokenizer, pickled, for preparation processes; b"": `tokenizer` is the whole."""
    longest_token: int = 1 << 20
    """Characters of the longest token: a text has at least its own length divided by this many tokens."""
    has_own_calls: bool = True
    """Whether mlx-lm knows the model's own form of tool calls; the server's form (`tool_text`) is read otherwise."""
    processor: Any = None
    """mlx_lm's image processor; None: mlx-lm shows the model no images."""
    vision: ImageProcessor | None = None
    """mlx-vlm's; None: mlx-vlm does not run the model."""
    kv: KvSize = NO_KV
    """What the KV cache of a sequence takes."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    task: ClassVar[Task] = "text"
    """What it does with text."""

    @functools.cached_property
    def _grammar_tokenizer(self) -> Any:
        return self.make_grammar_tokenizer()

    @property
    def grammar_tokenizer(self) -> Any:
        """llguidance's view of the vocabulary, made at first use, which takes up to a second. Raises ValueError."""
        with self._lock:
            return self._grammar_tokenizer

    @property
    def sees(self) -> bool:
        """Whether requests to it may have images."""
        return self.processor is not None or self.vision is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process is made of: all but the lock, and what is made at first use."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_grammar_tokenizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the copy."""
        vars(self).update(state, _lock=threading.Lock())

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, which may end inside a character."""
        text = self.tokenizer.convert_ids_to_tokens([token])[0]
        if text is None:  # logits may have more columns than there are tokens
            return b""
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):  # byte fallback, as in Llama 2
            return bytes([int(text[3:5], 16)])
        whole = self._decoded_after_text(token)
        if "\ufffd" in whole and all(char in _BYTE_OF for char in text):  # a part of a character, in byte-level BPE
            return bytes(_BYTE_OF[char] for char in text)
        return whole.encode()

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return sorted(token for token in self.tokenizer.eos_token_ids if token < self.vocab_size)

    def _decoded_after_text(self, token: int) -> str:
        """Return a token's text where other text precedes it: at the start of a text, decoders drop a space."""
        before, whole = self.tokenizer.decode([*self.letter]), self.tokenizer.decode([*self.letter, token])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode([token])


def _byte_of() -> dict[str, int]:
    """Return the byte that each character of byte-level BPE stands for, as in openai/gpt-2, encoder.py."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_of()
