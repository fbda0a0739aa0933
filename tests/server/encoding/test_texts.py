"""From requests to what a model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server.encoding import texts
from mlx_overlay_server.encoding.loaded import LoadedEncoder
from mlx_overlay_server.encoding.requests import EmbedRequest, RankRequest
from mlx_overlay_server.errors import InvalidRequest, PromptTooLong
from mlx_overlay_server.settings import Limits

from tests.server.encoding.encoding import LIMITS, load
from tests.support.encoders import CONTEXT, VOCABULARY, make_encoder, make_pairs_template

PROMPTS = {"query": "why do ", "none": ""}


@pytest.fixture(scope="module")
def embeds(tmp_path_factory: pytest.TempPathFactory) -> LoadedEncoder:
    folder = tmp_path_factory.mktemp("models") / "m"
    return load(make_encoder(folder, longest=8, prompts=PROMPTS, default_prompt="query"), "embedding").loaded


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> LoadedEncoder:
    folder = make_encoder(tmp_path_factory.mktemp("models") / "m", head="ForSequenceClassification")
    return load(folder, "reranker").loaded


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> LoadedEncoder:
    folder = make_encoder(tmp_path_factory.mktemp("models") / "Reranker", "qwen3", head="ForCausalLM", modes=None)
    return load(folder, "reranker").loaded


def _words(model: LoadedEncoder, tokens: tuple[int, ...]) -> str:
    return " ".join(VOCABULARY[token] for token in tokens)


def _embedded(model: LoadedEncoder, *given: Any, **options: Any) -> list[str]:
    read = texts.read(model, EmbedRequest("m", given, **options), LIMITS)
    assert all(passage.first == len(passage.tokens) for passage in read)
    return [_words(model, passage.tokens) for passage in read]


def test_a_prompt_goes_before_each_text_but_not_before_tokens(embeds: LoadedEncoder) -> None:
    assert embeds.context == 8
    assert _embedded(embeds, "cats purr", (4, 5)) == ["<s> why do cats purr </s>", "cats purr"]
    assert _embedded(embeds, "cats purr", prompt="none") == ["<s> cats purr </s>"]
    for prompt, given, field in (("other", "cats", "prompt"), ("query", (4,), "prompt")):
        with pytest.raises(InvalidRequest) as refused:
            _embedded(embeds, given, prompt=prompt)
        assert refused.value.field == field
    with pytest.raises(InvalidRequest, match="it has: none, query"):
        _embedded(embeds, "cats", prompt="other")


def test_a_text_that_is_too_long_is_refused_or_cut(embeds: LoadedEncoder) -> None:
    long = "cats purr and dogs bark why"
    with pytest.raises(PromptTooLong, match="entry 1 of the input is too long: 10 tokens > 8 maximum"):
        _embedded(embeds, "cats", long)
    assert _embedded(embeds, long, truncates=True) == ["<s> why do cats purr and dogs </s>"]
    with pytest.raises(PromptTooLong, match="9 tokens"):
        _embedded(embeds, (4,) * 9)
    assert _embedded(embeds, (4,) * 9, truncates=True) == ["cats " * 7 + "cats"]
    with pytest.raises(PromptTooLong, match="> 5 maximum"):
        texts.read(embeds, EmbedRequest("m", ("cats purr",)), Limits(prompt_tokens=5))


@pytest.mark.parametrize("given", [(len(VOCABULARY),), (-1,), "\ud800"])
def test_what_is_no_text_and_no_token_is_refused(embeds: LoadedEncoder, given: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        _embedded(embeds, given)
    assert refused.value.field == "texts"


def test_a_pair_is_query_and_document_and_the_document_is_cut(ranks: LoadedEncoder) -> None:
    long = "cats " * 200
    read = texts.read(ranks, RankRequest("m", "why", ("dogs bark", long)), LIMITS)
    assert _words(ranks, read[0].tokens) == "<s> why </s> dogs bark </s>"
    assert [passage.first for passage in read] == [3, 3]
    assert len(read[1].tokens) == CONTEXT
    shorter = texts.read(ranks, RankRequest("m", "why", (long,), max_tokens=2), LIMITS)
    assert _words(ranks, shorter[0].tokens) == "<s> why </s> cats cats </s>"
    with pytest.raises(PromptTooLong) as refused:
        texts.read(ranks, RankRequest("m", "why", (long,), truncates=False), LIMITS)
    assert refused.value.field == "documents"
    with pytest.raises(PromptTooLong, match="no room") as refused:
        texts.read(ranks, RankRequest("m", long, ("dogs",)), LIMITS)
    assert refused.value.field == "query"
    with pytest.raises(InvalidRequest, match="no instruction"):
        texts.read(ranks, RankRequest("m", "why", ("dogs",), instruction="find it"), LIMITS)


def test_a_dialogue_holds_all_of_its_end_when_the_document_is_cut(asks: LoadedEncoder) -> None:
    short, long = texts.read(asks, RankRequest("m", "why", ("dogs", "cats " * 3000), "a rain"), LIMITS)
    assert len(long.tokens) == asks.context == 2048
    assert "a rain" in _words(asks, short.tokens)
    assert short.tokens[-20:] == long.tokens[-20:]


@pytest.mark.parametrize("content", ['m["content"]', 'm["content"][0]["text"]'])
def test_a_template_for_pairs_gets_the_instruction_or_the_model_s_own_prompt(content: str, tmp_path: Path) -> None:
    prompts = {"web": "a rain"}
    folder = make_encoder(tmp_path / "m", "qwen3", head="ForCausalLM", modes=None, prompts=prompts)
    make_pairs_template(folder, f"{{{{ m.role[0] }}}} {{{{ {content} }}}} |", default_prompt="web")
    model = load(folder, "reranker").loaded
    for instruction, said in ((None, "a rain"), ("do falls", "do falls")):
        read = texts.read(model, RankRequest("m", "why", ("dogs", "cats " * 3000), instruction), LIMITS)
        assert _words(model, read[0].tokens) == f"s {said} | q why | d dogs |"
        assert len(read[1].tokens) == model.context
        assert _words(model, read[1].tokens).endswith("cats |")


def test_a_template_that_drops_pairs_is_not_used(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "m", "qwen3", head="ForCausalLM", modes=None, prompts={})
    make_pairs_template(folder, "{{ m.role }}")
    model = load(folder, "reranker").loaded
    assert "why" in _words(model, texts.read(model, RankRequest("m", "why", ("dogs",)), LIMITS)[0].tokens)
