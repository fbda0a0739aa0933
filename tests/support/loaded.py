"""Models as the server's readers see them: a real tokenizer and its marks, and no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.generate import make_text_state_machine
from mlx_lm.tokenizer_utils import load
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import mlx_tokenizers


def loaded(folder: Path, *, template: str | None = None, defaults: Mapping[str, Any] | None = None) -> Loaded:
    """The model of a folder, as the engine hands it over; `template` takes the place of the folder's own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = load(folder, eos_token_ids=config["eos_token_id"])
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.has_chat_template = True
    has_own_calls = mlx_tokenizers.prepare_tokenizer(tokenizer)
    return Loaded(
        key=f"0:{folder}",
        path=str(folder),
        tokenizer=tokenizer,
        marks=make_text_state_machine(tokenizer),
        detokenizer=partial(mlx_tokenizers.detokenizer, tokenizer),
        make_grammar_tokenizer=partial(mlx_tokenizers.grammar_tokenizer, tokenizer, config["vocab_size"]),
        nbytes=0,
        letter=tuple(tokenizer.encode("a", add_special_tokens=False)),
        has_own_calls=has_own_calls,
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        defaults=defaults or {},
    )
