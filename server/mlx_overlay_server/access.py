"""Says by the API key of a request who has sent it, and what the key may be used for."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar

from mlx_overlay_server.errors import Forbidden, Overloaded, Unauthorized
from mlx_overlay_server.settings import Key, Settings

MINUTE = 60.0

CURRENT: ContextVar[Key | None] = ContextVar("key", default=None)
"""The key of the request that is being answered; None where no key is needed, or the key is for everything.

The guard sets it before any route runs, so that no route can forget to hand it on.
"""


def digest(key: bytes) -> str:
    """Return the hash of a key. The configuration file holds nothing else of it.

    Keys are made of 256 random bits, so guessing them is hopeless even with a fast hash such as SHA-256.
    """
    return hashlib.sha256(key).hexdigest()


class Access:
    """The keys in force, and when each was used lately."""

    def __init__(self, settings: Callable[[], Settings], clock: Callable[[], float] = time.monotonic) -> None:
        """`settings` returns those in force now; `clock` gives monotonic seconds."""
        self._settings = settings
        self._clock = clock
        self._used: dict[str, deque[float]] = {}
        """When each key with a rate was used within the last minute, by its name; oldest first."""

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        settings = self._settings()
        return not settings.api_key and not settings.keys

    def key(self, given: bytes) -> Key | None:
        """Return the key that a client sent; None for the one of the command line, which is for everything.

        Raises Unauthorized.
        """
        settings, hashed = self._settings(), digest(given)
        found: Key | None = None
        is_known = bool(settings.api_key) and hmac.compare_digest(hashed, digest((settings.api_key or "").encode()))
        for key in settings.keys:  # all are compared, so that the time it takes tells nothing of them
            if hmac.compare_digest(hashed, key.digest):
                found = key
        if found is None and not is_known:
            raise Unauthorized("this server needs an API key: send Authorization: Bearer …, or x-api-key")
        return found

    def count(self, key: Key) -> None:
        """Count a request of a key. Raises Overloaded where it has sent as many as it may in a minute."""
        if key.rate is None:
            return
        now = self._clock()
        used = self._used.setdefault(key.name, deque())
        while used and now - used[0] >= MINUTE:
            used.popleft()
        if len(used) >= key.rate:
            seconds = max(1, round(MINUTE - (now - used[0])))
            raise Overloaded(f"the key {key.name!r} may send {key.rate} requests in a minute; wait {seconds} seconds")
        used.append(now)


def may_use(*names: str) -> bool:
    """Return whether the request's key may use a model; `names` are the names of the model."""
    key = CURRENT.get()
    return key is None or not key.models or not set(names).isdisjoint(key.models)


def check_model(*names: str) -> None:
    """Raise Forbidden unless the request's key may use a model; `names` are the names of the model."""
    if (key := CURRENT.get()) is not None and not may_use(*names):
        raise Forbidden(f"the key {key.name!r} is not for {names[0]}", field="model", code="model_not_allowed")
