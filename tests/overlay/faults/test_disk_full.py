"""Without room for the tree, nothing half-made is shown, and the reason is given (P6, P12)."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_overlay
import pytest
from hf_overlay.tree import lease

from tests.overlay.faults.seen import CACHED, WEIGHTS, assert_as_new, left, loaded, opened, refused, scanned, shown
from tests.support.folders import lay_model, unseal
from tests.support.hfcache import add_repo, listing

MAKING = ("symlink", "mkdir", "open", "write", "pwrite", "replace")


@contextlib.contextmanager
def full_disk(below: Path, number: int, *, once: bool) -> Iterator[list[str]]:
    """The call `number` that makes something below a folder fails, and so do those after it unless `once`.

    Yields the names of the calls so far.
    """
    calls: list[str] = []

    def hooked(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            made = arguments[0] if name in ("symlink", "replace") else path
            makes = name != "open" or (arguments[0] & os.O_CREAT and not os.path.exists(path))
            if makes and (isinstance(made, int) or os.fspath(made).startswith(str(below))):
                calls.append(name)
                if len(calls) == number or (len(calls) > number and not once):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in MAKING:
            patch.setattr(os, name, hooked(name))
        yield calls


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("once", [False, True], ids=["from then on", "for a moment"])
def test_a_disk_that_fills_up_at_any_moment_of_a_start_leaves_nothing_behind(
    models: Path, hub: Path, sessions: Path, once: bool
) -> None:
    lay_model(models / "org/mine", {"nested/file.txt": b"x"})
    add_repo(hub, "org/cached", CACHED)
    (hub.parent / "token").write_text("hf_secret")
    whole = opened(models)
    before = listing(models), listing(hub)
    files = open_files()
    refusals = set()
    number, calls = 0, [""]
    while number <= len(calls):
        number += 1
        unseal(sessions / "shared")
        shutil.rmtree(sessions / "shared", ignore_errors=True)  # each is a first start
        with full_disk(sessions, number, once=once) as calls:
            found: list[Any] = []
            refusals.add(refused(lambda found=found: found.append(opened(models))))  # type: ignore[misc]
            assert found in ([], [whole]), f"{calls[number - 1]} failed and nothing was said"
        if number > len(calls):
            break
        assert left(sessions) == [], f"{calls[number - 1]} (call {number}) failed: leaves nothing behind"
        assert open_files() == files, f"{calls[number - 1]} (call {number}) failed: leaves no file open"
        assert (listing(models), listing(hub)) == before
    assert number > 30, "many moments were tried"


@pytest.mark.usefixtures("no_processes")
def test_a_disk_that_fills_up_at_any_moment_of_a_refresh_leaves_the_old_tree_whole(
    models: Path, hub: Path, sessions: Path
) -> None:
    kept = lay_model(models / "org/kept")
    add_repo(hub, "org/cached", CACHED)
    number, calls = 0, [""]
    while number <= len(calls):
        number += 1
        lay_model(models / "org/removed")
        changed = lay_model(models / "org/changed")
        with hf_overlay.open_session([models]) as session:
            before, hub_folder = shown(session), session.hub_cache.resolve()
            shutil.rmtree(models / "org/removed")
            lay_model(changed, {"more.txt": b"x"})
            added = add_repo(hub, "org/added", CACHED).parents[1]  # one link: what changed has the other steps
            with full_disk(sessions, number, once=number % 2 == 0) as calls:
                refusal = refused(session.refresh)
            assert "\n" not in refusal
            if refusal:
                assert shown(session) == before, f"{calls[number - 1]} (call {number}) failed: the old tree stays"
                assert session.hub_cache.resolve() == hub_folder
                assert loaded(session, "org/kept") == (kept / WEIGHTS).read_bytes()
                session.refresh()
            assert_as_new(session)
            assert scanned(session) == ["org/added", "org/cached", "org/changed", "org/kept"]
        shutil.rmtree(added)
        shutil.rmtree(changed)
    assert number > 10, "many moments were tried"


def test_the_refresh_that_shows_changes_tells_them_though_one_before_failed(models: Path, sessions: Path) -> None:
    lay_model(models / "org/removed")
    changed = lay_model(models / "org/changed")
    with hf_overlay.open_session([models]) as session:
        shutil.rmtree(models / "org/removed")
        lay_model(changed, {"more.txt": b"x"})
        lay_model(models / "org/added")
        with full_disk(sessions, 1, once=False), pytest.raises(hf_overlay.SessionError):
            session.refresh()
        assert session.refresh() == hf_overlay.Changes(("org/added",), ("org/changed",), ("org/removed",))
        assert session.refresh() == hf_overlay.Changes((), (), ())


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the kernel write so many bytes into a file and refuse the next, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 10, 100, 1000, 5000])
def test_a_write_cut_short_by_a_full_disk_is_not_taken_for_a_whole_one(models: Path, sessions: Path, size: int) -> None:
    lay_model(models / "org/mine", {f"file-{number}.txt": b"x" for number in range(100)})
    with hf_overlay.open_session([models]) as session:
        whole = shown(session)
        with (
            contextlib.suppress(hf_overlay.SessionError),
            files_of_at_most(size),
            hf_overlay.open_session([models]) as other,
        ):
            assert shown(other) == whole
            assert lease.read_owner(str(other.path)), "P3: nobody would know where downloads in it belong"
        lay_model(models / "org/mine", {"more.txt": b"x"})
        with contextlib.suppress(hf_overlay.SessionError), files_of_at_most(size):
            session.refresh()
        session.refresh()
        assert_as_new(session)
    assert left(sessions) == []


def test_a_volume_without_links_is_refused_with_what_to_do(
    models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def symlink(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # exFAT and SMB say so

    lay_model(models / "org/mine")
    monkeypatch.setattr(os, "symlink", symlink)
    with (
        pytest.raises(hf_overlay.SessionError, match=r"HF_OVERLAY_DIR.* symbolic links"),
        hf_overlay.open_session([models]),
    ):
        pass
    assert left(sessions) == []
