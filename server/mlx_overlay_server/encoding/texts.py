"""From requests to what a model reads: prompts before texts, pairs, tokens, and what is too long. No MLX, no HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_overlay_server.chat.prompt import check_unicode
from mlx_overlay_server.encoding.loaded import LoadedEncoder, Passage
from mlx_overlay_server.encoding.requests import EmbedRequest, EncodeRequest, RankRequest
from mlx_overlay_server.errors import Field, InvalidRequest, PromptTooLong
from mlx_overlay_server.settings import Limits

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""The dialogue that Qwen3-Reranker was trained with, around the query and the document."""
_QUERY, _DOCUMENT = "\ue000query\ue000", "\ue000document\ue000"
"""Stand for the two in what a template makes, in characters that no template has."""


def read(model: LoadedEncoder, request: EncodeRequest, limits: Limits) -> list[Passage]:
    """Return what the model reads for each text or document of a request, in their order. Raises InvalidRequest."""
    known = (limits.prompt_tokens, model.context)
    limit = min((each for each in known if each is not None), default=None)
    if isinstance(request, EmbedRequest):
        return _embedded(model, request, limit)
    for text in (request.query, request.instruction or ""):
        check_unicode(text, "query")
    for text in request.documents:
        check_unicode(text, "documents")
    if model.way == "pair":
        return _pairs(model, request, limit)
    head, asked, after = _framed(model, request) if model.way == "template" else _asked(request)
    return _dialogues(model, request, limit, head, asked, after)


def _embedded(model: LoadedEncoder, request: EmbedRequest, limit: int | None) -> list[Passage]:
    prompt = _prompt(model, request)
    given = [text for text in request.texts if isinstance(text, str)]
    for text in given:
        check_unicode(text, "texts")
    whole = [prompt + (text.lower() if model.lowers else text) for text in given]
    cut = limit if request.truncates else None
    made = iter(_tokens(model, whole, limit=cut, marks=True))
    found = [next(made) if isinstance(text, str) else _given(model, text, cut) for text in request.texts]
    _check_lengths(map(len, found), limit, "texts")
    return [Passage(tuple(tokens), len(tokens)) for tokens in found]


def _prompt(model: LoadedEncoder, request: EmbedRequest) -> str:
    """Return the text that goes before each text."""
    name = request.prompt if request.prompt is not None else model.default_prompt
    if name is None:
        return ""
    if name not in model.prompts:
        known = ", ".join(sorted(model.prompts)) or "none"
        raise InvalidRequest(f"{request.model} has no prompt {name!r}; it has: {known}", field="prompt")
    if request.prompt is not None and not all(isinstance(text, str) for text in request.texts):
        raise InvalidRequest("a prompt goes before texts, not before tokens", field="prompt")
    return model.prompts[name]


def _given(model: LoadedEncoder, tokens: Sequence[int], limit: int | None) -> Sequence[int]:
    if any(not 0 <= token < model.vocab_size for token in tokens):
        raise InvalidRequest(f"tokens are numbers from 0 to {model.vocab_size - 1}", field="texts")
    return tokens[:limit]


def _pairs(model: LoadedEncoder, request: RankRequest, limit: int | None) -> list[Passage]:
    if request.instruction is not None:
        raise InvalidRequest(f"{request.model} takes no instruction", field="instruction")
    query = _tokens(model, [request.query], marks=False)[0]
    marks = model.tokenizer.num_special_tokens_to_add(pair=True)
    _check_query(len(query) + marks, limit)
    documents = _cut(model, request)
    encoded = model.tokenizer(
        [request.query] * len(documents),
        documents,
        truncation="only_second" if request.truncates and limit is not None else False,
        max_length=limit if request.truncates else None,
        return_attention_mask=False,
    )
    found: list[list[int]] = encoded["input_ids"]
    # Whether a model tells the two texts of a pair apart is in its tokenizer's configuration.
    types: list[list[int]] = encoded.get("token_type_ids") or [[0] * len(tokens) for tokens in found]
    _check_lengths(map(len, found), limit, "documents")
    return [
        Passage(tuple(tokens), of.index(1) if 1 in of else len(of)) for tokens, of in zip(found, types, strict=True)
    ]


