"""A conversation that is too long loses its oldest turns where its client allows that, and no more than it must."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.prompt import render
from mlx_overlay_server.chat.requests import Call, ChatRequest, Message, Params, Role
from mlx_overlay_server.errors import PromptTooLong
from mlx_overlay_server.preparation.work import prepare, truncated
from mlx_overlay_server.settings import Limits

from tests.support.loaded import loaded
from tests.support.models import make_model

_TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
_SYSTEM = Message("system", ("s" * 10,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(make_model(tmp_path_factory.mktemp("m") / "m", "Hello.", context=400), template=_TEMPLATE)


def _turn(role: Role, size: int, mark: str) -> Message:
    return Message(role, (mark * size,))


def _request(*turns: Message, max_tokens: int | None = None) -> ChatRequest:
    return ChatRequest("org/m", Params(max_tokens=max_tokens), messages=turns, is_truncated=True)


def _size(model: Loaded, request: ChatRequest) -> int:
    return len(render(model, request).tokens)


_ROLES: st.SearchStrategy[Role] = st.sampled_from(["user", "assistant", "user", "tool"])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(_ROLES, st.integers(1, 40)), min_size=1, max_size=12), st.integers(40, 200), st.integers(1, 60)
)
def test_as_few_turns_as_possible_are_left_out(
    model: Loaded, parts: list[tuple[Role, int]], limit: int, room: int
) -> None:
    turns = [_SYSTEM, *(_turn(role, size, "x") for role, size in parts), _turn("user", 5, "y")]
    request = _request(*turns, max_tokens=room)
    left = truncated(model, request, limit)
    assert left.messages[0] == _SYSTEM
    kept = left.messages[1:]
    assert list(kept) == turns[len(turns) - len(kept) :]
    allowed = limit - min(room, limit // 2)
    if len(kept) == len(turns) - 1:
        assert _size(model, left) <= allowed
        return
    assert kept[0].role == "user"
    earlier = [at for at, turn in enumerate(turns) if at == 1 or turn.role == "user"]
    before = max(at for at in earlier if 0 < at < len(turns) - len(kept))
    longer = _request(_SYSTEM, *turns[before:], max_tokens=room)
    assert _size(model, longer) > allowed, "fewer turns would have been enough"
    assert _size(model, left) <= allowed or len(kept) == 1 or kept == (turns[-1],)


def test_a_result_is_left_out_with_its_call(model: Loaded) -> None:
    call = Message("assistant", ("c" * 100,), calls=(Call("call_1", "find", {}),))
    turns = (_turn("user", 150, "a"), call, Message("tool", ("r" * 50,), call_id="call_1"), _turn("user", 90, "b"))
    assert truncated(model, _request(*turns), 399).messages == (turns[-1],)


def test_the_last_question_is_never_left_out(model: Loaded) -> None:
    with pytest.raises(PromptTooLong):
        prepare(model, _request(_turn("user", 10, "a"), _turn("user", 500, "b")), Limits())


def test_without_leave_nothing_is_left_out(model: Loaded) -> None:
    turns = (_turn("user", 300, "a"), _turn("user", 300, "b"))
    with pytest.raises(PromptTooLong):
        prepare(model, ChatRequest("org/m", messages=turns), Limits())
    (made,) = prepare(model, _request(*turns), Limits())
    assert len(made.prompt.tokens) < 400


def test_a_model_without_a_known_limit_reads_everything(tmp_path: Path, model: Loaded) -> None:
    unlimited = loaded(make_model(tmp_path / "m", "Hello."), template=_TEMPLATE)
    turns = (_turn("user", 300, "a"), _turn("user", 300, "b"))
    (made,) = prepare(unlimited, _request(*turns), Limits())
    assert len(made.prompt.tokens) > 600
