"""The command, as a person or a script meets it. `run` has tests of its own, with real programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hf_overlay import open_session
from hf_overlay.command import cli

from tests.support import hfcache, processes
from tests.support.folders import lay_model, weights
from tests.support.permissions import respected
from tests.support.sessions import new_name

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(b"from the cache"),
    "tokenizer.json": b"{}",
}


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


@pytest.mark.mlx_lm
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
            "kind": "mlx",
            "source": "cache",
            "path": str(cached),
            "model_type": "llama",
            "size_bytes": sum(map(len, FILES.values())),
            "shadows": [],
        },
        {
            "id": "org/both",
            "kind": "mlx",
            "source": "custom",
            "path": str(mine),
            "model_type": "llama",
            "size_bytes": sum(path.stat().st_size for path in mine.iterdir()),
            "shadows": [str(second), str(both)],
        },
    ]
    table = hf_overlay("ls", *arguments)
    assert re.split(r" {2,}|\n", table.out)[:9] == [
        *("ID", "SOURCE", "KIND", "SIZE", "TYPE", "PATH"),
        *("Aorg/cached", "cache", "mlx"),
    ]
    assert table.err == "", "success is quiet"


def test_ls_with_nothing_to_list_says_where_it_looked(
    hf_overlay: Callable[..., Result], models: Path, hub: Path
) -> None:
    done = hf_overlay("ls", "--model-path", models)
    assert done.status == 0
    assert done.err.count("\n") == 1
    for part in (str(models), str(hub), "hf-overlay doctor"):
        assert part in done.err
    assert hf_overlay("ls", "--json", "--model-path", models) == (0, "[]\n", "")
    assert hf_overlay("ls", "-q", "--model-path", models).err == ""


def test_ls_says_that_the_cache_is_away(hf_overlay: Callable[..., Result], models: Path, hub: Path) -> None:
    lay_model(models / "org/name")
    hub.parent.mkdir(parents=True)
    hub.symlink_to("/nowhere/hub")
    done = hf_overlay("ls", "--json", "--model-path", models)
    assert [row["id"] for row in done.json] == ["org/name"]
    assert done.err.count("\n") == 1
    assert f"{hub} is away: it is a link to /nowhere/hub, which is not there; connect that drive" in done.err


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
            if not entry.resolve().is_relative_to(sessions):
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


def test_config_says_what_is_in_force_and_where_each_comes_from(
    hf_overlay: Callable[..., Result], home: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / ".config/hf-overlay/config.toml"
    assert hf_overlay("config").out.splitlines()[0] == f"{file} (there is none)"
    file.parent.mkdir(parents=True)
    file.write_text(
        f'# mine\nmodel_path = ["{models}", "~/more"]\n\nexclude = ["org/mine"]\n'
        'below = ["/shared"]\n[map]\n"datasets/a/b" = "/rows"\n'
    )
    monkeypatch.setenv("HF_HOME", "/Volumes/X/hf")
    found = hf_overlay("config", "--json").json
    assert (found["file"], found["is_there"]) == (str(file), True)
    assert {row["name"]: (row["value"], row["origin"]) for row in found["settings"]} | {"sessions": None} == {
        "model_path": ([str(models), f"{home}/more"], f"{file}:2"),
        "below": (["/shared"], f"{file}:5"),
        "map": (["datasets/a/b=/rows"], f"{file}:6"),
        "exclude": (["org/mine"], f"{file}:4"),
        "hub_cache": ("/Volumes/X/hf/hub", "HF_HOME"),
        "hf_home": ("/Volumes/X/hf", "HF_HOME"),
        "sessions": None,
    }
    monkeypatch.setenv("MLX_OMNI_MODEL_PATH", "/by/variable")
    shown = hf_overlay("config", "--exclude", "a/b").out.splitlines()
    assert shown[0] == str(file)
    assert [line.split() for line in shown[1:6]] == [
        ["SETTING", "VALUE", "ORIGIN"],
        ["model_path", "/by/variable", "MLX_OMNI_MODEL_PATH"],
        ["below", "/shared", f"{file}:5"],
        ["map", "datasets/a/b=/rows", f"{file}:6"],
        ["exclude", "a/b", "--exclude"],
    ]


def test_every_command_honours_the_file_and_names_a_mistake_in_it(
    hf_overlay: Callable[..., Result], home: Path, models: Path, sessions: Path
) -> None:
    mine = lay_model(models / "org/mine")
    file = home / ".config/hf-overlay/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'model_path = ["{models}"]\n')
    assert hf_overlay("path", "org/mine").out == f"{mine}\n"
    file.write_text('\nmodel_paths = ["/a"]\n')
    for command in (["ls"], ["config"], ["doctor"], ["run", "--", "true"], ["serve"]):
        done = hf_overlay(*command)
        assert (done.status, done.out) == (2, "")
        assert done.err == f"hf-overlay: error: {file}:2: there is no setting 'model_paths'; write model_path\n"


def test_clean_clears_what_a_killed_program_left_and_says_so(hf_overlay: Callable[..., Result], sessions: Path) -> None:
    dead = sessions / new_name()
    (dead / "home").mkdir(parents=True)
    (dead / ".hf-overlay-session").write_text("{}")
    assert "left behind" in hf_overlay("doctor").out
    assert hf_overlay("clean", "--json").json == [{"session": str(dead), "kept": []}]
    assert hf_overlay("clean") == (0, "", ""), "nothing to do: quiet"


def test_usage_errors_exit_2(hf_overlay: Callable[..., Result]) -> None:
    for wrong in (["frobnicate"], ["run"], ["run", "--"], ["--", "x"], ["ls", "--", "x"], ["path"], ["ls", "--nope"]):
        assert hf_overlay(*wrong).status == 2
    for wrong in (["install", "--json"], ["uninstall", "--json"], ["status", "--replace"]):
        assert hf_overlay("service", *wrong).status == 2


def test_a_working_folder_that_is_gone_is_named(
    hf_overlay: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (["ls"], ["run", "--", "true"]):
        done = hf_overlay(*command)
        assert done == (
            1,
            "",
            "hf-overlay: error: the folder that you are in has been removed; go to another one: cd\n",
        )


def test_where_a_file_is_in_the_place_of_the_sessions_there_are_none(
    hf_overlay: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_OVERLAY_DIR", str(tmp_path / "file"))
    assert hf_overlay("clean") == (0, "", "")
    assert "no overlay is being served" in hf_overlay("env").err


def test_sessions_that_may_not_be_read_are_named(
    hf_overlay: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    monkeypatch.setenv("HF_OVERLAY_DIR", str(tmp_path / "closed"))
    with respected():
        for command in ("env", "clean", "doctor"):
            done = hf_overlay(command)
            assert done.status == 1
            assert "permission denied; set HF_OVERLAY_DIR to a folder of your own" in done.out + done.err


def test_help_has_examples_and_is_what_the_bare_command_prints(hf_overlay: Callable[..., Result]) -> None:
    shown = hf_overlay("--help")
    assert shown.status == 0
    assert "examples:" in shown.out
    assert hf_overlay() == shown


@pytest.mark.parametrize("command", ["completion", "config", "env", "serve", "service"])
def test_the_help_of_a_command_for_once_has_examples(hf_overlay: Callable[..., Result], command: str) -> None:
    done = hf_overlay(command, "--help")
    assert done.status == 0
    assert f"hf-overlay {command}" in done.out.partition("examples:")[2]


def test_the_version_is_the_distributions(hf_overlay: Callable[..., Result]) -> None:
    assert hf_overlay("--version") == (0, f"hf-overlay {metadata.version('hf-overlay')}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_knows_every_command(hf_overlay: Callable[..., Result], shell: str) -> None:
    script = hf_overlay("completion", shell).out
    for command in ("run", "ls", "path", "why", "plan", "doctor", "clean", "config", "service", "uninstall"):
        assert re.search(rf"\b{command}\b", script)


def test_completion_offers_folders_for_a_model_path(hf_overlay: Callable[..., Result]) -> None:
    for shell, folders in (
        ("bash", "_shtab_compgen_dirs"),
        ("zsh", "_files -/"),
        ("fish", "__fish_complete_directories"),
    ):
        lines = [line for line in hf_overlay("completion", shell).out.splitlines() if re.search("model.path", line)]
        assert any(folders in line for line in lines), shell


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_commands_and_options(hf_overlay: Callable[..., Result], tmp_path: Path) -> None:
    script = tmp_path / "hf-overlay.fish"
    script.write_text(hf_overlay("completion", "fish").out)

    def completed(line: str) -> set[str]:
        command = ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {each.split("\t")[0] for each in done.stdout.splitlines()}

    assert {"run", "ls", "doctor"} <= completed("hf-overlay ")
    assert {"--model-path", "--kind"} <= completed("hf-overlay ls --")
    assert completed("hf-overlay ls --kind ") == {"mlx", "any"}


# Kinds of models -----------------------------------------------------------------------------------------------


def run_without_mlx_lm(*arguments: object) -> Result:
    """hf-overlay in a process of its own, in which mlx-lm cannot be found."""
    script = "import sys; sys.modules['mlx_lm'] = None; from hf_overlay.command.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def lay_both_kinds(models: Path) -> None:
    lay_model(models / "org/llama", model_type="llama")
    lay_model(models / "org/bert", model_type="bert")


@pytest.mark.mlx_lm
def test_with_mlx_lm_beside_it_only_its_models_count_unless_any_kind_is_asked_for(
    hf_overlay: Callable[..., Result], models: Path
) -> None:
    lay_both_kinds(models)
    both = {"org/bert": "transformers", "org/llama": "mlx"}
    for options, expected in (
        ([], {"org/llama": "mlx"}),
        (["--kind", "mlx"], {"org/llama": "mlx"}),
        (["--kind", "any"], both),
        (["--all-kinds"], both),
    ):
        rows = hf_overlay("ls", "--json", "--model-path", models, *options).json
        assert {row["id"]: row["kind"] for row in rows} == expected, options


def test_without_mlx_lm_beside_it_every_kind_counts(models: Path) -> None:
    lay_both_kinds(models)
    for options in ([], ["--kind", "any"], ["--all-kinds"]):
        done = run_without_mlx_lm("ls", "--json", "--model-path", models, *options)
        assert (done.status, done.err) == (0, "")
        assert {row["id"]: row["kind"] for row in done.json} == {
            "org/bert": "transformers",
            "org/llama": "transformers",
        }


def test_without_mlx_lm_beside_it_its_models_cannot_be_asked_for(models: Path) -> None:
    """P12: nothing here knows them."""
    done = run_without_mlx_lm("ls", "--kind", "mlx", "--model-path", models)
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"hf-overlay: error: mlx-lm is not installed for {sys.executable}, so nothing can tell which models it loads; "
        "install it there (pip install mlx-lm), or use --kind any\n"
    )


# `hf overlay …` ------------------------------------------------------------------------------------------------


def test_registered_as_an_extension_it_answers_to_hf_overlay(
    hf_overlay: Callable[..., Result], home: Path, models: Path
) -> None:
    lay_model(models / "org/name")
    environ = processes.environment(home)
    done = hf_overlay("extension")
    assert (done.status, done.out) == (0, "")
    again = hf_overlay("extension")
    assert again.status == 0, "an update of the entry"
    rows = json.loads(processes.succeed(["hf", "overlay", "ls", "--json", "--model-path", str(models)], environ).out)
    assert [row["id"] for row in rows] == ["org/name"]
    ran = processes.finish(["hf", "overlay", "run", "-q", "--", "sh", "-c", "exit 7"], environ)
    assert ran.status == 7, "what follows the dashes is the program's own"
    assert "overlay" in processes.succeed(["hf", "extensions", "list"], environ).out
    processes.succeed(["hf", "extensions", "remove", "overlay"], environ)
    assert not (home / ".local/share/hf/extensions/hf-overlay").exists()


def test_an_extension_of_that_name_from_elsewhere_is_not_replaced(
    hf_overlay: Callable[..., Result], home: Path
) -> None:
    folder = home / ".local/share/hf/extensions/hf-overlay"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"owner": "somebody"}')
    done = hf_overlay("extension")
    assert done.status == 1
    assert "hf extensions remove overlay" in done.err
    assert (folder / "manifest.json").read_text() == '{"owner": "somebody"}'


# What it prints ------------------------------------------------------------------------------------------------


def test_colour_and_control_characters_stay_off_what_is_no_terminal(
    hf_overlay: Callable[..., Result], models: Path
) -> None:
    lay_model(models / "org/bell\x07\x1b[31mred\norg/false")
    out = hf_overlay("ls", "--model-path", models).out
    assert len(out.splitlines()) == 2
    assert "red\\norg/false" in out
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("command", "to", "status", "said"),
    [
        ("ls", ">/dev/full", 1, "hf-overlay: error: [Errno 28] No space left on device\n"),
        ("ls --help", ">/dev/full", 1, "hf-overlay: error: [Errno 28] No space left on device\n"),
        ("ls", ">&-", 0, ""),
        ("path no/such", ">/dev/null 2>/dev/full", 1, ""),
        ("path no/such", "2>&-", 1, ""),
        ("ls --such", ">/dev/null 2>/dev/full", 2, ""),
    ],
)
def test_output_that_cannot_be_written_ends_without_a_traceback(
    models: Path, monkeypatch: pytest.MonkeyPatch, command: str, to: str, status: int, said: str
) -> None:
    """Nor does what belongs on stderr appear on stdout."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    lay_model(models / "org/name")
    monkeypatch.setenv("MLX_OMNI_MODEL_PATH", str(models))
    line = f"{sys.executable} -m hf_overlay {command} {to}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


