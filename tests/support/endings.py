"""Sessions that end, in all the ways they can, while a program in them downloads.

Each way starts real processes, gives the program to the context, and ends the session at once; the download goes on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import hubs
from tests.support.alone import check_stands_alone
from tests.support.hfcache import repo_folder
from tests.support.loopback_hub import LoopbackHub
from tests.support.online import cached
from tests.support.processes import OVERLAY, PYTHON, SECONDS, eventually, start, succeed

SMALL, LARGE = "config.json", "model.safetensors"
"""Kept in git, and in LFS: the latter comes from the CDN, past the gateway."""

# Says how it went in a file, since nobody may be left who reads what it prints.
_DOWNLOAD = """
import os, sys, traceback
try:
    from huggingface_hub import snapshot_download
    snapshot_download(sys.argv[1])
    said = "whole"
except BaseException:
    said = traceback.format_exc()
with open(sys.argv[2] + ".new", "w") as file:
    file.write(said)
os.rename(sys.argv[2] + ".new", sys.argv[2])
"""
# README's "From Python", with and without its `pass_fds`.
_FROM_PYTHON = """
import subprocess, sys, hf_overlay
with hf_overlay.open_session([], gateway=sys.argv[1] == "gateway") as session:
    subprocess.run(sys.argv[3:], env=session.environment, pass_fds=[session.owner_fd] if sys.argv[2] == "fds" else [])
"""
# A program that ends at once, and leaves another one that has none of its descriptors.
_LEAVE = "import subprocess, sys; subprocess.Popen(sys.argv[1:], close_fds=True)"


@dataclass(frozen=True)
class Download:
    """A repo on a Hub that sends slowly, and the home of somebody who has nothing yet."""

    hub: LoopbackHub
    home: Path
    repo_id: str
    files: Mapping[str, bytes]
    environ: Mapping[str, str]
    """Of a shell."""
    release: str
    """Of huggingface_hub in the program that downloads."""

    @property
    def cache(self) -> Path:
        """The real one."""
        return self.home / ".cache/huggingface/hub"

    @property
    def command(self) -> list[str]:
        """The program that downloads, whatever else is in its environment."""
        variables = (f"{name}={value}" for name, value in hubs.environment(self.release).items())
        return ["env", *variables, PYTHON, "-c", _DOWNLOAD, self.repo_id, str(self._said)]

    @property
    def _said(self) -> Path:
        return self.home / f"said-{repo_folder(self.repo_id)}"

    def said(self) -> str | None:
        """How the download went: `whole`, or a traceback; None while it goes on."""
        return self._said.read_text() if self._said.exists() else None

    def is_under_way(self) -> bool:
        """Whether the large file is being sent, and no other one is."""
        return (self.repo_id, SMALL) in self.hub.finished_files() and self.bytes_sent(LARGE) > 0

    def bytes_sent(self, name: str) -> int:
        """How many bytes of a file went out."""
        return sum(each.sent for each in self.hub.requests if (each.repo_id, each.name) == (self.repo_id, name))

    def start_anything(self) -> None:
        """What anybody does next with the overlay."""
        succeed([OVERLAY, "clean"], self.environ)
        succeed([OVERLAY, "run", "--", "true"], self.environ)

    def sessions(self) -> list[Path]:
        """Those that are left."""
        return sorted(self.home.glob("sessions/session-*"))

    def wait(self) -> None:
        """Wait for the download's end, which is a good one. AssertionError when it is not."""
        eventually(lambda: self.said() is not None, "the download ends")
        assert self.said() == "whole", f"P3 is broken: the download was cut: {self.said()}"

    def check_nothing_is_lost(self) -> None:
        """The download is in the real cache, as if it had been made directly, and no session is left."""
        self.hub.reset_counts()
        succeed([*self.command[:-1], str(self.home / "plain")], self.environ)
        assert (self.home / "plain").read_text() == "whole"
        (self.home / "plain").unlink()
        assert self.hub.bytes_served(self.repo_id) == 0, "P3 is broken: what was downloaded is downloaded again"
        assert cached(self.cache, self.repo_id) == self.files
        check_stands_alone(self.cache)
        assert self.sessions() == [], "a session that nobody uses is left"


