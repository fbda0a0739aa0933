"""KV caches outlive the server, however it ends, and say the same as a prompt that is read again."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.support.models import make_random_model
from tests.support.processes import eventually
from tests.support.server import Server, serving

_WORDS = "baba dada gaga haha kaka lala mama nana papa rara "
_PROMPT = "".join(_WORDS * 20)
"""About 1,000 tokens."""


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    make_random_model(tmp_path / "drive" / "acme" / "endless")
    return tmp_path / "drive"


def _answer(server: Server) -> tuple[str, int]:
    """What a client hears, and how many tokens of its prompt were not read again."""
    answer = server.chat("acme/endless", _PROMPT, temperature=0, max_tokens=8)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens_details.cached_tokens or 0


def _metric(server: Server, name: str) -> float:
    found = re.search(rf"^mlx_omni_{name} (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def _folder(home: Path) -> Path:
    return next(path for path in home.rglob("kv") if path.is_dir())


def _left_by_a_kill(home: Path, drive: Path) -> str:
    """Have a server killed when its answer is on disk, and return the answer."""
    said: list[str] = []

    def serve() -> None:
        with serving(home, drive) as server:
            text, cached = _answer(server)
            assert cached == 0
            eventually(lambda: _metric(server, "kv_disk_files") >= 3, "the KV cache is on disk")
            said.append(text)
            server.process.kill()

    with pytest.raises(AssertionError, match=f"exited {-signal.SIGKILL}"):
        serve()
    return said[0]


def test_after_a_kill_a_prompt_is_not_read_again_nor_by_two_servers_that_share_the_folder(
    home: Path, tmp_path: Path, drive: Path
) -> None:
    text = _left_by_a_kill(home, drive)
    folder = _folder(home)
    assert folder.stat().st_mode & 0o777 == 0o700
    shared = tmp_path / "other" / folder.relative_to(home)
    shared.parent.mkdir(parents=True)
    shared.symlink_to(folder)
    with serving(home, drive) as one, serving(tmp_path / "other", drive) as other:
        for server in (one, other):
            again, cached = _answer(server)
            assert cached >= 768
            assert again == text
            assert _metric(server, "kv_disk_read_tokens_total") == cached
            assert _metric(server, "kv_disk_limit_bytes") == 20 * 10**9


def test_what_is_kept_is_on_disk_after_a_normal_end_and_not_read_where_nothing_is_kept(home: Path, drive: Path) -> None:
    with serving(home, drive, options=["--kv-disk", "10M"]) as server:
        text, _ = _answer(server)
    sizes = [path.stat().st_size for path in _folder(home).iterdir()]
    assert 100_000 < sum(sizes) < 10 * 10**6
    with serving(home, drive, options=["--kv-disk", "0"]) as server:
        assert _answer(server) == (text, 0)
        assert _metric(server, "kv_disk_limit_bytes") == 0