def test_a_closed_stream_is_closed_for_the_program_and_not_a_file_of_the_sessions(hub: Path) -> None:
    """Else what the program prints gets into the record of the session's owner."""
    command = f"{sys.executable} -m hf_overlay run -q -- sh -c 'echo hi; test -e /dev/fd/1 || exit 7' <&- >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert done.returncode == 7


def test_finding_models_imports_none_of_the_heavy_libraries(models: Path) -> None:
    """`hf-overlay ls` starts in milliseconds: no mlx_lm (2 s), transformers, huggingface_hub (0.4 s)."""
    lay_model(models / "org/name")
    script = (
        "import sys; from hf_overlay.command.cli import main; main(sys.argv[1:])\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'numpy', 'logging', 'shtab', 'platformdirs'}\n"
        "heavy |= {'hashlib', 'queue', 'socket'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "ls", "--model-path", models], capture_output=True, text=True, check=True
    )
    assert done.stderr == "set()\n"


def test_no_module_with_named_tuples_has_annotations_that_are_texts() -> None:
    """Typing compiles the text of each field when the module is imported, which took a start milliseconds."""
    package = Path(cli.__file__).parents[1]
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert [
        path.name
        for path, source in sources.items()
        if "(NamedTuple" in source and "from __future__ import annotations" in source
    ] == []


