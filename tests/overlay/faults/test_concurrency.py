"""Sessions, refreshes and readers at the same time each see a whole tree (P6, P10)."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import hf_overlay
import pytest

from tests.overlay.faults.seen import CACHED, WEIGHTS, assert_as_new, ids, left, loaded, said
from tests.support import hubs, processes
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo

OPEN_ONE = """
import json, sys, hf_overlay
sys.stdin.readline()
with hf_overlay.open_session([sys.argv[1]]) as session:
    print(json.dumps([str(session.path), [model.id for model in session.models], sorted(
        path.name for path in session.hub_cache.iterdir()
    )]), flush=True)
    sys.stdin.readline()
    session.refresh()
"""


def test_sessions_building_at_once_do_not_meet(models: Path, hub: Path, home: Path, sessions: Path) -> None:
    """P10. They all begin with a leftover of a killed program to clear."""
    for number in range(50):
        lay_model(models / f"org/model-{number}")
    add_repo(hub, "org/cached", CACHED)
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    command = [processes.PYTHON, "-c", OPEN_ONE, str(models)]
    with processes.start(command, environ) as killed:
        assert killed.stdin
        killed.stdin.write(b"go\n")
        assert processes.read_line(killed.stdout)
    assert len(left(sessions)) == 1
    with contextlib.ExitStack() as stack:
        builders = [stack.enter_context(processes.start(command, environ)) for _ in range(5)]
        for line in (b"go\n", b"end\n"):
            for builder in builders:
                assert builder.stdin
                builder.stdin.write(line)
            if line == b"go\n":
                answers = [json.loads(processes.read_line(builder.stdout)) for builder in builders]
        for builder in builders:
            _, err = builder.communicate(timeout=processes.SECONDS)
            assert (builder.returncode, err) == (0, b"")
    assert len({path for path, _, _ in answers}) == 5
    assert all(answer[1:] == answers[0][1:] for answer in answers)
    assert len(answers[0][1]) == 51
    assert left(sessions) == []


WRITE_THE_CACHE = """
import os, shutil, sys
from pathlib import Path
from tests.support.folders import weights
from tests.support.hfcache import add_repo
hub = Path(sys.argv[1])
for number in range(300):
    name = f"org/model-{number % 4}"
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights(b"%d" % number)}
    files["tokenizer.json"] = b"{}"
    snapshot = add_repo(hub, name, files)
    if number % 3 == 0:
        shutil.rmtree(snapshot.parents[1])
    if number % 5 == 0:
        (snapshot.parents[1] / "blobs" / "x.incomplete").parent.mkdir(parents=True, exist_ok=True)
        (snapshot.parents[1] / "blobs" / "x.incomplete").write_bytes(b"")
    if number == 0:
        print("writing", flush=True)
"""


def test_a_session_goes_on_while_another_process_writes_the_cache(
    models: Path, hub: Path, home: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = lay_model(models / "org/mine")
    stable = add_repo(hub, "org/stable", CACHED)
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    with (
        hf_overlay.open_session([models]) as session,
        processes.start([processes.PYTHON, "-c", WRITE_THE_CACHE, str(hub)], environ) as writer,
    ):
        assert processes.read_line(writer.stdout) == "writing"
        refreshes = 0
        while writer.poll() is None and refreshes < 100_000:
            session.refresh()
            assert {"org/mine", "org/stable"} <= set(ids(session))
            assert session.resolve("org/stable") == stable
            assert loaded(session, "org/stable") == CACHED[WEIGHTS]
            assert loaded(session, "org/mine") == (mine / WEIGHTS).read_bytes()
            with contextlib.suppress(hf_overlay.ModelNotFound):
                session.resolve("org/model-1")
            refreshes += 1
        assert writer.wait(processes.SECONDS) == 0
        assert refreshes > 3
        session.refresh()
        assert_as_new(session)
    assert said(caplog) == []
