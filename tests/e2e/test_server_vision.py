"""Images shown by mlx-vlm to a model of a real server; skipped where that extra is not installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_model
from tests.support.server import Server, serving
from tests.support.vision import data_url, png

if find_spec("mlx_vlm") is None:
    pytest.skip("mlx-vlm is not installed: pip install './server[vision]'", allow_module_level=True)

from tests.support.qwen_vl import MARK, SIDE, make_qwen_vl, said_by_mlx_vlm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what mlx-vlm imports

SEES = "acme/sees"
RED, BLUE, GREEN = png("red"), png("blue", 4 * SIDE, 3 * SIDE), png("green", 3 * SIDE, 5 * SIDE)
TOKENS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_vl(tmp_path_factory.mktemp("vision") / "models" / "acme" / "sees")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    models = folder.parent.parent
    make_model(models / "acme" / "reads", "I see nothing.")
    with serving(models.parent / "home", models, options=["--offline"]) as server:
        yield server


def _asked(text: str, images: Sequence[bytes]) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _tokens(server: Server, messages: Any, **options: Any) -> list[str]:
    """The tokens of an answer, and how many of its prompt's were cached."""
    made = server.chat(SEES, messages, temperature=0, max_tokens=TOKENS, logprobs=True, **options)
    assert made.choices[0].logprobs is not None
    return [str(each.bytes) for each in made.choices[0].logprobs.content or ()]


def _cached(server: Server, messages: Any) -> int:
    usage = server.chat(SEES, messages, temperature=0, max_tokens=TOKENS).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.cached_tokens or 0


@pytest.mark.parametrize("images", [(), (RED,), (BLUE,), (RED, GREEN), (GREEN, RED)])
def test_the_answer_is_mlx_vlm_s_own(server: Server, folder: Path, images: Sequence[bytes]) -> None:
    assert _said(server, _asked("Which?", images)) == _said_by_mlx_vlm(folder, "Which?", images)


def _said(server: Server, messages: Any) -> str | None:
    return server.chat(SEES, messages, temperature=0, max_tokens=TOKENS).choices[0].message.content


def _said_by_mlx_vlm(folder: Path, text: str, images: Sequence[bytes]) -> str:
    from mlx_lm.utils import load_tokenizer

    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    tokens = said_by_mlx_vlm(folder, [{"role": "user", "content": content}], images, TOKENS)
    assert len(tokens) == TOKENS
    return str(load_tokenizer(folder).decode(tokens))


def test_every_dialect_shows_images(server: Server) -> None:
    url = data_url(RED)
    head, _, data = url.partition(",")
    source = {"type": "base64", "media_type": head.removeprefix("data:").removesuffix(";base64"), "data": data}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": "Which?"}]
    body = {"model": SEES, "max_tokens": TOKENS, "temperature": 0}
    claude = server.http.post("/v1/messages", json={**body, "messages": [{"role": "user", "content": parts}]}).json()
    items = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Which?"}]
    asked = {
        "model": SEES,
        "max_output_tokens": TOKENS,
        "temperature": 0,
        "input": [{"role": "user", "content": items}],
    }
    response = server.http.post("/v1/responses", json=asked).json()
    whole = server.chat_answer(SEES, _asked("Which?", [RED]), stream=False, temperature=0, max_tokens=TOKENS)
    streamed = server.chat_answer(SEES, _asked("Which?", [RED]), stream=True, temperature=0, max_tokens=TOKENS)
    assert whole == streamed
    assert claude["content"][0]["text"] == response["output"][0]["content"][0]["text"] == whole.content


def test_an_image_that_was_seen_before_is_read_from_the_cache(server: Server) -> None:
    first = _asked("What is the first thing?", [BLUE])
    before = _cached(server, first)
    assert _cached(server, first) > before + 12  # its 12 marks are among them
    more = [*first, {"role": "assistant", "content": "I see."}, *_asked("And this?", [RED])]
    assert _cached(server, more) >= _cached(server, first) - 1
    assert _cached(server, _asked("What is the first thing?", [png("black", 4 * SIDE, 3 * SIDE)])) < 12, "another image"


def test_an_answer_from_the_cache_is_the_same(server: Server) -> None:
    asked = _asked("Once, and again?", [GREEN, RED])
    first = _tokens(server, asked)
    assert _cached(server, asked) > 0
    assert _tokens(server, asked) == first


def test_requests_at_the_same_time_do_not_disturb_each_other(server: Server) -> None:
    asked = [_asked("Which?", images) for images in ((RED,), (BLUE, GREEN), (), (GREEN,))]
    alone = [_tokens(server, each) for each in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(lambda each: _tokens(server, each), asked)) == alone
    assert len({tuple(each) for each in alone}) == len(asked)


def test_a_long_prompt_is_read_in_pieces(server: Server, folder: Path) -> None:
    text = "x" * 900
    assert _said(server, _asked(text, [BLUE])) == _said_by_mlx_vlm(folder, text, [BLUE])


@pytest.mark.parametrize(("images", "text"), [([RED], f"What does {MARK} mean?"), ([b"Just a text."], "Which?")])
def test_what_cannot_be_shown_is_refused(server: Server, images: Sequence[bytes], text: str) -> None:
    body = {"model": SEES, "messages": _asked(text, images)}
    told = server.http.post("/v1/chat/completions", json=body)
    assert told.status_code == 400, told.text
    assert told.json()["error"]["param"].startswith("messages")


def test_a_model_that_only_reads_does_not_see(server: Server) -> None:
    told = server.http.post("/v1/chat/completions", json={"model": "acme/reads", "messages": _asked("Which?", [RED])})
    assert told.status_code == 400
    assert "does not take images" in told.text
