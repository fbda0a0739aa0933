"""Without a free file descriptor nothing is found out, so what was known stays; programs keep the limit they had."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import pickle
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hf_overlay
import pytest
from hf_overlay import config, descriptors, errors, keeping
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.gateway.hub import Hub, Unavailable

from tests.overlay.faults.seen import CACHED, ids, said, scanned
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo
from tests.support.processes import OVERLAY, PYTHON


@contextmanager
def no_free_descriptor() -> Iterator[None]:
    """A context in which this process has as many files open as it may."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    opened: list[int] = []
    try:
        while len(opened) < 256:
            try:
                opened.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_was_known_stays_while_no_descriptor_is_free(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P7: such a scan says nothing of the drive, so no model goes away, and the first one afterwards goes on."""
    mine = lay_model(models / "org/mine", settled=True)
    lay_model(models / "org/fresh")
    add_repo(hub, "org/cached", CACHED)
    with hf_overlay.open_session([models]) as session:
        before = scanned(session)
        with no_free_descriptor():
            with pytest.raises(hf_overlay.OutOfFiles, match=r"too many open files.*ulimit -n"):
                session.refresh()
            assert session.resolve("org/mine") == mine
            for unknown in ("org/cached", "org/new"):
                with pytest.raises(hf_overlay.OutOfFiles):
                    session.resolve(unknown)
        assert session.refresh() == hf_overlay.Changes((), (), ())
        assert scanned(session) == before
        assert ids(session) == ["org/cached", "org/fresh", "org/mine"]
        assert said(caplog) == []


def test_the_hub_is_not_asked_for_a_model_that_may_be_in_a_folder(models: Path, sessions: Path) -> None:
    with hf_overlay.open_session([models]) as session:
        lay_model(models / "org/new")
        with no_free_descriptor():
            found = Hub(session).refresh_and_find("org/new")
        assert isinstance(found, Unavailable)
        assert "too many open files" in found.message


def test_a_session_that_cannot_look_at_anything_is_not_opened(models: Path, sessions: Path) -> None:
    lay_model(models / "org/mine")
    with (
        no_free_descriptor(),
        pytest.raises(hf_overlay.OutOfFiles, match="too many open files"),
        hf_overlay.open_session([models]),
    ):
        pass


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("call", [(builtins, "open"), (os, "open"), (os, "scandir"), (os, "listdir")], ids=str)
def test_no_look_at_the_disk_takes_it_for_an_answer(
    number: int, call: tuple[Any, str], models: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it strikes, a look fails as a whole: it never leaves a model out, nor takes one for another."""
    shards = lay_model(models / "org/shards")
    (shards / "model.safetensors").rename(shards / "model-00001-of-00001.safetensors")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00001.safetensors"}}')
    lay_model(models / "org/linked", {"more/tokenizer.json": b"{}"})
    (models / "org/linked/chat_template.jinja").symlink_to(shards / "model-00001-of-00001.safetensors")
    add_repo(hub, "org/cached", CACHED)
    add_repo(models, "org/repo", CACHED)
    tier = models.with_name("tier")
    add_repo(tier, "org/below", CACHED)
    add_repo(tier, "org/cached", {**CACHED, "more.json": b"{}"})
    lay_model(tier / "org/folder")
    settings = config.load([str(models)], os.environ, str(models), kind="any", below=[str(tier)])
    left = 0
    function = getattr(*call)

    def fails(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(number, os.strerror(number))
        return function(*given, **named)

    def look(failing: int) -> object:
        nonlocal left
        left = failing
        catalog = Catalog(settings)
        return (
            catalog.sources,
            catalog.plan(case_insensitive=False),
            catalog.real_cache.models(),
            catalog.warnings("kept"),
        )

    expected = look(0)
    monkeypatch.setattr(*call, fails)
    for nth in itertools.count(1):
        try:
            assert look(nth) == expected, f"the failure of call {nth} was taken for an answer"
        except hf_overlay.OutOfFiles:
            continue
        if left > 0:
            break


def test_the_cache_is_not_away_for_it(tmp_path: Path) -> None:
    with no_free_descriptor(), pytest.raises(OSError, match="Too many open files"):
        keeping.problem(str(tmp_path))


def test_the_error_comes_whole_out_of_a_process_that_looks_at_a_disk() -> None:
    with pytest.raises(hf_overlay.OutOfFiles) as raised:
        errors.check_descriptors(OSError(errno.EMFILE, "Too many open files"))
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    errors.check_descriptors(OSError(errno.ENOENT, "No such file or directory"))


# The limit -----------------------------------------------------------------------------------------------------------


def limits(script: str) -> list[int]:
    """The numbers that a Python program prints which starts with a soft limit of 256."""
    soft = f"ulimit -S -n 256; exec {PYTHON} -c '{script}'"
    done = subprocess.run(["bash", "-c", soft], capture_output=True, text=True, check=True, timeout=60)
    return [int(number) for number in done.stdout.split()]


def test_the_soft_limit_is_raised_and_programs_get_the_one_there_was() -> None:
    script = """
import os, resource, sys
from hf_overlay import descriptors
now = lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0]
before = descriptors.raise_limit()
print(before, now(), flush=True)
with descriptors.limit_for_programs(before):
    os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "ulimit -n"], dict(os.environ)), 0)
print(now())
"""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = descriptors.WANTED if hard == resource.RLIM_INFINITY else min(hard, descriptors.WANTED)
    assert limits(script) == [256, wanted, 256, wanted]


def test_a_limit_that_may_not_be_raised_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert descriptors.raise_limit() == 256


@pytest.mark.parametrize("limit", ["-S -n 256", "-n 256"])
def test_a_program_under_run_has_the_limit_that_the_command_had(
    limit: str, models: Path, home: Path, sessions: Path
) -> None:
    lay_model(models / "org/mine")
    command = f"ulimit {limit}; exec {OVERLAY} run --model-path {models} -- sh -c 'ulimit -S -n; ulimit -H -n'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    expected = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    assert done.stdout.split() == ["256", "256" if limit == "-n 256" else expected]
