"""Reads models' tokenizers, and extracts the part of each that turns answers into text.

A tokenizer is an object of transformers, whose import takes a second and 40 MB. So a preparation process reads it,
where prompts are made, too. The server's process gets only the part for answers, which needs no transformers.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm.generate import make_text_state_machine
from mlx_lm.utils import load_tokenizer

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import mlx_tokenizers
from mlx_overlay_server.engine.failures import Unreadable


@dataclass(frozen=True, eq=False)
class AnswerTokenizer:
    """The part of a tokenizer that turns tokens into text, with the names of mlx-lm's TokenizerWrapper."""

    size: int
    """Tokens in its vocabulary."""
    eos_token_ids: set[int]
    tool_call_start: str | None
    tool_call_end: str | None
    tool_parser: Any
    response_initial_state: str | None
    json: str | None
    """The tokenizer as JSON of the tokenizers library; None where it is written in another way."""
    _detokenizer: Any
    """The detokenizer that `mlx_tokenizers.own_detokenizer` returned."""
    _whole: Any = None
    """The whole tokenizer, where there is no `json`."""

    def __len__(self) -> int:
        return self.size

    @cached_property
    def backend_tokenizer(self) -> Any:
        """The tokenizers library's object, made at first use for log probabilities, grammars and some models."""
        from tokenizers import Tokenizer

        return None if self.json is None else Tokenizer.from_str(self.json)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, special ones included."""
        if self.json is None:
            return str(self._whole.decode(tokens))
        return str(self.backend_tokenizer.decode(tokens, skip_special_tokens=False))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """Return each token as the vocabulary writes it; None for ids without one."""
        if self.json is None:
            return list(self._whole.convert_ids_to_tokens(ids))
        return [self.backend_tokenizer.id_to_token(each) for each in ids]


class Read(NamedTuple):
    """A model's tokenizer as it was read. All fields but the first two are fields of Loaded."""

    whole: bytes
    """The whole tokenizer, pickled, for preparation processes; b"" where `tokenizer` is the whole one."""
    tokenizer: Any
    marks: Any
    letter: tuple[int, ...]
    longest_token: int
    has_own_calls: bool


def read_here(path: str, options: Mapping[str, Any], end_tokens: Any) -> Read:
    """Read the tokenizer in a folder in this process, which has imported mlx-lm with transformers.

    `options` are for transformers; `end_tokens` are those of the model's config.json.
    """
    return described(load_tokenizer(Path(path), dict(options), end_tokens))


def described(tokenizer: Any) -> Read:
    """Describe a tokenizer that mlx-lm has read; `tokenizer` of the result is the whole one."""
    has_own_calls = mlx_tokenizers.prepare_tokenizer(tokenizer)
    return Read(
        b"",
        tokenizer,
        make_text_state_machine(tokenizer),
        tuple(tokenizer.encode("a", add_special_tokens=False)),
        max(map(len, tokenizer.get_vocab()), default=1),
        has_own_calls,
    )


def cut(read: Read) -> Read:
    """Return the same with only the part for answers in `tokenizer`, and the whole one pickled in `whole`."""
    tokenizer = read.tokenizer
    inner = mlx_tokenizers.backend(tokenizer)
    json = None if inner is None else mlx_tokenizers.plain_json(inner)
    part = AnswerTokenizer(
        len(tokenizer),
        set(tokenizer.eos_token_ids),
        tokenizer.tool_call_start,
        tokenizer.tool_call_end,
        tokenizer.tool_parser,
        tokenizer.response_initial_state,
        json,
        mlx_tokenizers.own_detokenizer(tokenizer),
        tokenizer if json is None else None,
    )
    return read._replace(tokenizer=part, whole=pickle.dumps(tokenizer, pickle.HIGHEST_PROTOCOL))


def sent(path: str, options: Mapping[str, Any], end_tokens: Any) -> tuple[bytes, Any]:
    """Read a tokenizer for another process, which hands the bytes to `received`; also return it (or None).

    This may run code that comes with the model, which may raise or do anything.
    """
    whole = None
    try:
        read = read_here(path, options, end_tokens)
        whole = read.tokenizer
        result: Read | Unreadable = cut(read)
        data = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except BaseException as error:  # noqa: BLE001 - the boundary: a panic in Rust and sys.exit are no Exceptions
        data = pickle.dumps(Unreadable(type(error).__name__, str(error)))
    return pickle.dumps((tuple(sys.path), data)), whole


def received(data: bytes) -> Read:
    """Return the tokenizer that another process has sent with `sent`. Raises Unreadable."""
    path, inner = pickle.loads(data)  # noqa: S301 - from our own program
    sys.path += [
        folder for folder in path if folder not in sys.path
    ]  # the tokenizer's class may be code that came with its model
    result = pickle.loads(inner)  # noqa: S301
    if isinstance(result, Unreadable):
        raise result
    assert isinstance(result, Read)  # noqa: S101
    return result


def with_whole(model: Loaded, tokenizer: Any) -> Loaded:
    """Return a model for a preparation process: with the whole tokenizer instead of the part for answers."""
    return replace(
        model,
        tokenizer=tokenizer,
        detokenizer=partial(mlx_tokenizers.detokenizer, tokenizer),
        make_grammar_tokenizer=partial(mlx_tokenizers.grammar_tokenizer, tokenizer, model.vocab_size),
        whole=b"",
    )
