"""The address of a running server, which it writes into its session's folder, where the commands find it.

That folder belongs to this user alone (0700), and is cleared with the session. A server that was killed is not taken
for a running one, because its session has no living owner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

from hf_overlay.tree import lease

_FILE = "server.lock"
"""The file's name. Files with this ending are never downloads, so they are removed with the session."""


class Address(NamedTuple):
    """The address at which a server listens."""

    url: str
    """Such as http://127.0.0.1:10240, without a slash at its end."""
    pid: int


def leave(session: str, url: str) -> None:
    """Write a server's address into the folder of its session. Raises OSError."""
    path = os.path.join(session, _FILE)
    with open(os.open(f"{path}.new.lock", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump({"url": url, "pid": os.getpid()}, file)
    os.replace(f"{path}.new.lock", path)


def running(environ: Mapping[str, str]) -> list[Address]:
    """Return this user's running servers, the one started last first.

    Raises OSError, and SessionError where the folder of all sessions cannot be trusted.
    """
    sessions = lease.sessions_folder(environ)
    found: list[tuple[float, Address]] = []
    for path in lease.sessions_in(sessions):
        try:
            with open(os.path.join(path, _FILE), encoding="utf-8") as file:
                address = Address(**json.load(file))
                left = os.fstat(file.fileno()).st_mtime
        except (OSError, ValueError, TypeError):  # a session of another program, or one that is just starting or ending
            continue
        with lease.dead(sessions, path) as is_dead:
            if not is_dead:
                found.append((left, address))
    return [address for _, address in sorted(found, reverse=True)]
