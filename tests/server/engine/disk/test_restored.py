"""KV caches that outlive the server: texts are the same with and without them, for every kind, damaged or not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine.commands import Command, Load, Prefilled, Sampled, Submit
from mlx_overlay_server.engine.disk import tier
from mlx_overlay_server.settings import EngineOptions

from tests.support.kinds import KINDS, make_kind
from tests.support.stage import Script, Stage, until

Prompt = tuple[int, ...]

SYSTEM = 300
"""Tokens of the part that conversations share."""
BASES = [tuple(97 + (at * (number + 3) + at * at % 11) % 26 for at in range(560)) for number in range(2)]
_QUANTISED: dict[str, Any] = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 280}


@dataclass
class Kept:
    """A model of one kind, and a folder in which KV caches of its were left by a server that has ended."""

    model: Path
    folder: Path
    options: dict[str, Any]
    answers: dict[Prompt, list[int]] = field(default_factory=dict)
    """Prompt -> what is said to it when nothing is kept on disk."""

    def play(self, groups: Sequence[Sequence[Prompt]], *, model: Path | None = None, **options: Any) -> Stage:
        """Have prompts answered by a new server, those of a group at once."""

        def script(stage: Stage) -> Script:
            yield [Load("m", str(model or self.model))]
            yield from until(lambda: stage.loaded("m"))
            count = 0
            for group in groups:
                sent: list[Command] = [
                    Submit(count + at, "m", prompt, Params(temperature=0), 6, system=SYSTEM)
                    for at, prompt in enumerate(group)
                ]
                count += len(group)
                yield sent
                yield from until(partial(are_over, stage, count))

        return Stage(EngineOptions(**{**self.options, **options})).play(script)

    def expected(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """What is said to prompts without a disk."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.answers]
        if new:
            stage = self.play([[prompt] for prompt in new], kv_disk=0)
            self.answers.update({prompt: said(stage, number) for number, prompt in enumerate(new)})
        return [self.answers[prompt] for prompt in prompts]


def are_over(stage: Stage, count: int) -> bool:
    return all(stage.is_over(id_) for id_ in range(count))


def said(stage: Stage, id_: int) -> list[int]:
    return [item.token for item in stage.items[id_] if isinstance(item, Sampled)]


def cached(stage: Stage, id_: int) -> int:
    return next(item.cached for item in stage.items[id_] if isinstance(item, Prefilled))


