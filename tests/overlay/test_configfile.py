"""The configuration file: where it is, what it says, and how a mistake in it is named."""

from __future__ import annotations

import os
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hf_overlay import config, configfile, open_session
from hf_overlay.config import ConfigFile
from hf_overlay.errors import UsageError
from hypothesis import given, settings
from hypothesis import strategies as st
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

GOOD = """# mine
model_path = [
  "/Volumes/LLMS/models",  # a drive
  "~/models",
]

exclude = ["org/name"]
below = ["/shared/hub"]

[map]
"org/mapped" = "/data/mine"
"datasets/org/rows" = "~/rows"

[server]
port = 8000
"""
MISTAKES = {
    "no TOML": ('exclude = ["a"]\nmodel_path = /Volumes\n', 2, "this is not TOML (Invalid value"),
    "an end that is missing": ('\nmodel_path = ["/a"\n', 2, "this is not TOML (Unclosed array"),
    "a name that is close": ('exclude = []\n\nmodel-paths = ["/a"]\n', 3, "no setting 'model-paths'; write model_path"),
    "a name of nothing": ("# c\nport = 3\n", 2, "no setting 'port'; there are model_path"),
    "a table of nothing": ("exclude = []\n[servers]\nport = 3\n", 2, "no setting 'servers'; write server"),
    "a server that is no table": ("exclude = []\nserver = 3\n", 2, "server must be a table; write [server]"),
    "one text": ('\n\nmodel_path = "/a"\n', 3, 'must be a list of folders; write model_path = ["'),
    "a number": ('model_path = [\n"/a",\n3]\n', 1, "must be a list of folders"),
    "a table in place of a list": ("[exclude]\na = 1\n", 1, "must be a list of ids"),
    "a relative path": ('exclude = []\nmodel_path = ["/a", "b/c"]\n', 2, "'b/c' is a relative path; write the whole"),
    "an empty path": ('model_path = [""]\n', 1, "empty or malformed text, ''"),
    "a map that is no table": ('map = ["/a"]\n', 1, "map must be a table of folders; write [map]"),
    "a mapped id that is none": ('[map]\n"a/b" = "/a"\n"../c" = "/c"\n', 3, "'../c' is not an id"),
    "a mapped folder that is relative": ('[map]\n"a/b" = "/a"\n"c" = "d"\n', 3, "'d' is a relative path"),
    "a mapped number": ('exclude = []\n[map]\n"a/b" = "/c"\n"d/e" = 3\n', 4, "'d/e' must lead to a folder; write"),
    "a list below the map": ('[map]\n"a/b" = "/c"\nexclude = ["a"]\n', 3, "exclude is in the table map; put it above"),
    "a NUL": ('exclude = ["a\\u0000"]\n', 1, "malformed"),
}


@pytest.fixture
def file(home: Path) -> Path:
    path = home / ".config/hf-overlay/config.toml"
    path.parent.mkdir(parents=True)
    return path


def test_it_says_the_ordered_roots_tiers_maps_and_exclusions() -> None:
    found = configfile.parse("/c", GOOD)
    assert found.model_path == ("/Volumes/LLMS/models", "~/models")
    assert found.exclude == ("org/name",)
    settings = config.load([], {"HOME": "/home/me"}, "/", file=found)
    assert settings.roots == ("/Volumes/LLMS/models", "/home/me/models")
    assert settings.below == ("/shared/hub",)
    assert settings.maps == (
        config.Map("models", "org/mapped", "/data/mine"),
        config.Map("datasets", "org/rows", "/home/me/rows"),
    )
    assert settings.exclude == ("org/name",)


