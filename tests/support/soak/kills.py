"""Signal 9 at random moments of everything that an overlay does, with every release of huggingface_hub in turn.

P1, P3, P4: after each kill and the next start, the user's bytes are what they were, the real cache stands alone, no
session is left, and each file whose download was complete is in the real cache and is never fetched again. `waited` is
how long the longest next start took, `held` counts sessions that are left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from tests.support import hubs
from tests.support.alone import check_stands_alone
from tests.support.folders import lay_model
from tests.support.hfcache import Entry, etag, listing
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import OVERLAY, PYTHON, SECONDS, finish, read_line, start
from tests.support.soak import Row, took

FILES = 40
WORKERS = 4
"""Files that a client downloads at once: those may be cut, and fetched again."""
BYTES_PER_SECOND = 6000
"""For each file by itself, of 600 bytes."""
DOWNLOAD = (
    "import os, sys; print(os.getpid(), flush=True); from huggingface_hub import snapshot_download as get; "
    "get(sys.argv[1], max_workers=int(sys.argv[2]))"
)
COMMANDS = (
    ("run", "--quiet", "--", "true"),
    ("run", "--quiet", "--", "sleep", "0.2"),
    ("clean",),
    ("ls",),
    ("serve", "--interval", "0.02"),
)


def run(place: Path, seconds: float, random: Random) -> Row:
    """Kill, start again, look; and at the end, let a download that was killed come to its end."""
    with LoopbackHub() as hub:
        world = _World(place, hub)
        releases = [release for release in hubs.ALL if hubs.is_here(release)]
        tried = 0
        ends = time.monotonic() + seconds
        while tried == 0 or time.monotonic() < ends:
            release = releases[tried % len(releases)]
            if random.random() < 0.7:
                world.kill_a_download(release, random)
            else:
                world.kill_a_command(random)
            tried += 1
            world.start_again(random)
            world.look(f"kill {tried}, huggingface_hub {release}")
        world.finish_downloads()
    held = len(world.sessions())
    return Row(tried, world.lost, world.waited, held, tuple(world.broken))


class _World:
    """A user's drive and real cache, and a Hub, through all the kills."""

    def __init__(self, place: Path, hub: LoopbackHub) -> None:
        self.lost = 0
        self.waited = 0.0
        self.broken: list[str] = []
        self._hub = hub
        self._home, self._drive, self._aside = place / "home", place / "drive", place / "aside"
        self._home.mkdir()
        for name in ("mine", "also-mine"):
            lay_model(self._drive / "org" / name, settled=True)
        self._users = listing(self._drive)
        self._cache = self._home / ".cache/huggingface/hub"
        self._repos: dict[str, dict[str, bytes]] = {}
        self._repo = ""
        self._had: dict[str, set[str]] = {}
        self._published: set[str] = set()
        self._gone: set[str] = set()

    def kill_a_download(self, release: str, random: Random) -> None:
        """Kill the session, the program in it, or both, after so many requests at the Hub."""
        # What a program downloads past the gateway must be moved, but only where the cache does not have its repo yet.
        if not self._repo or len(self._had[self._repo]) > FILES // 2 or random.random() < 0.4:
            self._new_repo()
        self._hub.slow(BYTES_PER_SECOND)
        self._hub.reset_counts()
        past = [] if random.random() < 0.5 else ["env", f"HF_ENDPOINT={self._hub.endpoint}"]
        program = [*past, PYTHON, "-c", DOWNLOAD, self._repo, str(WORKERS)]
        command = [OVERLAY, "run", "--quiet", "--model-path", str(self._drive), "--", *program]
        requests = random.randrange(FILES)
        with start(command, self._environ(release), stderr=subprocess.DEVNULL) as process:
            pid = int(read_line(process.stdout) or 0)
            ends = time.monotonic() + 20
            while len(self._hub.requests) < requests and process.poll() is None and time.monotonic() < ends:
                time.sleep(0.005)
            victims = random.choice([[process.pid, pid], [pid, process.pid], [-process.pid]])
            _kill(victims, random.choice([0, random.uniform(0, 0.2)]))
            process.communicate(timeout=SECONDS)  # ends when the last of them has
        self._hub.heal()
        again = self._served() & self._had[self._repo]
        self.lost += len(again)
        if again:
            self.broken.append(f"P3: fetched again with huggingface_hub {release}: {sorted(again)}")

    def kill_a_command(self, random: Random) -> None:
        """Kill a command at a moment of its life; meanwhile a model goes away and comes back."""
        name, *rest = random.choice(COMMANDS)
        command = [OVERLAY, name, *([] if name == "clean" else ["--model-path", str(self._drive)]), *rest]
        here, away = self._drive / "org" / "also-mine", self._aside
        with start(command, self._environ(hubs.INSTALLED), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
            ends = time.monotonic() + random.uniform(0.05, 0.8)
            while time.monotonic() < ends and one.poll() is None:
                here.rename(away)
                time.sleep(random.uniform(0, 0.05))
                away.rename(here)
                time.sleep(random.uniform(0, 0.05))
            _kill([-one.pid], 0)

    def start_again(self, random: Random) -> None:
        """The next start, which clears what the kill left."""
        self._published = self._whole(self._home)
        command: Sequence[str] = random.choice([["clean"], ["run", "--quiet", "--", "true"]])
        started = time.monotonic()
        done = finish([OVERLAY, *command], self._environ(hubs.INSTALLED))
        self.waited = max(self.waited, took(started))
        if done.status != 0 or "Traceback" in done.err:
            self.broken.append(f"P3: the next start exited {done.status}: {done.err[-300:]!r}")

    def look(self, when: str) -> None:
        """Compare with what must be so after any kill."""
        if self._mine(listing(self._drive)) != self._mine(self._users):
            self.broken.append(f"P1: {when}: the user's folders have changed")
        try:
            check_stands_alone(self._cache, is_in_progress=True)
        except AssertionError as error:
            self.broken.append(f"{when}: {error}")
        home = self._whole(self._cache)
        if gone := self._published - home - self._gone:
            self.lost += len(gone)
            self._gone |= gone
            self.broken.append(f"P3: {when}: {len(gone)} complete files are not in the real cache")
        if left := self.sessions():
            self.broken.append(f"P3: {when}: sessions are left: {left}")
        if self._repo:
            self._had[self._repo] = {name for name in self._repos[self._repo] if self._key(name) in home}

    def finish_downloads(self) -> None:
        """What is missing of the last repo, and nothing else, is fetched when it is let through."""
        if not self._repo:
            return
        self._hub.heal()
        self._hub.reset_counts()
        program = [PYTHON, "-c", DOWNLOAD, self._repo, str(WORKERS)]
        done = finish([OVERLAY, "run", "--quiet", "--", *program], self._environ(hubs.INSTALLED))
        files = self._repos[self._repo]
        if done.status != 0 or self._served() != files.keys() - self._had[self._repo]:
            self.broken.append(f"P3: a download that was killed does not go on where it was: {done.err[-300:]!r}")
        self.lost += len(files.keys() - {name for name in files if self._key(name) in self._whole(self._cache)})
        check_stands_alone(self._cache, is_in_progress=True)

    def sessions(self) -> list[str]:
        """Names of sessions that are there."""
        return sorted(path.name for path in self._home.glob("sessions/session-*"))

    # ------------------------------------------------------------------------------------------------------------

    def _environ(self, release: str) -> Mapping[str, str]:
        more = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_OVERLAY_DIR": str(self._home / "sessions")}
        return self._hub.environment(self._home, **more, **hubs.environment(release))

    def _new_repo(self) -> None:
        self._repo = f"org/new-{len(self._repos)}"
        names = (f"part-{n}.safetensors" if n % 3 else f"notes/{n}.txt" for n in range(FILES))
        files = {name: (f"{self._repo} {name} ".encode() * 40)[:600] for name in names}
        self._hub.add_repo(self._repo, files)
        self._repos[self._repo] = files
        self._had[self._repo] = set()

    def _key(self, name: str) -> str:
        return etag(name, self._repos[self._repo][name])

    def _whole(self, where: Path) -> set[str]:
        """Etags of the Hub's files that a client has published anywhere below a folder; their bytes are compared."""
        known = {etag(name, content): content for files in self._repos.values() for name, content in files.items()}
        found = set()
        for path in where.rglob("blobs/*"):
            if path.name in known and not path.is_symlink():
                found.add(path.name)
                if path.read_bytes() != known[path.name]:
                    self.broken.append(f"P3: {path} has other bytes than the Hub's")
        return found

    def _served(self) -> set[str]:
        """Names of files of which bytes went out since the last time."""
        return {each.name for each in self._hub.requests if each.sent and each.name in self._repos[self._repo]}

    @staticmethod
    def _mine(found: Mapping[str, Entry]) -> dict[str, Entry]:
        """A listing without the folders whose times change when the user moves a model in and out."""
        return {name: entry for name, entry in found.items() if name not in (".", "org")}


def _kill(victims: Sequence[int], gap: float) -> None:
    for number, pid in enumerate(victims):
        if number:
            time.sleep(gap)
        try:
            os.killpg(-pid, signal.SIGKILL) if pid < 0 else os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
