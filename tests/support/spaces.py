"""Tiny tokenizers of each kind that mlx-lm has a detokenizer for; all of them know words with a space before them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.tokens import CHAT_TEMPLATE

KINDS = ("ByteLevel", "Llama", "Gemma", "Metaspace")
"""By decoder: mlx-lm detokenizes the first as BPE, the next two as SPM, and has no fast detokenizer for the last."""

WORDS = ("Paris", "is", "big", ".", "a")

_BYTE_FALLBACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_DECODERS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    "Llama": {
        "type": "Sequence",
        "decoders": [*_BYTE_FALLBACK, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    },
    "Gemma": {"type": "Sequence", "decoders": _BYTE_FALLBACK},
    "Metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
}


def make_tokenizer(folder: Path, kind: str) -> Callable[[str], int]:
    """Write a folder with a tokenizer of a kind, and return the function that finds the id of a word or byte.

    A word may begin with a space; a byte is written as `<0x41>`. Text is encoded as words with the space before them.
    """
    space = "Ġ" if kind == "ByteLevel" else "▁"
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), space, *WORDS, *(space + word for word in WORDS)]
    if kind == "ByteLevel":
        names += ["Ã", "©"]  # the two bytes of é
    vocab = {name: number for number, name in enumerate(names)}
    folder.mkdir(parents=True)
    added = [
        {"id": number, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, name in enumerate(special)
    ]
    replace: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": replace,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": space},
            "behavior": "MergedWithNext",
            "invert": False,
        },
        "post_processor": None,
        "decoder": _DECODERS[kind],
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [],
            "ignore_merges": True,
            "unk_token": "<unk>",
            "byte_fallback": False,
            "fuse_unk": False,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    sizes = {"eos_token_id": 2, "vocab_size": len(vocab), "max_position_embeddings": 64}
    for name, written in (("tokenizer.json", content), ("tokenizer_config.json", config), ("config.json", sizes)):
        (folder / name).write_text(json.dumps(written), encoding="utf-8")
    return lambda word: vocab[word if word.startswith("<") else word.replace(" ", space)]
