"""The log holds no terminal escapes; clients get neither paths nor half sentences."""

from __future__ import annotations

import io
import logging

import pytest
from mlx_overlay_server.engine.failures import load_reason
from mlx_overlay_server.logs import Handler

_FOLDER = "/Volumes/LLMS/org/name"


def test_the_log_escapes_what_steers_a_terminal() -> None:
    record = logging.LogRecord("mlx_overlay_server", logging.INFO, "", 0, "loading %s", ("org/\x1b[2J\x9bm",), None)
    file = io.StringIO()
    Handler(file).emit(record)
    assert file.getvalue().endswith(" INFO loading org/\\x1b[2J\\x9bm\n")


def test_only_tracebacks_have_more_than_one_line() -> None:
    """A client could otherwise put false lines into the log."""
    error = ValueError("\x1b[2J")
    about = (type(error), error, error.__traceback__)
    record = logging.LogRecord("mlx_overlay_server", logging.INFO, "", 0, "%s", ("org/m\n12:00:00 INFO false",), about)
    file = io.StringIO()
    Handler(file).emit(record)
    first, *others = file.getvalue().splitlines()
    assert first.endswith(" INFO org/m\\n12:00:00 INFO false")
    assert others == ["ValueError: \\x1b[2J"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("Model type foo not supported."), "Model type foo not supported."),
        (FileNotFoundError(f"No safetensors found in {_FOLDER}"), "No safetensors found in its folder"),
        (OSError(f"cannot open {_FOLDER}/model.safetensors"), "cannot open model.safetensors"),
        (ValueError("Received 2 parameters not in model:\na,\nb."), "Received 2 parameters not in model: a, b."),
        (OSError("cannot open '/Users/me/other/file'"), "OSError; the server's log says why"),
        (SystemExit(), "SystemExit; the server's log says why"),
        (ValueError("x" * 10_000), "ValueError; the server's log says why"),
    ],
)
def test_a_client_gets_a_whole_sentence_without_paths(error: BaseException, told: str) -> None:
    assert load_reason(error, _FOLDER) == told