# Layers ------------------------------------------------------------------------------------------------------------


def test_ls_and_why_tell_of_maps_and_tiers(
    hf_overlay: Callable[..., Result], models: Path, hub: Path, tmp_path: Path
) -> None:
    """P11: a map, model paths, the own cache, tiers; of one repo the cache and tiers show all revisions."""
    tier, mapped = tmp_path / "shared/hub", lay_model(tmp_path / "elsewhere/experiment 3")
    mine = lay_model(models / "org/mine")
    own = hfcache.add_repo(hub, "org/both", FILES)
    lower = hfcache.add_repo(tier, "org/both", FILES | {"more.txt": b"more"})
    only = hfcache.add_repo(tier, "org/only", FILES)
    plain = lay_model(tier / "org/plain")
    layers = ("--model-path", models, "--below", tier, "--map", f"org/mapped={mapped}", "--map", f"org/both2={mapped}")
    rows = {row["id"]: (row["source"], row["path"], row["shadows"]) for row in hf_overlay("ls", "--json", *layers).json}
    assert rows == {
        "org/both": ("cache", str(own), [str(lower)]),
        "org/both2": ("map", str(mapped), []),
        "org/mapped": ("map", str(mapped), []),
        "org/mine": ("custom", str(mine), []),
        "org/only": ("tier", str(only), []),
        "org/plain": ("tier", str(plain), []),
    }
    why = hf_overlay("why", "org/both", *layers)
    assert why.status == 0
    assert f"{own} (cache): wins\n" in why.out
    assert f"{lower} (tier): stands behind {own}; its revision {lower.name[:12]} is shown beside that one\n" in why.out
    assert hf_overlay("path", "org/plain", *layers).out == f"{plain}\n"
    away = (*layers, "--map", f"org/away={tmp_path / 'unplugged'}", "--map", f"datasets/org/both={tmp_path / 'gone'}")
    assert hf_overlay("why", "org/both", *away).out == why.out, "maps of other ids are none of its places"
    assert f"{tmp_path / 'unplugged'} (map): does not exist\n" in hf_overlay("why", "org/away", *away).out
    assert f"{tmp_path / 'gone'} (map): does not exist\n" in hf_overlay("why", "datasets/org/both", *away).out


