"""What goes wrong with requests, from when it is set until it is cleared."""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple

from tests.support.loopback_hub.answers import Request

FaultKind = Literal["hang", "fail", "slow", "cut"]


class Fault(NamedTuple):
    """What is to go wrong with requests that have `on` in their target."""

    amount: float
    on: str


class Faults:
    """What is set to go wrong; the handlers ask at each step."""

    def __init__(self) -> None:
        self._set: dict[FaultKind, Fault] = {}
        self._changed = threading.Condition()
        self._ending = False

    def set(self, kind: FaultKind, amount: float, on: str) -> None:
        with self._changed:
            self._set[kind] = Fault(amount, on)

    def clear(self) -> None:
        with self._changed:
            self._set.clear()
            self._changed.notify_all()

    def end_pauses(self, ending: bool) -> None:
        with self._changed:
            self._ending = ending
            self._changed.notify_all()

    def amount(self, kind: FaultKind, request: Request) -> float | None:
        with self._changed:
            fault = self._set.get(kind)
            return fault.amount if fault is not None and fault.on in request.target else None

    def take_cut(self, request: Request, length: int) -> int | None:
        """After how many bytes this body is to be cut, which then no other is."""
        with self._changed:
            amount = self.amount("cut", request)
            if amount is None or amount >= length:
                return None
            del self._set["cut"]
            return int(amount)

    def pause(self, kind: FaultKind, seconds: float) -> None:
        """Wait, unless the listening ends or the reason to wait does."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending or kind not in self._set, seconds)
