"""A home of any name holds caches and sessions as any other does."""

from __future__ import annotations

from pathlib import Path

import hf_overlay
import pytest

from tests.overlay.faults.seen import CACHED, WEIGHTS, ids, loaded, scanned
from tests.support import hubs, processes
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo


def test_a_home_with_spaces_and_dollars_in_its_name_is_as_good_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variable has these names, so nothing expands them."""
    home = tmp_path / "John's $files & ${more} $ %s"
    mine = lay_model(home / "models/org/mine")
    hub = home / ".cache/huggingface/hub"
    add_repo(hub, "org/cached", CACHED)
    monkeypatch.setenv("HOME", str(home))
    for model_path in ("~/models", home / "models"):
        with hf_overlay.open_session([model_path]) as session:
            assert session.path.is_relative_to(home)
            assert session.settings.hub_cache == str(hub)
            assert ids(session) == scanned(session) == ["org/cached", "org/mine"]
            assert loaded(session, "org/mine") == (mine / WEIGHTS).read_bytes()
            environ = session.environment | hubs.environment(hubs.INSTALLED)
            script = "import huggingface_hub as h; print(h.snapshot_download('org/mine', local_files_only=True))"
            done = processes.succeed([processes.PYTHON, "-c", script], environ)
            assert Path(done.out.strip(), WEIGHTS).read_bytes() == (mine / WEIGHTS).read_bytes()
