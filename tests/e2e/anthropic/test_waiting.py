"""What a client of the Messages API sees while it waits."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest

from tests.e2e.anthropic.asking import HELLO, HI, PLAIN, events_of
from tests.support.dialects import anthropic_sdk
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model
from tests.support.server import Server, serving

SLOW, SLOWER = "acme/slow", "acme/slower"


@pytest.fixture(scope="module")
def downloading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, LoopbackHub]]:
    """A server that has nothing yet, and the Hub from which it gets a model as fast as the test wants."""
    top = tmp_path_factory.mktemp("downloading")
    with LoopbackHub() as hub:
        for name in (SLOW, SLOWER):
            hub.add_repo(name, make_model(top / name, HELLO))
        environ = hub.environment(top / "home", HF_HUB_OFFLINE="0")
        own = {name: value for name, value in environ.items() if name.startswith(("HF_", "NO_PROXY"))}
        with serving(top / "home", environ=own) as server:
            yield server, hub


def test_pings_come_while_a_model_is_on_its_way(downloading: tuple[Server, LoopbackHub]) -> None:
    server, hub = downloading
    hub.hang(60)
    body = {"model": SLOWER, "messages": HI, "max_tokens": 100, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(": ")
        assert [next(lines), next(lines)] == ["event: ping", 'data: {"type":"ping"}']
        hub.heal()
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    names = names[names.index("message_start") :]
    assert (names[1:3], names[-1]) == (["ping", "content_block_start"], "message_stop")


def test_the_sdk_waits_through_pings(downloading: tuple[Server, LoopbackHub]) -> None:
    with anthropic_sdk(downloading[0]) as sdk, sdk.messages.stream(model=SLOW, messages=HI, max_tokens=100) as stream:
        assert stream.get_final_text() == HELLO


def test_an_error_after_pings_is_an_event_that_the_sdk_raises(downloading: tuple[Server, LoopbackHub]) -> None:
    server, hub = downloading
    hub.hang(60)
    body = {"model": "acme/nowhere", "messages": HI, "max_tokens": 100, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as answer:
        lines = answer.iter_lines()
        assert "event: ping" in (next(lines), next(lines))
        hub.heal()
        names = [line for line in lines if line.startswith("event: ")]
    assert names[-1] == "event: error"
    with anthropic_sdk(server) as sdk:
        hub.hang(2)  # twice as long as a stream waits before it begins
        with pytest.raises(anthropic.APIStatusError, match="acme/nowhere") as refused:
            events_of(sdk, "acme/nowhere")
    assert refused.value.type == "not_found_error"


def test_an_assistant_message_at_the_end_is_the_beginning_of_the_answer(server: Server) -> None:
    """Nothing comes between it and the answer: no end of a turn, no beginning of another."""
    question = {"role": "user", "content": "Hi"}
    sizes = [
        server.http.post("/v1/messages/count_tokens", json={"model": PLAIN, "messages": messages}).json()
        for messages in ([question], [question, {"role": "assistant", "content": "It is"}])
    ]
    assert sizes[1]["input_tokens"] - sizes[0]["input_tokens"] == len("It is"), "a byte is a token of this model"
