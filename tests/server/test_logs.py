"""The log: a line for each request, bars and colours on a terminal alone, JSON for programs, and nobody's words."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from mlx_overlay_server import logs
from mlx_overlay_server.progress import WIPE
from mlx_overlay_server.recent import Outcome, RequestRecord


class Terminal(io.StringIO):
    """A file that is one."""

    def isatty(self) -> bool:
        return True


def _record(outcome: Outcome = "answered", **more: object) -> RequestRecord:
    record = RequestRecord(id="r1", client="ann", model="org/m", outcome=outcome, reason="stop")
    for name, value in {"tokens_in": 10, "tokens_cached": 4, "tokens_out": 5, **more}.items():
        setattr(record, name, value)
    return record


@pytest.fixture
def logged(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What the server's logger writes to a file of the kind that the test asks for."""
    kind, format_ = request.param
    file: io.StringIO = kind()
    handler = logs.Handler(file, format_)
    before = logs.logger.level
    logs.logger.addHandler(handler)
    logs.logger.setLevel("INFO")
    yield file
    logs.logger.removeHandler(handler)
    logs.logger.setLevel(before)


def test_a_request_is_one_line() -> None:
    record = _record(first_token_seconds=0.5, seconds=2.5)
    assert logs.line_of(record) == (
        "ann, org/m: 10 tokens in (4 cached), 5 out, first token 0.50 s, 2.0 tokens/s, answered (stop)"
    )
    assert (
        logs.line_of(_record("left", tokens_cached=0, tokens_out=0)) == "ann, org/m: 10 tokens in, 0 out, left (stop)"
    )


@pytest.mark.parametrize("logged", [(io.StringIO, "text")], indirect=True)
def test_in_a_file_lines_have_no_colours_and_steer_nothing(logged: io.StringIO) -> None:
    logs.request_ended(_record(client="\x1b[2Jevil"))
    logs.logger.warning("beware")
    for done in range(0, 101, 5):
        logs.downloading("org/m", done, 100)
    logs.download_ended("org/m")
    lines = logged.getvalue().splitlines()
    assert len(lines) == 2 + 11
    assert lines[0].partition(" INFO ")[2].startswith("\\x1b[2Jevil, org/m: 10 tokens in")
    assert lines[2].endswith(" INFO downloading org/m: 0 % of 0.0 MB")
    assert "\x1b" not in logged.getvalue()


@pytest.mark.parametrize("logged", [(Terminal, "text")], indirect=True)
def test_on_a_terminal_a_download_is_a_bar_below_the_lines(logged: io.StringIO) -> None:
    logs.downloading("org/m", 1_000_000, 4_000_000)
    logs.logger.info("meanwhile")
    logs.downloading("org/m", 2_000_000, 4_000_000)
    logs.downloading("org/gone", 1, 10)
    logs.download_ended("org/gone")
    before = logged.tell()
    logs.downloading("org/m", 4_000_000, 4_000_000)
    logs.download_ended("org/m")
    lines = logged.getvalue().split("\n")
    assert len(lines) == 3, "a line for what came meanwhile, one for the end, and what is below"
    assert "meanwhile" in lines[0]
    assert lines[1].rpartition(WIPE)[2].rpartition(" INFO ")[2].startswith("org/m ▕█")
    assert "100% of 4.0 MB" in lines[1]
    assert "org/gone" not in logged.getvalue()[before:]
    assert lines[2] == WIPE, "nothing is left of the bars"


@pytest.mark.parametrize("logged", [(Terminal, "text")], indirect=True)
def test_colours_are_for_terminals(logged: io.StringIO) -> None:
    logs.request_ended(_record("failed"))
    assert "\x1b[31m" in logged.getvalue()
    assert logged.getvalue().endswith("\x1b[0m\n")


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    logs.Handler(file).emit(logging.LogRecord("x", logging.ERROR, "", 0, "no", None, None))
    assert "\x1b[31m" not in file.getvalue()


@pytest.mark.parametrize("logged", [(io.StringIO, "json")], indirect=True)
def test_for_programs_each_line_is_an_object(logged: io.StringIO) -> None:
    logs.logger.info("a\nb")
    logs.request_ended(_record(first_token_seconds=0.5, seconds=2.5))
    logs.downloading("org/m", 1, 2)
    plain, request, download = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert (plain["level"], plain["message"]) == ("info", "a\nb")
    assert (request["client"], request["tokens_out"], request["tokens_per_second"]) == ("ann", 5, 2.0)
    assert request["time"].endswith("+00:00")
    assert download["download"] == {"model": "org/m", "done": 1, "total": 2}
