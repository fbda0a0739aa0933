"""Folders that hold no model are left out, with a reason (P7, P12)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import hf_overlay
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.overlay.faults.seen import CACHED, CONFIG, WEIGHTS, assert_as_new, ids, link, loaded, said, scanned
from tests.support.folders import lay_model, settle
from tests.support.hfcache import add_repo


def put(name: str, content: bytes) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return lay


def cut(size: int) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        put(WEIGHTS, (folder / WEIGHTS).read_bytes()[:size])(folder)

    return lay


def huge(name: str) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(64 * 2**20 + 1)  # sparse

    return lay


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def folder_in_place(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def sharded(folder: Path, *, index: bytes | None = None, sizes: Mapping[int, int]) -> None:
    (folder / WEIGHTS).unlink()
    shards = {number: f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)}
    weight_map = {f"tensor {number}": name for number, name in shards.items()}
    (folder / "model.safetensors.index.json").write_bytes(index or json.dumps({"weight_map": weight_map}).encode())
    for number, size in sizes.items():
        (folder / shards[number]).write_bytes(b"x" * size)


def shards_without_index(folder: Path) -> None:
    sharded(folder, sizes={1: 5, 3: 5})
    (folder / "model.safetensors.index.json").unlink()


def copy_under_other_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.incomplete")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty config": (put("config.json", b""), "not valid JSON"),
    "cut short": (put("config.json", CONFIG[:-3]), "not valid JSON"),
    "json list": (put("config.json", b"[]"), "not a JSON object"),
    "json text": (put("config.json", b'"llama"'), "not a JSON object"),
    "deep lists": (put("config.json", b"[" * 200_000), "not valid JSON"),
    "deep objects": (put("config.json", b'{"a":' * 200_000), "not valid JSON"),
    "a number of 10,000 digits": (put("config.json", b'{"model_type": "llama", "n": ' + b"9" * 10_000 + b"}"), "JSON"),
    "binary": (put("config.json", bytes(range(256)) * 100), "not UTF-8|not valid JSON"),
    "latin-1": (put("config.json", '{"model_type": "llama", "é": 1}'.encode("latin-1")), "not UTF-8"),
    "utf-16": (put("config.json", CONFIG.decode().encode("utf-16")), "not UTF-8"),
    "byte order mark": (put("config.json", b"\xef\xbb\xbf" + CONFIG), "not valid JSON"),
    "no type": (put("config.json", b"{}"), "no model_type"),
    "type is no text": (put("config.json", b'{"model_type": ["llama"]}'), "model type"),
    "unknown type": (put("config.json", b'{"model_type": "unheard-of"}'), "unheard-of"),
    "lone surrogate": (put("config.json", b'{"model_type": "\\ud800"}'), "model type"),
    "huge config": (huge("config.json"), "larger than"),
    "pipe": (pipe, "no config.json"),
    "folder": (folder_in_place, "no config.json"),
    "device": (link("config.json", "/dev/zero"), "no config.json"),
    "dangling config": (link("config.json", "nowhere.json"), "no config.json"),
    "looping config": (link("config.json", "config.json"), "no config.json"),
    "weights in a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "pickle"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights"),
    "weights still under another name": (copy_under_other_name, "no weights"),
    "empty weights": (put(WEIGHTS, b""), "is empty: still being copied"),
    "weights cut off": (cut(100), "holds 100 of .* bytes: still being copied"),
    "weights cut in their header": (cut(20), "holds 20 of .* bytes"),
    "weights cut at once": (cut(5), "less than a header"),
    "weights not written yet": (put(WEIGHTS, bytes(4096)), "is not a safetensors file"),
    "weights are a pointer of git's": (
        put(WEIGHTS, b"version https://git-lfs.github.com/spec/v1"),
        "not a safetensors",
    ),
    "dangling weights": (link(WEIGHTS, "nowhere"), "broken link"),
    "weights are a device": (link(WEIGHTS, "/dev/zero"), "no weights|broken link"),
    "shard missing": (lambda folder: sharded(folder, sizes={1: 5, 3: 5}), "1 of 3 shards not there.*00002"),
    "shards missing": (lambda folder: sharded(folder, sizes={}), "3 of 3 shards not there"),
    "shard empty": (lambda folder: sharded(folder, sizes={1: 5, 2: 0, 3: 5}), "00002.* is empty"),
    "shard missing without index": (shards_without_index, "1 of 3 shards not there.*00002"),
    "index is no json": (lambda folder: sharded(folder, index=b"{", sizes={1: 5, 2: 5, 3: 5}), "index.*not valid JSON"),
    "index is a list": (lambda folder: sharded(folder, index=b"[]", sizes={1: 5, 2: 5, 3: 5}), "index.*not a JSON obj"),
    "index without map": (lambda folder: sharded(folder, index=b"{}", sizes={1: 5, 2: 5, 3: 5}), "no weight_map"),
    "index with a list for a map": (
        lambda folder: sharded(folder, index=b'{"weight_map": []}', sizes={1: 5, 2: 5, 3: 5}),
        "no weight_map",
    ),
    "index leads out of the folder": (
        lambda folder: sharded(folder, index=b'{"weight_map": {"a": "../mine/model.safetensors"}}', sizes={1: 5}),
        "not there",
    ),
    "huge index": (huge("model.safetensors.index.json"), "larger than"),
}


BY_MLX_LM = frozenset(
    {"no type", "type is no text", "unknown type", "lone surrogate", "no weights", "weights in a pickle"}
    | {"weights still under another name", "weights are a device", "dangling weights"}
)
"""What is broken only for mlx-lm: other programs may know the type, or load other files."""


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [pytest.param(*each, id=name, marks=[pytest.mark.mlx_lm] * (name in BY_MLX_LM)) for name, each in BROKEN.items()],
)
def test_a_broken_model_hides_itself_alone_gives_its_reason_and_is_back_when_repaired(
    models: Path,
    hub: Path,
    sessions: Path,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[Path], object],
    reason: str,
) -> None:
    lay_model(models / "org/mine")
    lay_model(models / "zoo/last")
    add_repo(hub, "org/cached", CACHED)
    others = ["org/cached", "org/mine", "zoo/last"]
    broken = models / "org/broken"
    break_it(lay_model(broken))
    settle(broken)
    with hf_overlay.open_session([models]) as session:
        for _ in range(2):
            assert ids(session) == scanned(session) == others
            assert loaded(session, "org/mine") == (models / "org/mine" / WEIGHTS).read_bytes()
            with pytest.raises(hf_overlay.ModelNotFound, match=reason) as raised:
                session.resolve("org/broken")
            assert len(str(raised.value)) < 2000
            shutil.rmtree(broken)
            lay_model(broken, settled=True)
            assert session.refresh().added == ("org/broken",)
            assert loaded(session, "org/broken") == (broken / WEIGHTS).read_bytes()
            assert session.resolve("org/broken") == broken
            break_it(broken)
            assert session.refresh().removed == ("org/broken",)
        add_repo(hub, "org/broken", CACHED)
        session.refresh()
        assert loaded(session, "org/broken") == CACHED[WEIGHTS], "the cache's copy answers for a broken folder"
        assert len(set(warnings := said(caplog))) == len(warnings), "said once, not at each refresh"
        assert_as_new(session)


@pytest.mark.mlx_lm
def test_every_broken_model_at_once_hides_no_other(models: Path, hub: Path, sessions: Path) -> None:
    lay_model(models / "org/mine")
    for number, (break_it, _) in enumerate(BROKEN.values()):
        break_it(lay_model(models / f"broken/{number}"))
    with hf_overlay.open_session([models]) as session:
        assert ids(session) == scanned(session) == ["org/mine"]
        shutil.rmtree(models / "broken")
        session.refresh()
        assert ids(session) == scanned(session) == ["org/mine"]


FAULTS = st.sampled_from(["whole", "gone", *BROKEN])


@pytest.mark.mlx_lm
@settings(max_examples=15)
@given(steps=st.lists(st.dictionaries(st.sampled_from(["a", "org/b", "org/c"]), FAULTS), min_size=1, max_size=5))
def test_whatever_breaks_and_is_repaired_a_refresh_shows_what_a_new_session_shows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, str]]
) -> None:
    models = tmp_path_factory.mktemp("models")
    state: dict[str, str] = {}
    with hf_overlay.open_session([models]) as session:
        for step in steps:
            for name, fault in step.items():
                shutil.rmtree(models / name, ignore_errors=True)
                if fault != "gone":
                    lay_model(models / name, settled=name == "a")
                if fault in BROKEN:
                    BROKEN[fault][0](models / name)
            state |= step
            session.refresh()
            assert ids(session) == scanned(session) == sorted(name for name in state if state[name] == "whole")
            assert_as_new(session)
