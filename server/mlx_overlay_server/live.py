"""The settings in force while the server runs. Before each request, the configuration file is checked for changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from hf_overlay import OverlayError

from mlx_overlay_server import configuration
from mlx_overlay_server.settings import Profile, Settings

logger = logging.getLogger("mlx_overlay_server")

CHANGING = frozenset({"alias", "default_model", "profile", "key"})
"""The settings whose changes take effect at once, by their names in the file. All others need a restart."""
LOOK_SECONDS = 2.0
"""Seconds that a request waits for the check. A disk that takes longer holds up no request."""


class Target(NamedTuple):
    """What the name of a model in a request stands for."""

    id: str
    """The name under which the model is loaded: its id, or the profile's name where it is loaded apart for that."""
    profile: Profile | None = None


class Live:
    """The settings in force, and the functions to call when they change."""

    def __init__(
        self,
        settings: Settings,
        *,
        stamp: Callable[[], object] = lambda: None,
        reread: Callable[[], Settings] | None = None,
    ) -> None:
        """`stamp` returns a value that changes when the file changes; `reread` returns the settings that the file then
        gives.
        """
        self.settings = settings
        self.followers: list[Callable[[Settings], None]] = []
        """Called with the new settings when they have changed."""
        self._stamp = stamp
        self._reread = reread
        self._seen = stamp()
        self._look: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Take over changes in the file. A mistake in it is logged, and the settings in force stay."""
        if self._reread is None:
            return
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._once())
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await asyncio.shield(self._look)
        except TimeoutError:
            pass  # the check goes on, and the first request after it finds its result

    def target(self, name: str) -> Target:
        """Return what a name stands for: an alias, a profile, or a model's own id."""
        name = self.settings.aliases.get(name, name)
        profile = self.settings.profiles.get(name)
        if profile is None:
            return Target(name)
        return Target(name if profile.is_loaded_apart else profile.model, profile)

    def names(self, model_id: str) -> list[str]:
        """Return the other names that lead to a model: aliases and profiles, sorted."""
        names = {*self.settings.aliases, *self.settings.profiles} - {model_id}
        return sorted(name for name in names if self.source(self.target(name).id) == model_id)

    def source(self, loaded_as: str) -> str:
        """Return the id of the model that is loaded under a name."""
        profile = self.settings.profiles.get(loaded_as)
        return loaded_as if profile is None else profile.model

    async def _once(self) -> None:
        stamp = await asyncio.to_thread(self._stamp)
        if stamp == self._seen or self._reread is None:
            return
        self._seen = stamp
        try:
            settings = await asyncio.to_thread(self._reread)
        except (OverlayError, ValueError) as error:
            logger.warning("the configuration stays as it was: %s", error)
            return
        self._take(settings)

    def _take(self, settings: Settings) -> None:
        before = self.settings
        if before.keys and not settings.keys and not settings.api_key:
            # As when an editor empties the file before it writes it: nobody shall get in for want of a key.
            settings = replace(settings, keys=before.keys)
            logger.warning(
                "the configuration has no API keys any more; the last ones hold until the server is restarted"
            )
        self.settings = settings
        changed = configuration.changed(before, settings)
        if now := sorted(changed & CHANGING):
            logger.info("the configuration has changed: %s", ", ".join(now))
        if later := sorted(changed - CHANGING):
            logger.warning("the configuration has changed, and these settings need a restart: %s", ", ".join(later))
        for follow in self.followers:
            follow(settings)