def test_why_tells_of_datasets_that_are_mapped_and_in_tiers(
    hf_overlay: Callable[..., Result], hub: Path, tmp_path: Path
) -> None:
    tier, rows = tmp_path / "shared", tmp_path / "rows"
    rows.mkdir()
    (rows / "train.csv").write_bytes(b"a\n1\n")
    for cache in (hub, tier):
        hfcache.add_repo(cache, "org/data", {f"{cache.name}.csv": b"1"}, repo_type="dataset")
    name = "datasets--org--data"
    shown = hf_overlay("why", "datasets/org/data", "--below", tier)
    assert shown.out.splitlines() == [
        f"{hub / name} (cache): wins",
        f"{tier / name} (tier): is shown together with {hub / name}",
    ]
    mapped = hf_overlay("why", "datasets/org/data", "--below", tier, "--map", f"datasets/org/data={rows}")
    assert mapped.out.splitlines()[:2] == [f"{rows} (map): wins", f"{hub / name} (cache): stands behind {rows}"]
    nowhere = hf_overlay("why", "datasets/org/none", "--below", tier)
    assert nowhere.status == 1
    assert f"{tier} (tier): holds no datasets/org/none\n" in nowhere.out
    path = hf_overlay("path", "datasets/org/data", "--below", tier)
    assert (path.status, path.out) == (2, "")
    assert "hf-overlay why datasets/org/data" in path.err, "it is not called a model that does not exist"


