"""Counts the values in a JSON body as it arrives, because decoding very many would block the event loop."""

from __future__ import annotations

MAX_VALUES = 200_000
"""The most values in a body. A prompt of this many token ids, and a conversation of 10,000 messages, have fewer."""
MAX_CONTAINERS = 32_000
"""The most objects and arrays in a body. Each costs many times what a number does. 10,000 messages of one part have
30,000.
"""


class ValueCount:
    """Counts the values in the part of a JSON body that has arrived. The contents of strings are skipped."""

    def __init__(self) -> None:
        self._containers = 0
        self._commas = 0
        self._is_in_string = False
        self._rest = b""

    @property
    def is_too_many(self) -> bool:
        """Whether there are more than the server decodes."""
        return self._containers > MAX_CONTAINERS or self._containers + self._commas > MAX_VALUES

    def feed(self, chunk: bytes) -> None:
        """Count what is in the next chunk of the body."""
        data = self._rest + chunk
        self._rest = b"\\" * ((len(data) - len(data.rstrip(b"\\"))) % 2)  # the escaped character is in the next chunk
        data = data.removesuffix(self._rest) if self._rest else data
        parts = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        for part in parts[self._is_in_string :: 2]:
            self._commas += part.count(b",")
            self._containers += part.count(b"{") + part.count(b"[")
        self._is_in_string ^= len(parts) % 2 == 0