def make(hub: LoopbackHub, home: Path, repo_id: str, release: str, *, size: int = 200_000) -> Download:
    """A repo of one small and one large file."""
    home.mkdir(exist_ok=True)
    files = {SMALL: b'{"model_type": "llama"}', LARGE: (repo_id.encode() * size)[:size]}
    hub.add_repo(repo_id, files)
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "critical"}
    environ = hub.environment(home, HF_OVERLAY_DIR=str(home / "sessions"), **quiet, **hubs.environment(hubs.INSTALLED))
    return Download(hub, home, repo_id, files, environ, release)


# Ways to end --------------------------------------------------------------------------------------------------------

Way = Callable[[Download], AbstractContextManager[Callable[[], None]]]
"""Starts a session and the download in it. What it gives ends the session."""


@contextmanager
def from_python(download: Download, gateway: str, fds: str) -> Iterator[Callable[[], None]]:
    """README's example, of which the parent is killed."""
    command = [PYTHON, "-c", _FROM_PYTHON, gateway, fds, *download.command]
    with start(command, download.environ) as process:
        yield process.kill


@contextmanager
def served(download: Download, number: int) -> Iterator[Callable[[], None]]:
    """`hf-overlay serve` is ended by a signal; the program was started from a shell that had joined it."""
    log = download.home / "serve.log"
    with (
        log.open("wb") as err,
        start([OVERLAY, "serve", "--interval", "0.05"], download.environ, stderr=err) as service,
    ):
        eventually(lambda: b"serving" in log.read_bytes(), "it says that it serves")
        with start(["bash", "-euc", 'eval "$(hf-overlay env)"; exec "$@"', "sh", *download.command], download.environ):

            def end() -> None:
                service.send_signal(number)
                assert service.wait(SECONDS) == (0 if number == signal.SIGTERM else -number), log.read_text()

            yield end


@contextmanager
def left_running(download: Download) -> Iterator[Callable[[], None]]:
    """The program of `hf-overlay run` ends, and leaves another one without descriptors, which downloads."""
    gate = download.home / "gate"
    os.mkfifo(gate)
    script = f"{PYTHON} -c '{_LEAVE}' \"$@\"; read line < '{gate}'"
    with start([OVERLAY, "run", "--", "sh", "-c", script, "sh", *download.command], download.environ) as process:

        def end() -> None:
            gate.write_text("end\n")
            assert process.wait(SECONDS) == 0
            gate.unlink()

        yield end


@contextmanager
def killed(download: Download) -> Iterator[Callable[[], None]]:
    """`hf-overlay run` is killed; what its program left behind, without descriptors, goes on."""
    gate = download.home / "gate"
    os.mkfifo(gate)
    script = f"{PYTHON} -c '{_LEAVE}' \"$@\"; read line < '{gate}'; kill -9 $PPID"
    with start([OVERLAY, "run", "--", "sh", "-c", script, "sh", *download.command], download.environ) as process:

        def end() -> None:
            gate.write_text("end\n")
            assert process.wait(SECONDS) == -signal.SIGKILL
            gate.unlink()

        yield end


WAYS: Mapping[str, Way] = {
    "from Python": lambda download: from_python(download, "none", "none"),
    "from Python with a gateway": lambda download: from_python(download, "gateway", "none"),
    "from Python with pass_fds": lambda download: from_python(download, "gateway", "fds"),
    "serve stopped": lambda download: served(download, signal.SIGTERM),
    "serve killed": lambda download: served(download, signal.SIGKILL),
    "left running": left_running,
    "run killed": killed,
}
