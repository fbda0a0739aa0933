"""A server that a command starts, and that runs as long as the command does."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from hf_overlay import OverlayError

from mlx_overlay_server.command.client import Client

START_SECONDS = 120
_LISTENING = " listening on "


def folder_options(options: argparse.Namespace) -> list[str]:
    """Return a command's options about folders, as options for the server."""
    return [
        *(word for path in options.model_paths for word in ("--model-path", path)),
        *(word for path in options.below for word in ("--below", path)),
        *(word for id_, path in options.maps for word in ("--map", f"{id_}={path}")),
        *(word for id_ in options.exclude for word in ("--exclude", id_)),
    ]


@contextmanager
def server(options: argparse.Namespace, more: Sequence[str] = ()) -> Iterator[Client]:
    """Run a server on a free port of this machine, with a key that nobody else knows. Raises OverlayError.

    Its log goes to a file that is removed with it. If it does not start, the log's last line is in the error.
    """
    key = secrets.token_urlsafe(16)
    command = [sys.executable, "-P", "-m", "mlx_overlay_server", "--port", "0", "--host", "127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *folder_options(options), *more],
            env={**os.environ, "MLX_OMNI_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the command, which then ends the server
        )
        try:
            yield Client(_listening(process, log.fileno()), key)
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def _listening(process: subprocess.Popen[bytes], log: int) -> str:
    """Return the URL of a server once it listens. Raises OverlayError where it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll()
        text = os.pread(log, 1 << 16, 0).decode("utf-8", "replace")
        for line in text.splitlines():
            if _LISTENING in line:
                return line.partition(_LISTENING)[2].split()[0]
        if ended is not None:
            lines = [line for line in text.splitlines() if line.strip()]
            raise OverlayError(f"the server did not start: {lines[-1] if lines else f'status {ended}'}")
        time.sleep(0.05)
    raise OverlayError(f"the server did not start in {START_SECONDS} seconds")
