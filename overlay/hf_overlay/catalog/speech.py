"""Models that transcribe recordings or speak texts: which of them mlx-omni-server runs, by mlx-audio.

mlx-audio itself goes by parts of a folder's name where config.json names no type. Here config.json alone decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from hf_overlay.models import Task

Family = Literal["whisper", "parakeet", "qwen3_asr", "kokoro", "qwen3_tts"]
"""What mlx-audio calls the code of a kind of model."""

TASKS: Mapping[Family, Task] = {
    "whisper": "transcription",
    "parakeet": "transcription",
    "qwen3_asr": "transcription",
    "kokoro": "speech",
    "qwen3_tts": "speech",
}
"""The families, and what their models do."""

_OF_NEMO = "nemo.collections.asr.models."
"""What `target` begins with in a config.json of NVIDIA's NeMo, which names no type: those are Parakeet."""
_OF_PARAKEET = frozenset({"EncDecRNNTBPEModel", "EncDecHybridRNNTCTCBPEModel", "EncDecCTCModelBPE"})
"""The last parts of the targets that it knows."""

_TOKENIZER = ("tokenizer.json", "vocab.json")
_FEATURES = ("preprocessor_config.json", "processor_config.json")
_NEEDED: Mapping[Family, tuple[tuple[str, ...], ...]] = {
    "whisper": (_TOKENIZER, _FEATURES),
    "qwen3_asr": (_TOKENIZER, _FEATURES),
    "qwen3_tts": (_TOKENIZER, ("speech_tokenizer/config.json",), ("speech_tokenizer/model.safetensors",)),
}
"""Files without which mlx-audio cannot use a model, beside config.json and weights: one of each group."""


def family(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a model, by its config.json; None for one that neither transcribes nor speaks."""
    model_type, target = config.get("model_type"), config.get("target")
    if model_type is None or model_type == "parakeet":
        is_known = isinstance(target, str) and target.startswith(_OF_NEMO) and target.rpartition(".")[2] in _OF_PARAKEET
        return "parakeet" if is_known else None
    return next((each for each in TASKS if each == model_type), None)


def task(config: Mapping[str, Any]) -> Task | None:
    """Return what a model does that transcribes or speaks; None for any other."""
    known = family(config)
    return None if known is None else TASKS[known]


def problem(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Return why mlx-audio cannot use a model that transcribes or speaks, as the end of a sentence; None where it can.

    `names` are the folder's files.
    """
    known = family(config)
    if known is None:
        return None
    if missing := [group for group in _NEEDED.get(known, ()) if not any(name in names for name in group)]:
        return f"has no {missing[0][0]}, without which mlx-audio cannot use it; copy or download it again"
    if known == "kokoro" and not any(name.startswith("voices/") and name.endswith(".safetensors") for name in names):
        return "has no voices (voices/*.safetensors); copy or download it again"
    return None
