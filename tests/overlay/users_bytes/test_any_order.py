"""Operations in any order change no byte of the user's (P1)."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hf_overlay
import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.overlay.users_bytes.world import (
    BELOW,
    CACHED,
    CUSTOM,
    OPERATIONS,
    REMOVALS,
    World,
    contents,
    download,
    held,
    kill_owner,
    load,
)
from tests.support.folders import lay_model, settle, unseal
from tests.support.hfcache import repo_folder
from tests.support.hubs import Answer, HubProcess

CHANGING = ("acme/added", "acme/tiny", "org/front", "solo")
"""What the user adds, changes and removes."""

IDS = st.sampled_from([*CUSTOM, *CACHED, *BELOW, "acme/added", "org/new0", "org/absent"])
WHICH = st.integers(0, 1)
is_open = precondition(lambda self: bool(self.open))


class Lives(RuleBasedStateMachine):
    """Sessions, clients, a user and a killer at work on one world, which is checked after each step."""

    def __init__(self, base: Path, client: HubProcess) -> None:
        super().__init__()
        self.base = base
        self.world = World(base)
        self.client = client
        self.open: list[tuple[ExitStack, hf_overlay.Session]] = []
        self.loadable: dict[str, dict[str, str]] = {}
        """What the newest session must give for an id; nothing once anything else has happened."""
        self.payloads: list[bytes] = []

    @contextmanager
    def by_us(self) -> Iterator[None]:
        """A step of the overlay's own, which deletes no download."""
        before = held(self.world, self.payloads)
        yield
        lost = before - held(self.world, self.payloads)
        assert not lost, f"P3 is broken: downloads were deleted: {lost}"

    def session(self, which: int) -> hf_overlay.Session:
        return self.open[which % len(self.open)][1]

    def operate(self, which: int, model_id: str, operation: str) -> None:
        OPERATIONS[operation](self.world, self.client, self.session(which).hub_cache, model_id)
        self.loadable = {}

    def new_payload(self) -> bytes:
        self.payloads.append(f"payload {len(self.payloads)}".encode())
        return self.payloads[-1]

    # Sessions

    @initialize()
    def start_first(self) -> None:
        self.start()

    @precondition(lambda self: len(self.open) < 2)
    @rule()
    def start(self) -> None:
        with self.by_us():
            stack = ExitStack()
            self.open.append((stack, stack.enter_context(self.world.open())))
        models = self.session(-1).models
        self.loadable = {model.id: contents(model) for model in models if model.id.count("/") < 2}

    @is_open
    @rule(which=WHICH)
    def refresh(self, which: int) -> None:
        with self.by_us():
            self.session(which).refresh()

    @is_open
    @rule(which=WHICH)
    def end(self, which: int) -> None:
        with self.by_us():
            self.open.pop(which % len(self.open))[0].close()
        self.loadable = {}

    @rule(kill_at=st.integers(0, 400), refreshes=st.integers(0, 3))
    def kill_an_owner(self, kill_at: int, refreshes: int) -> None:
        with self.by_us():
            kill_owner(self.world, self.client, kill_at, refreshes)

    @is_open
    @rule(which=WHICH)
    def let_an_hour_pass(self, which: int) -> None:
        """For the hub folders of before a refresh, which are kept so long."""
        for path in (self.session(which).path / "hubs").iterdir():
            os.utime(path, (1, 1))

    # Clients

    @is_open
    @rule(model_id=IDS)
    def load(self, model_id: str) -> None:
        answer = load(self.world, self.client, self.session(-1).hub_cache, model_id)
        if model_id in self.loadable:
            assert answer == Answer(self.loadable[model_id], None)

    @is_open
    @rule(which=WHICH, model_id=IDS)
    def force_download(self, which: int, model_id: str) -> None:
        self.operate(which, model_id, "forced download")

    @is_open
    @rule(which=WHICH, model_id=IDS, operation=st.sampled_from(["hf cache rm model/ID", "hf cache rm COMMIT"]))
    def hf_cache_rm(self, which: int, model_id: str, operation: str) -> None:
        self.operate(which, model_id, operation)

    @is_open
    @rule(which=WHICH, operation=st.sampled_from(["hf cache prune", "delete_revisions of all"]))
    def clean_up(self, which: int, operation: str) -> None:
        self.operate(which, "", operation)

    @is_open
    @rule(which=WHICH, model_id=IDS)
    def delete_revisions(self, which: int, model_id: str) -> None:
        self.operate(which, model_id, "delete_revisions of one")

    @is_open
    @rule(which=WHICH, model_id=IDS, operation=st.sampled_from(["delete_files of one", "delete_files of all"]))
    def delete_files(self, which: int, model_id: str, operation: str) -> None:
        self.operate(which, model_id, operation)

    @is_open
    @rule(which=WHICH, pattern=IDS | st.sampled_from(["acme", "o"]))
    def mlx_lm_manage_delete(self, which: int, pattern: str) -> None:
        self.operate(which, pattern, "mlx_lm.manage --delete")

    @is_open
    @rule(which=WHICH, model_id=IDS, how=st.sampled_from([*REMOVALS]))
    def remove_folder(self, which: int, model_id: str, how: str) -> None:
        self.operate(which, model_id, how)

    @is_open
    @rule(which=WHICH)
    def download_a_new_model(self, which: int) -> None:
        hub = self.session(which).hub_cache
        download(self.world, hub, f"org/new{len(self.payloads)}", self.new_payload())

    @is_open
    @rule(
        which=WHICH,
        model_id=st.sampled_from(["acme/tiny", "org/both", "org/front", "org/second", "solo", "twin", *BELOW]),
    )
    def download_a_newer_revision(self, which: int, model_id: str) -> None:
        hub = self.session(which).hub_cache
        if repo_folder(model_id) not in self.world.shown(hub):
            try:
                download(self.world, hub, model_id, self.new_payload())
            except FileExistsError:
                pass  # as a client does where another one has removed what the link leads to
            self.loadable = {}

    # The user

    @rule(
        model_id=st.sampled_from(CHANGING),
        what=st.sampled_from(["weights", "file", "time", "gone", "plug"]),
        is_noticed=st.booleans(),
    )
    def change(self, model_id: str, what: str, is_noticed: bool) -> None:
        """Bring the drive back if it is away; else take it away, or change a model on it. Then refresh, perhaps."""
        away = self.world.users / "away"
        folder = self.world.roots[0] / model_id
        if away.exists():
            away.rename(self.world.drive)
        elif what == "plug":
            self.world.drive.rename(away)
        elif not folder.exists():
            lay_model(folder)
        elif what == "gone":
            shutil.rmtree(folder)
        elif what == "time":
            settle(folder)
        else:
            path = folder / ("model.safetensors" if what == "weights" else "added.json")
            path.write_bytes((path.read_bytes() if path.exists() else b"") + b"{}")
        self.world.changed_by_the_user()
        self.loadable = {}
        for which in range(len(self.open) if is_noticed else 0):
            self.refresh(which)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        with self.by_us():
            for stack, _ in self.open:
                stack.close()
            self.world.recover()
        self.world.check()
        for session in self.world.sessions.glob("session-*"):
            files = {path.read_bytes() for path in session.rglob("*") if path.is_file() and not path.is_symlink()}
            assert files & set(self.payloads), f"a session was left behind for nothing: {session}"
        unseal(self.base)
        shutil.rmtree(self.base)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a failure takes minutes to be made small
def test_nothing_is_lost_in_any_order(base: Path, client: HubProcess) -> None:
    numbers = itertools.count()

    @seed(client.version if settings().derandomize else os.urandom(8))  # each release with examples of its own
    class LivesHere(Lives):
        def __init__(self) -> None:
            super().__init__(base / f"life{next(numbers)}", client)

    run_state_machine_as_test(
        LivesHere,
        settings=settings(max_examples=15, stateful_step_count=25),
    )
