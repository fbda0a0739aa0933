"""Sound files: read part by part, and written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
from mlx_audio.resample import resample_audio_array

from mlx_overlay_server.errors import InvalidRequest
from mlx_overlay_server.speech.values import SoundFormat

Samples = npt.NDArray[np.float32]

HEARD_RATE = 16_000
"""Samples a second that models hear."""
SPOKEN_RATE = 24_000
"""Samples a second of what is answered, whatever the model's own rate is."""
PART_SECONDS = 600
"""A recording is heard in parts of at most so many seconds, so that its length takes no memory."""
STREAMED_SECONDS = 30
"""The same where the text of each part is sent as it is heard: what Whisper hears at once."""
QUIET_SECONDS = 20
"""Where it is cut: at the quietest moment within the last so many seconds of a part."""
MAX_SECONDS = 4 * 3600
"""The longest recording: a small file can hold days of silence."""

_MOMENT = HEARD_RATE // 10
_BLOCK_SECONDS = 10
_WRITTEN: dict[SoundFormat, tuple[str, str]] = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}
"""What libsndfile calls the formats."""


class Part(NamedTuple):
    """A part of a recording."""

    start: float
    """When it begins, in seconds."""
    samples: Samples


def parts(file: BinaryIO, longest: int = PART_SECONDS) -> Iterator[Part]:
    """Read a recording, in parts of at most `longest` seconds. Raises InvalidRequest."""
    try:
        with soundfile.SoundFile(file) as recording:
            yield from _cut(_blocks(recording), longest * HEARD_RATE)
    except soundfile.LibsndfileError:
        raise InvalidRequest(
            "this is not a recording that can be read: send WAV, MP3, FLAC, Ogg (Vorbis or Opus) or AIFF; convert "
            "others before, such as M4A, MP4 and WebM: ffmpeg -i RECORDING recording.mp3",
            param="file",
            code="unknown_format",
        ) from None


def _blocks(recording: Any) -> Iterator[Samples]:
    """Read some seconds at a time, as one channel at the rate that models hear."""
    count = recording.samplerate * _BLOCK_SECONDS
    seconds = 0.0
    while len(block := recording.read(count, dtype="float32", always_2d=True)):
        seconds += len(block) / recording.samplerate
        if seconds > MAX_SECONDS:
            raise InvalidRequest(f"the recording is longer than {MAX_SECONDS // 3600} hours", param="file")
        yield resample_audio_array(block.mean(axis=1), recording.samplerate, HEARD_RATE)


def _cut(blocks: Iterator[Samples], longest: int) -> Iterator[Part]:
    """Join blocks to parts of at most `longest` samples, which end where it is quiet."""
    held = np.zeros(0, np.float32)
    done = 0
    for block in blocks:
        held = np.concatenate((held, block))
        if len(held) > longest:
            end = _quietest(held[:longest])
            yield Part(done / HEARD_RATE, held[:end])
            held, done = held[end:], done + end
    if len(held):
        yield Part(done / HEARD_RATE, held)


def _quietest(samples: Samples) -> int:
    """Return the place of the quietest moment near the end of some samples."""
    first = len(samples) - QUIET_SECONDS * HEARD_RATE
    moments = samples[first:].reshape(-1, _MOMENT)
    return first + int(np.square(moments).sum(axis=1).argmin()) * _MOMENT + _MOMENT // 2


def spoken(samples: Samples, rate: int) -> Samples:
    """Return samples at the rate of what is answered."""
    resampled: Samples = resample_audio_array(np.asarray(samples, np.float32).reshape(-1), rate, SPOKEN_RATE)
    return resampled


def raw(samples: Samples) -> bytes:
    """Return samples at 16 bits each, little-endian, without a head."""
    data: bytes = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    return data


def written(samples: Sequence[Samples], form: SoundFormat) -> bytes:
    """Return samples as a file, whose format is not `pcm`."""
    file = io.BytesIO()
    kind, coding = _WRITTEN[form]
    soundfile.write(file, np.concatenate(samples), SPOKEN_RATE, format=kind, subtype=coding)
    return file.getvalue()
