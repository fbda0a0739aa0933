"""Log probabilities of tokens, in the three shapes that OpenAI's clients know."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from typing_extensions import TypedDict

from mlx_overlay_server.chat.events import Event, Logprobs, PromptLogprobs, PromptToken, TokenLogprob


class TokenEntry(TypedDict):
    """A token with its log probability; `bytes` are its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class SampledTokenEntry(TokenEntry):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TokenEntry]


class ChatLogprobs(TypedDict):
    """Log probabilities of a message's tokens."""

    content: list[SampledTokenEntry]
    refusal: None


class TextLogprobs(TypedDict):
    """Log probabilities of plain text: four lists of one length; offsets count characters.

    The first token of an echoed prompt, before which there is nothing, has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """A token in one place of the prompt, as vLLM has it; `rank` is its place among all, the likeliest being 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobList = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt: the token itself and the likeliest ones in its place, by their ids; null for the first.
"""


def logprob_entries(tokens: Iterable[TokenLogprob]) -> list[SampledTokenEntry]:
    """Return tokens with their log probabilities, as chat completions and Responses have them."""
    return [
        {
            **_entry(each.token, each.data, each.logprob),
            "top_logprobs": [_entry(token, data, logprob) for token, data, logprob in each.top],
        }
        for each in tokens
    ]


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> ChatLogprobs:
    """Return tokens with their log probabilities, as a choice has them."""
    return {"content": logprob_entries(tokens), "refusal": None}


def tokens_of(events: Iterable[Event]) -> list[TokenLogprob]:
    """Return the tokens whose log probabilities were asked for."""
    return [token for event in events if isinstance(event, Logprobs) for token in event.tokens]


def prompt_tokens_of(events: Iterable[Event]) -> Sequence[PromptToken]:
    """Return the tokens of the prompt, where their log probabilities were asked for."""
    return next((event.tokens for event in events if isinstance(event, PromptLogprobs)), ())


def prompt_logprobs(tokens: Iterable[PromptToken], count: int) -> PromptLogprobList:
    """Return the tokens of a prompt, each with the `count` likeliest ones in its place, as vLLM has them."""
    made: PromptLogprobList = []
    for each in tokens:
        if each.logprob is None:
            made.append(None)
            continue
        here: dict[str, PromptLogprob] = {
            str(id_): {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}
            for rank, (id_, text, logprob) in enumerate(each.top[:count], 1)
        }
        here[str(each.id)] = {"logprob": _finite(each.logprob), "rank": each.rank, "decoded_token": each.token}
        made.append(here)
    return made


def no_logprobs() -> TextLogprobs:
    """Return the log probabilities of no token."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class TextLogprobEncoder:
    """Encodes the tokens of one continuation piece by piece, and counts how far into the text they are."""

    def __init__(self, count: int, *, has_echo: bool) -> None:
        """`count`: alternatives to each token; `has_echo`: whether the text begins with the prompt."""
        self._count = count
        self._has_echo = has_echo
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        """Tokens may end inside a character, which counts once."""

    def encode(self, events: Sequence[Event]) -> TextLogprobs | None:
        """Return the tokens in the next events; None where there are none."""
        shape = no_logprobs()
        for prompt in prompt_tokens_of(events) if self._has_echo else ():
            top = None if prompt.logprob is None else {text: logprob for _, text, logprob in prompt.top[: self._count]}
            self._add(shape, prompt.token, prompt.data, prompt.logprob, top)
        for each in tokens_of(events):
            self._add(shape, each.token, each.data, each.logprob, {text: logprob for text, _, logprob in each.top})
        return shape if shape["tokens"] else None

    def _add(
        self, shape: TextLogprobs, token: str, data: bytes, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        shape["tokens"].append(token)
        shape["token_logprobs"].append(None if logprob is None else _finite(logprob))
        shape["top_logprobs"].append(None if top is None else {text: _finite(value) for text, value in top.items()})
        shape["text_offset"].append(self._offset)
        self._offset += len(self._decoder.decode(data))


def _entry(token: str, data: bytes, logprob: float) -> TokenEntry:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI sends -9999 for it."""
    return max(-9999.0, logprob)
