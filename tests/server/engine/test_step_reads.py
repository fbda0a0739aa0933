"""How often a step waits for the device does not grow with its rows: on a GPU, each wait is a round trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_overlay_server.chat.grammar import Budget, Constraint
from mlx_overlay_server.engine.likely import Row, likeliest

from tests.support.models import make_random_model
from tests.support.running import PROMPT, Running

_WORDS = Constraint('{"grammars": [{"lark_grammar": "start: /[a-z ]*/"}]}')
_BUDGET = Budget(1000, is_open=True, opens=(5,), ends=(7, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    made = Running(folder)
    yield made
    made.runner.close()


def _count_waits(running: Running, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What waits for the device in one step."""
    counts: Counter[str] = Counter()

    def counting(name: str, original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", counting("eval", mx.eval))
        for name in ("item", "tolist", "__int__", "__float__", "__bool__"):
            patch.setattr(mx.array, name, counting(name, getattr(mx.array, name)))
        assert running.step(), "nothing was drawn: the test shows nothing"
    return counts


def _waits(running: Running, rows: int, monkeypatch: pytest.MonkeyPatch, **params: Any) -> Counter[str]:
    """The waits of a step in which so many rows are in the middle of their answers."""
    more = params.pop("more", {})
    ids = [running.add([*PROMPT, number], max_tokens=1000, more=dict(more), **params) for number in range(1, rows + 1)]
    while not all(len(running.sampled(id_)) > 2 for id_ in ids):
        running.step()
    counts = _count_waits(running, monkeypatch)
    for id_ in ids:
        running.runner.cancel(id_)
    return counts


def test_log_probabilities_of_all_rows_are_one_evaluation(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _waits(running, 8, monkeypatch)
    one = _waits(running, 1, monkeypatch, logprobs=5)
    many = _waits(running, 8, monkeypatch, logprobs=5)
    assert one == many
    assert many - plain == Counter(eval=1, tolist=2)


@pytest.mark.parametrize(
    "more", [{"constraint": _WORDS}, {"budget": _BUDGET}, {"constraint": _WORDS, "budget": _BUDGET}]
)
def test_grammars_and_budgets_read_the_tokens_of_a_step_once(
    more: dict[str, Any], running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _waits(running, 8, monkeypatch)
    many = _waits(running, 8, monkeypatch, more=more)
    assert many - plain == Counter(tolist=1)


def test_alone_both_read_the_last_token_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: dict[str, Any] = {"seed": 3, "temperature": 1}
    plain = _waits(running, 1, monkeypatch, **seeded)
    both = _waits(running, 1, monkeypatch, more={"constraint": _WORDS, "budget": _BUDGET}, **seeded)
    assert both - plain == Counter(item=1)


def test_rows_that_come_and_go_each_get_their_own_token(running: Running) -> None:
    """Each grammar allows one text alone, which a token of another row would end."""
    texts = ["abcdefghij", "kl", "mnopqrstuv", "wxyz", "zyxwvuts"]
    loaded = running.runner.loaded
    rules = [Constraint(f'{{"grammars": [{{"lark_grammar": "start: \\"{text}\\""}}]}}') for text in texts]
    ids = []
    for rule in rules:
        ids.append(running.add(max_tokens=100, more={"constraint": rule}))
        for _ in range(3):
            running.step()
    running.finish()
    said = [loaded.tokenizer.decode(running.tokens(id_)[:-1]) for id_ in ids]
    assert said == texts
    assert all(running.sampled(id_)[-1].finish == "stop" for id_ in ids)


def test_a_row_gets_as_many_of_the_likeliest_as_it_asked_for() -> None:
    one = mx.log(mx.array([0.1, 0.2, 0.3, 0.4]))
    other = mx.log(mx.array([0.4, 0.3, 0.2, 0.1]))
    told = likeliest([Row(0, one, 2), Row(3, other, None), Row(1, other, 0), Row(2, other, 20)])
    assert told[1] is None
    values = [(round(each.logprob, 3), [token for token, _ in each.top]) for each in told if each is not None]
    assert values == [(-2.303, [3, 2]), (-1.204, []), (-1.609, [0, 1, 2, 3])]
    assert told[0] is not None
    assert [round(value, 3) for _, value in told[0].top] == [-0.916, -1.204]
    assert likeliest([]) == []
