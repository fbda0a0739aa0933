"""A preparation process as the event loop sees it: it does one thing at a time, and can be killed."""

from __future__ import annotations

import sys

from mlx_overlay_server.frames import Result
from mlx_overlay_server.peer import Ended, Peer

__all__ = ["Ended", "Process"]


class Process(Peer):
    """One preparation process."""

    def __init__(self) -> None:
        super().__init__("mlx_overlay_server.preparation.program")
        self.models: set[str] = set()
        """The keys of the models that it knows."""
        self.has_read: str | None = None
        """The key of the model whose tokenizer it read last, and keeps until it gets that model."""

    async def read_tokenizer(self, key: str, arguments: bytes) -> Result:
        """Let the process read a model's tokenizer; `arguments`: those of `tokenizers.sent`, as a pickled tuple.

        Raises Ended.
        """
        result = await self.ask(("tokenizer", key, arguments))
        self.has_read = key
        return result

    async def teach(self, key: str, model: bytes, tokenizer: bytes) -> Result:
        """Give the process a model and its whole tokenizer, both pickled; b"" where the model contains it.

        Raises Ended.
        """
        result = await self.ask(("model", key, model, b"" if self.has_read == key else tokenizer, sys.path))
        if result.unexpected is None:
            self.models.add(key)
        return result

    def forget(self, key: str) -> None:
        """Let the process drop a model."""
        if key in self.models:
            self.models.discard(key)
            self.post(("forget", key))

    async def work(self, name: str, key: str, arguments: bytes) -> Result:
        """Run one of the functions of `work.WORK` on a model; `arguments` is a pickled tuple. Raises Ended."""
        return await self.ask(("work", name, key, arguments))
