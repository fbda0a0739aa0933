"""Recordings are heard in parts that end where it is quiet, and what is spoken is written as files."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_overlay_server.errors import InvalidRequest

from tests.support.speech_models import RATE, recording

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")


@pytest.fixture(scope="module")
def sound() -> Iterator[Any]:
    """The module, with mlx-audio, or what stands in for it."""
    path = str(Path(__file__).parents[2] / "support/stand_in")
    sys.path.append(path)
    yield import_module("mlx_overlay_server.speech.sound")
    sys.path.remove(path)


def test_a_short_recording_is_one_part(sound: Any) -> None:
    (part,) = sound.parts(io.BytesIO(recording(1.5, 8000)))
    assert (part.start, len(part.samples)) == (0.0, 24_000)


def test_a_long_recording_is_cut_where_it_is_quiet(sound: Any) -> None:
    samples = np.sin(np.arange(70 * RATE) / 5).astype(np.float32)
    samples[25 * RATE : 26 * RATE] = 0
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    file.seek(0)
    parts = list(sound.parts(file, 30))
    assert 25 < parts[1].start < 26
    assert all(len(part.samples) <= 30 * RATE for part in parts)
    starts = [0, *np.cumsum([len(part.samples) for part in parts])]
    assert [round(part.start * RATE) for part in parts] == starts[:-1]  # nothing is left out, or heard twice
    assert np.array_equal(np.concatenate([part.samples for part in parts]), samples)


def test_a_recording_has_a_longest_length(sound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "MAX_SECONDS", 3600 / 200)
    with pytest.raises(InvalidRequest, match="longer than"):
        list(sound.parts(io.BytesIO(recording(21.0, 1000))))


def test_sound_is_written_without_a_wrap_at_its_loudest(sound: Any) -> None:
    loud = np.array([2.0, -2.0, 0.0], np.float32)
    assert np.frombuffer(sound.raw(loud), "<i2").tolist() == [32767, -32767, 0]
    read, rate = soundfile.read(io.BytesIO(sound.written([loud, loud], "wav")))
    assert (len(read), rate) == (6, 24_000)
