"""Runs the server. The overlay's environment comes first, then the imports that read it, then HTTP until a signal."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import hf_overlay
from hf_overlay import descriptors

from mlx_overlay_server import address, garbage, logs, signals
from mlx_overlay_server.imports import absent
from mlx_overlay_server.listening import listen, url
from mlx_overlay_server.live import Live
from mlx_overlay_server.settings import Settings, rank

if TYPE_CHECKING:
    from mlx_overlay_server.preparer import Process
    from mlx_overlay_server.service import Service

logger = logging.getLogger("mlx_overlay_server")

GRACE_SECONDS = 4.5
"""Seconds after `--shutdown-seconds` that the server has to free what it holds, before the process ends itself."""


def serve(live: Live) -> int:
    """Serve until a signal ends it, and return the exit code. Call it in the main thread, which gets the signals.

    Raises OverlayError.
    """
    settings = live.settings
    logs.set_up(settings.log_level, settings.log_format)
    descriptors.raise_limit()
    signals.raise_stopped()  # until the server handles signals itself
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"} if settings.is_offline else dict(os.environ)
    try:
        with hf_overlay.open_session(
            settings.model_paths,
            below=settings.below,
            maps=settings.maps,
            kind="mlx",
            exclude=settings.exclude,
            encoders=True,
            trusts_code=settings.engine.trust_remote_code,
            hold_downloads=settings.hold_downloads,
            announces=True,
            environ=environ,
        ) as session:
            # huggingface_hub reads the environment when it is imported, which happens later in this process.
            os.environ.update(session.environment)
            for name in [name for name in os.environ if name not in session.environment]:
                del os.environ[name]
            if rank(os.environ):
                return _follow(settings)
            return _serve_http(live, session)
    except KeyboardInterrupt:  # Stopped is a KeyboardInterrupt, too
        return 0


def _follow(settings: Settings) -> int:
    """Run a non-zero rank until rank 0 stops or a signal arrives, and return the exit code.

    A signal goes to all ranks, and may have ended rank 0. Then nothing stops the engine's thread, so it is left running
    after a while.
    """
    from mlx_overlay_server.engine.handle import STOP_SECONDS, follow

    signalled = threading.Event()
    for number in signals.heeded():
        signal.signal(number, lambda *_: signalled.set())
    engine = follow(settings.engine)
    while engine.is_alive() and not signalled.wait(0.5):
        pass
    engine.join(settings.shutdown_seconds + STOP_SECONDS if signalled.is_set() else None)
    return 1 if engine.is_alive() else 0


def _serve_http(live: Live, session: hf_overlay.Session) -> int:
    settings = live.settings
    try:
        sockets = listen(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or error
        advice = "try --port 0" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "correct --host"
        raise hf_overlay.OverlayError(
            f"cannot listen on {settings.host}:{settings.port}: {reason}; {advice}"
        ) from error
    from mlx_overlay_server.preparer import Process

    first = Process()  # it makes its imports beside this process, so that the first answer does not wait for them
    try:
        return _run(live, session, sockets, first)
    finally:
        first.end()  # a signal may have come before anything else could end it


def _run(live: Live, session: hf_overlay.Session, sockets: list[socket.socket], first: Process) -> int:
    settings = live.settings
    import uvicorn

    from mlx_overlay_server.api.connection import Connection

    with absent("pydantic.v1"):  # FastAPI does without it where it is missing
        from mlx_overlay_server.app import build

        app, service = build(live, session, first)
    config = uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=75,  # longer than clients keep idle connections, so that they meet no closed one
        timeout_graceful_shutdown=int(settings.shutdown_seconds) + 1,
    )
    here = url(settings.host, sockets)
    try:
        address.leave(str(session.path), here)
    except OSError as error:
        logger.warning("commands will not find this server by themselves: %s", error.strerror)
    server = _server_class()(config, service, settings.shutdown_seconds, here)
    server.run(sockets=sockets)
    return 1 if service.engine.is_stuck else 0


def _server_class() -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn's server, which lets running streams end when it stops."""

        def __init__(self, config: uvicorn.Config, service: Service, seconds: float, url: str) -> None:
            super().__init__(config)
            self._service = service
            self._seconds = seconds
            self._url = url

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Let signals stop the server, without raising them again as uvicorn does, so that the exit code is 0."""
            loop = asyncio.get_running_loop()
            for number in signals.heeded():
                loop.add_signal_handler(number, self._stop, loop)
            yield

        def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
            if self.should_exit:  # the second signal: stop at once
                self._service.abort()
                return
            logger.info("stopping")
            last = threading.Timer(self._seconds + GRACE_SECONDS, _end)
            last.daemon = True
            last.start()
            self.should_exit = True
            self._service.close()
            loop.call_later(self._seconds, self._service.abort)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                garbage.begin()
                logger.info("listening on %s (open it in a browser; OpenAI clients: %s/v1)", self._url, self._url)

    return Server


def _end() -> None:
    """End the process, whatever blocks it: a step of the engine, or a disk. The next start clears up what is left."""
    logger.error("the server did not stop in time and ends now")
    os._exit(1)
