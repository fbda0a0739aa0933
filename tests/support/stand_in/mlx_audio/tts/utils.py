"""As in mlx-audio: a Kokoro that hums once for each line of a text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx


def load_model(path: Path, *, model_type: str, model_name_parts: list[str]) -> Kokoro:
    return Kokoro()


class Kokoro:
    def generate(self, text: str, *, voice: str, speed: float, lang_code: str) -> Iterator[Any]:
        for line in text.splitlines():
            if line == "wait":
                time.sleep(600)
            if line == "fail":
                raise ValueError("a secret text")
            if line.strip("."):
                count = int(24_000 / speed)
                yield SimpleNamespace(audio=mx.sin(mx.arange(count) / 20) * 0.5, sample_rate=24_000)
