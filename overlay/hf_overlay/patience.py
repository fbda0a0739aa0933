"""Asks questions of disks that may never answer, such as a network mount whose server is gone.

A system call on such a mount does not return, and nothing can interrupt it. So each question runs in a thread of its
own, which is given up on when it makes no progress for `STALL_SECONDS`. A slow disk is not given up on, because long
work reports progress with `alive`. On a busy machine, work that reports nothing may take long, too: where the system
tells how much processor time a thread has used (Linux), using some is progress. The threads are daemons, which no
program waits for at its end. Some mounts hold even a process that is killed; there, the thread asks a helper process.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hf_overlay.errors import check_descriptors
from hf_overlay.mounts import may_hang
from hf_overlay.progress import alive, reporting

if TYPE_CHECKING:
    from hf_overlay.helper import Helper

Answer = TypeVar("Answer")

STALL_SECONDS = 1.2
"""Seconds without a sign of life after which a disk "does not answer". It may still: some take seconds to spin up."""
_TURN_SECONDS = 0.2
_WORK_SECONDS = 0.005
"""Processor time within one turn that a thread uses which works; one that waits for a disk uses less."""


class NoAnswer(OSError):
    """A disk does not answer, now or since an earlier question."""

    def __init__(self, root: str) -> None:
        super().__init__(errno.ETIMEDOUT, "does not answer", root)


class _Question(Generic[Answer]):
    """A function that runs in a thread."""

    def __init__(self, root: str, function: Callable[[], Answer]) -> None:
        self.root = root
        self._function = function
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._has_reported = False
        self._clock: int | None = None
        self._worked = 0.0
        self.silent = 0.0
        """Seconds without progress, as far as this process has waited for them."""
        threading.Thread(target=self._work, name=f"asks {root}", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, seconds: float) -> None:
        self._ended.wait(seconds)

    def has_waited(self, seconds: float) -> None:
        """Note that somebody has waited for some seconds."""
        worked = self._processor_seconds()
        has_progressed = self._has_reported or worked - self._worked > _WORK_SECONDS
        self.silent = 0.0 if has_progressed else self.silent + seconds
        self._has_reported, self._worked = False, worked

    def answer(self) -> Answer:
        """Return what the function returns, or raise what it raises. Raises NoAnswer when it has not ended."""
        if not self.has_ended:
            raise NoAnswer(self.root)
        if self._error is not None:
            raise self._error
        return self._answer  # type: ignore[return-value]  # which may be None itself

    def _processor_seconds(self) -> float:
        """The processor time that the thread has used, where the system tells it and the thread has not ended."""
        try:
            return self._worked if self._clock is None else time.clock_gettime(self._clock)
        except OSError:
            return self._worked

    def _work(self) -> None:
        if sys.platform == "linux":
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            with reporting(self._has_progressed):
                self._answer = self._function()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asks
            self._error = error
        self._ended.set()

    def _has_progressed(self) -> None:
        self._has_reported = True


class Patience:
    """Asks questions, and remembers which disks have not answered. Several threads may use it."""

    def __init__(self, seconds: float = STALL_SECONDS) -> None:
        self._seconds = seconds
        self._open: dict[str, _Question[object]] = {}
        """For each root, the question that was given up on and has not ended."""
        self._helpers: dict[str, Helper] = {}
        self._lock = threading.Lock()

    def is_waiting_for(self, root: str) -> bool:
        """Return whether an earlier question about this root still has no answer."""
        question = self._open.get(root)
        if question is not None and question.has_ended:
            self._open.pop(root, None)
            return False
        return question is not None

    def ask(self, root: str, function: Callable[[], Answer], *, seconds: float | None = None) -> Answer:
        """Return what a function returns that looks at nothing but the disk of `root`, and can be pickled.

        Raises NoAnswer when it makes no progress for so many seconds (default: those of this object), and at once while
        an earlier question about that root is open, so that threads do not pile up. Raises OutOfFiles when no file
        descriptor is free.
        """
        question = self._begin(root, function)
        _wait([question], self._seconds if seconds is None else seconds)
        return self._answer(question)

    def ask_each(self, functions: Mapping[str, Callable[[], Answer]]) -> dict[str, Answer | OSError]:
        """Ask all roots at once; return for each what its function returns, or the OSError that `ask` would raise."""
        answers: dict[str, Answer | OSError] = {}
        begun: dict[str, _Question[Answer]] = {}
        for root, function in functions.items():
            try:
                begun[root] = self._begin(root, function)
            except NoAnswer as error:
                answers[root] = error
        _wait(begun.values(), self._seconds)
        for root, question in begun.items():
            try:
                answers[root] = self._answer(question)
            except OSError as error:
                answers[root] = error
        return answers

    def _begin(self, root: str, function: Callable[[], Answer]) -> _Question[Answer]:
        if self.is_waiting_for(root):
            raise NoAnswer(root)
        return _Question(root, lambda: self._look(root, function))

    def _look(self, root: str, function: Callable[[], Answer]) -> Answer:
        try:
            if not may_hang(root):
                return function()
            answer: Answer = self._helper(root).call(function, alive)
            return answer
        except OSError as error:
            check_descriptors(error)
            raise

    def _helper(self, root: str) -> Helper:
        from hf_overlay.helper import Helper  # few machines need helpers

        with self._lock:
            return self._helpers.setdefault(root, Helper())

    def _answer(self, question: _Question[Answer]) -> Answer:
        try:
            return question.answer()
        except NoAnswer:
            if not question.has_ended:
                self._open[question.root] = question  # type: ignore[assignment]  # its answer is not wanted any more
            raise


def _wait(questions: Iterable[_Question[Any]], seconds: float) -> None:
    """Wait until each question has ended, or was silent for so many seconds.

    A turn never counts as longer than it was meant to be: while this process was stopped, or starved by a busy machine,
    the disk may have had no time to answer, either.
    """
    waiting = list(questions)
    while waiting := [each for each in waiting if not each.has_ended and each.silent < seconds]:
        turn = min(_TURN_SECONDS, seconds - min(each.silent for each in waiting))
        began = time.monotonic()
        waiting[0].wait(turn)
        turn = min(turn, time.monotonic() - began)
        for each in waiting:
            each.has_waited(turn)
