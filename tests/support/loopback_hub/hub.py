"""The hub as tests hold it: what it has, what it was asked, and what goes wrong with it."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.loopback_hub.answers import Answer, Refusal, Request
from tests.support.loopback_hub.faults import Faults
from tests.support.loopback_hub.files import in_lfs, lfs_file, make_file
from tests.support.loopback_hub.http import Host, Listener, reserved
from tests.support.loopback_hub.repos import RepoType, User
from tests.support.loopback_hub.routes import Site
from tests.support.processes import environment as program_environment


class LoopbackHub:
    """The hub, reachable while its context is entered. Its methods may be called from any thread, before and within.

    The context's end raises AssertionError when the hub itself failed to answer a request.
    """

    def __init__(
        self, *, prefix: str = "", page_size: int = 1000, resolve_cache: bool = True, compress: bool = False
    ) -> None:
        """`prefix` is a path that the endpoint has, as behind a mirror: "/a/b".

        `page_size`: how many entries of a listing one answer holds at most. `resolve_cache`: GET and HEAD of a file
        kept in git are redirected (307, relative) as by the Hub of today, else answered at once, as by that of old.
        `compress`: text and JSON go out gzipped and chunked to clients that accept it.
        """
        self.compress = compress
        self.prefix = f"/{prefix.strip('/')}" if prefix else ""
        self._site = Site(self.prefix, page_size, resolve_cache)
        self.faults = Faults()
        self._lock = threading.Lock()
        self._requests: list[tuple[Request, threading.Lock]] = []
        self._errors: list[BaseException] = []
        self._ports: dict[Host, int] = {}
        self._held: dict[Host, socket.socket] = {}
        self._listeners: list[Listener] = []

    def __enter__(self) -> Self:
        self._held = {"hub": reserved(0), "cdn": reserved(0)}
        self._ports = {host: held.getsockname()[1] for host, held in self._held.items()}
        self._site.endpoint = f"http://127.0.0.1:{self._ports['hub']}{self.prefix}"
        self._site.cdn = f"http://localhost:{self._ports['cdn']}"
        self.recover()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        for held in self._held.values():
            held.close()
        if kind is None and self._errors:
            raise AssertionError(f"the hub failed to answer {len(self._errors)} requests") from self._errors[0]

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return self._site.endpoint

    @property
    def cdn(self) -> str:
        """Where files kept in LFS are served from."""
        return self._site.cdn

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a shell whose Hub is this one hands to a program.

        Without Xet, of which the hub knows the routes and not the storage.
        """
        environ = program_environment(home)
        del environ["HF_HUB_OFFLINE"]
        local = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return environ | local | more

    # What it holds

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        *,
        repo_type: RepoType = "model",
        branch: str = "main",
        commit: str | None = None,
        private: bool | None = None,
        gated: bool | None = None,
        xet: bool | None = None,
        lfs: Callable[[str, int], bool] = in_lfs,
    ) -> str:
        """Put a commit of exactly these files on a branch of a repo, which is made if need be; return the commit.

        `files` is also a folder to copy. Commits that the branch had before stay, by their hash. `commit` follows
        from the repo and the files when None. `lfs` says by name and size what is kept in LFS. `xet` offers those
        by Xet too, which only clients without Xet can live with. `private`, `gated` and `xet` stay as they were
        when None, which at first is False.
        """
        contents = _read_folder(files) if isinstance(files, Path) else files
        held = {name: make_file(name, content, lfs=lfs(name, len(content))) for name, content in contents.items()}
        with self._site.lock:
            repo = self._site.repo(repo_type, repo_id)
            repo.private = repo.private if private is None else private
            repo.gated = repo.gated if gated is None else gated
            repo.xet = repo.xet if xet is None else xet
            repo.lfs = lfs
            return repo.move(branch, held, commit)

    def add_virtual(self, repo_id: str, name: str, size: int, *, repo_type: RepoType = "model") -> str:
        """Add to main a file in LFS whose bytes are made as they are sent: `virtual_bytes`; return the commit.

        Its sha256 is made up, as computing it would take longer than serving the file.
        """
        file = lfs_file(name, size, None, hashlib.sha256(f"{repo_id}/{name} {size}".encode()).hexdigest())
        with self._site.lock:
            repo = self._site.repo(repo_type, repo_id)
            before = repo.commit("main").files if "main" in repo.branches else {}
            return repo.move("main", {**before, name: file})

    def rename(self, old: str, new: str, *, repo_type: RepoType = "model") -> None:
        """Answer for `old` with redirects (307, relative) to `new`."""
        with self._site.lock:
            self._site.renamed[repo_type, old] = new

    def add_user(self, token: str, name: str, *, reads: Collection[str] = ()) -> None:
        """A user to whom these of the private and gated repos are open."""
        with self._site.lock:
            self._site.users[token] = User(name, reads)

    # What it served

    @property
    def requests(self) -> list[Request]:
        """All requests in the order of their arrival, as they are now."""
        with self._lock:
            known = list(self._requests)
        return [_copy(*entry) for entry in known]

    def bytes_served(self, repo_id: str | None = None, *, files_only: bool = True) -> int:
        """Bytes of bodies that went out: all, or those about one repo; those of files, or also what tells of them."""
        return sum(
            request.sent
            for request in self.requests
            if repo_id in (None, request.repo_id) and (request.name is not None or not files_only)
        )

    def finished_files(self) -> list[tuple[str, str]]:
        """(repo_id, name) for each time that the last byte of a file went out, alone or at the end of more.

        Never an empty file: clients take its size for an answer. A client that is killed may not have read that byte.
        """
        return [
            (request.repo_id, request.name)
            for request in self.requests
            if request.finished and request.repo_id is not None and request.name is not None
        ]

    def reset_counts(self) -> None:
        """Forget all requests so far."""
        with self._lock:
            self._requests.clear()

    # What goes wrong: from when it is set until `heal`, with requests that have `on` in their path or query

    def outage(self) -> None:
        """Refuse connections, and drop those there are. The ports stay taken, by sockets that do not listen."""
        self._stop()
        if not self._held:
            self._held = {host: reserved(port) for host, port in self._ports.items()}

    def recover(self) -> None:
        """End an outage: listen again, at the same ports."""
        self.faults.end_pauses(False)
        while self._held:
            self._listeners.append(Listener(self, *self._held.popitem()))

    def hang(self, seconds: float, *, on: str = "") -> None:
        """Accept requests, and answer that much later, or at once when healed."""
        self.faults.set("hang", seconds, on)

    def fail(self, status: int = 500, *, on: str = "") -> None:
        """Answer with an error."""
        self.faults.set("fail", status, on)

    def slow(self, bytes_per_second: float, *, on: str = "") -> None:
        """Send no body of a file faster than that, each by itself."""
        self.faults.set("slow", bytes_per_second, on)

    def cut_after(self, size: int, *, on: str = "") -> None:
        """Drop the connection after so many bytes of the next body of a file that is longer, and of no other."""
        self.faults.set("cut", size, on)

    def heal(self) -> None:
        """Let nothing go wrong any more but an outage, which `recover` ends."""
        self.faults.clear()

    # For the handlers

    def record(self, request: Request) -> threading.Lock:
        """Count a request from now on; return the lock under which it is changed."""
        lock = threading.Lock()
        with self._lock:
            self._requests.append((request, lock))
        return lock

    def answer(self, request: Request) -> Answer:
        failure = self.faults.amount("fail", request)
        if failure is not None:
            said = "Internal Error - We're working hard to fix this as soon as possible!"
            return Refusal(int(failure), None, said).answer(as_text=False)
        return self._site.answer(request)

    def broke(self, error: BaseException) -> None:
        """Tell of an error of the hub's own."""
        with self._lock:
            self._errors.append(error)

    def _stop(self) -> None:
        self.faults.end_pauses(True)
        while self._listeners:
            self._listeners.pop().stop()


def _copy(request: Request, lock: threading.Lock) -> Request:
    with lock:
        return replace(request)


def _read_folder(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise NotADirectoryError(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
