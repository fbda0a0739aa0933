"""As in mlx-audio: a Whisper that says what it was asked, in segments of half a second."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def load_model(path: Path, *, model_type: str, model_name_parts: list[str]) -> Whisper:
    config = json.loads((path / "config.json").read_text("utf-8"))
    if config.get("needs"):
        raise ImportError(f"no {config['needs']}", name=config["needs"])
    return Whisper()


class Whisper:
    is_multilingual = True
    _processor = "a processor"

    def generate(
        self,
        samples: Any,
        *,
        language: str | None,
        initial_prompt: str | None,
        task: str,
        word_timestamps: bool,
        temperature: float | None = None,
    ) -> Any:
        if initial_prompt == "be slow":
            time.sleep(600)
        if initial_prompt == "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if initial_prompt == "fail":
            raise ValueError("a secret prompt")
        text = f" {len(samples)} samples, {language}, {initial_prompt}, {task}, {temperature}."
        segments = [_segment(number, words=word_timestamps) for number in range(len(samples) // 8000)]
        return SimpleNamespace(text=text, segments=segments, language=language or "en")


def _segment(number: int, *, words: bool) -> dict[str, Any]:
    start = number / 2
    made = {"text": f" Part --> <{number}>", "start": start, "end": start + 0.5, "seek": 0, "tokens": [1, 2]}
    made |= {"temperature": 0.0, "avg_logprob": float("nan"), "compression_ratio": 1.0, "no_speech_prob": 0.1}
    return made | ({"words": [{"word": " Part", "start": start, "end": start + 0.25}]} if words else {})
