"""Log probabilities of prompts, asked by OpenAI's SDK of a real server, beside what the model itself computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.models import make_model, make_random_model
from tests.support.server import Server, serving
from tests.support.tokens import BOS_ID, word_vocabulary

RANDOM, PLAIN = "acme/random", "acme/plain"
WORDS = {token.replace("Ġ", " "): id_ for token, id_ in word_vocabulary(512).items()}
NAMES = {id_: token for token, id_ in WORDS.items()}
PROMPT = "bake bami bobu bake "
IDS = [BOS_ID, *(WORDS[word + " "] for word in PROMPT.split())]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("scores")
    make_random_model(top / "models" / "acme" / "random")
    make_model(top / "models" / "acme" / "plain", "Hello there.")
    return top / "models"


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    with serving(models.parent / "home", models, options=["--offline"]) as server:
        yield server


@pytest.fixture(scope="module")
def table(models: Path) -> list[list[float]]:
    """Log probabilities of the vocabulary after each token of the prompt, by mlx-lm alone."""
    import mlx.core as mx
    from mlx_lm import load

    model = load(str(models / "acme" / "random"))[0]
    logits = model(mx.array([IDS]))[0].astype(mx.float32)
    found: Any = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()
    return list(found)


def _echoed(server: Server, prompt: Any, *, stream: bool = False, **options: Any) -> Any:
    """The only choice of an answer, or of the chunks of one put together."""
    options = {"echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 1} | options
    client = server.unchecked_openai  # the first token has no log probability, which the SDK's type does not admit
    made: Any = client.completions.create(model=RANDOM, prompt=prompt, stream=stream, **options)
    if not stream:
        return made.choices[0]
    chunks = [chunk.choices[0] for chunk in made]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole.text += chunk.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if chunk.logprobs else ():
            getattr(whole.logprobs, name).extend(getattr(chunk.logprobs, name))
    return whole


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_the_log_probabilities_that_the_model_computes(
    server: Server, table: list[list[float]], stream: bool
) -> None:
    choice = _echoed(server, PROMPT, stream=stream)
    told = choice.logprobs
    expected = [table[at - 1][IDS[at]] for at in range(1, len(IDS))]
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert told.token_logprobs[1 : len(IDS)] == pytest.approx(expected, abs=1e-3)
    for at in range(1, len(IDS)):
        likeliest = sorted(range(len(table[0])), key=lambda id_: -table[at - 1][id_])[:2]
        assert list(told.top_logprobs[at].values()) == pytest.approx([table[at - 1][i] for i in likeliest], abs=1e-3)
    assert len(told.tokens) == len(IDS) + 1  # and the one of the answer
    assert choice.text.startswith(PROMPT)
    for token, offset in list(zip(told.tokens, told.text_offset, strict=True))[1:]:
        assert choice.text[offset : offset + len(token)] == token
    assert told.text_offset[:2] == [0, 0]  # the mark that the tokenizer has added has no place in the text


def test_a_prompt_of_tokens_is_scored_token_by_token_and_without_an_answer(
    server: Server, table: list[list[float]]
) -> None:
    choice = _echoed(server, IDS, max_tokens=0, logprobs=0)
    assert len(choice.logprobs.tokens) == len(IDS)
    assert sum(choice.logprobs.token_logprobs[1:]) == pytest.approx(
        sum(table[at - 1][IDS[at]] for at in range(1, len(IDS))), abs=1e-2
    )
    assert choice.finish_reason == "length"


def test_no_tokens_are_counted_of_an_answer_that_is_not_wanted(server: Server) -> None:
    made = server.complete(RANDOM, PROMPT, echo=True, max_tokens=0)
    assert (made.choices[0].text, made.choices[0].finish_reason) == (PROMPT, "length")
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(IDS), 0)


def test_long_prompts_are_scored_to_their_ends_also_when_they_are_known(server: Server) -> None:
    prompt = PROMPT * 150
    server.complete(RANDOM, prompt, max_tokens=1)
    told = _echoed(server, prompt, max_tokens=0, logprobs=0).logprobs
    assert len(told.token_logprobs) == 1 + 4 * 150
    assert all(isinstance(each, float) for each in told.token_logprobs[1:])


def test_prompt_logprobs_name_each_token_with_its_rank(server: Server, table: list[list[float]]) -> None:
    extra = {"prompt_logprobs": 1}
    choice: Any = server.complete(RANDOM, PROMPT, max_tokens=1, logprobs=0, extra_body=extra).choices[0]
    first, *others = choice.prompt_logprobs
    assert first is None
    for at, here in enumerate(others, 1):
        row = table[at - 1]
        own, best = here[str(IDS[at])], max(range(len(row)), key=row.__getitem__)
        assert own["logprob"] == pytest.approx(row[IDS[at]], abs=1e-3)
        assert own["rank"] == 1 + sum(each > row[IDS[at]] for each in row)
        assert own["decoded_token"] == NAMES[IDS[at]]
        assert here.keys() == {str(IDS[at]), str(best)}
        assert here[str(best)]["rank"] == 1
    assert len(choice.logprobs.tokens) == 1  # of the answer alone


def test_a_conversation_has_prompt_logprobs_too(server: Server) -> None:
    made: Any = server.chat(PLAIN, "So?", extra_body={"prompt_logprobs": 0})
    assert made.choices[0].message.content == "Hello there."
    assert len(made.prompt_logprobs) == made.usage.prompt_tokens
    assert all(len(each) == 1 for each in made.prompt_logprobs[1:])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"prompt": PROMPT * 900, "echo": True, "logprobs": 20, "n": 2}, "prompt"),
    ],
)
def test_what_has_no_answer_is_refused_by_its_name(server: Server, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.openai.completions.create(**{"model": RANDOM, "prompt": PROMPT, **options})
    assert refused.value.param == param