@pytest.fixture(scope="module", params=[*KINDS, "quantised"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    place = tmp_path_factory.mktemp("kept")
    is_quantised = request.param == "quantised"
    model = make_kind(place / "model", "rows" if is_quantised else request.param)
    made = Kept(model, place / "kv", _QUANTISED if is_quantised else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tier, "folder", lambda: str(made.folder))
        made.play([[base] for base in BASES])
        yield made


@pytest.fixture
def uses(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """The same with a folder of its own, which a test may change."""
    shutil.copytree(kept.folder, tmp_path / "kv", ignore=shutil.ignore_patterns("lock"))
    monkeypatch.setattr(tier, "folder", lambda: str(tmp_path / "kv"))
    return Kept(kept.model, tmp_path / "kv", kept.options, kept.answers)


def follow_up(kept: Kept, number: int) -> Prompt:
    """The second turn of a conversation."""
    (answer,) = kept.expected([BASES[number]])
    return (*BASES[number], *answer, 65, 66, 67)


def test_a_conversation_goes_on_from_disk(uses: Kept) -> None:
    prompt = follow_up(uses, 0)
    stage = uses.play([[prompt]])
    assert cached(stage, 0) >= 512
    assert [said(stage, 0)] == uses.expected([prompt])
    assert stage.stats.disk.restored == cached(stage, 0)
    assert stage.stats.disk.failures == 0


def test_another_conversation_takes_the_shared_part_from_disk(uses: Kept) -> None:
    prompt = (*BASES[1][:SYSTEM], *range(65, 91))
    stage = uses.play([[prompt]])
    if "kv_bits" not in uses.options:  # with them, what is shared is shorter than what is quantised
        assert cached(stage, 0) >= 256
    assert [said(stage, 0)] == uses.expected([prompt])


def test_what_is_on_disk_is_not_written_again(uses: Kept) -> None:
    before = {path.name for path in uses.folder.iterdir()}
    stage = uses.play([[BASES[0]]])
    assert before <= {path.name for path in uses.folder.iterdir()}
    size = sum(path.stat().st_size for path in uses.folder.iterdir() if path.name in before)
    assert stage.stats.disk.written < size / 4


@given(st.data())
@settings(max_examples=4, suppress_health_check=list(HealthCheck))
def test_texts_are_the_same_in_any_order_in_batches_of_any_size_whatever_is_damaged(
    kept: Kept, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("kv")
    shutil.copytree(kept.folder, folder, dirs_exist_ok=True)
    for path in sorted(folder.glob("*.safetensors")):
        harm(folder, path, data.draw(st.sampled_from([None, None, None, *HARMS])), data.draw(st.integers(0, 10**6)))
    known = [*BASES, *(follow_up(kept, number) for number in range(2))]
    most = 1  # what memory shares of a quantised KV cache was quantised earlier than it would be
    if not kept.options:
        known.append((*BASES[0][:SYSTEM], *range(65, 91)))
        most = 3
    group = st.lists(st.sampled_from(known), min_size=1, max_size=most)
    groups = data.draw(st.lists(group, min_size=1, max_size=min(most, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tier, "folder", lambda: str(folder))
        stage = kept.play(groups, batch_size=data.draw(st.integers(1, 3)))
    prompts = [prompt for group in groups for prompt in group]
    assert [said(stage, number) for number in range(len(prompts))] == kept.expected(prompts)


HARMS = ("cut", "flipped", "removed", "of another")


def harm(folder: Path, path: Path, how: str | None, at: int) -> None:
    """Damage a file."""
    if how == "cut":
        path.write_bytes(path.read_bytes()[: at % path.stat().st_size])
    elif how == "flipped":
        file = bytearray(path.read_bytes())
        file[at % len(file)] ^= 0x10
        path.write_bytes(file)
    elif how == "removed":
        path.unlink()
    elif how == "of another":
        others = sorted(folder.glob("*.safetensors"))
        path.write_bytes(others[at % len(others)].read_bytes())


# Whose they are -----------------------------------------------------------------------------------------------------


_ONE_KIND = pytest.mark.parametrize("kept", ["rows"], indirect=True)


@_ONE_KIND
def test_another_model_of_the_same_shape_gets_nothing(uses: Kept, tmp_path: Path) -> None:
    other = Path(shutil.copytree(uses.model, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert cached(uses.play([[BASES[0]]], model=other), 0) == 0


@_ONE_KIND
def test_the_same_model_in_another_folder_gets_them(uses: Kept, tmp_path: Path) -> None:
    other = Path(shutil.copytree(uses.model, tmp_path / "other"))
    assert cached(uses.play([[follow_up(uses, 0)]], model=other), 0) >= 512


@pytest.mark.parametrize("kept", ["quantised"], indirect=True)
def test_kv_caches_of_another_quantisation_are_not_used(uses: Kept) -> None:
    assert cached(Kept(uses.model, uses.folder, {**uses.options, "kv_bits": 8}).play([[BASES[0]]]), 0) == 0
    assert cached(Kept(uses.model, uses.folder, {}).play([[BASES[0]]]), 0) == 0


@_ONE_KIND
def test_kv_caches_that_are_not_quantised_are_not_used_where_they_are_to_be(uses: Kept) -> None:
    assert cached(Kept(uses.model, uses.folder, _QUANTISED).play([[BASES[0]]]), 0) == 0


@_ONE_KIND
def test_what_must_not_be_reused_is_not(uses: Kept) -> None:
    """A seed promises the same text each time, and a KV cache that is not to be kept is not."""
    before = {path.name for path in uses.folder.iterdir()}

    def script(stage: Stage) -> Script:
        yield [Load("m", str(uses.model))]
        yield from until(lambda: stage.loaded("m"))
        yield [
            Submit(0, "m", BASES[0], Params(temperature=1, seed=3), 2),
            Submit(1, "m", tuple(reversed(BASES[0])), Params(temperature=0), 2, keeps_cache=False),
        ]
        yield from until(lambda: stage.is_over(0) and stage.is_over(1))

    stage = Stage(EngineOptions(**uses.options)).play(script)
    assert (cached(stage, 0), cached(stage, 1)) == (0, 0)
    assert {path.name for path in uses.folder.iterdir()} - before <= {"lock"}


def test_a_quantised_beginning_that_is_shorter_than_what_is_quantised_is_read_anew(tmp_path: Path) -> None:
    """Both prompts begin with one token, of which a prompt that is read anew has exact numbers."""
    kept = Kept(make_kind(tmp_path / "model", "rows"), tmp_path / "kv", _QUANTISED)
    together = kept.play([[base] for base in BASES], kv_disk=0)
    assert [cached(together, number) for number in range(2)] == [0, 0]
    assert said(together, 1) == said(kept.play([[BASES[1]]], kv_disk=0), 0)
