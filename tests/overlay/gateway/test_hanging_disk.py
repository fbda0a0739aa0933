"""A disk that hangs keeps no request waiting but those for its own models, and those get an answer (P7)."""

from __future__ import annotations

import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import hf_overlay
import pytest

from tests.support import processes
from tests.support.folders import lay_model

SECONDS = 4.0
"""In which everything answers: a disk is given up on after 1.2 s."""


@pytest.fixture
def session(models: Path, sessions: Path, tmp_path: Path) -> Iterator[hf_overlay.Session]:
    lay_model(models / "org/slow")
    lay_model(tmp_path / "other/org/other")
    with hf_overlay.open_session([models, tmp_path / "other"]) as session:
        session.start_gateway()
        yield session


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch, models: Path) -> Iterator[threading.Event]:
    """While it is set, calls of this process that look at a file of `org/slow` do not return."""
    hangs, is_over = threading.Event(), threading.Event()

    for name in ("stat", "open", "readlink", "lstat"):
        real = getattr(os, name)

        def call(path: object, *arguments: object, _real: object = real, **options: object) -> object:
            if hangs.is_set() and isinstance(path, str | os.PathLike) and f"{models}/org/slow/" in os.fspath(path):
                is_over.wait(60)
            return _real(path, *arguments, **options)  # type: ignore[operator]

        monkeypatch.setattr(os, name, call)
    yield hangs
    hangs.clear()
    is_over.set()


def status(session: hf_overlay.Session, path: str, **headers: str) -> tuple[int, bytes]:
    url = f"{session.environment['HF_ENDPOINT']}/{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=processes.SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["X-Error-Message"].encode()


def test_a_file_on_a_disk_that_hangs_is_refused_and_others_are_served_meanwhile(
    session: hf_overlay.Session, hang: threading.Event, models: Path
) -> None:
    path = "org/slow/resolve/main/model.safetensors"
    whole = (models / "org/slow/model.safetensors").read_bytes()
    assert status(session, path) == (200, whole)
    assert status(session, path, Range="bytes=-5") == (206, whole[-5:])
    hang.set()
    answers: list[tuple[int, bytes]] = []
    slow = threading.Thread(target=lambda: answers.append(status(session, path)))
    slow.start()
    assert status(session, "org/other/resolve/main/config.json")[0] == 200
    assert not answers, "another model waited for the disk that hangs"
    slow.join(processes.SECONDS)
    assert [answer[0] for answer in answers] == [404]
    assert b"which does not answer" in answers[0][1]


def test_a_large_file_is_whole(session: hf_overlay.Session, models: Path) -> None:
    path = models / "org/slow/model.safetensors"
    whole = path.read_bytes() + os.urandom(9 << 20)
    path.write_bytes(whole)
    assert status(session, "org/slow/resolve/main/model.safetensors") == (200, whole)
    assert status(session, "org/slow/resolve/main/model.safetensors", Range="bytes=5-") == (206, whole[5:])


def test_an_announced_download_waits_for_no_cache_that_hangs_nor_does_a_refresh(
    session: hf_overlay.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(os, "makedirs", lambda *_, **__: is_over.wait(60))
        began = time.monotonic()
        session.expect_download("models--org--new")
        session.expect_download("models--org--another")
        session.refresh()
        assert time.monotonic() - began < processes.due(SECONDS)
    is_over.set()
