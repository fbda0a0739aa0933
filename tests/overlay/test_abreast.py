"""Many looks at one disk: in order, by threads only where the disk is slow, and given up on where it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_overlay import abreast, config
from hf_overlay.abreast import Abreast
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.patience import NoAnswer, Patience
from hf_overlay.progress import alive, reporting

from tests.support.folders import gguf, lay_files, lay_model
from tests.support.hfcache import add_repo


def slow() -> Abreast:
    found = Abreast()
    found.is_slow = True
    return found


@pytest.mark.parametrize("make", [Abreast, slow])
def test_answers_come_in_order_each_once(make: Callable[[], Abreast]) -> None:
    asked: list[int] = []

    def look(number: int) -> int:
        asked.append(number)
        return number * number

    assert list(make().each(look, range(500))) == [number * number for number in range(500)]
    assert sorted(asked) == list(range(500))


@pytest.mark.parametrize("make", [Abreast, slow])
def test_what_a_look_raises_is_raised_when_it_is_its_turn(make: Callable[[], Abreast]) -> None:
    def look(number: int) -> int:
        if number == 3:
            raise FileNotFoundError(number)
        return number

    answers = make().each(look, range(10))
    assert [next(answers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FileNotFoundError):
        next(answers)


def test_a_disk_that_keeps_each_look_waiting_is_slow_and_one_that_works_is_not() -> None:
    threads: set[int] = set()

    def wait(_: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(abreast._WAIT_SECONDS * 10)

    of_a_network = Abreast()
    list(of_a_network.each(wait, range(20)))
    assert of_a_network.is_slow
    assert len(threads) > 2


def test_a_disk_is_not_slow_because_a_look_waited_for_the_processor() -> None:
    local = Abreast()
    list(local.each(lambda number: time.sleep(0.1) if number == 2 else None, range(200)))
    assert not local.is_slow


def test_looks_are_reported_by_the_thread_that_asks_and_never_after_it_is_done() -> None:
    reports: list[int] = []
    go_on = threading.Event()

    def look(number: int) -> int:
        if number == 0:
            raise OSError
        go_on.wait(60)
        alive()
        return number

    with reporting(lambda: reports.append(threading.get_ident())), pytest.raises(OSError):
        list(slow().each(look, range(8)))
    before = len(reports)
    go_on.set()
    time.sleep(0.05)
    assert len(reports) == before
    assert set(reports) <= {threading.get_ident()}


def test_a_look_that_hangs_is_given_up_on() -> None:
    is_over = threading.Event()

    def look(number: int) -> int:
        if number == 5:
            is_over.wait(60)
        return number

    with pytest.raises(NoAnswer):
        Patience(0.3).ask("/drive", lambda: list(slow().each(look, range(10))))
    is_over.set()


def test_a_slow_disk_shows_the_same_as_a_quick_one(models: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        lay_model(models / f"org-{number % 3}/model-{number}", {"sub/vocab.json": b"{}"}, settled=number % 2 == 0)
    lay_files(models / "deep/er/broken", {"config.json": b"{"})
    lay_files(models / "org-1/some-GGUF", {"a-Q4_K_M.gguf": gguf(b"x"), "._a.gguf": b"junk"})
    (models / "again").symlink_to("org-0")
    (models / "twice").symlink_to("org-0")
    (models / "deep/up").symlink_to("..")
    (models / "nowhere").symlink_to("/nowhere")
    for number in range(10):
        add_repo(hub, f"org/cached-{number}", {"config.json": b"{}"})

    def found() -> object:
        catalog = Catalog(config.load([str(models)], {"HOME": str(hub.parents[2])}, "/", kind="any"))
        return catalog.sources, catalog.real_cache.models(), [each.name for each in catalog.real_cache.entries()]

    quick = found()
    monkeypatch.setattr(abreast, "_WAIT_SECONDS", -1)
    monkeypatch.setattr(abreast, "_FIRST", 0)
    assert found() == quick