def test_plan_and_doctor_tell_of_tiers(
    hf_overlay: Callable[..., Result], hub: Path, tmp_path: Path, sessions: Path
) -> None:
    tier = tmp_path / "shared"
    snapshot = hfcache.add_repo(tier, "org/data", {"rows.csv": b"1"}, repo_type="dataset")
    lay_model(tier / "org/broken", {"model.safetensors": b""})
    plan = hf_overlay("plan", "--json", "--below", tier).json
    assert str(snapshot / "rows.csv") in {link["target"] for link in plan["links"]}
    found = hf_overlay("doctor", "--json", "--below", tier, "--below", tmp_path / "away").json
    where = {each["where"]: each["what"] for each in found}
    assert where[str(tier / "org/broken")] == "model.safetensors is empty: still being copied?"
    assert where[str(tmp_path / "away")] == "does not exist"


@pytest.mark.parametrize("bad", ["org/name", "=/data", "../x=/data", "org/name="])
def test_a_malformed_map_is_a_usage_error(hf_overlay: Callable[..., Result], bad: str) -> None:
    result = hf_overlay("ls", "--map", bad)
    assert result.status == 2
    assert result.err.count("\n") == 1


def test_one_id_is_mapped_to_one_folder(hf_overlay: Callable[..., Result], tmp_path: Path) -> None:
    """Neither of two is silently left out; the same folder twice is no matter."""
    maps = [f"--map=org/name={lay_model(tmp_path / name)}" for name in ("a", "b")]
    assert hf_overlay("ls", maps[0], maps[0]).status == 0
    result = hf_overlay("ls", *maps)
    assert result.status == 2
    assert str(tmp_path / "a") in result.err
    assert str(tmp_path / "b") in result.err


def test_the_variable_names_tiers_as_path_does_and_the_flag_wins(
    hf_overlay: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        hfcache.add_repo(tmp_path / name, f"org/{name}", FILES)
    monkeypatch.setenv("HF_OVERLAY_BELOW", os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    assert [row["id"] for row in hf_overlay("ls", "--json").json] == ["org/a", "org/b"]
    assert [row["id"] for row in hf_overlay("ls", "--json", "--below", tmp_path / "c").json] == ["org/c"]
