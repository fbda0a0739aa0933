"""Records of requests: what is kept of each, how it ended, and how one is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server import recent as module
from mlx_overlay_server.errors import Overloaded, ServerError, Stopped, Unavailable, UnknownModel
from mlx_overlay_server.recent import KEPT, LATELY, RATE_SECONDS, Rate, Recent, RequestRecord


@dataclass
class FakeLive:
    """A request that came at the time 0."""

    client: str = "curl/8"
    started: float = 0.0
    note: Callable[[], str] = lambda: "reading the prompt"
    stops: int = 0

    def stop(self) -> None:
        self.stops += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, which is `now` until a test sets another one."""
    time = SimpleNamespace(now=1.0)
    time.monotonic = lambda: time.now
    monkeypatch.setattr(module, "time", time)
    return time


def test_a_running_request_is_listed_with_what_it_waits_for_and_an_ended_one_with_its_counts(
    clock: SimpleNamespace,
) -> None:
    said: list[RequestRecord] = []
    recent, live = Recent(said.append), FakeLive()
    with recent.following("acme/plain", live) as record:
        assert recent.running == [(record, "reading the prompt")]
        assert (recent.ended, record.outcome, record.tokens_per_second) == ([], "running", None)
        record.tokens_in = 7
        recent.count(record, live, 1)
        assert record.tokens_per_second is None, "of one token there is no speed"
        recent.count(record, live, 0)
        clock.now = 3.0
        recent.count(record, live, 4)
        clock.now = 4.0
    assert recent.running == []
    assert recent.ended == said == [record]
    assert (record.client, record.model, record.tokens_in, record.tokens_out) == ("curl/8", "acme/plain", 7, 5)
    assert record.outcome == "answered"
    assert (record.first_token_seconds, record.seconds) == (1, 4)
    assert record.tokens_per_second == (5 - 1) / (4 - 1)


def test_tokens_that_come_at_once_have_no_speed(clock: SimpleNamespace) -> None:
    recent, live = Recent(), FakeLive()
    with recent.following("m", live) as record:
        recent.count(record, live, 8)
        assert record.tokens_per_second is None


def test_the_usual_time_to_a_first_token_is_the_median_of_the_last_requests(clock: SimpleNamespace) -> None:
    recent = Recent()
    assert recent.first_token_seconds is None
    for seconds in (1000.0, *range(LATELY, 0, -1)):
        clock.now = seconds
        with recent.following("m", live := FakeLive()) as record:
            recent.count(record, live, 1)
        with recent.following("m", FakeLive()):
            pass  # without a token
    assert recent.first_token_seconds == LATELY // 2 + 1


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
    with recent.following("m", live) as record, recent.following("m", other) as later:
        assert [each for each, _ in recent.running] == [later, record], "newest first"
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
