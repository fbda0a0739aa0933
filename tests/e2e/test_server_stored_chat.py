"""Chat completions that a real server stores because OpenAI's SDK asks it to, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.resources.chat.completions import Completions

from tests.support.models import make_model
from tests.support.server import Server, serving

HELLO = "acme/hello"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("stored")
    make_model(top / "models" / "acme" / "hello", "Hello there.")
    make_model(top / "models" / "acme" / "other", "Good bye.")
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


@pytest.fixture
def stored(server: Server) -> Completions:
    return server.openai.chat.completions


def _ask(stored: Completions, text: Any = "Hi", *, model: str = HELLO, **options: Any) -> Any:
    return stored.create(model=model, messages=[{"role": "user", "content": text}], **{"store": True, **options})


def test_a_stored_completion_is_found_again(stored: Completions) -> None:
    made = _ask(stored, metadata={"topic": "greeting"}, n=2)
    again = stored.retrieve(made.id)
    assert again.metadata == {"topic": "greeting"}
    assert [choice.message.content for choice in again.choices] == ["Hello there."] * 2
    assert (again.id, again.usage) == (made.id, made.usage)


def test_a_streamed_completion_is_stored_before_its_end_is_sent(stored: Completions) -> None:
    with _ask(stored, stream=True, n=2) as chunks:
        for chunk in chunks:
            last = chunk
            if all(choice.finish_reason for choice in chunk.choices) and chunk.choices[0].index == 1:
                break
        again = stored.retrieve(last.id)
    assert [choice.message.content for choice in again.choices] == ["Hello there."] * 2


@pytest.mark.parametrize("options", [{"store": False}, {"store": None}])
def test_what_is_not_to_be_stored_is_not(stored: Completions, options: Any) -> None:
    made = _ask(stored, **options)
    with pytest.raises(openai.NotFoundError) as missing:
        stored.retrieve(made.id)
    assert missing.value.code == "chat_completion_not_found"


def test_stored_completions_are_listed_by_model_and_metadata(stored: Completions) -> None:
    first, second = (_ask(stored, metadata={"run": "a", "at": str(at)}).id for at in range(2))
    other = _ask(stored, model="acme/other", metadata={"run": "a"}).id
    assert [each.id for each in stored.list(metadata={"run": "a"})] == [first, second, other]
    assert [each.id for each in stored.list(metadata={"run": "a"}, model=HELLO, order="desc")] == [second, first]
    assert [each.id for each in stored.list(metadata={"run": "a", "at": "1"})] == [second]
    assert [each.id for each in stored.list(metadata={"run": "a"}, limit=1)] == [first, second, other]
    assert [each.id for each in stored.list(metadata={"run": "a"}, after=first).data] == [second, other]


def test_the_messages_of_a_stored_completion_are_listed(server: Server, stored: Completions) -> None:
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": " now?"}]
    id_ = _ask(stored, parts).id
    told = server.http.get(f"/v1/chat/completions/{id_}/messages").json()  # the SDK's type has answers alone
    (message,) = told["data"]
    assert (message["role"], message["content"], message["content_parts"]) == ("user", None, parts)
    plain = server.http.get(f"/v1/chat/completions/{_ask(stored).id}/messages").json()["data"][0]
    assert (plain["content"], plain["content_parts"]) == ("Hi", None)


def test_metadata_is_changed_and_a_completion_is_forgotten(stored: Completions) -> None:
    id_ = _ask(stored, metadata={"a": "b"}).id
    assert stored.update(id_, metadata={"c": "d"}).metadata == {"c": "d"}
    assert stored.retrieve(id_).metadata == {"c": "d"}
    assert stored.delete(id_).deleted is True
    for ask in (stored.retrieve, stored.delete):
        with pytest.raises(openai.NotFoundError):
            ask(id_)
