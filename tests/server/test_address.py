"""How commands find the server that runs: by the file in its session."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay import OverlayError, UsageError
from mlx_overlay_server import address
from mlx_overlay_server.command.client import DEFAULT_URL, client

ONE, OTHER = "http://127.0.0.1:1", "http://127.0.0.1:2"


def _found(url: str | None = None) -> str:
    return client(argparse.Namespace(url=url, api_key=None)).url


def test_a_server_is_found_while_its_session_lives(sessions: Path) -> None:
    with hf_overlay.open_session() as session:
        assert address.running(os.environ) == []
        address.leave(str(session.path), ONE)
        assert address.running(os.environ) == [(ONE, os.getpid())]
        assert _found() == ONE
    assert address.running(os.environ) == []
    with pytest.raises(OverlayError, match="no server runs here"):
        _found()


def test_of_several_the_one_at_the_usual_address_is_meant_or_else_one_must_be_named(sessions: Path) -> None:
    with hf_overlay.open_session() as session, hf_overlay.open_session() as second:
        address.leave(str(session.path), ONE)
        address.leave(str(second.path), OTHER)
        with pytest.raises(UsageError, match=f"{ONE}.*name one with --url") as caught:
            _found()
        assert OTHER in str(caught.value)
        assert _found(OTHER) == OTHER
        address.leave(str(second.path), DEFAULT_URL)
        assert _found() == DEFAULT_URL


def test_what_a_killed_server_left_is_not_a_server(sessions: Path) -> None:
    dead = sessions / "session-1-a"
    dead.mkdir(parents=True, mode=0o700)
    sessions.chmod(0o700)
    (dead / ".hf-overlay-session").touch()
    address.leave(str(dead), ONE)
    assert address.running(os.environ) == []
    with hf_overlay.open_session():
        assert not dead.exists(), "it is cleared with all that is in it"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": 1}'])
def test_a_file_that_is_broken_is_no_server(sessions: Path, content: str) -> None:
    with hf_overlay.open_session() as session:
        (session.path / "server.lock").write_text(content)
        assert address.running(os.environ) == []
