"""The releases of huggingface_hub that tests run: those installed aside by `make`, and the installed one.

Deletions differ: up to 1.31 they follow links to the end, from 1.32 on they stop at the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hf_overlay

from tests.support import hub_process
from tests.support.processes import SECONDS, answering

ASIDE = ("0.36.2", "1.31.0", "1.32.0", "1.33.0")
"""As HUB_VERSIONS in the Makefile."""
INSTALLED = "installed"
ALL = (*ASIDE, INSTALLED)
FOLLOWING_LINKS = ("0.36.2", "1.31.0")


def environment(release: str) -> dict[str, str]:
    """What a Python needs in its environment to import that release. AssertionError when it is not there."""
    # The hf_overlay that these tests import, wherever it lies, is also the one in processes they start.
    path = [str(Path(hf_overlay.__file__).parents[1]), str(Path(__file__).parents[2])]
    if release != INSTALLED:
        folder = Path(sys.prefix, "hubs", release)
        assert (folder / "huggingface_hub").is_dir(), (
            f"huggingface_hub {release} is not installed aside in {folder}: run `make test`, which sets it up, or "
            f"{sys.executable} -m pip install --target {folder} huggingface_hub=={release}"
        )
        path.insert(0, str(folder))
    return {"PYTHONPATH": os.pathsep.join(path)}


def is_here(release: str) -> bool:
    """Whether a release is installed."""
    return release == INSTALLED or Path(sys.prefix, "hubs", release, "huggingface_hub").is_dir()


class Answer(NamedTuple):
    """What an operation of hub_process.py gave."""

    value: Any
    error: str | None
    """What the client said when it refused."""


class HubProcess:
    """A process that runs the operations of hub_process.py with one release; it costs its import once."""

    def __init__(self, release: str, process: subprocess.Popen[str]) -> None:
        self.release = release
        self._process = process
        self.version: str = self.ask("version").value

    def ask(self, operation: str, **arguments: Any) -> Answer:
        """Run one operation. AssertionError when it fails as no client does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(SECONDS, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"operation": operation, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        reply: dict[str, Any] = json.loads(line) if line else {"crash": "it ended, or hung and was killed"}
        assert "crash" not in reply, f"{operation} with huggingface_hub {self.release}: {reply['crash']}"
        return Answer(reply.get("value"), reply.get("error"))


@contextmanager
def open_hub_process(release: str, home: Path, *, is_offline: bool = True) -> Iterator[HubProcess]:
    """`home` is an empty folder, for what clients write of their own."""
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1" if is_offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_SHARED_BLOBS": "1",  # as in every session's environment
        "HF_HUB_VERBOSITY": "critical",
        **environment(release),
    }
    with answering(hub_process.__file__, environ) as process:
        yield HubProcess(release, process)
