"""System messages reach the prompt, also by templates that would drop them, and so does the wish for few words."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx_overlay_server.chat.prompt import render
from mlx_overlay_server.chat.requests import ChatRequest, Message, Verbosity

from tests.support.loaded import loaded
from tests.support.models import make_model

_KEEPS = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
_DROPS_ALL = "{% for m in messages if m.role != 'system' %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
_DROPS_LATER = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    "[{{ m.role }}|{{ m.content }}]{% endif %}{% endfor %}"
)
_HAS_VERBOSITY = "{{ verbosity }}" + _KEEPS
SYSTEM, LATER = Message("system", ("Be kind.",)), Message("system", ("Be quick.",))
ASKED, SAID, AGAIN = Message("user", ("Hi",)), Message("assistant", ("Ho",)), Message("user", ("So?",))


def _written(folder: Path, template: str, *turns: Message, verbosity: Verbosity | None = None) -> str:
    model = loaded(make_model(folder / "m", "Hello."), template=template)
    request = ChatRequest("org/m", messages=turns, verbosity=verbosity)
    return model.tokenizer.decode(list(render(model, request).tokens))


@pytest.mark.parametrize(
    ("template", "turns", "written"),
    [
        pytest.param(_KEEPS, (SYSTEM, ASKED), "[system|Be kind.][user|Hi]", id="a template that has a place for it"),
        pytest.param(_DROPS_ALL, (SYSTEM, ASKED), "[user|Be kind.\n\nHi]", id="a template without one"),
        pytest.param(
            _DROPS_ALL,
            (SYSTEM, ASKED, SAID, LATER, AGAIN),
            "[user|Be kind.\n\nHi][assistant|Ho][user|Be quick.\n\nSo?]",
            id="several, each before the question that it precedes",
        ),
        pytest.param(
            _DROPS_LATER,
            (SYSTEM, ASKED, SAID, LATER, AGAIN),
            "[system|Be kind.][user|Hi][assistant|Ho][user|Be quick.\n\nSo?]",
            id="a template that has a place for the first alone",
        ),
        pytest.param(_DROPS_ALL, (SYSTEM,), "[user|Be kind.]", id="nothing but a system message"),
    ],
)
def test_no_system_message_is_dropped(template: str, turns: tuple[Message, ...], written: str, tmp_path: Path) -> None:
    assert _written(tmp_path, template, *turns) == written


@pytest.mark.parametrize(
    ("verbosity", "system"),
    [
        ("low", "Be kind.\n\nKeep your answers short."),
        ("medium", "Be kind."),
        ("high", "Be kind.\n\nAnswer in detail."),
    ],
)
def test_verbosity_is_a_sentence_of_the_system_message(verbosity: Verbosity, system: str, tmp_path: Path) -> None:
    assert _written(tmp_path, _KEEPS, SYSTEM, ASKED, verbosity=verbosity) == f"[system|{system}][user|Hi]"


def test_verbosity_is_the_template_s_own_setting_where_it_has_one(tmp_path: Path) -> None:
    assert _written(tmp_path, _HAS_VERBOSITY, ASKED, verbosity="low") == "low[user|Hi]"
