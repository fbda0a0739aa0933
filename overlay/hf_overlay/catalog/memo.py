"""The one rule for "unchanged since": a value worked out from the disk holds while certain paths look the same.

A path looks the same while its inode, times and size do, or while it is missing in the same way. Adding, removing or
renaming something changes the times of the folder it is in. Writing into an existing file does not: whoever remembers
a value must watch each file that may be written to, or remember it only once nobody writes any more.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from hf_overlay.progress import alive, reporter

Value = TypeVar("Value")

Stamps = tuple[tuple[str, tuple[int, ...]], ...]
"""Paths, each with how it looked."""


def stamps(paths: Iterable[str]) -> Stamps:
    """Paths, each with how it looks now. Where a value's paths are known beforehand, take these before the value."""
    return tuple((path, _stamp(path)) for path in paths)


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """The part of a path's status that changes when the path is changed or replaced."""
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


class Kept(NamedTuple, Generic[Value]):
    """A value, with the paths that it depends on."""

    value: Value
    stamps: Stamps


class Memo(Generic[Value]):
    """Values from one round of looking at the disk, which may recall those of the round before.

    A value that a round neither recalls nor remembers is forgotten with the round after it. Rounds do not disturb each
    other, so that threads may have rounds of their own.
    """

    def __init__(
        self,
        before: Mapping[str, Kept[Value]] | None = None,
        *,
        is_same: Callable[[str, Value], bool] | None = None,
    ) -> None:
        """Begin a first round; later ones come from `next_round`.

        It may recall the values of `before`, from an earlier process, for which `is_same` looks at more than the paths.
        """
        self._before = before or {}
        self._is_same = is_same
        self.kept: dict[str, Kept[Value]] = {}
        """What this round has recalled or remembered so far."""
        self._has_news = False

    def next_round(self) -> "Memo[Value]":
        """A new round, which can recall the values of this one."""
        return Memo(self.kept)

    @property
    def has_changed(self) -> bool:
        """Whether this round holds other values than the one before."""
        return self._has_news or len(self.kept) != len(self._before)

    def recall(self, key: str) -> Value | None:
        """The value remembered for `key`, if nothing it depends on has changed; None otherwise."""
        kept = self._before.get(key)
        if kept is None:
            return None
        report = reporter()
        for path, looked in kept.stamps:
            report()
            try:
                status = os.stat(path)
            except OSError as error:
                if looked != _missing(error):
                    return None
                continue
            # As `stamp`, without a call: a refresh spends most of its time in this loop.
            if looked != (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size):
                return None
        if self._is_same is not None and not self._is_same(key, kept.value):
            return None
        self.kept[key] = kept
        return kept.value

    def knew(self, key: str) -> bool:
        """Whether the round before kept a value for `key`, be it that it holds no more."""
        return key in self._before

    def remember(self, key: str, value: Value, looked: Stamps) -> None:
        """Keep a value for as long as the paths look as they did in `looked`."""
        self._has_news = True
        self.kept[key] = Kept(value, looked)


def _stamp(path: str) -> tuple[int, ...]:
    alive()
    try:
        return stamp(os.stat(path))
    except OSError as error:
        return _missing(error)


def _missing(error: OSError) -> tuple[int, ...]:
    """The stamp of a path that cannot be looked at."""
    return (error.errno or 0,)
