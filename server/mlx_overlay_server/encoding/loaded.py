"""A loaded model that embeds or ranks texts, as everything outside the engine sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from hf_overlay import Task

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.errors import Failed
from mlx_overlay_server.memory import NO_KV, KvSize
from mlx_overlay_server.speech.values import LoadedSpeech

Way = Literal["embedding", "pair", "dialogue", "template"]
"""What a model reads: a text of its own; a query and a document as a pair; or both in a question to a chat model, which
is Qwen3-Reranker's dialogue, or what the model's own chat template makes of them."""


class Passage(NamedTuple):
    """One text, or one pair of texts, as a model reads it."""

    tokens: tuple[int, ...]
    first: int
    """How many of them belong to the first text of a pair; for a single text all."""


@dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """A resident model that embeds or ranks."""

    key: str
    """Names it in the engine; another load of the same folder has another key."""
    path: str
    """Its folder."""
    way: Way
    nbytes: int
    """Bytes of its weights in memory."""
    vocab_size: int
    context: int | None
    """Tokens that a text may have, the marks at its ends included; None: nobody knows."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Texts that go before what is embedded, by name."""
    default_prompt: str | None = None
    """The name of the prompt of requests that name none."""
    lowers: bool = False
    """Whether texts are in lower case."""
    kv: KvSize = NO_KV
    """What the KV cache of a sequence takes."""
    trusts_code: bool = False
    """Whether to run Python files that come with the model."""

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer. It is read at first use, which is in a preparation process. Raises Failed."""
        from transformers import AutoTokenizer  # noqa: TID251 - not the server's process, which never asks for it

        try:
            made = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=self.trusts_code)
        except (Exception, SystemExit) as error:
            raise Failed(f"the model's tokenizer cannot be read: {type(error).__name__}") from error
        made.model_max_length = 1 << 60  # it would log a warning for long texts, which are refused or cut anyway
        return made

    @property
    def sees(self) -> bool:
        """Whether requests to it may have images."""
        return False

    @property
    def task(self) -> Task:
        """What it does with text."""
        return "embedding" if self.way == "embedding" else "reranker"


AnyLoaded = Loaded | LoadedEncoder | LoadedSpeech
"""A resident model, whatever it does."""
