"""The server's log on stderr: lines for people, coloured only on a terminal, or JSON for programs.

Prompts, answers and keys are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from hf_overlay.text import printable

from mlx_overlay_server.progress import WIPE, Meter, is_terminal

if TYPE_CHECKING:
    from mlx_overlay_server.recent import RequestRecord

logger = logging.getLogger("mlx_overlay_server")

FORMATS = ("text", "json")
_MESSAGE = logging.Formatter("%(message)s")
"""Returns a record's message, and the traceback of one that has one."""
_COLORS = {"WARNING": 33, "ERROR": 31, "CRITICAL": 31, "DEBUG": 2}
_OUTCOMES = {"answered": 32, "left": 33, "stopped": 33, "refused": 33, "failed": 31}


def set_up(level: str, format_: str, file: TextIO | None = None) -> None:
    """Let all loggers of the server write to stderr: `level` and what is above it, in one of FORMATS."""
    handler = Handler(file or sys.stderr, format_)
    for name in ("mlx_overlay_server", "hf_overlay", "uvicorn"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level.upper() if name != "uvicorn" else "WARNING")
        logging.getLogger(name).propagate = False


def request_ended(record: RequestRecord) -> None:
    """Log the line of a request."""
    level = logging.WARNING if record.outcome == "failed" else logging.INFO
    logger.log(level, "%s", line_of(record), extra={"request": record})


def downloading(model_id: str, done: int, total: int) -> None:
    """Log how many bytes of a download are there: a bar on a terminal, a line for each tenth elsewhere."""
    logger.info("downloading %s", model_id, extra={"download": (model_id, done, total)})


def download_ended(model_id: str) -> None:
    """Log nothing more of a download."""
    logger.info("download of %s has ended", model_id, extra={"ended": model_id})


def line_of(record: RequestRecord) -> str:
    """Return a request in one line: client, model, tokens, times, outcome."""
    cached = f" ({record.tokens_cached} cached)" if record.tokens_cached else ""
    parts = [f"{record.tokens_in} tokens in{cached}", f"{record.tokens_out} out"]
    if record.first_token_seconds is not None:
        parts.append(f"first token {record.first_token_seconds:.2f} s")
    if (speed := record.tokens_per_second) is not None:
        parts.append(f"{speed:.1f} tokens/s")
    reason = f" ({record.reason})" if record.reason is not None else ""
    return f"{record.client}, {record.model or 'no model'}: {', '.join(parts)}, {record.outcome}{reason}"


class Handler(logging.Handler):
    """Writes records to a file. On a terminal, downloads are bars in its last line, below all others."""

    def __init__(self, file: TextIO, format_: str = "text") -> None:
        super().__init__()
        self._file = file
        self._is_json = format_ == "json"
        self._is_terminal = not self._is_json and is_terminal(file)
        self._has_colors = self._is_terminal and not os.environ.get("NO_COLOR")
        self._meters: dict[str, Meter] = {}
        self._bars: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            line = self._written(record)
            if self._is_terminal:
                bars = "  ".join(self._bars.values())
                self._file.write(WIPE + ("" if line is None else f"{line}\n") + bars)
            elif line is not None:
                self._file.write(f"{line}\n")
            self._file.flush()
        except Exception:  # noqa: BLE001 - the boundary: a log that cannot be written ends no request
            self.handleError(record)

    def _written(self, record: logging.LogRecord) -> str | None:
        """Return the line for a record; None where it has none of its own."""
        if (ended := getattr(record, "ended", None)) is not None:
            self._meters.pop(ended, None)
            self._bars.pop(ended, None)
            return None
        download: tuple[str, int, int] | None = getattr(record, "download", None)
        return self._line(record) if download is None else self._progress(record, *download)

    def _progress(self, record: logging.LogRecord, model_id: str, done: int, total: int) -> str | None:
        """Note how far a download is, and return the line for it, if any."""
        meter = self._meters.setdefault(model_id, Meter(model_id))
        if self._is_terminal:
            self._bars[model_id] = meter.line(done, total)
            return self._text(record, self._bars.pop(model_id)) if done >= total else None
        step = meter.step(done, total)
        if step is None:
            return None
        if self._is_json:
            more: dict[str, object] = {"download": {"model": model_id, "done": done, "total": total}}
            return self._json(record, f"downloading {step}", more)
        return self._text(record, f"downloading {step}")

    def _line(self, record: logging.LogRecord) -> str:
        request: RequestRecord | None = getattr(record, "request", None)
        if not self._is_json:
            color = _COLORS.get(record.levelname) if request is None else _OUTCOMES.get(request.outcome)
            message = record.getMessage()
            traceback = _MESSAGE.format(record).removeprefix(message)
            return self._text(record, message, color) + "\n".join(map(printable, traceback.split("\n")))
        if request is None:
            return self._json(record, _MESSAGE.format(record), {})
        return self._json(record, "request", {**asdict(request), "tokens_per_second": request.tokens_per_second})

    def _text(self, record: logging.LogRecord, message: str, color: int | None = None) -> str:
        """Return a line that cannot steer a terminal: ids and paths in it may hold anything."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        line = printable(f"{time} {record.levelname} {message}")
        return f"\x1b[{color}m{line}\x1b[0m" if color is not None and self._has_colors else line

    def _json(self, record: logging.LogRecord, message: str, more: dict[str, object]) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, "level": record.levelname.lower(), "message": message, **more})
