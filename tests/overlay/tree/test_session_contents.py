"""P3 and P12: whatever is in a session's folder, it neither stops a start nor leads a clearing out of the folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import hf_overlay
import pytest
from hf_overlay.config import OWNER_FILE
from hf_overlay.tree.clear import clear_dead
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.folders import lay_model
from tests.support.hfcache import add_repo, listing
from tests.support.sessions import new_name

REPO = "models--org--m"
FOLDERS = (
    "", "hubs", "hubs/1", "hubs/x", f"hubs/1/{REPO}", f"hubs/1/{REPO}/blobs", f"hubs/1/{REPO}/snapshots/c",
    f"hubs/1/{REPO}/refs", "hubs/1/.locks", f"hubs/1/.locks/{REPO}", "repos", f"repos/{REPO}.0123", "home", "new",
    f"repos/{REPO}.0123/blobs", f"repos/{REPO}.0123/views/c", "shadows",
)  # fmt: skip
NAMES = (
    OWNER_FILE, "made", ".DS_Store", "hubs", "1", "2", "home", "hub", "hub.next", "repos", "new", "overlay.json", REPO,
    "x", "x.lock", f"{'c' * 64}", f"{'c' * 64}.incomplete", "blobs", "snapshots", "refs", "main", "c", "trees",
    ".locks",
)  # fmt: skip
CONTENTS = (
    b"", b"\0", b"\xff\n", b"{}", b"[]", b"null", b"c", b'{"folder": 1, "commit": []}', b'{"hub_cache": "x"}',
    b'{"folder": "/", "commit": "../../.."}', b"/no/such\0folder\n", b'"\\u0000"\n"relative"\n', b"[" * 100_000,
    b'{"pid": 1, "started": "x", "sources": 0, "hub_cache": 5, "service": []}',
)  # fmt: skip
KINDS = ("file", "folder", "link to the user's folder", "link to itself", "link to nothing", "pipe")

Entry = tuple[str, str, str, bytes]


def lay(session: Path, user: Path, entry: Entry) -> None:
    folder, name, kind, content = entry
    path = session / folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.resolve() == user or user in path.parent.resolve().parents:
            return  # what is already there led to it
        if path.is_fifo():
            return  # to open it for writing would wait for a reader
        if kind == "file":
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"link to itself": name, "link to nothing": "/no/such"}.get(kind, user))
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT):
            raise  # else something of another kind is there already


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    entries=st.lists(
        st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from(KINDS), st.sampled_from(CONTENTS)),
        max_size=12,
    ),
    has_record=st.booleans(),
)
@example(entries=[("hubs", ".DS_Store", "file", b"x"), ("", "made", "file", b"/a\0b\n")], has_record=True)
@example(
    entries=[("", "hubs", "link to the user's folder", b""), ("", "repos", "link to itself", b"")], has_record=True
)
@example(entries=[("", "made", "pipe", b""), (f"repos/{REPO}.0123", "overlay.json", "pipe", b"")], has_record=True)
@example(entries=[("", OWNER_FILE, "pipe", b"")], has_record=False)
def test_clearing_survives_any_content_of_a_sessions_folder(entries: list[Entry], has_record: bool) -> None:
    with TemporaryDirectory() as name:
        top = Path(name).resolve()
        session, user, hub = top / "sessions" / new_name(), top / "user", top / "hub"
        session.mkdir(parents=True)
        for folder in ("", "blobs", "snapshots/c", "1/models--a--b/blobs"):
            (user / folder).mkdir(parents=True, exist_ok=True)
            (user / folder / "precious").write_bytes(b"precious")
        if has_record:
            record = {"pid": 1, "started": 1.0, "sources": [], "hub_cache": str(hub), "service": {}}
            (session / OWNER_FILE).write_text(json.dumps(record))
        for entry in entries:
            lay(session, user, entry)
        before, downloaded = listing(user), blobs(top)
        for _ in range(2):
            clear_dead(str(session.parent))
        environ = {"HOME": str(top), "HF_OVERLAY_DIR": str(session.parent)}
        with hf_overlay.open_session(environ=environ) as opened:
            opened.refresh()
        assert listing(user) == before, "P1 is broken: clearing went out of the session"
        assert not downloaded - blobs(top), "P3 is broken: downloaded bytes are deleted"


def blobs(top: Path) -> Counter[bytes]:
    """The bytes of blobs: in the session, and in the real cache."""
    found = [path for folder in ("sessions", "hub") for path in (top / folder).rglob("blobs/c*")]
    held = (path.read_bytes() for path in found if path.is_file() and not path.is_symlink())
    return Counter({content: 1 for content in held if content})


def test_an_id_that_no_file_name_may_hold_is_neither_made_nor_recorded(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "HF_OVERLAY_DIR": str(tmp_path / "sessions")}
    with hf_overlay.open_session(environ=environ) as session:
        for model_id in ("org/a\0b", "a\0", "..", "a/../b", "a/b/c", "a\n/b", "\udcff", "x" * 200):
            session.expect_model(model_id)
        assert not (session.path / "made").exists()
        session.expect_model("org/name")
        assert (session.path / "made").exists()
    assert not (tmp_path / ".cache/huggingface/hub").exists()


def test_files_that_others_put_into_a_session_do_not_disturb_it(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "HF_OVERLAY_DIR": str(tmp_path / "sessions")}
    lay_model(tmp_path / "drive/org/one")
    with hf_overlay.open_session([tmp_path / "drive"], environ=environ) as session:
        for folder in ("", "hubs", "hubs/1", "repos", "home"):
            (session.path / folder / ".DS_Store").write_bytes(b"view")
        lay_model(tmp_path / "drive/org/two")
        session.refresh()
        session.expect_model("org/three")
        assert {"models--org--two", "models--org--three"} <= set(os.listdir(session.hub_cache))
    assert not list((tmp_path / "sessions").glob("session-*"))


def test_what_lands_in_a_folder_that_was_made_for_it_stays_there(tmp_path: Path) -> None:
    """P3: at the session's end, only those that are empty go."""
    environ = {"HOME": str(tmp_path), "HF_OVERLAY_DIR": str(tmp_path / "sessions")}
    with hf_overlay.open_session(environ=environ) as session:
        for model_id in ("org/fetched", "org/announced"):
            session.expect_model(model_id)
        add_repo(session.hub_cache, "org/fetched", {"config.json": b"{}"})
    hub = tmp_path / ".cache/huggingface/hub"
    assert [path.read_bytes() for path in hub.glob("models--org--fetched/snapshots/*/config.json")] == [b"{}"]
    assert not (hub / "models--org--announced").exists()


