"""No test sees the user's home, caches or settings; touching the real ones is an error that fails the test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from hf_overlay import config
from hf_overlay.tree import lease
from hypothesis import HealthCheck, settings

from tests.support import processes

_REAL_ENVIRONMENT = dict(os.environ)
_FORBIDDEN = tuple(
    os.path.realpath(path) + os.sep
    for path in (
        config.hf_home(_REAL_ENVIRONMENT),
        config.hub_cache(_REAL_ENVIRONMENT),
        os.path.expanduser("~/.cache/huggingface"),
        os.path.expanduser("~/.cache/hf-overlay"),
        os.path.expanduser("~/.config/hf-overlay"),
        os.path.expanduser("~/Library/Caches/hf-overlay"),
        os.path.expanduser("~/Library/Application Support/hf-overlay"),
    )
)
_EVENTS = frozenset(
    {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}
)
_FOREIGN = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTORCH_", "MLX_", "XDG_", "PYTHONPATH", "NO_COLOR")


# A busy machine fails no test, and neither does the draw: the same code is tested with the same examples each time.
# `--hypothesis-profile=drawn` draws others in each run.
settings.register_profile("drawn", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("same", settings.get_profile("drawn"), derandomize=True)
settings.load_profile("same")

_HAS_SERVER = find_spec("mlx_lm") is not None and find_spec("mlx_overlay_server") is not None
_OF_THE_SERVER = ["server", "e2e/test_server_*.py", "e2e/anthropic", "e2e/responses", "e2e/test_soak_short.py"]
collect_ignore_glob = (
    []
    if _HAS_SERVER
    else [*_OF_THE_SERVER, "packaging/test_wheels.py", "packaging/test_examples.py", "support/test_s*.py"]
)
"""Tests that import the server or MLX; without them, the tests of hf-overlay are left."""


def pytest_report_header() -> str | None:
    """The reason for which tests are left out before they are collected."""
    return None if _HAS_SERVER else f"mlx-lm or the server is not installed, left out: {', '.join(collect_ignore_glob)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs mlx-lm where it is not installed."""
    if find_spec("mlx_lm") is None:
        for item in items:
            if item.get_closest_marker("mlx_lm") is not None:
                item.add_marker(pytest.mark.skip(reason="mlx-lm is not installed"))


def pytest_configure() -> None:
    """Before anything is collected: an environment of the tests' own, and a guard on the real one."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN):
            del os.environ[name]
    sys.addaudithook(_guard)


def _guard(event: str, arguments: tuple[object, ...]) -> None:
    if event in _EVENTS and arguments and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.abspath(os.fspath(arguments[0])) + os.sep
        if path.startswith(_FORBIDDEN):
            raise RuntimeError(f"a test touched the user's real cache: {event} {path}")


@pytest.fixture(scope="session", autouse=True)
def signals() -> Iterator[None]:
    """Tests may run under nohup: what they start is signalled all the same."""
    with processes.signals_reach_children():
        yield


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, for this process and those it starts; offline unless a test says otherwise."""
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    return path


@pytest.fixture
def hub(home: Path) -> Path:
    """Where the real Hugging Face cache of `home` is; not made yet."""
    return home / ".cache" / "huggingface" / "hub"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """An empty folder for the user's models, outside of home, like a drive."""
    path = tmp_path / "drive" / "models"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def sessions(home: Path) -> Iterator[Path]:
    """Where sessions live; at the end of the test none may be left."""
    path = Path(lease.sessions_folder(os.environ))
    assert path.is_relative_to(home)
    yield path
    left = sorted(entry.name for entry in path.glob("session-*")) if path.exists() else []
    assert not left, f"sessions were left behind: {left}"


@pytest.fixture
def clean_environment(home: Path) -> Mapping[str, str]:
    """What a person's shell hands to a program."""
    return {"HOME": str(home), "PATH": os.environ["PATH"]}
