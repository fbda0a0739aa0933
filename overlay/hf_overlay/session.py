"""A session: a private, temporary Hugging Face cache in which the user's folders stand in front of the real one.

settings -> catalog (what is on the disk) -> plan (what the tree must hold) -> tree (made, switched, removed)
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_overlay import config, hfcache
from hf_overlay.catalog import reading
from hf_overlay.catalog.catalog import Catalog, incomplete_text
from hf_overlay.catalog.plan import Plan, resolve
from hf_overlay.config import Settings
from hf_overlay.downloads import Downloads
from hf_overlay.errors import (
    OverlayError,
    SessionError,
    check_descriptors,
    privacy_advice,
)
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.messages import Messages
from hf_overlay.models import Model
from hf_overlay.patience import NoAnswer
from hf_overlay.tiers import MergedRepo
from hf_overlay.tree.lease import Lease
from hf_overlay.tree.publish import Tree, home_entries
from hf_overlay.tree.shared import Shared

if TYPE_CHECKING:
    from pathlib import Path

    from hf_overlay.doctor import Finding
    from hf_overlay.gateway.server import Gateway


class Changes(NamedTuple):
    """The ids of the user's models that a refresh found to differ."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


class Session:
    """An open overlay. Made by `open_session`; safe to use from several threads."""

    def __init__(
        self, catalog: Catalog, environ: Mapping[str, str], owner: Lease, messages: Messages, *, shares: bool = False
    ) -> None:
        """`shares`: the repos of the user's models are those of all sessions; clients must announce what they write."""
        self._environ = dict(environ)
        self._owner = owner
        self._messages = messages
        self._catalog = catalog
        self._lock = threading.Lock()
        self._changed: dict[str, float] = {}
        self._gateway: Gateway | None = None
        sessions = os.path.dirname(owner.path)
        self._tree = Tree(owner.path, Shared(sessions, catalog.settings.hub_cache) if shares else None)
        self._downloads = Downloads(
            owner.path, catalog, self._tree, self._lock, messages, shares_blobs=config.shares_blobs(environ)
        )
        self._has_home = self._is_home_silent = False
        plan = catalog.plan(case_insensitive=self._tree.is_case_insensitive)
        self._publish(plan)
        self._plan = plan
        """What the tree holds."""
        self._published = _answering(catalog, plan)

    @property
    def path(self) -> "Path":
        """The session's own folder (0700)."""
        return _path(self._owner.path)

    @property
    def hub_cache(self) -> "Path":
        """The overlay as a Hugging Face cache: the value of HF_HUB_CACHE for programs."""
        return _path(self._tree.hub)

    @property
    def home(self) -> "Path":
        """The overlay as an HF_HOME, for programs that know no other variable."""
        return _path(self._tree.home)

    @property
    def settings(self) -> Settings:
        """The model paths and the real cache this session was opened on."""
        return self._catalog.settings

    @property
    def variables(self) -> dict[str, str | None]:
        """The environment variables that the overlay changes for a program: name -> value, None to unset it.

        The user's HF_HOME stays where it is, so that the login, the Xet cache and datasets are the real ones; only
        the hub cache is ours. Programs read these variables once, when they import huggingface_hub.
        """
        variables: dict[str, str | None] = dict.fromkeys(config.OTHER_CACHE_VARIABLES)
        variables["HF_HOME"] = self.settings.hf_home
        variables["HF_HUB_CACHE"] = variables["HUGGINGFACE_HUB_CACHE"] = self._tree.hub
        # Paths in the shared blob store are computed lexically, which links break (see hfcache.entries).
        variables["HF_HUB_DISABLE_SHARED_BLOBS"] = "1"
        if self._gateway is not None:
            variables["HF_ENDPOINT"] = self._gateway.endpoint
        # Also for programs started elsewhere; without a gateway, nothing else keeps programs from the Hub.
        if self.is_offline or (self._gateway is None and self.why_no_downloads is not None):
            variables["HF_HUB_OFFLINE"] = "1"
        return variables

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a program that should see the overlay."""
        return config.applied(self.variables, self._environ)

    @property
    def is_offline(self) -> bool:
        """Whether programs in `environment` will not use the network."""
        return config.is_offline(self._environ)

    @property
    def why_no_downloads(self) -> str | None:
        """Why nothing is downloaded at the moment: the real cache could not keep it. None when downloads are welcome.

        Looked at now, since a drive comes back. Always None in a session that holds downloads.
        """
        if self.settings.holds_downloads:
            return None
        problem = self._catalog.real_cache.why_not_kept()
        if problem is None:
            return None
        return (
            f"the Hugging Face cache {self.settings.hub_cache} {problem.text}, so it cannot keep a download; "
            f"{problem.advice}, or use --hold-downloads"
        )

    @property
    def owner_fd(self) -> int:
        """File descriptor to hand to a child (`pass_fds`) for which the overlay must stay if this process is killed."""
        return self._owner.fd

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model that can be loaded, one for each id, sorted by id; the real cache is scanned now."""
        return tuple(resolution.winner for resolution in self._catalog.resolutions().values())

    def scan(self) -> tuple[Model, ...]:
        """The same as `models` after a refresh, in half the time: the tree stays as it is. Raises SessionError."""
        with self._lock:
            self._scan(only_settled=False)
            self._warn()
        return self.models

    @property
    def models_away(self) -> dict[str, str]:
        """The ids of models that the last refresh knew to be away, each with the folder that held it."""
        return self._catalog.models_away

    def findings(self) -> "list[Finding]":
        """What `hf-overlay doctor` finds, each with what to do about it. The disks are looked at now."""
        from hf_overlay import doctor

        return doctor.examine(self._catalog, self._environ)

    def resolve(self, model_id: str) -> "Path":
        """The folder to load for an id: the user's own, else the real cache's snapshot, else a tier's.

        Raises InvalidModelId, ModelNotFound, SourceAway when the drive that held the model is gone, or IncompleteModel
        when a part of the user's folder is missing.
        """
        return _path(self.find(model_id).path)

    def find(self, model_id: str) -> Model:
        """The model that answers to an id: its folder is there. Raises as `resolve`.

        Where no cache holds all of it, but all of them together do, its folder is in the tree.
        """
        try:
            model = self._catalog.find(model_id)
        except OverlayError:
            together = self._catalog.read_made(model_id, self._tree.path_of(hfcache.repo_folder(model_id)))
            if together is None:
                raise
            model = together
        if self._messages.are_detailed:
            from hf_overlay.catalog.explain import origin

            self._messages.debug(f"{model_id} comes from the {origin(model)}: {model.path}")
            for candidate in self._catalog.explain(model_id)[1:]:
                self._messages.debug(f"{model_id}: {candidate.path} {candidate.reason.text}")
        return model

    def refresh(self, *, only_settled: bool = False) -> Changes:
        """Make the tree show what is in the folders and the cache now.

        `only_settled` is for refreshing at short intervals: a model that changed since the last refresh is shown by
        the next one that finds it unchanged, so that one that is being copied does not count as changed every time.

        Loads that have begun continue in the tree they began in. Raises SessionError and leaves the tree as it was.
        """
        with self._lock:
            before = self._published
            self._restore()
            self._downloads.bring_home()
            self._scan(only_settled=only_settled)
            plan = self._catalog.plan(case_insensitive=self._tree.is_case_insensitive)
            after = before if plan is self._plan else _answering(self._catalog, plan)
            changes = Changes(
                added=tuple(sorted(after.keys() - before.keys())),
                changed=tuple(sorted(name for name in after.keys() & before.keys() if after[name] != before[name])),
                removed=tuple(sorted(before.keys() - after.keys())),
            )
            now = time.monotonic()
            self._changed |= {model_id: now for ids in changes for model_id in ids}
            self._publish(plan)
            self._plan, self._published = plan, after
        return changes

    def _scan(self, *, only_settled: bool) -> None:
        try:
            self._catalog.scan(only_settled=only_settled)
        except SessionError:
            raise
        except OverlayError as error:  # mlx-lm's model types are needed, and can no longer be read
            raise SessionError(str(error)) from error

    def start_gateway(self) -> None:
        """Start a Hub on loopback that serves the user's models; `environment` leads programs to it from now on.

        It passes other requests on to the environment's own HF_ENDPOINT. Raises SessionError.
        """
        from hf_overlay.gateway.hub import Hub  # sockets, which a session without a network needs not
        from hf_overlay.gateway.server import DEFAULT_UPSTREAM, Gateway

        try:
            gateway = Gateway(Hub(self), self._environ.get("HF_ENDPOINT") or DEFAULT_UPSTREAM)
            gateway.start()
        except OSError as error:
            check_descriptors(error)
            raise SessionError(f"cannot listen on 127.0.0.1: {error.strerror}; run with --offline") from error
        self._gateway = gateway

    def offer(self) -> None:
        """Let other programs of this user find the session (`hf-overlay env`). Raises OSError."""
        self._owner.record(self.settings, self.variables)

    def stop(self) -> None:
        """Stop the gateway once it has sent the answers that are under way, or `cut` is called.

        The tree is cleared separately, since other programs may still use it.
        """
        if self._gateway is not None:
            self._gateway.stop()

    def cut(self) -> None:
        """Let `stop` wait for nothing: the gateway's answers are cut. May be called by a signal handler."""
        if self._gateway is not None:
            self._gateway.cut()

    def warn(self, text: str) -> None:
        """Tell people what is wrong."""
        self._messages.warning(text)

    @property
    def is_there(self) -> bool:
        """Whether the tree is there; when something has removed it, a refresh makes it again."""
        return self._tree.is_there

    def spelled(self, model_id: str) -> str:
        """The id as the user's folders spell it, where one of them answers to this spelling; else as it is given.

        Raises InvalidModelId.
        """
        return self._catalog.spelled(model_id)

    def repo(self, repo_id: str, kind: str = "models") -> LinkedRepo | MergedRepo | None:
        """The repo with this id that was made in the tree; None when it holds none, or the real cache's."""
        return self._tree.repo(repo_id, kind)

    def seconds_since_change(self, model_id: str) -> float:
        """Seconds since a refresh found the user's model added, changed or removed; infinite when none did."""
        return time.monotonic() - self._changed.get(model_id, -float("inf"))

    def path_away(self, repo_id: str, kind: str = "models") -> str | None:
        """The folder of the user's that held this repo and has gone away since; None when there is none."""
        return self._catalog.away(repo_id, kind)

    def incomplete(self, model_id: str) -> str | None:
        """A sentence about the user's folder of this id that lacks a part of its weights; None when there is none."""
        reject = self._catalog.incomplete(model_id)
        return None if reject is None else incomplete_text(reject)

    def is_cached(self, model_id: str) -> bool:
        """Whether the real cache holds a loadable copy now."""
        return self._catalog.real_cache.has(model_id)

    def is_folder(self, path: str, root: str) -> bool:
        """Whether there is a folder at `path`, in the model path `root`; False while its disk does not answer."""
        return self._catalog.is_folder(path, root)

    def ask(self, root: str, function: Callable[[], Any]) -> Any:
        """What a function returns that looks at the disk of the model path `root`. Raises NoAnswer when it hangs."""
        return self._catalog.patience.ask(root, function)

    def has_copy(self, folder: str) -> bool:
        """Whether a client finds main of a repo, by its folder name, without the Hub: of a model, with weights."""
        kind, repo_id = config.kind_and_id(hfcache.full_id(folder))
        made = self._tree.repo(repo_id, kind)
        # The disk of a tier that does not answer must not be taken for that of the real cache.
        if made is not None and not all(self.is_folder(path, root) for path, root in made.sources):
            return False
        root = self.settings.hub_cache if made is None else f"{self._tree.hub}/{folder}"
        try:
            return self._catalog.patience.ask(root, partial(reading.has_copy, f"{self._tree.hub}/{folder}"))
        except OSError:
            return False

    def expect_download(self, folder: str, xet_hashes: Mapping[str, str] | None = None) -> None:
        """Let what a client is about to write to a repo folder land in the real cache.

        What it writes beside a model of the user's lands in a repo of this session's own. `xet_hashes` are those of the
        files that it asks for, by their etags: what is downloaded may be a file that another repo has (see blobstore).
        """
        self._downloads.expect(folder, xet_hashes or {})

    def expect_model(self, model_id: str) -> None:
        """Let a model that a program in `environment` is about to download land in the real cache.

        Of a model of the user's, what is downloaded lands in the session, and moves to the real cache at its end.
        """
        self.expect_download(hfcache.repo_folder(model_id))

    def _restore(self) -> None:
        """Make the session's folder again if something has removed it, or a part of it. Raises SessionError."""
        try:
            if not self._owner.is_intact():
                self._owner.renew()
            self._tree.restore()
        except OSError as error:
            raise session_error(self._owner.path, error) from error

    def _publish(self, plan: Plan) -> None:
        self._warn()
        try:
            self._link_home()
            self._tree.publish(plan, is_there=self.is_folder)
        except OSError as error:
            raise session_error(self._owner.path, error) from error

    def _warn(self) -> None:
        for warning in self._catalog.warnings(self._fate_of_downloads()):
            self._messages.warning(warning)

    def _link_home(self) -> None:
        """Let the tree lead to what the user's HF_HOME holds, as soon as its disk answers. Raises OSError."""
        home, hub, patience = self.settings.hf_home, self.settings.hub_cache, self._catalog.patience
        if self._has_home or (hub.startswith(f"{home}/") and patience.is_waiting_for(hub)):  # nor wait for it twice
            return
        try:
            names = patience.ask(home, partial(home_entries, home))
        except NoAnswer:
            if not self._is_home_silent:
                self._messages.warning(
                    f"HF_HOME {home} does not answer; programs that log in with what it holds will wait"
                )
            self._is_home_silent = True
            return
        self._tree.link_home(home, names)
        self._has_home = True

    def _fate_of_downloads(self) -> str | None:
        """What becomes of downloads while the real cache keeps none; None when programs will not download."""
        if self.is_offline:
            return None
        if self.settings.holds_downloads:
            return f"downloads are held in {self._owner.path} until it takes them"
        return "nothing is downloaded meanwhile (to download all the same, and hold it here: --hold-downloads)"


def _path(path: str) -> "Path":
    from pathlib import Path  # takes a while to import, and the command needs none

    return Path(path)


def _answering(catalog: Catalog, plan: Plan) -> dict[str, Model]:
    """The user's models, by id: those before the real cache, and those in tiers that stand for the Hub's."""
    in_front = {model_id: resolution.winner for model_id, resolution in resolve(catalog.sources).items()}
    linked = (repo.model for repo in plan.linked_repos.values())
    return {model.id: model for model in linked if model.kind == "models"} | in_front


def session_error(path: str, error: OSError) -> SessionError:
    """Return what to raise when a session's folder cannot be written to. Raises OutOfFiles."""
    check_descriptors(error)
    advice = privacy_advice(error)
    if advice is None:
        space = "free some space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        advice = f"{space}set {config.DIRECTORY_VARIABLE} to a folder of yours on a volume that takes symbolic links"
    return SessionError(f"cannot build the overlay in {path}: {error.strerror or error}; {advice}")
