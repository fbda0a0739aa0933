"""Tiny models that transcribe, with weights drawn at random, and recordings for them."""

from __future__ import annotations

import io
import json
import os
import string
import wave
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import hubs

RATE = 16_000
STAND_IN_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent / "stand_in"), hubs.environment(hubs.INSTALLED)["PYTHONPATH"]]
    )
}
"""The environment of a server that has a stand-in for mlx-audio, whether that is installed or not."""
_SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
_STEP = 0.02
_TIMES = tuple(f"<|{number * _STEP:.2f}|>" for number in range(1501))
_SIZE = 32


def recording(seconds: float = 1.0, rate: int = RATE) -> bytes:
    """A WAV file that hums."""
    samples = (np.sin(np.arange(int(seconds * rate)) * 440 * 2 * np.pi / rate) * 8000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return file.getvalue()


def make_whisper(folder: Path, seed: int = 0) -> Path:
    """A folder with a Whisper that knows English alone, and says letters for whatever it hears; return it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_audio.stt.models.whisper.whisper import Model, ModelDimensions

    letters = [*string.ascii_lowercase, "Ġ"]
    vocab = {token: number for number, token in enumerate((*letters, *_SPECIAL, *_TIMES))}
    config = {
        "model_type": "whisper",
        "n_mels": 80,
        "n_audio_ctx": 1500,
        "n_audio_state": _SIZE,
        "n_audio_head": 2,
        "n_audio_layer": 1,
        "n_vocab": len(vocab),
        "n_text_ctx": 32,
        "n_text_state": _SIZE,
        "n_text_head": 2,
        "n_text_layer": 2,
    }
    model: Any = Model(ModelDimensions.from_dict(config))
    drawn = np.random.default_rng(seed)
    weights = {
        name: mx.array((drawn.standard_normal(each.shape) * (5.0 if "token_embedding" in name else 0.3)).astype("f2"))
        for name, each in tree_flatten(model.parameters())
        if not name.startswith("_")
    }
    # Letters are likelier than all else, so that the rules for times never leave nothing to say.
    numbers = mx.arange(len(vocab)) < len(letters)
    weights["decoder.token_embedding.weight"][:, 0] = numbers.astype(mx.float16) * 4
    weights["decoder.ln.bias"] = weights["decoder.ln.bias"] * 0
    weights["decoder.ln.bias"][0] = 4
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    added = [
        {"id": number, "content": token, "special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)}
        | {"normalized": False}
        for token, number in vocab.items()
        if token in _SPECIAL or token in _TIMES
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: vocab[token] for token in letters}, "merges": []},
    }
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer", **end},
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "WhisperProcessor",
            "feature_size": 80,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
