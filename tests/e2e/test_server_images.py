"""Pictures shown to a real server: a model that sees answers to them, in every dialect; what is none is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.models import make_model
from tests.support.server import Server, serving
from tests.support.vision import PATCH, SIDE, data_url, make_vision_model, png, said_by_mlx_lm

SEES = "acme/sees"
READS = "acme/reads"
RED, BLUE = png("red"), png("blue")
TOKENS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("images")
    make_vision_model(top / "models" / "acme" / "sees")
    make_model(top / "models" / "acme" / "reads", "I see nothing.")
    with serving(top / "home", top / "models", options=["--offline", "--trust-remote-code"]) as server:
        yield server


class Answer(NamedTuple):
    text: str
    prompt_tokens: int


class Dialect(NamedTuple):
    """How one of them shows an image, and where an answer has its text."""

    path: str
    content: Callable[[str, Sequence[str]], list[Any]]
    """Of the only message: a text, then images at these URLs."""
    body: Callable[[list[Any]], dict[str, Any]]
    answer: Callable[[Any], Answer]
    where: str
    """The field that is wrong if the first image is, in the message that `body` makes."""


def _chat_content(text: str, urls: Sequence[str]) -> list[Any]:
    return [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


def _responses_content(text: str, urls: Sequence[str]) -> list[Any]:
    return [{"type": "input_text", "text": text}, *({"type": "input_image", "image_url": url} for url in urls)]


def _anthropic_content(text: str, urls: Sequence[str]) -> list[Any]:
    return [{"type": "text", "text": text}, *({"type": "image", "source": _source(url)} for url in urls)]


def _source(url: str) -> dict[str, str]:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    head, _, data = url.partition(",")
    return {"type": "base64", "media_type": head.removeprefix("data:").removesuffix(";base64"), "data": data}


CHAT = Dialect(
    "/v1/chat/completions",
    _chat_content,
    lambda content: {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS},
    lambda told: Answer(told["choices"][0]["message"]["content"], told["usage"]["prompt_tokens"]),
    "messages[0].content[1].image_url.url",
)
RESPONSES = Dialect(
    "/v1/responses",
    _responses_content,
    lambda content: {"input": [{"role": "user", "content": content}], "max_output_tokens": TOKENS},
    lambda told: Answer(told["output"][0]["content"][0]["text"], told["usage"]["input_tokens"]),
    "input[0].content[1].image_url",
)
ANTHROPIC = Dialect(
    "/v1/messages",
    _anthropic_content,
    lambda content: {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS},
    lambda told: Answer(
        told["content"][0]["text"], told["usage"]["input_tokens"] + told["usage"]["cache_read_input_tokens"]
    ),
    "messages[0].content[1].source",
)
DIALECTS = pytest.mark.parametrize("dialect", [CHAT, RESPONSES, ANTHROPIC], ids=["chat", "responses", "anthropic"])


def _ask(server: Server, dialect: Dialect, urls: Sequence[str], *, model: str = SEES, text: str = "What is it?") -> Any:
    body = dialect.body(dialect.content(text, urls)) | {"model": model, "temperature": 0}
    return server.http.post(dialect.path, json=body)


def _answer(server: Server, dialect: Dialect, *images: bytes, text: str = "What is it?") -> Answer:
    told = _ask(server, dialect, [data_url(image) for image in images], text=text)
    assert told.status_code == 200, told.text
    return dialect.answer(told.json())


def _refused(server: Server, dialect: Dialect, urls: Sequence[str], **options: Any) -> str:
    """The message of a refusal; it names the field itself where the dialect has no place for that."""
    told = _ask(server, dialect, urls, **options)
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert error["type"] == "invalid_request_error"
    return f"{error.get('param', '')} {error['message']}"


@DIALECTS
def test_what_an_image_shows_changes_the_answer(dialect: Dialect, server: Server) -> None:
    answers = [_answer(server, dialect, *images).text for images in ((), (RED,), (BLUE,))]
    assert len(set(answers)) == len(answers)


@DIALECTS
def test_the_same_image_has_the_same_answer(dialect: Dialect, server: Server) -> None:
    before = _answer(server, dialect, RED)
    _answer(server, dialect, BLUE)  # of as many tokens, which have the same numbers
    assert _answer(server, dialect, RED) == before


def test_all_dialects_have_the_same_answer(server: Server) -> None:
    chat, responses, anthropic = (_answer(server, each, RED, BLUE) for each in (CHAT, RESPONSES, ANTHROPIC))
    assert chat == responses == anthropic


def test_the_answer_is_mlx_lm_s_own(server: Server, tmp_path: Path) -> None:
    folder = make_vision_model(tmp_path / "sees")
    content = [{"type": "text", "text": "Which first?"}, {"type": "image"}, {"type": "image"}]
    for images in ([RED, BLUE], [BLUE, png("green", 3 * SIDE, 5 * SIDE)]):  # in their order
        said = said_by_mlx_lm(folder, [{"role": "user", "content": content}], images, TOKENS)
        assert _answer(server, CHAT, *images, text="Which first?").text == said


def test_an_image_in_an_earlier_turn_is_still_seen(server: Server) -> None:
    def second_answer(image: bytes) -> str | None:
        turns = [
            {"role": "user", "content": _chat_content("Look.", [data_url(image)])},
            {"role": "assistant", "content": "I did."},
            {"role": "user", "content": "What was it?"},
        ]
        return server.chat(SEES, turns, temperature=0, max_tokens=TOKENS).choices[0].message.content

    assert second_answer(RED) != second_answer(BLUE)


def test_an_image_that_a_tool_answers_is_seen(server: Server) -> None:
    def answer(image: bytes) -> str:
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": _anthropic_content("", [data_url(image)])}
        turns = [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "call_1", "name": "look", "input": {}}]},
            {"role": "user", "content": [result]},
        ]
        body = {"model": SEES, "messages": turns, "max_tokens": TOKENS, "temperature": 0}
        told = server.http.post("/v1/messages", json=body)
        assert told.status_code == 200, told.text
        return ANTHROPIC.answer(told.json()).text

    assert answer(RED) != answer(BLUE)


def test_a_stream_says_of_an_image_what_a_whole_answer_says(server: Server) -> None:
    message = [{"role": "user", "content": _chat_content("What is it?", [data_url(RED)])}]
    whole, streamed = (
        server.chat_answer(SEES, message, stream=stream, temperature=0, max_tokens=TOKENS) for stream in (False, True)
    )
    assert whole == streamed


def test_a_prompt_without_its_image_is_not_continued_from_one_with_it(server: Server) -> None:
    text = "Is it the prompt that counts?"
    before = _answer(server, CHAT, text=text)
    _answer(server, CHAT, RED, text=text)
    assert _answer(server, CHAT, text=text) == before


@DIALECTS
def test_usage_counts_an_image_s_tokens(dialect: Dialect, server: Server) -> None:
    without = _answer(server, dialect).prompt_tokens
    small, large = (
        _answer(server, dialect, png("red", width * SIDE, height * SIDE)).prompt_tokens
        for width, height in ((1, 1), (5, 3))
    )
    assert small == without + 1 + 2  # and one mark before it, one after it
    assert large == without + 5 * 3 + 2


def test_formats_that_clients_send_are_read(server: Server) -> None:
    from io import BytesIO

    from PIL import Image

    for name, mode in (("JPEG", "L"), ("GIF", "P"), ("WEBP", "RGBA"), ("PNG", "LA")):
        file = BytesIO()
        Image.new(mode, (SIDE, SIDE)).save(file, name)
        url = f"data:image/{name.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
        assert _ask(server, CHAT, [url]).status_code == 200, name


@DIALECTS
def test_a_model_that_only_reads_refuses_an_image(dialect: Dialect, server: Server) -> None:
    message = _refused(server, dialect, [data_url(RED)], model=READS)
    assert dialect.where in message
    assert f"{READS} does not take images" in message


_NO_IMAGES = {
    "cut base64": ("data:image/png;base64,iVBORw0KGg", "base64"),
    "no base64": ("data:image/png;base64,****", "base64"),
    "a text": (data_url(b"Just a text."), "cannot decode the image"),
    "nothing": (data_url(b""), "cannot decode the image"),
    "a cut image": (data_url(RED[:-30]), "cannot decode the image"),
    # What Pillow refuses with errors of other kinds, or reads by starting other programs.
    "a broken DDS": (data_url(b"DDS " + (124).to_bytes(4, "little") + bytes(120)), "cannot decode the image"),
    "a program": (
        data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"),
        "cannot decode the image",
    ),
    "http": ("http://127.0.0.1:9/cat.png", "data URLs"),
    "https": ("https://example.com/cat.png", "data URLs"),
    "a file": ("file:///etc/hostname", "data URLs"),
    "another type": ("data:text/plain;base64,aGk=", "data URLs"),
}


@DIALECTS
@pytest.mark.parametrize(("url", "reason"), _NO_IMAGES.values(), ids=_NO_IMAGES.keys())
def test_what_is_no_image_is_refused_by_its_field(url: str, reason: str, dialect: Dialect, server: Server) -> None:
    message = _refused(server, dialect, [url])
    assert dialect.where in message
    assert reason in message


@DIALECTS
def test_the_model_s_mark_of_an_image_in_a_text_is_refused_beside_one(dialect: Dialect, server: Server) -> None:
    """The image would be put at the wrong place."""
    _refused(server, dialect, [data_url(RED)], text=f"What does {PATCH} mean?")
    assert _ask(server, dialect, [], text=f"What does {PATCH} mean?").status_code == 200


def test_an_image_too_large_for_the_context_is_refused(server: Server) -> None:
    message = _refused(server, CHAT, [data_url(png("red", 100 * SIDE, 41 * SIDE))] * 2)
    assert "prompt is too long" in message
