"""Short names of models, which people type at commands: `smollm2` for HuggingFaceTB/SmolLM2-135M-Instruct.

Requests may use only whole ids and aliases: the meaning of a short name changes when a model is added, and a request
must never be answered by another model than the one it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_overlay import InvalidModelId, ModelNotFound

SHOWN = 8
"""How many ids a message lists."""


def matches(text: str, ids: Iterable[str]) -> list[str]:
    """Return the ids that a text stands for, sorted: those that match by the first rule that any id matches by.

    The rules: the id is the text; the same in another case; the text is the name after the last slash; the id contains
    all words of the text.
    """
    ids = sorted(set(ids))
    folded, words = text.casefold(), _words(text)
    rules = (
        lambda each: each == text,
        lambda each: each.casefold() == folded,
        lambda each: each.casefold().rpartition("/")[2] == folded,
        lambda each: bool(words) and all(word in each.casefold() for word in words),
    )
    return next((found for rule in rules if (found := [each for each in ids if rule(each)])), [])


def resolved(text: str, ids: Iterable[str], *, where: str = "here") -> str:
    """Return the only id that a text stands for. Raises ModelNotFound, and InvalidModelId where there are several."""
    known = sorted(set(ids))
    found = matches(text, known)
    if len(found) == 1:
        return found[0]
    if not found:
        if not known:
            raise ModelNotFound(f"no model {where} is called {text!r}: there are no models")
        raise ModelNotFound(f"no model {where} is called {text!r}; there are {_listed(known)}")
    raise InvalidModelId(f"{text!r} may be {_listed(found)}; write more of its name")


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s/:_.-]+", text.casefold()) if word]


def _listed(ids: list[str]) -> str:
    more = len(ids) - SHOWN
    return ", ".join(ids[:SHOWN]) + (f" and {more} more" if more > 0 else "")
