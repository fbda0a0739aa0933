"""Repos with their commits and branches, and users with what they may read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from tests.support.loopback_hub.answers import Refusal
from tests.support.loopback_hub.files import File, in_lfs

RepoType = Literal["model", "dataset", "space"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Commit(NamedTuple):
    sha: str
    files: Mapping[str, File]
    parent: Commit | None
    date: str

    def history(self) -> Iterator[Commit]:
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    id: str
    type: RepoType
    private: bool = False
    gated: bool = False
    xet: bool = False
    lfs: Callable[[str, int], bool] = in_lfs
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return f"/api/{self.type}s/{self.id}"

    @property
    def page(self) -> str:
        return f"/{self.id}" if self.type == "model" else f"/{self.type}s/{self.id}"

    def commit(self, revision: str) -> Commit:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def move(self, branch: str, files: Mapping[str, File], sha: str | None = None) -> str:
        """Put a commit of these files on a branch."""
        if sha is None:
            listed = "\n".join(f"{name} {files[name].etag}" for name in sorted(files))
            sha = hashlib.sha1(f"{self.type}\n{self.id}\n{listed}".encode()).hexdigest()
        if not _COMMIT.fullmatch(sha):
            raise ValueError(f"not a commit: {sha!r}")
        if sha not in self.commits:
            parent = self.commits.get(self.branches.get(branch, ""))
            date = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=len(self.commits))
            self.commits[sha] = Commit(sha, files, parent, date.strftime("%Y-%m-%dT%H:%M:%S.000Z"))
        elif self.commits[sha].files != files:
            raise ValueError(f"{self.id} has a commit {sha} of other files")
        self.branches[branch] = sha
        return sha


class User(NamedTuple):
    name: str
    reads: Collection[str] | None
    """Ids of the private and gated repos open to this user; None: all."""

    def may_read(self, repo: Repo) -> bool:
        return self.reads is None or repo.id in self.reads
