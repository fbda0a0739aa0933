"""What OpenAI's SDK meets around its answers at a real server: models, routes, errors, keys, requests at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.models import make_model, make_random_model
from tests.support.processes import eventually
from tests.support.server import ChatAnswer, Server, joined, serving

PLAIN = "acme/plain"
HELLO = "Hello there."
MODELS = ["acme/deep/nested", PLAIN, "acme/random", "flat"]
KEY = "a-secret-key"
HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": PLAIN, "messages": HI}
TEXT: dict[str, Any] = {"model": PLAIN, "prompt": "hi"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "acme" / "plain", HELLO)
    make_model(folder / "acme" / "deep" / "nested", "Deep.")
    make_model(folder / "flat", "Flat.")
    make_random_model(folder / "acme" / "random", context=1_000_000)  # that many words take longer than any wait here
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), models, options=["--offline"]) as server:
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    """A server that takes one key, and was not told by a flag that it is offline."""
    home = tmp_path_factory.mktemp("home")
    with serving(home, models, environ={"MLX_OMNI_API_KEY": KEY}, api_key=KEY) as server:
        yield server
        assert KEY not in server.log()


ENTRY = ("id", "object", "created", "owned_by", "kind", "context_length", "max_model_len")


# Models --------------------------------------------------------------------------------------------------------


def test_models_are_listed_by_id_in_openais_format(server: Server) -> None:
    listed = server.openai.models.list().data
    assert [model.id for model in listed] == MODELS
    assert {model.object for model in listed} == {"model"}
    assert all(0 < model.created <= time.time() for model in listed)
    answer = server.http.get("/v1/models").json()
    assert answer.keys() == {"object", "data"}
    assert answer["object"] == "list"
    assert [sorted(entry) for entry in answer["data"]] == [sorted(ENTRY)] * 4


@pytest.mark.parametrize("model", ["acme/deep/nested", PLAIN, "flat"])
def test_a_model_is_found_by_its_id_with_slashes(server: Server, model: str) -> None:
    assert server.http.get(f"/v1/models/{model}").json()["id"] == model
    assert server.openai.models.retrieve(model).id == model


def test_every_listed_model_answers(server: Server) -> None:
    said = {
        model.id: server.chat(model.id, "hi").choices[0].message.content
        for model in server.openai.models.list()
        if model.id != "acme/random"
    }
    assert said == {"acme/deep/nested": "Deep.", PLAIN: HELLO, "flat": "Flat."}


def test_a_model_that_is_new_in_the_folder_is_listed_and_answers(server: Server, models: Path) -> None:
    folder = make_model(models.parent / "aside" / "new", "New.")
    late = models / "late"
    folder.rename(late)
    try:
        assert "late" in [model.id for model in server.openai.models.list()]
        assert server.chat("late", "hi").choices[0].message.content == "New."
    finally:
        late.rename(folder)
    assert "late" not in [model.id for model in server.openai.models.list()]


@pytest.mark.parametrize("model", ["acme/none", "none", "acme/plain/more"])
def test_an_unknown_model_is_not_found(server: Server, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        server.openai.models.retrieve(model)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    asks: list[Any] = [server.chat, server.chat_stream, server.complete, server.complete_stream]
    for ask in asks:
        with pytest.raises(openai.NotFoundError) as refused:
            ask(model, "hi")
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert refused.value.type == "invalid_request_error"
        assert model in refused.value.message


def test_an_unknown_model_is_not_found_where_the_environment_says_offline(locked: Server) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        locked.chat("acme/none", "hi")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("model", ["", "../flat", "/etc/passwd", "acme/../flat", "acme//plain", "a\x00b", "é" * 500])
def test_an_id_that_no_model_can_have_is_refused(server: Server, model: str) -> None:
    answer = server.http.post("/v1/chat/completions", json={"model": model, "messages": HI})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == "model"


# Routes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/v1", ""])
def test_every_route_is_there_with_and_without_v1(server: Server, root: str) -> None:
    post, get = server.http.post, server.http.get
    assert post(f"{root}/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"] == HELLO
    assert post(f"{root}/completions", json=TEXT).json()["choices"][0]["text"] == HELLO
    assert len(get(f"{root}/models").json()["data"]) == 4
    assert get(f"{root}/models/{PLAIN}").json()["id"] == PLAIN
    assert get(f"{root}/health").json()["status"] == "ready"
    assert get(f"{root}/metrics").status_code == 200


def test_the_sdk_needs_no_v1_in_its_base_url(server: Server) -> None:
    client = server.openai.with_options(base_url=server.url)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == HELLO


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("PUT", "/v1/chat/completions", 405), ("POST", "/v1/models", 405)],
)
def test_what_is_no_route_is_told_in_openais_shape(server: Server, method: str, path: str, status: int) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


# Who may ask ---------------------------------------------------------------------------------------------------


def test_with_the_key_everything_is_answered(locked: Server) -> None:
    assert locked.chat(PLAIN, "hi").choices[0].message.content == HELLO
    assert [model.id for model in locked.openai.models.list()] == MODELS


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], f"{KEY}x", "é"])
def test_a_wrong_key_is_refused(locked: Server, key: str) -> None:
    answer = locked.http.get("/v1/models", headers={b"Authorization": f"Bearer {key}".encode()})
    assert answer.status_code == 401
    if key.isascii():
        with pytest.raises(openai.AuthenticationError) as refused:
            locked.openai.with_options(api_key=key).chat.completions.create(**CHAT)
        assert (refused.value.code, refused.value.type) == ("invalid_api_key", "authentication_error")
        assert key not in refused.value.message


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/manage/v1/status", "/v1/nothing"])
def test_without_a_key_only_the_health_is_told(locked: Server, path: str) -> None:
    assert locked.http.get(path).status_code == 401
    assert locked.http.get("/health").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_foreign_host_is_refused(server: Server, host: str) -> None:
    answer = server.http.post("/v1/chat/completions", json=CHAT, headers={"Host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "foreign_host"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil", "http://127.0.0.1:1"])
def test_a_foreign_page_is_refused(server: Server, origin: str) -> None:
    client = server.openai.with_options(default_headers={"Origin": origin})
    with pytest.raises(openai.PermissionDeniedError) as refused:
        client.chat.completions.create(**CHAT)
    assert (refused.value.code, refused.value.type) == ("foreign_origin", "permission_error")


def test_the_servers_own_names_and_pages_are_not_foreign(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200
    assert server.http.get("/v1/models", headers={"Origin": server.url}).status_code == 200


# Asynchronously ------------------------------------------------------------------------------------------------


def test_the_async_client_is_answered_streamed_and_not(server: Server) -> None:
    async def ask() -> None:
        async with server.async_openai() as client:
            completion = await client.chat.completions.create(**CHAT)
            assert completion.choices[0].message.content == HELLO
            stream = await client.chat.completions.create(**CHAT, stream=True)
            assert joined([chunk async for chunk in stream]) == [ChatAnswer(HELLO, finish="stop")]
            assert (await client.completions.create(**TEXT)).choices[0].text == HELLO
            assert [model.id async for model in client.models.list()] == MODELS
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("none")

    asyncio.run(ask())


def test_many_requests_at_once_get_each_its_own_answer(server: Server) -> None:
    alone = [
        server.chat("acme/random", f"hi {number}", max_tokens=20).choices[0].message.content for number in range(8)
    ]

    async def ask() -> list[str | None]:
        async with server.async_openai() as client:

            async def one(number: int) -> str | None:
                messages: Any = [{"role": "user", "content": f"hi {number % 8}"}]
                completion = await client.chat.completions.create(model="acme/random", messages=messages, max_tokens=20)
                return completion.choices[0].message.content

            return await asyncio.gather(*map(one, range(40)))

    assert asyncio.run(ask()) == alone * 5


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    async def leave() -> None:
        async with server.async_openai() as client:
            stream = await client.chat.completions.create(model="acme/random", messages=HI, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()

    asyncio.run(leave())
    assert server.chat(PLAIN, "hi").choices[0].message.content == HELLO
    eventually(lambda: _active(server) == 0, "no sequence is left")


def _active(server: Server) -> int:
    engine = server.http.get("/health").json()["engine"]
    return int(engine["active"] + engine["waiting"])
