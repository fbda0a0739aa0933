"""Decides who answers for a model on the gateway: the user's folder, the real Hub, or nobody for now."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from hf_overlay import hfcache
from hf_overlay.catalog.spelling import check_id
from hf_overlay.config import Settings
from hf_overlay.errors import InvalidModelId, OutOfFiles, SessionError
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.tiers import MergedRepo

SETTLE_SECONDS = 5
"""Seconds. Any client asks the Hub sooner than this after it has looked into its cache."""


class Unavailable(NamedTuple):
    """A user's model that cannot be served at the moment, and must not be downloaded instead."""

    message: str
    has_copy: bool
    """Whether clients that fall back to their cache will find a copy there."""


class Overlay(Protocol):
    """What the gateway uses of a session."""

    @property
    def settings(self) -> Settings:
        """The model paths and the real cache."""

    @property
    def is_there(self) -> bool:
        """Return whether the tree exists. If something has removed it, a refresh makes it again."""

    def spelled(self, model_id: str) -> str:
        """Return the id as the user's folders spell it, where one answers to this spelling; else the id as given."""

    def repo(self, repo_id: str, kind: str = "models") -> LinkedRepo | MergedRepo | None:
        """Return the linked repo in the tree for an id; None where there is none, or the repo is the real cache's."""

    def refresh(self) -> object:
        """Bring the tree up to date. Raises SessionError, and OutOfFiles when nothing could be looked at."""

    def seconds_since_change(self, model_id: str) -> float:
        """Return the seconds since a refresh found the user's model added, changed or removed; infinite if none has."""

    def path_away(self, repo_id: str, kind: str = "models") -> str | None:
        """Return the user's folder that held this model and has gone away since; None where there is none."""

    def incomplete(self, model_id: str) -> str | None:
        """Return a sentence on the user's folder of this id whose weights are incomplete; None: there is none."""

    def is_cached(self, model_id: str) -> bool:
        """Return whether the real cache holds a loadable copy now."""

    def is_folder(self, path: str, root: str) -> bool:
        """Return whether there is a folder at `path` in the model path `root`; False while its disk does not answer."""

    def ask(self, root: str, function: Callable[[], Any]) -> Any:
        """Let a function look at the disk of a model path, and return its result. Raises NoAnswer if it hangs."""

    def expect_download(self, folder: str, xet_hashes: Mapping[str, str] | None = None) -> None:
        """Prepare the real cache for what a client is about to download into a repo folder."""

    @property
    def why_no_downloads(self) -> str | None:
        """Return why nothing can be downloaded at the moment; None when downloads can be kept."""

    def has_copy(self, folder: str) -> bool:
        """Return whether clients find `main` of a repo in their cache; `folder` is its folder's name."""

    def warn(self, text: str) -> None:
        """Tell people what is wrong."""


class Hub:
    """Decides for each model id who answers, by what the overlay holds."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay

    def refresh_and_find(self, repo_id: str, kind: str = "models") -> LinkedRepo | Unavailable | None:
        """Do as `find` does, after a refresh of the overlay if the disk shows that the tree is out of date."""
        try:
            if _is_id(repo_id) and self._is_behind(repo_id, kind):
                self._overlay.refresh()
        except OutOfFiles as error:  # no file descriptor is free, so nobody knows what is there
            return Unavailable(str(error), False)
        except SessionError as error:
            self._overlay.warn(str(error))
        return self.find(repo_id, kind)

    def find(self, repo_id: str, kind: str = "models") -> LinkedRepo | Unavailable | None:
        """Return the linked repo that answers for an id, or why nobody may; None when the real Hub answers.

        The Hub also answers for what the real cache and tiers hold: it names the newest revision, and clients fetch
        what none of them has of it. `repo_id` may be any string.
        """
        if not _is_id(repo_id):
            return None
        repo_id = self._spelled(repo_id, kind)
        found = self._overlay.repo(repo_id, kind)
        if isinstance(found, LinkedRepo):
            if self._overlay.seconds_since_change(repo_id) >= SETTLE_SECONDS:
                return found
            # A load that began before the change sees the old model, one that begins now sees the new one. If either
            # learned of the other's commit, it would download that. Sent to its cache instead, each finds its own.
            return Unavailable(f"{repo_id} has just changed on disk; try again in {SETTLE_SECONDS} seconds", True)
        root = self._overlay.path_away(repo_id, kind)
        if root is not None:
            name = hfcache.full_id(hfcache.repo_folder(repo_id, kind))
            is_empty = self._overlay.is_folder(root, root)
            state = f"holds nothing to load (hf-overlay why {name})" if is_empty else "is not there now"
            message = f"{name} is in {root}, which {state}; connect that drive, or use --exclude {name}"
        elif kind == "models" and (incomplete := self._overlay.incomplete(repo_id)) is not None:
            message = incomplete
        else:
            return None
        has_copy = kind == "models" and self._overlay.is_cached(repo_id)
        return Unavailable(message, has_copy or self._overlay.has_copy(hfcache.repo_folder(repo_id, kind)))

    def expect_download(self, folder: str, xet_hashes: Mapping[str, str] | None = None) -> None:
        """Prepare the real cache for what a client is about to download into a repo folder.

        `xet_hashes`: the Xet hashes of the files that it asks for, by their etags.
        """
        self._overlay.expect_download(folder, xet_hashes)

    def ask(self, root: str, function: Callable[[], Any]) -> Any:
        """Let a function look at the disk of a model path, and return its result. Raises NoAnswer if it hangs."""
        return self._overlay.ask(root, function)

    def refuse_download(self, repo_id: str, folder: str) -> Unavailable | None:
        """Return why a repo may not be downloaded now; None when it may."""
        why = self._overlay.why_no_downloads
        return Unavailable(f"{repo_id} is not downloaded: {why}", self._overlay.has_copy(folder)) if why else None

    def _is_behind(self, repo_id: str, kind: str) -> bool:
        """Return whether the tree and the disk differ about a repo: one has a folder for it and the other has not.

        The tree is also out of date when it is gone.
        """
        if not self._overlay.is_there:
            return True
        repo_id = self._spelled(repo_id, kind)
        found = self._overlay.repo(repo_id, kind)
        if found is not None:
            return not all(self._overlay.is_folder(path, root) for path, root in found.sources)
        settings, name = self._overlay.settings, hfcache.repo_folder(repo_id, kind)
        if hfcache.full_id(name) in settings.exclude:
            return False
        places = [(each.folder, each.folder) for each in settings.maps if (each.kind, each.id) == (kind, repo_id)]
        if kind == "models":
            places += [(f"{root}/{repo_id}", root) for root in settings.roots]
        if not self._overlay.has_copy(name):
            places += [(f"{root}{hub}/{name}", root) for root in settings.below for hub in ("", "/hub")]
        return any(self._overlay.is_folder(path, root) for path, root in places)

    def _spelled(self, repo_id: str, kind: str) -> str:
        return self._overlay.spelled(repo_id) if kind == "models" else repo_id


def _is_id(model_id: str) -> bool:
    try:
        check_id(model_id)
    except InvalidModelId:
        return False
    return True
