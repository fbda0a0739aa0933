"""Records of requests: what is kept of each, how it ended, and how one is stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.errors import Overloaded, ServerError, Stopped, Unavailable, UnknownModel
from mlx_overlay_server.recent import KEPT, RATE_SECONDS, Rate, Recent, RequestRecord


@dataclass
class FakeLive:
    """A request that came a second ago."""

    client: str = "curl/8"
    started: float = field(default_factory=lambda: time.monotonic() - 1)
    note: Callable[[], str] = lambda: "reading the prompt"
    stops: int = 0

    def stop(self) -> None:
        self.stops += 1


def test_a_running_request_is_listed_with_what_it_waits_for_and_an_ended_one_with_its_counts() -> None:
    said: list[RequestRecord] = []
    recent, live = Recent(said.append), FakeLive()
    with recent.following("acme/plain", live) as record:
        assert recent.running == [(record, "reading the prompt")]
        assert (recent.ended, record.outcome, record.tokens_per_second) == ([], "running", None)
        record.tokens_in = 7
        recent.count(record, live, 1)
        live.started -= 2
        recent.count(record, live, 4)
    assert recent.running == []
    assert recent.ended == said == [record]
    assert (record.client, record.model, record.tokens_in, record.tokens_out) == ("curl/8", "acme/plain", 7, 5)
    assert record.outcome == "answered"
    assert record.first_token_seconds == pytest.approx(1, abs=0.5)
    assert record.seconds == pytest.approx(3, abs=0.5)
    assert record.tokens_per_second == pytest.approx(2, rel=0.2)
    assert recent.first_token_seconds == record.first_token_seconds


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (UnknownModel("no"), "refused", "model_not_found"),
        (Overloaded("later"), "refused", "rate_limit_exceeded"),
        (Unavailable("not now"), "failed", "503"),
        (Stopped("stop"), "stopped", "request_stopped"),
        (asyncio.CancelledError(), "left", None),
        (GeneratorExit(), "left", None),
        (ValueError("secret"), "failed", None),
    ],
)
def test_the_outcome_says_how_a_request_ended(error: BaseException, outcome: str, reason: str | None) -> None:
    recent = Recent()
    with pytest.raises(type(error)), recent.following("m", FakeLive()):
        raise error
    (record,) = recent.ended
    assert (record.outcome, record.reason) == (outcome, reason)
    assert recent.running == []


def test_names_that_clients_make_up_do_not_pile_up() -> None:
    recent = Recent()
    with recent.following("m" * 10**6, FakeLive()) as record:
        record.model = "n" * 10**6
    assert len(recent.ended[0].model) <= 200


def test_only_the_last_requests_are_kept_newest_first() -> None:
    recent = Recent()
    for number in range(KEPT + 3):
        with recent.following(f"m{number}", FakeLive()):
            pass
    assert [each.model for each in recent.ended] == [f"m{number}" for number in range(KEPT + 2, 2, -1)]


def test_a_request_that_runs_can_be_stopped_and_no_other() -> None:
    recent, live, other = Recent(), FakeLive(), FakeLive()
    with recent.following("m", live) as record, recent.following("m", other):
        assert recent.stop(record.id)
    assert not recent.stop(record.id)
    assert not recent.stop("r99")
    assert (live.stops, other.stops) == (1, 0)


def test_a_stop_is_an_error_that_clients_do_not_repeat() -> None:
    assert issubclass(Stopped, ServerError)
    assert Stopped.status not in {408, 409, 429, *range(500, 600)}


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 1000)), max_size=50))
def test_the_rate_is_that_of_the_last_whole_seconds(steps: list[tuple[float, int]]) -> None:
    now = 0.0
    rate = Rate(lambda: now)
    came: list[tuple[int, int]] = []
    for pause, tokens in steps:
        now += pause
        rate.add(tokens)
        came.append((int(now), tokens))
    seconds = range(int(now) - RATE_SECONDS, int(now))
    assert rate.per_second == sum(tokens for second, tokens in came if second in seconds) / RATE_SECONDS
