"""Linked repos that sessions share: nobody changes one, and what happens to one happens to nobody's downloads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.tree import files, shared, usage
from hf_overlay.tree.clear import clear_dead

from tests.overlay.faults.seen import loaded, scanned
from tests.support.folders import lay_model, settle, unseal
from tests.support.hfcache import add_repo, listing, repo_folder
from tests.support.permissions import respected
from tests.support.processes import PYTHON, finish

MODEL = "org/name"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"a newer payload", "tokenizer.json": b"{}"}
"""Of a revision that a client downloads beside the user's."""


@pytest.fixture
def environ(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"], **OFFLINE}


@pytest.fixture
def opened(
    models: Path, environ: dict[str, str], sessions: Path
) -> Iterator[Callable[[], tuple[ExitStack, hf_overlay.Session]]]:
    """Opens a session, and gives what ends it, too."""
    lay_model(models / MODEL, {"sub/vocab.json": b"{}"}, settled=True)
    with ExitStack() as all_of_them:

        def opened() -> tuple[ExitStack, hf_overlay.Session]:
            stack = all_of_them.enter_context(ExitStack())
            return stack, stack.enter_context(hf_overlay.open_session([models], environ=environ))

        yield opened


def led_to(session: hf_overlay.Session, model_id: str = MODEL) -> Path:
    return (session.hub_cache / repo_folder(model_id)).resolve(strict=True)


def kept(sessions: Path) -> list[Path]:
    return sorted(path for path in (sessions / shared.FOLDER).iterdir() if path.is_dir())


def download(session: hf_overlay.Session) -> None:
    """As root can, past the modes: another revision, whose files lie in the repo afterwards."""
    unseal(led_to(session))
    add_repo(session.hub_cache, MODEL, FILES, tree=True)


def home_of(hub: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in hub.glob("models--org--name/snapshots/*/model.safetensors"))


# Sharing


def test_sessions_lead_to_one_repo_which_outlives_them(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], sessions: Path
) -> None:
    end, first = opened()
    _, second = opened()
    assert led_to(first) == led_to(second) == kept(sessions)[0]
    before = listing(kept(sessions)[0])
    assert list((first.path / "repos").iterdir()) == []
    assert len(os.readlink(first.hub_cache / repo_folder(MODEL))) < 60, "a longer text takes a block of the disk"
    end.close()
    assert scanned(second) == [MODEL]
    assert loaded(second, MODEL)
    opened()
    assert listing(kept(sessions)[0]) == before


