"""Embeddings and ranking at a real server, by OpenAI's SDK and as other clients ask."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.support.encoders import VOCABULARY, make_encoder
from tests.support.models import make_model
from tests.support.server import Server, serving

EMBED, RERANK, JUDGE, CHAT = "acme/embed", "acme/rerank", "acme/Qwen3-Reranker", "acme/chat"
PROMPTS = {"query": "why do ", "document": ""}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("models")
    make_encoder(top / "models" / EMBED, longest=20, prompts=PROMPTS)
    make_encoder(top / "models" / RERANK, "xlm-roberta", head="ForSequenceClassification")
    make_encoder(top / "models" / JUDGE, "qwen3", head="ForCausalLM", modes=None)
    make_encoder(top / "models/acme/nli", head="ForSequenceClassification", labels=3)
    make_model(top / "models" / CHAT, "Hello.")
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


def _vectors(server: Server, given: Any, **options: Any) -> Any:
    # The SDK asks for base64 and turns it into numbers, which its own types do not have.
    made = server.unchecked_openai.embeddings.create(model=EMBED, input=given, **options)
    assert [each.index for each in made.data] == list(range(len(made.data)))
    return np.array([each.embedding for each in made.data], dtype=np.float32)


def _rank(server: Server, path: str = "/v1/rerank", **body: Any) -> dict[str, Any]:
    answer = server.http.post(path, json={"model": RERANK, "query": "why do cats purr", **body})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def _refused(server: Server, path: str, **body: Any) -> Any:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    return answer.json()


def test_models_are_listed_with_their_kind(server: Server) -> None:
    listed = server.http.get("/v1/models").json()["data"]
    kinds = {each["id"]: each["kind"] for each in listed}
    assert kinds == {EMBED: "embedding", RERANK: "reranker", JUDGE: "reranker", CHAT: "text"}
    anthropic = server.http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert [each["id"] for each in anthropic["data"]] == [CHAT]


def test_a_text_has_one_vector_in_every_form_of_the_request(server: Server) -> None:
    one = _vectors(server, "cats purr")
    assert one.shape == (1, 32)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(_vectors(server, ["cats purr"], encoding_format="float"), one)
    tokens = [VOCABULARY.index(token) for token in ("<s>", "cats", "purr", "</s>")]
    for given in (tokens, [tokens]):
        np.testing.assert_allclose(_vectors(server, given), one, atol=1e-6)
    asked = _vectors(server, "cats purr", extra_body={"prompt_name": "query"})
    np.testing.assert_allclose(asked, _vectors(server, "why do cats purr"), atol=1e-6)
    assert not np.allclose(asked, one)


def test_what_goes_over_the_wire(server: Server) -> None:
    body = {"model": EMBED, "input": ["cats", "dogs bark"], "user": "me", "encoding_format": "base64"}
    answer = server.http.post("/embeddings", json=body)
    told = answer.json()
    assert (told["object"], told["model"]) == ("list", EMBED)
    assert told["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    numbers = np.frombuffer(base64.b64decode(told["data"][1]["embedding"]), dtype="<f4")
    floats = server.http.post("/v1/embeddings", json={**body, "encoding_format": "float"}).json()["data"][1][
        "embedding"
    ]
    np.testing.assert_array_equal(numbers, np.array(floats, dtype=np.float32))


def test_vectors_are_cut_to_dimensions_at_unit_length(server: Server) -> None:
    whole, cut = _vectors(server, ["cats", "dogs"]), _vectors(server, ["cats", "dogs"], dimensions=8)
    assert cut.shape == (2, 8)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    refused = _refused(server, "/v1/embeddings", model=EMBED, input="cats", dimensions=33)
    assert refused["error"]["param"] == "dimensions"
    assert "32 numbers" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": ["cats", ""]}, "input", "entry 1"),
        ({"input": []}, "input", ""),
        ({"input": ["cats"] * 2049}, "input", "more than 2048"),
        ({"input": "cats " * 30}, "input", "32 tokens > 20 maximum"),
        ({"input": [[1, 10_000]]}, "input", "numbers from 0"),
        ({"input": "cats", "prompt_name": "other"}, "prompt_name", "document, query"),
        ({"input": "cats", "encoding_format": "int8"}, "encoding_format", ""),
        ({"input": "cats", "late_chunking": True}, "late_chunking", "not supported"),
    ],
)
def test_what_is_refused_by_name(body: dict[str, Any], param: str, text: str, server: Server) -> None:
    error = _refused(server, "/v1/embeddings", model=EMBED, **body)["error"]
    assert error["param"].startswith(param)
    assert text in error["message"]


def test_a_text_that_is_too_long_is_cut_when_that_is_asked_for(server: Server) -> None:
    long = "cats " * 30
    cut = _vectors(server, [long], extra_body={"truncate": True})
    np.testing.assert_allclose(cut, _vectors(server, ["cats " * 18]), atol=1e-6)
    with pytest.raises(openai.BadRequestError) as refused:
        _vectors(server, [long])
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/chat/completions", {"model": EMBED, "messages": [{"role": "user", "content": "Hi"}]}, "/v1/embeddings"),
        ("/v1/completions", {"model": RERANK, "prompt": "Hi"}, "/v1/rerank"),
        ("/v1/responses", {"model": EMBED, "input": "Hi"}, "/v1/embeddings"),
        ("/v1/messages", {"model": EMBED, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}, "/v1/emb"),
        ("/v1/embeddings", {"model": CHAT, "input": "Hi"}, "/v1/chat/completions"),
        ("/v1/embeddings", {"model": RERANK, "input": "Hi"}, "/v1/rerank"),
        ("/v2/rerank", {"model": EMBED, "query": "Hi", "documents": ["Hi"]}, "/v1/embeddings"),
    ],
)
def test_a_model_is_not_loaded_for_what_it_does_not_do(
    path: str, body: dict[str, Any], place: str, server: Server
) -> None:
    before = server.http.get("/health").json()["loaded"]
    refused = _refused(server, path, **body)
    assert place in json.dumps(refused)
    assert set(server.http.get("/health").json()["loaded"]) <= set(before)


def test_a_model_with_several_classes_is_left_out_and_the_log_says_why(server: Server) -> None:
    answer = server.http.post("/v1/rerank", json={"model": "acme/nli", "query": "a", "documents": ["a"]})
    assert answer.status_code == 404
    assert "sorts texts into 3 classes" in server.log()


@pytest.mark.parametrize("model", [RERANK, JUDGE])
def test_documents_are_ranked(model: str, server: Server) -> None:
    documents = ["dogs bark", "the rain falls", {"text": "cats purr"}, "a cats a dogs"]
    told = _rank(server, model=model, documents=documents, return_documents=True)
    scores = [each["relevance_score"] for each in told["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert sorted(each["index"] for each in told["results"]) == [0, 1, 2, 3]
    for each in told["results"]:
        document = documents[each["index"]]
        assert each["document"] == (document if isinstance(document, dict) else {"text": document})
        (alone,) = _rank(server, model=model, documents=[document])["results"]
        assert alone["relevance_score"] == pytest.approx(each["relevance_score"], abs=1e-5)
    best = _rank(server, "/v2/rerank", model=model, documents=documents, top_n=2)
    assert [each["index"] for each in best["results"]] == [each["index"] for each in told["results"][:2]]
    assert all(each.keys() == {"index", "relevance_score"} for each in best["results"])
    assert best["usage"]["total_tokens"] == told["usage"]["total_tokens"] == best["meta"]["tokens"]["input_tokens"] > 0


def test_jinas_clients_get_the_documents_unless_they_do_not_want_them(server: Server) -> None:
    assert _rank(server, documents=["cats"])["results"][0]["document"] == {"text": "cats"}
    assert "document" not in _rank(server, "/rerank", documents=["cats"], return_documents=False)["results"][0]


def test_an_instruction_is_for_models_that_take_one(server: Server) -> None:
    plain = _rank(server, model=JUDGE, documents=["cats"])["results"][0]["relevance_score"]
    told = _rank(server, model=JUDGE, documents=["cats"], instruction="find dogs")["results"][0]["relevance_score"]
    assert told != plain
    refused = _refused(server, "/v1/rerank", model=RERANK, query="a", documents=["a"], instruction="find dogs")
    assert "takes no instruction" in refused["message"]
    assert refused["detail"] == refused["message"]


def test_a_long_document_is_cut_and_a_long_query_is_not(server: Server) -> None:
    long = "cats " * 300
    assert _rank(server, documents=[long, "dogs"], max_tokens_per_doc=5)["usage"]["total_tokens"] < 40
    assert _rank(server, documents=[long])["results"]
    for body in ({"documents": [long], "truncate": False, "query": "a"}, {"documents": ["a"], "query": long}):
        assert _refused(server, "/v1/rerank", model=RERANK, **body)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [{}, {"documents": []}, {"documents": [{"txt": "a"}]}, {"documents": ["a"], "rank_fields": ["a"]}]
)
def test_what_is_no_ranking_request_is_refused(body: dict[str, Any], server: Server) -> None:
    assert "`" in _refused(server, "/v1/rerank", model=RERANK, query="a", **body)["message"]


def test_many_requests_at_once_beside_a_chat(server: Server) -> None:
    texts = [" ".join(["cats", "purr", "rain", "falls"][: 1 + at % 4]) for at in range(40)]
    expected = _vectors(server, texts)

    async def ask() -> None:
        async with server.async_openai() as checked:
            client = checked.with_options(_extra_kwargs={"_strict_response_validation": False})
            many = [client.embeddings.create(model=EMBED, input=texts[at:]) for at in range(20)]
            chats = [
                client.chat.completions.create(model=CHAT, messages=[{"role": "user", "content": "Hi"}])
                for _ in range(5)
            ]
            made = await asyncio.gather(*many)
            for at, each in enumerate(made):
                rows = np.array([one.embedding for one in each.data], dtype=np.float32)
                np.testing.assert_allclose(rows, expected[at:], atol=1e-5)
            assert {each.choices[0].message.content for each in await asyncio.gather(*chats)} == {"Hello."}

    asyncio.run(ask())
    health = server.http.get("/health").json()
    assert {EMBED, CHAT} <= set(health["loaded"])
    assert (health["engine"]["active"], health["engine"]["failures"]) == (0, 0)
    assert "mlx_omni_texts_total" in server.http.get("/metrics").text


def test_requests_as_open_webui_sends_them(server: Server) -> None:
    """Batches of texts with a Bearer key and headers about the user; its external reranker wants `results`."""
    headers = {"Authorization": "Bearer none", "X-OpenWebUI-User-Name": "me"}
    answer = server.http.post("/v1/embeddings", json={"input": ["cats", "dogs"], "model": EMBED}, headers=headers)
    assert [len(each["embedding"]) for each in answer.json()["data"]] == [32, 32]
    body = {"model": RERANK, "query": "cats", "documents": ["cats", "dogs"], "top_n": 2}
    ranked = server.http.post("/v1/rerank", json=body, headers=headers).json()["results"]
    assert sorted(each["index"] for each in ranked) == [0, 1]
