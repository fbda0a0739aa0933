"""Problems of a model's folder that show only when the model answers: its chat template, and what ends an answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hf_overlay.catalog.files import Unfit, read_json
from hf_overlay.doctor import Finding

_TEMPLATE = "chat_template.jinja"


def examine(folder: str) -> list[Finding]:
    """Return what is wrong with a folder whose model generates text. Raises OSError."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        """The tag by which templates mark what the model says, as transformers has it."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    found = []
    environment = jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])  # noqa: S701 - renders nothing
    for name, template in _templates(folder):
        try:
            environment.parse(template)
        except jinja2.TemplateSyntaxError as error:
            found.append(
                Finding(
                    "template",
                    folder,
                    f"line {error.lineno} of the chat template in {name} is not valid: {error.message}",
                    "Copy that file again, or set chat_template in the model's profile.",
                )
            )
    if not _has_end(folder):
        found.append(
            Finding(
                "end",
                folder,
                "no file in it names the token that ends an answer (eos_token_id), so answers go on up to their limit",
                "Write the id as eos_token_id into its generation_config.json.",
            )
        )
    return found


def _templates(folder: str) -> Iterator[tuple[str, str]]:
    """Yield (file, template) for each of a folder's chat templates."""
    if os.path.isfile(path := os.path.join(folder, _TEMPLATE)):
        with open(path, encoding="utf-8", errors="replace") as file:
            yield _TEMPLATE, file.read()
        return  # it comes before the others
    for name in ("tokenizer_config.json", "chat_template.json"):
        given = _json(folder, name).get("chat_template")
        for each in given if isinstance(given, list) else [{"template": given}]:
            if isinstance(each, dict) and isinstance(each.get("template"), str):
                yield name, each["template"]


def _has_end(folder: str) -> bool:
    """Return whether a token is named that ends an answer, or the tokenizer is of a kind that need not name it."""
    config, tokenizer = _json(folder, "config.json"), _json(folder, "tokenizer_config.json")
    if not tokenizer or "auto_map" in tokenizer:
        return True
    inner = config.get("text_config")
    ids = [config, inner if isinstance(inner, dict) else {}, _json(folder, "generation_config.json")]
    words = [tokenizer, _json(folder, "special_tokens_map.json")]
    return any(each.get("eos_token_id") is not None for each in ids) or any(each.get("eos_token") for each in words)


def _json(folder: str, name: str) -> dict[str, Any]:
    """Return the object in a file; {} where there is none that can be read."""
    try:
        return read_json(os.path.join(folder, name))
    except (Unfit, FileNotFoundError, PermissionError):
        return {}
