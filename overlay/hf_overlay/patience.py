"""Asks questions of disks that may never answer, such as a network mount whose server is gone.

A system call on such a mount does not return, and nothing can interrupt it. So each question runs in a thread of its
own, which is given up on when it makes no progress for `STALL_SECONDS`. A slow disk is not given up on: what takes long
reports progress with `alive`. The threads are daemons, for which a program that ends does not wait.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Generic, TypeVar

Answer = TypeVar("Answer")

STALL_SECONDS = 1.5
"""A disk that gives no sign of life for so long does not answer. It may yet: one that spins up takes a few seconds."""


class NoAnswer(OSError):
    """A disk does not answer, now or since an earlier question."""

    def __init__(self, root: str) -> None:
        super().__init__(errno.ETIMEDOUT, "does not answer", root)


_report: ContextVar[Callable[[], None]] = ContextVar("report", default=lambda: None)
"""Reports progress of the question that this thread works on."""


def alive() -> None:
    """Report that the disk has just answered a part of the question. Outside of a question it does nothing."""
    _report.get()()


class _Question(Generic[Answer]):
    """A function at work in a thread."""

    def __init__(self, root: str, function: Callable[[], Answer]) -> None:
        self.root = root
        self._function = function
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._progress = time.monotonic()
        threading.Thread(target=self._work, name=f"asks {root}", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def answer(self, seconds: float) -> Answer:
        """What the function returns or raises. Raises NoAnswer after so many seconds without progress."""
        while not self._ended.wait(max(0.0, self._progress + seconds - time.monotonic())):
            if time.monotonic() >= self._progress + seconds:
                raise NoAnswer(self.root)
        if self._error is not None:
            raise self._error
        return self._answer  # type: ignore[return-value]  # which may be None itself

    def _work(self) -> None:
        _report.set(self._has_progressed)
        try:
            self._answer = self._function()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asks
            self._error = error
        self._ended.set()

    def _has_progressed(self) -> None:
        self._progress = time.monotonic()


class Patience:
    """Asks questions, and remembers which disks have not answered. Safe to use from several threads."""

    def __init__(self, seconds: float = STALL_SECONDS) -> None:
        self._seconds = seconds
        self._open: dict[str, _Question[object]] = {}
        """By root, a question that was given up on and has not ended."""

    def is_waiting_for(self, root: str) -> bool:
        """Whether an earlier question about this root is still without an answer."""
        question = self._open.get(root)
        if question is not None and question.has_ended:
            self._open.pop(root, None)
            return False
        return question is not None

    def ask(self, root: str, function: Callable[[], Answer]) -> Answer:
        """What the function returns or raises, which looks at nothing but the disk of `root`.

        Raises NoAnswer when it makes no progress, and at once while an earlier question about that root is open: so
        threads do not pile up.
        """
        return self._answer(self._begin(root, function))

    def ask_each(self, functions: Mapping[str, Callable[[], Answer]]) -> dict[str, Answer | OSError]:
        """For each root, what its function returns, or the OSError that `ask` would raise. All are asked at once."""
        answers: dict[str, Answer | OSError] = {}
        begun: dict[str, _Question[Answer]] = {}
        for root, function in functions.items():
            try:
                begun[root] = self._begin(root, function)
            except NoAnswer as error:
                answers[root] = error
        for root, question in begun.items():
            try:
                answers[root] = self._answer(question)
            except OSError as error:
                answers[root] = error
        return answers

    def _begin(self, root: str, function: Callable[[], Answer]) -> _Question[Answer]:
        if self.is_waiting_for(root):
            raise NoAnswer(root)
        return _Question(root, function)

    def _answer(self, question: _Question[Answer]) -> Answer:
        try:
            return question.answer(self._seconds)
        except NoAnswer:
            if not question.has_ended:
                self._open[question.root] = question  # type: ignore[assignment]  # its answer is not wanted any more
            raise
