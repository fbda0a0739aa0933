"""The decision whether the user's folder, the real Hub, or nobody for now answers for a model on the gateway."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from hf_overlay import hfcache
from hf_overlay.catalog.spelling import check_id
from hf_overlay.config import Settings
from hf_overlay.errors import InvalidModelId, OutOfFiles, SessionError
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.tiers import MergedRepo

SETTLE_SECONDS = 5
"""Longer than any client takes from opening its cache to asking the Hub."""


class Unavailable(NamedTuple):
    """A user's model that cannot be served at the moment, and must not be downloaded instead."""

    message: str
    has_copy: bool
    """Whether clients that fall back to their cache find a copy there."""


class Overlay(Protocol):
    """The operations of a session that the gateway uses."""

    @property
    def settings(self) -> Settings:
        """The model paths and the real cache."""

    @property
    def is_there(self) -> bool:
        """Whether the tree is there; when something has removed it, a refresh makes it again."""

    def spelled(self, model_id: str) -> str:
        """The id as the user's folders spell it, where one of them answers to this spelling; else as it is given."""

    def repo(self, repo_id: str, kind: str = "models") -> LinkedRepo | MergedRepo | None:
        """The repo with this id that was made in the tree; None when it holds none, or the real cache's."""

    def refresh(self) -> object:
        """Make the tree show what is on the disk now. Raises SessionError, or OutOfFiles when nothing was seen."""

    def seconds_since_change(self, model_id: str) -> float:
        """Seconds since a refresh found the user's model added, changed or removed; infinite when none did."""

    def path_away(self, repo_id: str, kind: str = "models") -> str | None:
        """The folder of the user's that held this repo and has gone away since; None when there is none."""

    def incomplete(self, model_id: str) -> str | None:
        """A sentence about the user's folder of this id that lacks a part of its weights; None when there is none."""

    def is_cached(self, model_id: str) -> bool:
        """Whether the real cache holds a loadable copy now."""

    def is_folder(self, path: str, root: str) -> bool:
        """Whether there is a folder at `path`, in the model path `root`; False while its disk does not answer."""

    def ask(self, root: str, function: Callable[[], Any]) -> Any:
        """What a function returns that looks at the disk of a model path. Raises NoAnswer when the disk hangs."""

    def expect_download(self, folder: str, xet_hashes: Mapping[str, str] | None = None) -> None:
        """Let what a client is about to write to a repo folder land in the real cache."""

    @property
    def why_no_downloads(self) -> str | None:
        """Why nothing is downloaded at the moment; None when downloads are welcome."""

    def has_copy(self, folder: str) -> bool:
        """Whether a client finds main of a repo, by its folder name, without the Hub."""

    def warn(self, text: str) -> None:
        """Tell people what is wrong."""


class Hub:
    """Decides for each model id who answers, by what the overlay holds."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay

    def refresh_and_find(self, repo_id: str, kind: str = "models") -> LinkedRepo | Unavailable | None:
        """As `find`, after a refresh of the overlay if the disk shows that the tree is behind it."""
        try:
            if _is_id(repo_id) and self._is_behind(repo_id, kind):
                self._overlay.refresh()
        except OutOfFiles as error:  # nobody knows what is there
            return Unavailable(str(error), False)
        except SessionError as error:
            self._overlay.warn(str(error))
        return self.find(repo_id, kind)

    def find(self, repo_id: str, kind: str = "models") -> LinkedRepo | Unavailable | None:
        """The user's folder that answers to an id, or why nobody may; None when the real Hub answers.

        The Hub also answers for what the real cache and tiers hold: it names the newest revision, of which a client
        fetches what is in none of them. `repo_id` may be any string.
        """
        if not _is_id(repo_id):
            return None
        repo_id = self._spelled(repo_id, kind)
        found = self._overlay.repo(repo_id, kind)
        if isinstance(found, LinkedRepo):
            if self._overlay.seconds_since_change(repo_id) >= SETTLE_SECONDS:
                return found
            # A load that began before the switch sees the model as it was, one that begins now as it is. If either
            # learned of the other's commit, it would download that. Sent to its cache, each finds its own.
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
        """Let what a client is about to write to a repo folder land in the real cache.

        `xet_hashes` are those of the files that it asks for, by their etags.
        """
        self._overlay.expect_download(folder, xet_hashes)

    def ask(self, root: str, function: Callable[[], Any]) -> Any:
        """What a function returns that looks at the disk of a model path. Raises NoAnswer when the disk hangs."""
        return self._overlay.ask(root, function)

    def refuse_download(self, repo_id: str, folder: str) -> Unavailable | None:
        """Why a repo may not be downloaded now; None when it may be."""
        why = self._overlay.why_no_downloads
        return Unavailable(f"{repo_id} is not downloaded: {why}", self._overlay.has_copy(folder)) if why else None

    def _is_behind(self, repo_id: str, kind: str) -> bool:
        """Whether a folder for the repo is there and the tree lacks it, or the other way round; or the tree is gone."""
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
