"""Worlds for tests of the user's bytes, and clients of every release of huggingface_hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from hf_overlay.patience import Patience
from hf_overlay.tree import clear

from tests.overlay.users_bytes.world import World
from tests.support import hubs
from tests.support.folders import temporary_folder
from tests.support.hubs import HubProcess
from tests.support.processes import SECONDS


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, no_processes: None) -> None:
    """No disk hangs here, however long a busy machine leaves a thread without a processor."""
    monkeypatch.setattr(Patience.__init__, "__defaults__", (SECONDS,))
    monkeypatch.setattr(clear, "STALL_SECONDS", SECONDS)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A folder of the test's own; in memory where the system offers that, since disks take many times as long."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with temporary_folder(memory, "users-bytes-") as path:
            yield path
    else:
        yield tmp_path


@pytest.fixture
def world(base: Path) -> World:
    return World(base)


@pytest.fixture(scope="package")
def hub_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], HubProcess]]:
    """The client process of a release, started when first asked for."""
    with ExitStack() as stack:
        yield cache(
            lambda release: stack.enter_context(hubs.open_hub_process(release, tmp_path_factory.mktemp("client")))
        )


@pytest.fixture(scope="package")
def online_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], HubProcess]]:
    """As `hub_processes`, of clients that download."""
    with ExitStack() as stack:
        yield cache(
            lambda release: stack.enter_context(
                hubs.open_hub_process(release, tmp_path_factory.mktemp("client"), is_offline=False)
            )
        )


@pytest.fixture(params=hubs.ALL)
def client(request: pytest.FixtureRequest, hub_processes: Callable[[str], HubProcess]) -> HubProcess:
    """A client of each release."""
    return hub_processes(request.param)
