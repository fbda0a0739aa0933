"""Text is what the tokens say after what precedes it: a space at its start belongs to it, unless nothing precedes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer
from mlx_overlay_server.api.openai.logprobs import TextLogprobEncoder, TextLogprobs
from mlx_overlay_server.chat.events import Event, Text, TokenLogprob
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.prompt import render
from mlx_overlay_server.chat.reader import Reader, Token
from mlx_overlay_server.chat.requests import ChatRequest, Message

from tests.support.loaded import loaded
from tests.support.spaces import KINDS, make_tokenizer

Find = Callable[[str], int]


@pytest.fixture(scope="module", params=[*KINDS, "slow"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Find]:
    """A model of each kind of detokenizer; the slow one is mlx-lm's for tokenizers that are not in Rust."""
    folder = tmp_path_factory.mktemp("models") / "m"
    find = make_tokenizer(folder, "Metaspace" if request.param == "slow" else request.param)
    model = loaded(folder)
    if request.param == "slow":
        inner = model.tokenizer
        model = replace(model, detokenizer=lambda: NaiveStreamingDetokenizer(inner))
    return model, find


def _read(model: Loaded, tokens: Sequence[int], *, continues_text: bool) -> list[Event]:
    reader = Reader(model, has_marks=False, continues_text=continues_text)

    def token(id_: int) -> Token:
        data = model.token_bytes(id_)
        return Token(id_, TokenLogprob(data.decode("utf-8", "replace"), data, -0.5))

    events = [event for id_ in tokens for event in reader.feed([token(id_)])]
    return events + reader.feed([], "length")


def _said(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize(
    "words", [[" Paris", " is", " big", "."], ["Paris", " is"], [".", " Paris"], [" ", " Paris"], [" "], []]
)
def test_the_first_space_is_kept_after_text(words: list[str], known: tuple[Loaded, Find]) -> None:
    model, find = known
    assert _said(_read(model, [find(word) for word in words], continues_text=True)) == "".join(words)


def test_the_first_space_is_dropped_where_a_template_precedes(known: tuple[Loaded, Find]) -> None:
    model, find = known
    said = _said(_read(model, [find(" Paris"), find(" is")], continues_text=False))
    assert said == (" Paris is" if _keeps_spaces(model) else "Paris is")


def _keeps_spaces(model: Loaded) -> bool:
    """Return whether a model's decoder, as Gemma's does, keeps a space even at the start of a text."""
    return not getattr(model.detokenizer(), "trim_space", True)


def _encoded(events: Sequence[Event]) -> TextLogprobs:
    encoded = TextLogprobEncoder(0, has_echo=False).encode(events)
    assert encoded is not None
    return encoded


@pytest.mark.parametrize("words", [[" Paris", " is", " big", "."], ["Paris", " ", " is"]])
def test_the_offsets_of_tokens_are_those_of_their_text(words: list[str], known: tuple[Loaded, Find]) -> None:
    model, find = known
    events = _read(model, [find(word) for word in words], continues_text=True)
    encoded = _encoded(events)
    text = _said(events)
    assert encoded["tokens"] == words
    assert [text[at:].startswith(word) for at, word in zip(encoded["text_offset"], words, strict=True)] == [True] * len(
        words
    )


def test_a_character_that_two_tokens_make_counts_once(known: tuple[Loaded, Find]) -> None:
    model, find = known
    is_byte_level = type(model.detokenizer()).__name__ == "BPEStreamingDetokenizer"
    if not is_byte_level and not hasattr(model.detokenizer(), "trim_space"):
        pytest.skip("its decoder knows no bytes")
    halves = ["Ã", "©"] if is_byte_level else ["<0xC3>", "<0xA9>"]
    events = _read(model, [find(word) for word in (*halves, " is", ".")], continues_text=True)
    assert _said(events) == "é is."
    assert _encoded(events)["text_offset"] == [0, 0, 1, 4]


def test_a_prompt_tells_whether_the_answer_goes_on_with_its_text(known: tuple[Loaded, Find]) -> None:
    model, _ = known
    asked = Message("user", ("is",))

    def continues(last: Message, *, asked_for: bool = True) -> bool:
        return render(model, ChatRequest("m", messages=(asked, last), continues=asked_for)).continues_text

    assert continues(Message("assistant", ("Paris",)))
    assert not continues(Message("assistant", ("Paris",)), asked_for=False)
    assert not continues(asked)
