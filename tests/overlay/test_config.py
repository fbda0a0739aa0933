"""Where things are: the same answers as huggingface_hub gives in the same environment, without importing it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay import config
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.tree.lease import sessions_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from platformdirs.macos import MacOS

from tests.support import hubs
from tests.support.reader import Reader

VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HOME", "A", "B", "é")
SPELLED = st.sampled_from(
    [
        "",
        "relative/dir",
        "~",
        "~/x y",
        "~root/x",
        "~nobody-of-this-name/x",
        "$A/x",
        "${A}x",
        "$A$B",
        "$é/x",
        "${}",
        "$",
        "$UNSET/x",
        "${B",
        "/absolute",
        "/absolute/",
        "//two/slashes",
        "/up/../down",
        "$HOME/x",
        "~$A",
    ]
)
VALUES = st.one_of(SPELLED, st.text("~/$AB{}.x é", max_size=8))
ENVIRONMENTS = st.dictionaries(st.sampled_from(VARIABLES), VALUES).map(lambda drawn: {"HOME": "/home/me"} | drawn)


@settings(max_examples=300)
@given(ENVIRONMENTS, st.sampled_from(hubs.ALL))
def test_the_cache_is_where_huggingface_hub_looks_for_it(
    readers: Mapping[str, Reader], environ: dict[str, str], release: str
) -> None:
    constants = readers[release].constants(environ)
    assert config.hf_home(environ) == constants["HF_HOME"]
    assert config.hub_cache(environ) == constants["HF_HUB_CACHE"]


def test_without_home_it_is_where_the_password_database_says(readers: Mapping[str, Reader]) -> None:
    """A program started with the environment handed in sees no HOME either, whatever this process has."""
    for release, reader in readers.items():
        assert config.hub_cache({}) == reader.constants({})["HF_HUB_CACHE"], f"with huggingface_hub {release}"


@given(ENVIRONMENTS, st.sampled_from(["/somewhere", "/a b/$A"]))
def test_settings_are_absolute_and_of_the_environment_handed_in(environ: dict[str, str], cwd: str) -> None:
    found = config.load([], environ, cwd)
    assert found.roots == ()
    for path, spelled in ((found.hub_cache, config.hub_cache(environ)), (found.hf_home, config.hf_home(environ))):
        assert os.path.isabs(path)
        assert os.path.realpath(path) == os.path.realpath(os.path.join(cwd, spelled))


# P9: the rest of the user's Hugging Face home ------------------------------------------------------------------

PLACES = st.sampled_from(["{top}/place", "{top}/a $UNSET place", "$BASE/place", "~/place", "relative place"])
OWN = ("HF_HOME", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HUGGINGFACE_ASSETS_CACHE", "HF_TOKEN_PATH", "HF_XET_CACHE")
HUB_ALONE = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@settings(max_examples=40)
@given(
    places=st.dictionaries(st.sampled_from([*OWN, "XDG_CACHE_HOME"]), PLACES),
    folder=st.sampled_from(["h", "h $X"]),
    release=st.sampled_from(hubs.ALL),
)
def test_a_program_in_the_overlay_finds_the_hub_cache_elsewhere_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    readers: Mapping[str, Reader],
    places: dict[str, str],
    folder: str,
    release: str,
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as top:
        home = Path(top, folder)
        home.mkdir()
        environ = {name: value.format(top=top) for name, value in places.items()}
        environ |= {"HOME": str(home), "BASE": top, "HF_OVERLAY_DIR": f"{top}/sessions"}
        with hf_overlay.open_session([], environ=environ) as session:
            before, inside = (readers[release].constants(each) for each in (environ, session.environment))
            assert Path(inside["HF_HUB_CACHE"]) == session.hub_cache
            for name in before.keys() - set(HUB_ALONE):
                assert os.path.abspath(inside[name]) == os.path.abspath(before[name]), f"P9: {name} is another"


@pytest.mark.parametrize(
    "given",
    [
        {"HOME": "{odd}"},
        {"XDG_CACHE_HOME": "{odd}"},
        {"HF_HOME": "{odd}"},
        {"HF_HOME": "$PLACE", "PLACE": "{odd}"},
        {"HF_OVERLAY_DIR": "{odd}"},
    ],
    ids=lambda given: next(iter(given.values())).strip("{$}") + " as " + next(iter(given)),
)
def test_a_folder_whose_name_a_program_would_expand_again_works_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: Mapping[str, Reader], given: dict[str, str]
) -> None:
    """huggingface_hub expands $NAME in what it is given, so there are folders it cannot be told."""
    odd = tmp_path / "price in $CURRENCY"
    odd.mkdir()
    environ = {"HOME": str(tmp_path), "CURRENCY": "EUR"}
    environ |= {name: value.replace("{odd}", str(odd)) for name, value in given.items()}
    for name, value in environ.items():  # platformdirs looks at the process's own
        monkeypatch.setenv(name, value)
    reader = readers[hubs.INSTALLED]
    refusal = ""
    try:
        with hf_overlay.open_session([], environ=environ) as session:
            found, plain = reader.constants(session.environment), reader.constants(environ)
            is_led_there = Path(found["HF_HUB_CACHE"]) == session.hub_cache
    except hf_overlay.OverlayError as error:
        refusal = str(error)
    if refusal:
        assert "$" in refusal, "P12: says why"
    else:
        assert is_led_there, "P2: the program would make a cache elsewhere"
        assert found["HF_TOKEN_PATH"] == plain["HF_TOKEN_PATH"], "P9: the program would not find the login"


# Where sessions live -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has a rule of its own")
@pytest.mark.parametrize("is_own", [True, False], ids=["own environment", "another handed in"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "{home}/.cache/hf-overlay/sessions"),
        ({"XDG_CACHE_HOME": "{home}/xdg"}, "{home}/xdg/hf-overlay/sessions"),
        ({"XDG_CACHE_HOME": "relative"}, "{home}/.cache/hf-overlay/sessions"),
        ({"XDG_CACHE_HOME": ""}, "{home}/.cache/hf-overlay/sessions"),
        ({"XDG_CACHE_HOME": "{home}/xdg", "HF_OVERLAY_DIR": "{home}/mine"}, "{home}/mine"),
    ],
)
def test_sessions_live_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str, is_own: bool
) -> None:
    """The same place whether platformdirs finds it in this process's environment or another one is handed in."""
    environ = {"HOME": str(tmp_path)} | {name: value.format(home=tmp_path) for name, value in given.items()}
    for name, value in environ.items() if is_own else ():
        monkeypatch.setenv(name, value)
    assert sessions_folder(environ) == expected.format(home=tmp_path)