@pytest.mark.parametrize("folder", ["", "hubs"])
def test_what_belongs_nowhere_in_a_session_is_kept(tmp_path: Path, folder: str) -> None:
    """P3: nobody knows what it is."""
    environ = {"HOME": str(tmp_path), "HF_OVERLAY_DIR": str(tmp_path / "sessions")}
    with hf_overlay.open_session(environ=environ) as session:
        stray = session.path / folder / "weights.bin"
        stray.write_bytes(b"unknown")
    assert stray.read_bytes() == b"unknown"


def test_several_who_clear_a_session_at_once_have_nothing_to_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P10: and it is gone in the end."""
    caplog.set_level(logging.INFO)
    failed: list[BaseException] = []
    for number in range(30):
        session = tmp_path / new_name()
        (session / "hubs/1").mkdir(parents=True)
        if number % 3:
            (session / OWNER_FILE).write_text("{}")
        ready = threading.Barrier(4)

        def clear(ready: threading.Barrier = ready) -> None:
            try:
                ready.wait()
                clear_dead(str(tmp_path))
            except BaseException as error:  # noqa: BLE001 - shown below
                failed.append(error)

        if not number % 3:
            os.rmdir(session / "hubs/1")
            os.rmdir(session / "hubs")
        threads = [threading.Thread(target=clear) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    clear_dead(str(tmp_path))
    assert failed == []
    assert caplog.messages == []
    assert not list(tmp_path.glob("session-*"))
