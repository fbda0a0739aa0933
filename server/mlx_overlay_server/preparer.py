"""A preparation process as the event loop sees it: asked one thing at a time, and killed."""

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
        """Keys of the models that it has got."""
        self.has_read: str | None = None
        """Key of the model whose tokenizer it has read last, and keeps until it gets the model."""

    async def read_tokenizer(self, key: str, arguments: bytes) -> Result:
        """Have it read a model's tokenizer; `arguments`: those of `tokenizers.sent`, a pickled tuple. Raises Ended."""
        result = await self.ask(("tokenizer", key, arguments))
        self.has_read = key
        return result

    async def teach(self, key: str, model: bytes, tokenizer: bytes) -> Result:
        """Give it a model and its whole tokenizer, both pickled; b"" where the model holds that. Raises Ended."""
        result = await self.ask(("model", key, model, b"" if self.has_read == key else tokenizer, sys.path))
        if result.unexpected is None:
            self.models.add(key)
        return result

    def forget(self, key: str) -> None:
        """Let it drop a model."""
        if key in self.models:
            self.models.discard(key)
            self.post(("forget", key))

    async def work(self, name: str, key: str, arguments: bytes) -> Result:
        """Run one of the functions of `work.WORK` on a model; `arguments` is a pickled tuple. Raises Ended."""
        return await self.ask(("work", name, key, arguments))
