"""Looks at many places of one disk, several at a time where the disk is slow.

A network drive answers in milliseconds, and each look takes dozens of calls. A local disk answers from memory, and
threads would only hinder each other. So the first looks are made one after the other, and timed. On a busy
machine looks wait for the processor as well: some of them, and for a few times as long as they work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from hf_overlay.progress import alive, reporting

Item = TypeVar("Item")
Answer = TypeVar("Answer")

THREADS = 64
_WAIT_SECONDS = 0.002
"""Seconds: a disk that makes most looks wait for this long is slow, ..."""
_WAIT_FACTOR = 15
"""... and for so many times as long as they work: who waits for the processor waits less."""
_FIRST = 4
"""How many looks are made before a disk may count as slow."""
_TIMED = 16
"""One of so many further looks is timed, because timing takes a third as long as looking."""
_REPORT_SECONDS = 0.1


class Abreast:
    """Looks at the places of one disk, and finds out whether it is slow."""

    def __init__(self) -> None:
        self.is_slow = False

    def each(self, look: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
        """Return what `look` returns for each item, in order.

        It raises what a look raises, when it is that item's turn.

        Other threads may make the looks, and ahead of their turn.
        """
        items = list(items)
        timed, late = 0, 0
        for number, item in enumerate(items):
            if self.is_slow:
                yield from _by_threads(look, items[number:])
                return
            if number >= _FIRST and number % _TIMED:
                yield look(item)
                continue
            began, worked = time.monotonic(), time.thread_time()
            answer = look(item)
            timed += 1
            worked = time.thread_time() - worked
            late += time.monotonic() - began - worked > max(_WAIT_SECONDS, _WAIT_FACTOR * worked)
            self.is_slow = timed >= _FIRST and late > timed / 2
            yield answer


def _by_threads(look: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
    """Do the same with threads. Nobody waits for them at the end, because a disk may never answer."""
    from queue import Empty, SimpleQueue  # imported here, because local disks need no threads

    numbers = iter(range(len(items)))
    answers: SimpleQueue[tuple[int, Answer | None, BaseException | None]] = SimpleQueue()
    is_over, has_progressed = threading.Event(), threading.Event()

    def work() -> None:
        with reporting(has_progressed.set):
            for number in numbers:
                if is_over.is_set():
                    return
                try:
                    answers.put((number, look(items[number]), None))
                except BaseException as error:  # noqa: BLE001 - raised by who asked
                    answers.put((number, None, error))

    for _ in range(min(THREADS, len(items))):
        threading.Thread(target=work, name="looks at a slow disk", daemon=True).start()
    early: dict[int, tuple[Answer | None, BaseException | None]] = {}
    try:
        for number in range(len(items)):
            while number not in early:
                # Only this thread reports progress: the question may be over when another thread goes on.
                with suppress(Empty):
                    got, answer, problem = answers.get(timeout=_REPORT_SECONDS)
                    early[got] = (answer, problem)
                    has_progressed.set()
                if has_progressed.is_set():
                    has_progressed.clear()
                    alive()
            value, error = early.pop(number)
            if error is not None:
                raise error
            yield value  # type: ignore[misc]  # which may be None itself
    finally:
        is_over.set()
