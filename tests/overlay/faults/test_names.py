"""Files, folders and repos of any name are served, or left out with a reason (P7, P8, P12)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import hf_overlay
import pytest

from tests.overlay.faults.seen import CACHED, CONFIG, WEIGHTS, assert_as_new, ids, left, loaded, said, scanned
from tests.support import hubs, processes
from tests.support.folders import lay_model, weights
from tests.support.hfcache import add_repo

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "org/modèle"), unicodedata.normalize("NFD", "org/modèle")
NAMES = [
    "a name/with  spaces ",
    COMPOSED,
    DECOMPOSED,
    "org/模型🙂",
    "org/" + "n" * 255,
    "o" * 255,
    "o" * 238 + "/n",
    "o" * 220 + "/" + "n" * 9,
    "o" * 220 + "/" + "n" * 8,
    "/".join(["n" * 50] * 6),
    "/".join("abcdefghijklmnopqrstuvwxyz"),
    "org/a--b",
    "org/-",
    "-rf",
    "--help",
    "org/name-",
    "org-/name",
    "org/name.git",
    "org/new\nline",
    "org/\x07bell",
    "org/\x1b[31mred",
    "org/tab\tand\rreturn",
    "org/back\\slash",
    "org/\"quote'",
    "org/$HOME ${HOME} `id` *?[a]",
    "org/%s{0}",
    "models--odd",
    "refs/main",
    "blobs",
    "snapshots/" + "a" * 40,
    "con",
]


def test_every_name_a_disk_can_hold_is_listed_and_every_listed_id_resolves(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_repo(hub, "org/cached", CACHED)
    for name in NAMES:
        lay_model(models / name)
    with hf_overlay.open_session([models]) as session:
        listed = {model.id: model.path for model in session.models}
        refused = set(NAMES) - listed.keys()
        assert refused <= {"org/back\\slash"}, "only an id that `resolve` refuses as untrusted may be left out"
        assert [warning for warning in said(caplog) if "back\\slash" not in warning] == []
        for model_id, path in listed.items():
            assert session.resolve(model_id) == Path(path), "P11: what is listed resolves to the path it is listed with"
            assert model_id == "org/cached" or path == f"{models}/{model_id}"
        found = scanned(session)
        assert "org/cached" in found
        assert [name for name in ("org/name-", "con", COMPOSED, "org/\x07bell") if name not in found] == []
        assert "org/a/b" not in found, "`--` is `/` in a cache: that id is loaded by path"
        session.refresh()
        assert_as_new(session)


def test_dot_folders_are_no_models_and_hide_none(models: Path, sessions: Path) -> None:
    for name in (".hidden/org/name", "org/.hidden", "..odd", ".Trashes/501/name", "org/mine"):
        lay_model(models / name)
    with hf_overlay.open_session([models]) as session:
        assert ids(session) == scanned(session) == ["org/mine"]


def rename_to_bytes(folder: Path, name: bytes) -> Path:
    """Give a folder a name that is no UTF-8; skips where a volume takes none."""
    try:
        return folder.rename(folder.with_name(os.fsdecode(name)))
    except OSError:
        pytest.skip("names must be UTF-8 on this volume")


# In a process of its own: test reports cannot hold such names.
REFRESH_AND_TELL = """
import json, logging, os, pathlib, sys, hf_overlay
from huggingface_hub import scan_cache_dir, snapshot_download
from tests.overlay.faults.seen import assert_as_new

class Handler(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())

warnings = []
logging.getLogger("hf_overlay").addHandler(Handler(logging.WARNING))
with hf_overlay.open_session([sys.argv[1]]) as session:
    session.refresh()
    said = len(warnings)
    assert_as_new(session)
    info = scan_cache_dir(session.hub_cache)
    weights = pathlib.Path(snapshot_download("org/mine", cache_dir=session.hub_cache), "model.safetensors").read_bytes()
    assert weights == (session.resolve("org/mine") / "model.safetensors").read_bytes()
    print(json.dumps([
        said,
        [model.id for model in session.models],
        [repo.repo_id for repo in info.repos],
        len(info.warnings),
        os.fspath(session.resolve("org/mine")),
    ]))
