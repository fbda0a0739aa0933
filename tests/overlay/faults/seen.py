"""What a session shows, loads, refuses and warns of, as the tests of faults look at it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_overlay
import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

from tests.support.folders import weights

CONFIG = b'{"model_type": "llama"}'
CACHED = {"config.json": CONFIG, "model.safetensors": weights(b"from the cache"), "tokenizer.json": b"{}"}
WEIGHTS = "model.safetensors"


def ids(session: hf_overlay.Session) -> list[str]:
    return [model.id for model in session.models]


def scanned(session: hf_overlay.Session) -> list[str]:
    """The repos a scan reports; it must not raise, nor warn of anything (in these tests the real cache is whole)."""
    info = scan_cache_dir(session.hub_cache)
    assert not info.warnings, f"P8: {info.warnings}"
    return sorted(repo.repo_id for repo in info.repos)


def loaded(session: hf_overlay.Session, model_id: str) -> bytes:
    """The weights that an unmodified program reads for an id."""
    folder = snapshot_download(model_id, cache_dir=session.hub_cache, local_files_only=True)
    return Path(folder, WEIGHTS).read_bytes()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings since the last call."""
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def shown(session: hf_overlay.Session) -> dict[str, Any]:
    """All that a hub folder shows, so that two sessions, or two moments of one, can be compared."""
    return {
        entry.name: _repo(entry) if entry.resolve().is_relative_to(session.path) else os.readlink(entry)
        for entry in sorted(session.hub_cache.resolve().iterdir())
    }


def _repo(repo: Path) -> dict[str, str]:
    paths = [path for path in sorted(repo.rglob("*")) if not path.is_dir() or path.is_symlink()]
    return {
        path.relative_to(repo).as_posix(): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in paths
    }


def assert_as_new(session: hf_overlay.Session) -> None:
    """P5: what a session shows after refreshes is what a new one shows."""
    with hf_overlay.open_session(session.settings.roots, kind=session.settings.kind) as fresh:
        assert shown(session) == shown(fresh), "P5: a refreshed tree differs from a rebuilt one"
        assert session.models == fresh.models


def opened(models: Path) -> dict[str, Any]:
    """What a session shows that is opened and ended."""
    with hf_overlay.open_session([models]) as session:
        return shown(session)


def refused(act: Callable[[], object]) -> str:
    """What a SessionError says of an act; nothing when it is done."""
    try:
        act()
    except hf_overlay.SessionError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def moment(names: tuple[str, ...], below: Path, number: int, act: Callable[[], object]) -> Iterator[list[str]]:
    """Run `act` right before the call `number` of the `os` functions `names` with a path below `below`.

    Yields the calls so far.
    """
    calls: list[str] = []

    def hooked(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            # What is made is the last path of the calls that take two.
            made = arguments[0] if name in ("symlink", "replace") else path
            if not isinstance(made, int) and os.fspath(made).startswith(str(below)):
                calls.append(name)
                if len(calls) == number:
                    act()
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, hooked(name))
        yield calls


def link(name: str, target: str) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return lay


def left(sessions: Path) -> list[str]:
    return sorted(entry.name for entry in sessions.glob("session-*")) if sessions.exists() else []
