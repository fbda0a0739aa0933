"""Records of the running and the last ended requests: client, model, figures, outcome; never their text."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mlx_overlay_server.errors import ServerError, Stopped

KEPT = 200
"""How many ended requests are remembered."""
RATE_SECONDS = 5
"""Seconds over which tokens per second are averaged."""
_LONGEST_NAME = 200
"""Characters of a model's name that are kept, since clients may send names of any length."""
LATELY = 20
"""How many of the last requests the median time to first token is taken from."""

Outcome = Literal["running", "answered", "left", "stopped", "refused", "failed"]
"""`left`: the client hung up; `stopped`: by hand; `refused`: the client's own error."""


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request, as lists and the log show it. Its figures are for all of its answers together."""

    id: str
    client: str
    """A name for whoever asked."""
    model: str
    """The model's id; until that is known, the name in the request."""
    started: float = field(default_factory=time.time)
    """Unix seconds."""
    seconds: float = 0.0
    """Seconds from the request to its last token so far, or to its end."""
    tokens_in: int = 0
    """Tokens of the prompts that have been read."""
    tokens_cached: int = 0
    """Those of them whose KV cache was reused."""
    tokens_out: int = 0
    first_token_seconds: float | None = None
    """Seconds from the request to its first token; None until that comes."""
    outcome: Outcome = "running"
    reason: str | None = None
    """Why the last answer ended (`stop`, `length`, …), or the error's own reason; None while it runs."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens generated per second from the first to the last; None before the second token."""
        if self.first_token_seconds is None or self.tokens_out < 2 or self.seconds <= self.first_token_seconds:
            return None
        return (self.tokens_out - 1) / (self.seconds - self.first_token_seconds)


class Live(Protocol):
    """A running request, as far as its record needs it."""

    @property
    def client(self) -> str:
        """A name for whoever asked."""

    @property
    def started(self) -> float:
        """When the request came, in monotonic seconds."""

    @property
    def note(self) -> Callable[[], str]:
        """Returns in a few words what the request is waiting for now."""

    def stop(self) -> None:
        """End the request with `Stopped`."""


class Rate:
    """Counts tokens per second, averaged over the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._counts: deque[tuple[int, int]] = deque(maxlen=RATE_SECONDS + 1)
        """Pairs of a whole second and the tokens counted in it, oldest first."""

    def add(self, tokens: int) -> None:
        """Count tokens that have just come."""
        second = int(self._clock())
        if self._counts and self._counts[-1][0] == second:
            tokens += self._counts.pop()[1]
        self._counts.append((second, tokens))

    @property
    def per_second(self) -> float:
        """Tokens per second, over the last full seconds."""
        now = int(self._clock())
        return sum(tokens for second, tokens in self._counts if now - RATE_SECONDS <= second < now) / RATE_SECONDS


class Recent:
    """The records of one server's requests. Everything here runs on the event loop."""

    def __init__(self, ended: Callable[[RequestRecord], None] = lambda _: None) -> None:
        """`ended` is called with the record of each request that ends, for example to log it."""
        self.rate = Rate()
        """The rate of all generated tokens."""
        self._report = ended
        self._numbers = itertools.count(1)
        self._running: dict[str, tuple[RequestRecord, Live]] = {}
        self._ended: deque[RequestRecord] = deque(maxlen=KEPT)

    @property
    def running(self) -> list[tuple[RequestRecord, str]]:
        """The running requests and what each is waiting for, newest first."""
        return [(record, live.note()) for record, live in reversed(self._running.values())]

    @property
    def ended(self) -> list[RequestRecord]:
        """The last requests that have ended, newest first."""
        return list(reversed(self._ended))

    @property
    def first_token_seconds(self) -> float | None:
        """The median time to first token of the last requests, in seconds; None before the first."""
        lately = [each.first_token_seconds for each in self.ended if each.first_token_seconds is not None][:LATELY]
        return sorted(lately)[len(lately) // 2] if lately else None

    def stop(self, record_id: str) -> bool:
        """Stop a running request, whose client gets `Stopped`. Returns whether there was one with that id."""
        if record_id not in self._running:
            return False
        self._running[record_id][1].stop()
        return True

    @contextmanager
    def following(self, model: str, live: Live) -> Iterator[RequestRecord]:
        """Keep a record of a request while this context is open; the caller fills it in."""
        record = RequestRecord(id=f"r{next(self._numbers)}", client=live.client, model=model)
        self._running[record.id] = (record, live)
        outcome: Outcome = "failed"
        try:
            yield record
            outcome = "answered"
        except Stopped as error:
            outcome, record.reason = "stopped", error.code
            raise
        except ServerError as error:
            outcome, record.reason = "refused" if error.status < 500 else "failed", error.reason
            error.is_recorded = True
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "left"
            raise
        finally:
            record.outcome, record.seconds = outcome, time.monotonic() - live.started
            record.model = record.model[:_LONGEST_NAME]
            del self._running[record.id]
            self._ended.append(record)
            self._report(record)

    def count(self, record: RequestRecord, live: Live, tokens: int) -> None:
        """Count new tokens of a request. There may be 0 of them: an end mark as the first token is none."""
        record.seconds = time.monotonic() - live.started
        if record.first_token_seconds is None:
            record.first_token_seconds = record.seconds
        record.tokens_out += tokens
        self.rate.add(tokens)