def _asked(request: RankRequest) -> tuple[str, str, str]:
    """Return Qwen3-Reranker's dialogue around a document: its start, the query, and what follows the document."""
    return _BEFORE, f"<Instruct>: {request.instruction or INSTRUCTION}\n<Query>: {request.query}\n<Document>: ", _AFTER


def _framed(model: LoadedEncoder, request: RankRequest) -> tuple[str, str, str]:
    """Return the same of what the model's own chat template makes of messages of the roles `query` and `document`.

    As sentence-transformers does it; a model whose template drops them gets Qwen3-Reranker's dialogue.
    """
    instruction = request.instruction or model.prompts.get(model.default_prompt or "")
    for has_parts in (False, True):
        turns = [("query", _QUERY), ("document", _DOCUMENT)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if has_parts else text}
            for role, text in ([("system", instruction), *turns] if instruction else turns)
        ]
        try:
            whole = model.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: BLE001, S112 - templates raise what they like
            continue
        if whole.count(_QUERY) == 1 and whole.count(_DOCUMENT) == 1:
            before, _, after = whole.partition(_DOCUMENT)
            return "", before.replace(_QUERY, request.query), after.replace(_QUERY, request.query)
    return _asked(request)


def _dialogues(
    model: LoadedEncoder, request: RankRequest, limit: int | None, start: str, asked: str, end: str
) -> list[Passage]:
    head, before, after = (_tokens(model, [text], marks=False)[0] if text else [] for text in (start, asked, end))
    fixed = len(head) + len(before) + len(after)
    _check_query(fixed, limit)
    room = limit - fixed if limit is not None and request.truncates else None
    # Query and document are tokenized together, as the model was trained: a token may have a part of both.
    bodies = _tokens(
        model,
        [asked + document for document in _cut(model, request)],
        limit=None if room is None else len(before) + room,
        marks=False,
    )
    found = [(*head, *body, *after) for body in bodies]
    _check_lengths(map(len, found), limit, "documents")
    return [Passage(tokens, len(tokens)) for tokens in found]


def _cut(model: LoadedEncoder, request: RankRequest) -> list[str]:
    """Return the documents, without what is beyond the tokens that the request lets count."""
    documents = list(request.documents)
    if request.max_tokens is None:
        return documents
    return [
        document if len(tokens) <= request.max_tokens else model.tokenizer.decode(tokens[: request.max_tokens])
        for document, tokens in zip(documents, _tokens(model, documents, marks=False), strict=True)
    ]


def _tokens(model: LoadedEncoder, texts: Sequence[str], *, limit: int | None = None, marks: bool) -> list[list[int]]:
    """Tokenize texts; `limit`: tokens that are kept of each; `marks`: with those at their ends."""
    if not texts:
        return []
    tokenizer: Any = model.tokenizer
    encoded = tokenizer(
        list(texts),
        add_special_tokens=marks,
        truncation=limit is not None,
        max_length=limit,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    found: list[list[int]] = encoded["input_ids"]
    return found


def _check_query(size: int, limit: int | None) -> None:
    if limit is not None and size >= limit:
        raise PromptTooLong(f"the query leaves no room for documents: {size} tokens of {limit} maximum", field="query")


def _check_lengths(sizes: Iterable[int], limit: int | None, field: Field) -> None:
    for at, size in enumerate(_checked(sizes, field)):
        if limit is not None and size > limit:
            text = (
                f"entry {at} of the input is too long: {size} tokens > {limit} maximum; send `truncate` to have it cut"
            )
            raise PromptTooLong(text, field=field)


def _checked(sizes: Iterable[int], field: Field) -> Iterator[int]:
    for at, size in enumerate(sizes):
        if not size:
            raise InvalidRequest(f"entry {at} of the input is empty", field=field)
        yield size
