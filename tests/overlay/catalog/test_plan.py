"""Precedence and the content of the tree, as pure functions."""

from __future__ import annotations

from hf_overlay.catalog.plan import Entry, fold, plan, resolve
from hf_overlay.models import File, Model, Source
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "org/a", "Org/a", "org/b", "org/sub/a", "x--y", "org/" + "n" * 250, "é", "e\u0301"])
CACHED = st.sets(st.sampled_from(["models--a", "models--ORG--a", "datasets--x--y", ".locks", "version.txt"]))


def model(model_id: str, root: str, commit: str | None = None) -> Model:
    path = f"{root}/{model_id}"
    return Model(model_id, "custom", path, "llama", 1, (File("config.json", 1, 1),), root, commit)


def sources(draw: list[list[tuple[str, str | None]]]) -> list[Source]:
    return [
        Source(
            f"/root{number}", None, tuple(model(name, f"/root{number}", commit) for name, commit in dict(found).items())
        )
        for number, found in enumerate(draw)
    ]


CACHED_COMMIT = "c" * 40


def entries(cached: set[str]) -> list[Entry]:
    return [Entry(name, f"/hub/{name}", (CACHED_COMMIT,) if name == "models--a" else ()) for name in sorted(cached)]


DRAWN = st.lists(
    st.lists(st.tuples(NAMES, st.sampled_from([None, "c" * 40, "d" * 40])), max_size=6), min_size=1, max_size=3
).map(sources)


@given(DRAWN)
def test_the_first_model_path_wins_and_the_rest_stand_behind_in_order(found: list[Source]) -> None:
    for model_id, resolution in resolve(found).items():
        candidates = [each for source in found for each in source.models if each.id == model_id]
        assert [resolution.winner, *resolution.shadows] == candidates


@given(DRAWN, CACHED, st.booleans())
def test_every_entry_is_the_users_or_the_caches_and_no_two_collide(
    found: list[Source], cached: set[str], case_insensitive: bool
) -> None:
    made = plan(found, entries(cached), case_insensitive=case_insensitive)
    winners = {resolution.winner.id for resolution in resolve(found).values()}
    linked = {repo.model.id for repo in made.linked_repos.values()}
    assert linked | {each.id for each, _ in made.left_out} == winners, "each winner is linked or left out with a reason"
    if case_insensitive:
        assert len({fold(name) for name in made.entries}) == len(made.entries)
    for name in cached - made.entries.keys():
        assert case_insensitive
        assert fold(name) in {fold(entry) for entry in made.entries}, "what is hidden is hidden by a user's model"
    commits = [repo.commit for repo in made.linked_repos.values()]
    commits += [CACHED_COMMIT for entry in made.entries.values() if entry == "/hub/models--a"]
    assert len(commits) == len(set(commits)), "two repos with one commit confuse deletions"


@given(DRAWN, CACHED)
def test_a_plan_is_a_function_of_what_was_found(found: list[Source], cached: set[str]) -> None:
    forwards = entries(cached)
    first, second = (plan(found, each, case_insensitive=True) for each in (forwards, forwards[::-1]))
    assert first == second
    assert list(first.entries) == list(second.entries)


def test_ids_that_the_layout_cannot_hold_are_left_out_with_the_reason() -> None:
    made = plan([Source("/r", None, (model("a--b/c", "/r"), model("n" * 300, "/r")))], [], case_insensitive=False)
    assert not made.entries
    assert [reason.text.split()[2] for _, reason in made.left_out] == ["cannot", "is"]


@given(DRAWN, CACHED)
def test_an_earlier_plan_spares_work_and_changes_nothing(found: list[Source], cached: set[str]) -> None:
    first = plan(found, entries(cached), case_insensitive=False)
    again = plan(found, entries(cached), case_insensitive=False, earlier=first.linked_repos)
    assert again == first
    for name, repo in first.linked_repos.items():
        assert again.linked_repos[name] is repo, "a linked repo of a model that is the same is the same"


def test_a_model_that_has_changed_is_linked_anew() -> None:
    old, new = (Source("/r", None, (model("org/a", "/r")._replace(size_bytes=size),)) for size in (1, 2))
    first = plan([old], [], case_insensitive=False)
    assert plan([new], [], case_insensitive=False, earlier=first.linked_repos) == plan(
        [new], [], case_insensitive=False
    )
