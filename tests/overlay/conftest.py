"""What tests of several folders use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from hf_overlay.tree import usage

from tests.support import hubs
from tests.support.reader import Reader, open_readers


@pytest.fixture(scope="session")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Reader]]:
    """One process for each release of huggingface_hub, started when it is first asked for."""
    releases = {release: hubs.environment(release) for release in hubs.ALL}
    with open_readers(tmp_path_factory.mktemp("readers"), releases) as readers:
        yield readers


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process uses a tree: else each session that ends here looks at all of the machine's, which takes longest."""
    monkeypatch.setattr(usage, "_processes", lambda *_: iter(()))