def test_flags_beat_the_variable_and_the_variable_beats_the_file() -> None:
    file = configfile.parse("/c", GOOD)
    variable = {"HOME": "/home/me", config.MODEL_PATH_VARIABLE: "/by/variable"}
    both = config.load(["/by/flag"], variable, "/", exclude=["a/b"], file=file)
    assert (both.roots, both.exclude) == (("/by/flag",), ("a/b",))
    one = config.load([], variable, "/", file=file)
    assert (one.roots, one.exclude) == (("/by/variable",), ("org/name",))
    below = config.load([], {"HOME": "/home/me", config.BELOW_VARIABLE: "/1:/2"}, "/", file=file)
    assert (below.below, below.roots[0]) == (("/1", "/2"), "/Volumes/LLMS/models")
    origins = [each.origin for each in config.in_force([], [], variable, file)]
    assert origins == [config.MODEL_PATH_VARIABLE, "/c", "/c", "/c"]
    flags = config.in_force(["/x"], ["y"], variable, file, below=["/z"], maps={"a": "/a"})
    assert [each.origin for each in flags] == ["--model-path", "--exclude", "--below", "--map"]
    assert {each.origin for each in config.in_force([], [], {}, config.NO_FILE)} == {"default"}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_line_and_what_to_do(case: str) -> None:
    text, line, says = MISTAKES[case]
    with pytest.raises(UsageError) as raised:
        configfile.parse("/etc/c.toml", text)
    assert str(raised.value).startswith(f"/etc/c.toml:{line}: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@settings(max_examples=60)
@given(st.text(max_size=60) | st.text("abmodel_path=[]\"'\n#,/~ ", max_size=40))
def test_whatever_the_file_holds_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        assert isinstance(configfile.parse("/c", text), ConfigFile)


def test_a_file_that_cannot_be_read_is_named(file: Path, home: Path) -> None:
    environ = {"HOME": str(home)}
    file.write_bytes(b"exclude = []\n# \xff\n")
    with pytest.raises(UsageError, match=r"config\.toml:2: this is not UTF-8"):
        configfile.read(environ)
    file.unlink()
    file.mkdir()
    with pytest.raises(UsageError, match=r"cannot read .*config\.toml: Is a directory"):
        configfile.read(environ)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(UsageError, match=r"cannot read .*config\.toml: Not a regular file"):
        configfile.read(environ)
    with pytest.raises(UsageError, match=r"cannot read /dev/zero: Not a regular file"):
        configfile.read(environ | {"HF_OVERLAY_CONFIG": "/dev/zero"})
    file.unlink()
    with open(file, "wb") as large:
        large.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"cannot read .*config\.toml: Larger than 1 MiB"):
        configfile.read(environ)


def test_no_file_is_no_mistake_unless_it_was_named(home: Path, tmp_path: Path) -> None:
    environ = {"HOME": str(home)}
    assert configfile.read(environ) == ConfigFile(f"{home}/.config/hf-overlay/config.toml")
    with pytest.raises(UsageError, match=r"HF_OVERLAY_CONFIG names .*/mine\.toml, which is not there"):
        configfile.read(environ | {"HF_OVERLAY_CONFIG": str(tmp_path / "mine.toml")})
    assert configfile.read(environ | {"HF_OVERLAY_CONFIG": ""}) == config.NO_FILE


@pytest.mark.parametrize("given", [{}, {"XDG_CONFIG_HOME": "/xdg"}, {"XDG_CONFIG_HOME": "relative"}])
@pytest.mark.parametrize(("platform", "folders"), [("linux", Unix), ("darwin", MacOS)])
def test_it_is_where_platformdirs_says(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], platform: str, folders: type[Unix | MacOS]
) -> None:
    environ = {"HOME": "/Users/me", **given}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    expected = folders("hf-overlay", appauthor=False).user_config_dir
    if given.get("XDG_CONFIG_HOME") != "relative":  # platformdirs follows it there, which depends on where one is
        assert config.file_path(environ) == f"{expected}/config.toml"
    assert os.path.isabs(config.file_path(environ) or "")


def test_a_session_honours_it_as_every_command_does(file: Path, models: Path, sessions: Path) -> None:
    file.write_text(f'model_path = ["{models}"]\nexclude = ["org/mine"]\n')
    with open_session() as session:
        assert session.settings.roots == (str(models),)
        assert session.settings.exclude == ("org/mine",)


def test_the_line_of_a_key_is_found_in_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f'[server.profile."org/name{number}"]\nmodel = [\n"a/b"]\n' for number in range(100))
    read: list[str] = []
    loads = tomllib.loads

    def counted(text: str) -> object:
        read.append(text)
        return loads(text)

    monkeypatch.setattr(tomllib, "loads", counted)
    assert configfile.line_of(text, "server", "profile", "org/name70", "model") == 3 * 70 + 2
    assert len(read) < 40