def test_no_repo_is_removed_while_a_session_looks_for_some(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who removes them takes the lock alone."""
    place, held = shared.Shared.place, []

    def looked(self: shared.Shared, name: str, repo: LinkedRepo) -> object:
        held.append(usage.is_held(f"{self.folder}/lock"))
        return place(self, name, repo)

    monkeypatch.setattr(shared.Shared, "place", looked)
    opened()
    assert held == [True]


def test_a_session_whose_programs_may_write_without_a_word_has_repos_of_its_own(models: Path, sessions: Path) -> None:
    """Online and without a gateway."""
    lay_model(models / MODEL)
    with hf_overlay.open_session([models], environ={"HOME": os.environ["HOME"]}) as session:
        assert led_to(session).is_relative_to(session.path)


def test_a_session_whose_cache_is_another_session_has_repos_of_its_own(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], models: Path
) -> None:
    """They would be of use to nobody after it."""
    _, outer = opened()
    with hf_overlay.open_session([models], environ=outer.environment) as inner:
        assert led_to(inner).is_relative_to(inner.path)


def test_two_caches_share_nothing(models: Path, environ: dict[str, str], tmp_path: Path) -> None:
    """What root downloads into a repo belongs to one of them. The two names have one CRC-32, whatever precedes them."""
    lay_model(models / MODEL)
    caches = [str(tmp_path / name) for name in ("8755d764", "4170cb18")]
    one, other = (hf_overlay.open_session([models], environ=environ | {"HF_HUB_CACHE": cache}) for cache in caches)
    with one as mine, other as theirs:
        assert led_to(mine) != led_to(theirs)


def test_a_user_can_neither_add_to_a_shared_repo_nor_delete_in_it(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]],
) -> None:
    _, session = opened()
    repo = led_to(session)
    before = listing(repo)
    with respected():
        for path in repo.rglob("*"):
            for attempt in attempts(path):
                with pytest.raises(OSError):
                    attempt()
        with pytest.raises(OSError):
            (repo / "new").mkdir()
    assert listing(repo) == before


def test_a_users_model_has_one_revision_also_where_clients_may_write_beside_it(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]],
) -> None:
    """P1: with two, releases up to 1.31 delete the files of one where all links end."""
    _, session = opened()
    session.expect_model(MODEL)
    repo = led_to(session)
    assert repo.is_relative_to(session.path), "it is the session's own"
    with respected():
        (repo / "refs/main").write_text("c" * 40)
        with pytest.raises(PermissionError):
            (repo / "snapshots" / ("c" * 40)).mkdir()


def attempts(path: Path) -> Iterator[Callable[[], object]]:
    """What a client may do to something in a repo."""
    yield partial(path.rename, path.with_name("other"))
    yield partial(os.replace, path, path.with_name("other"))
    if path.is_dir() and not path.is_symlink():
        yield (path / "new").mkdir
        yield (path / "new").touch
        yield path.rmdir
    else:
        yield path.unlink
    if path.is_file() and not path.is_symlink():
        yield partial(path.write_bytes, b"new")


SEVERAL = """
import os, sys, hf_overlay
sys.stdin.readline()
with hf_overlay.open_session([sys.argv[1]], environ=os.environ) as session:
    names = [name for name in os.listdir(session.hub_cache) if name.startswith("models--")]
    assert all(os.path.isfile(session.hub_cache / name / "refs/main") for name in names)
    print(len(names), len(os.listdir(session.path / "repos")))
"""


def test_first_starts_at_once_share_what_either_makes(models: Path, sessions: Path, environ: dict[str, str]) -> None:
    for number in range(20):
        lay_model(models / f"org/model-{number}", settled=True)
    command = [sys.executable, "-c", SEVERAL, str(models)]
    starting = [subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    answers = [process.communicate(b"go\n", timeout=100)[0] for process in starting]
    assert answers == [b"20 0\n"] * 3
    assert len(kept(sessions)) == 20
    assert {path.stat().st_mode & 0o777 for path in kept(sessions)} == {0o500}


# A repo of the session's own


def test_a_client_that_asks_the_gateway_gets_a_repo_to_write_into_and_no_other_session_sees_it(
    models: Path, hub: Path, home: Path, sessions: Path
) -> None:
    """As a user, whom the modes of a shared repo stop."""
    lay_model(models / MODEL, settled=True)
    ask = f"""
import os, huggingface_hub
from tests.support.permissions import respected
with respected():
    before = huggingface_hub.snapshot_download({MODEL!r})
    path = huggingface_hub.hf_hub_download({MODEL!r}, "model.safetensors", force_download=True)
    assert open(path, "rb").read() == open({str(models / MODEL / "model.safetensors")!r}, "rb").read()
    assert before == os.path.dirname(path)
"""
    environ = {"HOME": str(home), "PATH": os.environ["PATH"], "HF_ENDPOINT": "http://127.0.0.1:9"}
    with (
        hf_overlay.open_session([models], environ=environ, gateway=True) as session,
        hf_overlay.open_session([models], environ=environ, gateway=True) as other,
    ):
        assert led_to(session) == led_to(other)
        before = listing(led_to(other))
        done = finish([PYTHON, "-c", ask], session.environment, cwd=Path(__file__).parents[3])
        assert done.status == 0, done
        assert led_to(session).is_relative_to(session.path)
        assert session.refresh() == ((), (), ())
        assert led_to(session).is_relative_to(session.path), "a refresh leaves it"
        assert listing(led_to(other)) == before
    assert home_of(hub) == [], "a copy of the user's own file is not kept"


def test_programs_that_began_in_an_earlier_hub_folder_get_it_too(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], models: Path
) -> None:
    _, session = opened()
    began_in = session.hub_cache.resolve()
    lay_model(models / "org/other")
    session.refresh()
    session.expect_model(MODEL)
    assert (began_in / repo_folder(MODEL)).resolve() == led_to(session)
    assert led_to(session).is_relative_to(session.path)


def test_refs_that_a_client_writes_are_its_sessions_alone_and_a_false_one_lasts_until_a_refresh(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], models: Path
) -> None:
    _, session = opened()
    _, other = opened()
    session.expect_model(MODEL)
    mine, theirs = led_to(session), led_to(other)
    commit = (theirs / "refs/main").read_text()
    before = listing(theirs)
    with respected():
        (mine / "refs/HEAD").write_text(commit)
        (mine / "refs/main").write_text(commit)
    assert session.refresh() == ((), (), ())
    assert led_to(session) == mine, "the same, once more, changes nothing"
    with respected():
        (mine / "refs/main").write_text("1" * 40)
    assert session.refresh() == ((), (), ())
    assert loaded(session, MODEL)
    assert led_to(session) not in (mine, theirs)
    with respected():
        (led_to(session) / "refs/main").write_text(commit)
    settle(models / MODEL)
    lay_model(models / MODEL, {"more.txt": b"more"})
    assert session.refresh().changed == (MODEL,)
    with respected():
        (led_to(session) / "refs/main").write_text(commit)  # by a client that began before
    assert listing(theirs) == before


# Written to by root


def test_what_root_downloads_into_a_shared_repo_comes_home_with_the_last_session_that_shows_it(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], hub: Path, sessions: Path
) -> None:
    end_first, first = opened()
    end_second, second = opened()
    download(first)
    end_first.close()
    assert len(list(led_to(second).glob("snapshots/*/model.safetensors"))) == 2, "what a program may be reading stays"
    end_second.close()
    assert home_of(hub) == [FILES["model.safetensors"]]
    _, third = opened()
    assert loaded(third, MODEL)
    assert len(list(led_to(third).glob("snapshots/*"))) == 1


def test_it_comes_home_at_the_next_start_if_its_session_was_killed(
    models: Path, hub: Path, sessions: Path, environ: dict[str, str]
) -> None:
    lay_model(models / MODEL, settled=True)
    killed = """
import os, sys, hf_overlay
with hf_overlay.open_session([sys.argv[1]], environ=os.environ) as session:
    from tests.overlay.tree.test_shared import download
    download(session)
    os._exit(9)
"""
    done = finish([PYTHON, "-c", killed, str(models)], environ, cwd=Path(__file__).parents[3])
    assert done.status == 9, done
    clear_dead(str(sessions))
    assert home_of(hub) == [FILES["model.safetensors"]]


def without_a_file(repo: Path) -> None:
    view = repo / "views" / os.listdir(repo / "snapshots")[0]
    view.chmod(0o700)
    (view / "model.safetensors").unlink()


def with_another_main(repo: Path) -> None:
    """As a client writes it that has learned of a newer commit, and then fails to download it."""
    (repo / "refs/main").chmod(0o600)
    (repo / "refs/main").write_text("1" * 40)


@pytest.mark.parametrize("change", [without_a_file, with_another_main])
def test_a_session_that_finds_a_shared_repo_changed_shows_another_one(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], change: Callable[[Path], None]
) -> None:
    _, first = opened()
    _, second = opened()
    before = led_to(first)
    change(before)
    second.refresh()
    assert led_to(second) != before
    assert loaded(second, MODEL)
    _, third = opened()
    assert led_to(third) == led_to(second)


# Damage


def emptied(repo: Path) -> None:
    (repo / "refs/main").chmod(0o600)
    os.truncate(repo / "refs/main", 0)


def led_elsewhere(repo: Path) -> None:
    link = next((repo / "blobs").iterdir())
    (repo / "blobs").chmod(0o700)
    status = (repo / "blobs").stat()
    link.unlink()
    link.symlink_to("/nowhere")
    os.utime(repo / "blobs", ns=(status.st_atime_ns, status.st_mtime_ns))


def removed(repo: Path) -> None:
    files.remove(str(repo))


@pytest.mark.parametrize("damage", [emptied, led_elsewhere, removed])
def test_a_damaged_or_lost_repo_is_made_again(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], sessions: Path, damage: Callable[[Path], None]
) -> None:
    """As after a machine has stopped at once: everything looks right, and a file is empty."""
    end, session = opened()
    before = led_to(session)
    end.close()
    damage(before)
    if before.exists():
        os.utime(before, (1, 1))  # looked at before the machine was started
    _, session = opened()
    assert scanned(session) == [MODEL]
    assert loaded(session, MODEL)
    assert damage is removed or led_to(session) != before


def test_when_all_of_them_are_removed_under_a_session_a_refresh_makes_them_again(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], sessions: Path
) -> None:
    _, session = opened()
    files.remove(str(sessions / shared.FOLDER))
    assert not session.is_there
    session.refresh()
    assert loaded(session, MODEL)


def test_one_that_was_looked_at_today_is_not_looked_at_again(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, _ = opened()
    end.close()
    monkeypatch.setattr(shared, "_is_exact", lambda *_: pytest.fail("it was looked at again"))
    opened()


# Removal


def test_what_no_session_leads_to_goes_after_a_while_and_nothing_else(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], models: Path, sessions: Path, hub: Path
) -> None:
    lay_model(models / "org/gone")
    end, session = opened()
    unused = led_to(session, "org/gone")
    end.close()
    shutil.rmtree(models / "org/gone")
    left = sessions / shared.FOLDER / ".new-1-0123"
    left.mkdir()
    end, session = opened()
    for path in (unused, led_to(session), left):
        os.utime(path, (1, 1))
    shared.remove_unused(str(session.path))
    assert kept(sessions) == [led_to(session)]
    assert loaded(session, MODEL)
    end.close()
    assert kept(sessions) != []


def test_what_is_not_due_stays(opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], sessions: Path) -> None:
    end, session = opened()
    end.close()
    before = kept(sessions)
    _, session = opened()
    shutil.rmtree(session.path / "hubs/1")
    (session.path / "hubs/1").mkdir()
    shared.remove_unused(str(session.path))
    assert kept(sessions) == before
    assert not shared.is_due(str(sessions))
    os.utime(sessions / shared.FOLDER / "cleaned", (1, 1))
    assert shared.is_due(str(sessions))


def test_an_unused_repo_with_a_download_in_it_is_not_removed_but_comes_home(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], models: Path, sessions: Path, hub: Path
) -> None:
    """As when a program has removed the session that led to it."""
    end, session = opened()
    download(session)
    written = led_to(session)
    (session.hub_cache / repo_folder(MODEL)).unlink()
    end.close()
    assert home_of(hub) == []
    os.utime(written, (1, 1))
    end, session = opened()
    shared.remove_unused(str(session.path))
    assert not written.exists()
    end.close()
    assert home_of(hub) == [FILES["model.safetensors"]]


def test_they_are_removed_in_the_background_once_a_day(
    opened: Callable[[], tuple[ExitStack, hf_overlay.Session]], models: Path, sessions: Path
) -> None:
    end, session = opened()
    old = led_to(session)
    end.close()
    settle(models / MODEL)
    os.utime(models / MODEL / "config.json", (5, 5))  # from now on another repo stands for it
    for path in (old, sessions / shared.FOLDER / "cleaned"):
        os.utime(path, (1, 1))
    _, session = opened()
    until = time.monotonic() + 60
    while len(kept(sessions)) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert kept(sessions) == [led_to(session)]