def test_on_macos_sessions_live_where_no_cleaner_looks_whatever_a_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place for shells, which may have XDG variables, and for what launchd starts, which has none."""
    monkeypatch.setattr(sys, "platform", "darwin")
    expected = "/Users/me/Library/Application Support/hf-overlay/sessions"
    xdg = {"XDG_CACHE_HOME": "/xdg", "XDG_DATA_HOME": "/xdg"}
    for environ in ({"HOME": "/Users/me"}, {"HOME": "/Users/me", **xdg}):
        assert sessions_folder(environ) == expected
    assert sessions_folder({"HOME": "/Users/me", "HF_OVERLAY_DIR": "/mine", **xdg}) == "/mine"
    monkeypatch.setenv("HOME", "/Users/me")
    assert f"{MacOS('hf-overlay', appauthor=False).user_data_dir}/sessions" == expected, (
        "platformdirs puts it elsewhere"
    )


# Model paths ---------------------------------------------------------------------------------------------------


def roots(model_paths: list[str], environ: Mapping[str, str], cwd: str = "/cwd") -> tuple[str, ...]:
    return config.load(model_paths, environ, cwd).roots


def test_the_commands_paths_win_over_the_variable_which_holds_several(tmp_path: Path) -> None:
    environ = {config.MODEL_PATH_VARIABLE: os.pathsep.join(["/b", "", "/a", "/b/"])}
    assert roots(["/c"], environ) == ("/c",)
    assert roots([], environ) == ("/b", "/a"), "in their order, each once, nothing for an empty part"
    assert roots([], {}) == ()


def test_model_paths_are_resolved_without_touching_how_people_spell_them(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    cwd = str(tmp_path)
    assert roots(["relative/", "~/m", "~"], {"HOME": "/h"}, cwd) == (f"{cwd}/relative", "/h/m", "/h")
    assert roots(["link"], {}, cwd) == (f"{cwd}/link",), "P12: messages say the path as it was given"
    assert roots(["link/../x"], {}, cwd) == (f"{os.path.realpath(cwd)}/real/x",), "`..` is the folder above the target"
    assert roots(["$A/m"], {"A": "/a"}, cwd) == (f"{cwd}/$A/m",), "expanding variables is the shell's part"


@pytest.mark.parametrize("bad", ["", "a\0b"])
def test_a_path_that_cannot_be_meant_is_a_usage_error(bad: str) -> None:
    with pytest.raises(hf_overlay.UsageError):
        config.load([bad], {}, "/cwd")


def test_a_file_as_model_path_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with pytest.raises(hf_overlay.UsageError, match=f"{tmp_path / name} is a file"):
            Catalog(config.load([name], {}, str(tmp_path)))
    assert roots(["later"], {}, str(tmp_path)) == (f"{tmp_path}/later",), "a missing one may come back"