"""


def refresh_and_tell(root: Path, home: Path) -> list[Any]:
    """Open a session and refresh it: how many warnings, what is listed, scanned and scanned with warnings; one path."""
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    command = [processes.PYTHON, "-c", REFRESH_AND_TELL, os.fspath(root)]
    answer = json.loads(processes.succeed(command, environ).out)
    assert isinstance(answer, list)
    return answer


def test_names_that_are_no_text_hide_themselves_alone_and_are_said_once(
    models: Path, home: Path, sessions: Path
) -> None:
    mine = lay_model(models / "org/mine")
    rename_to_bytes(lay_model(models / "org/odd", {"deeper/config.json": CONFIG}), b"odd-\xff\xfe")
    (mine / os.fsdecode(b"notes-\xff.txt")).write_bytes(b"x")
    (mine / os.fsdecode(b"folder-\xff")).mkdir()
    assert refresh_and_tell(models, home) == [1, ["org/mine"], ["org/mine"], 0, str(mine)]


def test_a_model_path_whose_own_name_is_no_text_is_as_good_as_any(tmp_path: Path, home: Path, sessions: Path) -> None:
    lay_model(tmp_path / "drive/org/mine")
    root = rename_to_bytes(tmp_path / "drive", b"drive-\xff")
    assert refresh_and_tell(root, home) == [0, ["org/mine"], ["org/mine"], 0, str(root / "org/mine")]


def test_names_reach_a_terminal_without_their_control_characters(models: Path, home: Path, sessions: Path) -> None:
    rename_to_bytes(lay_model(models / "org/odd"), b"\x1b[31m\x07\xff")
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    for command in (["run", "--model-path", str(models), "--", "true"], ["ls", "--model-path", str(models)]):
        done = processes.succeed([processes.OVERLAY, *command], environ)
        assert "not valid UTF-8" in done.err
        assert not [character for character in done.err if not character.isprintable() and character != "\n"]


def nest(folder: Path, name: str, depth: int) -> None:
    """Make folders in folders, deeper than a path can say, with a file in the last."""
    inner = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=inner)
        outer, inner = inner, os.open(name, os.O_RDONLY, dir_fd=inner)
        os.close(outer)
    os.close(os.open("notes.txt", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
    os.close(inner)


@pytest.mark.parametrize(
    ("name", "length"),
    [("d", 2400), ("d" * 20, 4060), ("d" * 200, 6000)],
    ids=["deeper than Python's stack", "too long below a session's folder", "too long anywhere"],
)
def test_a_model_of_folders_in_folders_hides_no_other_and_is_cleared(
    models: Path, sessions: Path, name: str, length: int
) -> None:
    lay_model(models / "org/mine")
    deep = lay_model(models / "org/deep")
    nest(deep, name, (length - len(os.fsencode(deep))) // (len(name) + 1))
    try:
        with hf_overlay.open_session([models]) as session:
            for _ in range(2):
                assert "org/mine" in ids(session)
                assert "org/mine" in scanned(session)
                assert loaded(session, "org/mine") == (models / "org/mine" / WEIGHTS).read_bytes()
                session.refresh()
        assert left(sessions) == []
    finally:
        subprocess.run(["rm", "-rf", deep, sessions], check=True)  # shutil, and so pytest, would need as deep a stack


def test_two_thousand_folders_are_listed_shown_refreshed_and_cleared(models: Path, sessions: Path) -> None:
    for number in range(2000):
        folder = models / f"org-{number % 40}" / f"model-{number}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(CONFIG if number % 100 else b"{")
        (folder / WEIGHTS).write_bytes(weights(b"%d" % number))
        (folder / "tokenizer.json").write_bytes(b"{}")
    with hf_overlay.open_session([models]) as session:
        assert len(ids(session)) == 1980
        assert scanned(session) == ids(session)
        assert loaded(session, "org-1/model-1001") == weights(b"1001")
        shutil.rmtree(models / "org-1")
        assert len(session.refresh().removed) == 50
        assert len(ids(session)) == 1930
