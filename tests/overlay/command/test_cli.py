"""The command, as a person or a script meets it. `run` has tests of its own, with real programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hf_overlay import open_session
from hf_overlay.command import cli

from tests.support import hfcache
from tests.support.folders import lay_model

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"from the cache"}


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def hf_overlay(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Result(status, captured.out, captured.err)

    return run


def test_ls_lists_one_row_an_id_sorted_with_what_it_stands_in_front_of(
    hf_overlay: Callable[..., Result], models: Path, hub: Path, tmp_path: Path
) -> None:
    mine = lay_model(models / "org/both")
    second = lay_model(tmp_path / "second/org/both")
    both = hfcache.add_repo(hub, "org/both", FILES)
    cached = hfcache.add_repo(hub, "Aorg/cached", FILES)
    arguments = ("--model-path", models, "--model-path", tmp_path / "second")
    assert hf_overlay("ls", "--json", *arguments).json == [
        {
            "id": "Aorg/cached",
            "source": "cache",
            "path": str(cached),
            "model_type": "llama",
            "size_bytes": sum(map(len, FILES.values())),
            "shadows": [],
        },
        {
            "id": "org/both",
            "source": "custom",
            "path": str(mine),
            "model_type": "llama",
            "size_bytes": sum(path.stat().st_size for path in mine.iterdir()),
            "shadows": [str(second), str(both)],
        },
    ]
    table = hf_overlay("ls", *arguments)
    assert re.split(r" {2,}|\n", table.out)[:7] == ["ID", "SOURCE", "SIZE", "TYPE", "PATH", "Aorg/cached", "cache"]
    assert table.err == "", "success is quiet"


def test_path_prints_the_folder_alone_or_exits_1_with_every_reason(
    hf_overlay: Callable[..., Result], models: Path
) -> None:
    folder = lay_model(models / "org/sub/name")
    lay_model(models / "org/broken", {"config.json": b"{"})
    assert hf_overlay("path", "org/sub/name", "--model-path", models) == (0, f"{folder}\n", "")
    status, out, err = hf_overlay("path", "org/broken", "--model-path", models)
    assert (status, out) == (1, "")
    assert "config.json is not valid JSON" in err
    assert err.count("\n") == 1, "one line a person can act on"


def test_why_names_the_winner_and_each_loser_with_its_reason(
    hf_overlay: Callable[..., Result], models: Path, hub: Path, tmp_path: Path
) -> None:
    winner = lay_model(models / "org/name")
    loser = lay_model(tmp_path / "b/org/name")
    broken = lay_model(tmp_path / "c/org/name", {"model.safetensors": b""})
    (tmp_path / "d/org/name").mkdir(parents=True)
    snapshot = hfcache.add_repo(hub, "org/name", FILES)
    roots = [part for root in (models, *(tmp_path / x for x in "bcde")) for part in ("--model-path", root)]
    result = hf_overlay("why", "org/name", "--json", *roots)
    verdicts = {candidate["path"]: candidate["verdict"] for candidate in result.json["candidates"]}
    assert result.status == 0
    assert verdicts == {
        str(winner): "wins",
        str(loser): f"stands behind {winner}",
        str(snapshot): f"stands behind {winner}",
        str(broken): "model.safetensors is empty: still being copied?",
        str(tmp_path / "d/org/name"): "has no config.json",
        str(tmp_path / "e"): "does not exist",
    }
    assert [candidate["code"] for candidate in result.json["candidates"]] == [
        *("wins", "shadowed", "shadowed", "incomplete", "no-config", "missing")
    ]
    assert all(set(candidate) == {"path", "source", "verdict", "code"} for candidate in result.json["candidates"])
    nowhere = hf_overlay("why", "org/nothing", "--model-path", models)
    assert nowhere.status == 1
    assert nowhere.out.count("does not exist") == 2


def test_plan_says_what_would_be_linked_and_makes_nothing(
    hf_overlay: Callable[..., Result], models: Path, hub: Path, home: Path
) -> None:
    folder = lay_model(models / "org/name")
    lay_model(models / "a--b")
    hfcache.add_repo(hub, "org/cached", FILES)
    before = hfcache.listing(home), hfcache.listing(models)
    result = hf_overlay("plan", "--json", "--model-path", models).json
    targets = {link["link"]: link["target"] for link in result["links"]}
    assert targets["hub/models--org--cached"] == str(hub / "models--org--cached")
    assert str(folder / "config.json") in targets.values()
    assert [each["id"] for each in result["left_out"]] == ["a--b"]
    assert (hfcache.listing(home), hfcache.listing(models)) == before


def test_plan_prints_each_link_that_a_session_makes(
    hf_overlay: Callable[..., Result], models: Path, hub: Path, sessions: Path
) -> None:
    for name in ("org/name", "org/other"):
        lay_model(models / name, {"sub/file.txt": b"x"})
    hfcache.add_repo(hub, "org/cached", FILES)
    for folder in (models / "second", hub):  # one commit in two repos, so that one of them has to get another
        hfcache.add_repo(folder, f"org/twin-in-{folder.name}", FILES, commit="c" * 40)
    printed = {
        (link["link"], link["target"]) for link in hf_overlay("plan", "--json", "--model-path", models).json["links"]
    }
    with open_session([models]) as session:
        made = set()
        for entry in session.hub_cache.iterdir():
            if not entry.resolve().is_relative_to(session.path):
                made.add((f"hub/{entry.name}", os.readlink(entry)))
                continue
            links = (path for path in entry.resolve().rglob("*") if path.is_symlink())
            made |= {(f"hub/{entry.name}/{path.relative_to(entry.resolve())}", os.readlink(path)) for path in links}
    assert printed == made


def test_a_missing_path_is_one_warning_and_a_file_is_a_usage_error(
    hf_overlay: Callable[..., Result], models: Path, hub: Path
) -> None:
    hfcache.add_repo(hub, "org/cached", FILES)
    gone = hf_overlay("ls", "--json", "--model-path", models / "gone")
    assert [row["id"] for row in gone.json] == ["org/cached"]
    assert gone.err == (
        f"hf-overlay: warning: model path {models / 'gone'} does not exist; going on with the Hugging Face cache\n"
    )
    assert hf_overlay("ls", "-q", "--model-path", models / "gone").err == ""
    (models / "file").write_text("")
    status, out, err = hf_overlay("ls", "--model-path", models / "file")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "is a file; give the folder that holds your models" in err
    assert hf_overlay("ls", "--model-path", "").status == 2


def test_the_flag_wins_over_the_variable_which_holds_several(
    hf_overlay: Callable[..., Result], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in "abc":
        lay_model(models / root / root)
    monkeypatch.setenv("MLX_OMNI_MODEL_PATH", os.pathsep.join(["~/none", str(models / "a"), "", str(models / "b")]))
    assert [row["id"] for row in hf_overlay("ls", "--json").json] == ["a", "b"]
    assert [row["id"] for row in hf_overlay("ls", "--json", "--model-path", models / "c").json] == ["c"]
    monkeypatch.chdir(models)
    assert [row["id"] for row in hf_overlay("ls", "--json", "--model-path", "b/../c").json] == ["c"]


@pytest.mark.parametrize("bad", ["../x", "/etc/passwd", "a\\b", "", "a//b"])
def test_an_id_that_could_leave_its_folder_is_a_usage_error(hf_overlay: Callable[..., Result], bad: str) -> None:
    for command in ("path", "why"):
        assert hf_overlay(command, bad).status == 2


def test_clean_clears_what_a_killed_program_left_and_says_so(hf_overlay: Callable[..., Result], sessions: Path) -> None:
    dead = sessions / "session-1-1"
    (dead / "home").mkdir(parents=True)
    (dead / ".hf-overlay-session").write_text("{}")
    assert "left behind" in hf_overlay("doctor").out
    assert hf_overlay("clean", "--json").json == [{"session": str(dead), "kept": []}]
    assert hf_overlay("clean") == (0, "", ""), "nothing to do: quiet"


def test_usage_errors_exit_2(hf_overlay: Callable[..., Result]) -> None:
    for wrong in ([], ["frobnicate"], ["run"], ["run", "--"], ["ls", "--", "x"], ["path"], ["ls", "--nope"]):
        assert hf_overlay(*wrong).status == 2


def test_help_has_examples(hf_overlay: Callable[..., Result]) -> None:
    shown = hf_overlay("--help")
    assert shown.status == 0
    assert "examples:" in shown.out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(hf_overlay: Callable[..., Result], shell: str) -> None:
    script = hf_overlay("completion", shell).out
    for command in ("run", "ls", "path", "why", "plan", "doctor", "clean"):
        assert re.search(rf"\b{command}\b", script)


def test_colour_and_control_characters_stay_off_what_is_no_terminal(
    hf_overlay: Callable[..., Result], models: Path
) -> None:
    lay_model(models / "org/bell\x07\x1b[31mred")
    out = hf_overlay("ls", "--model-path", models).out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "bell\\x07" in out


def test_a_pipe_that_closes_early_is_no_error(models: Path) -> None:
    for number in range(200):
        lay_model(models / f"org/{'n' * 200}{number}")
    command = f"{sys.executable} -m hf_overlay ls --model-path {models}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_finding_models_imports_none_of_the_heavy_libraries(models: Path) -> None:
    """`hf-overlay ls` starts in milliseconds: no mlx_lm (2 s), transformers, huggingface_hub (0.4 s)."""
    lay_model(models / "org/name")
    script = (
        "import sys; from hf_overlay.command.cli import main; main(sys.argv[1:])\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'numpy', 'logging', 'shtab'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "ls", "--model-path", models], capture_output=True, text=True, check=True
    )
    assert done.stderr == "set()\n"
