"""As in mlx-audio: another number of samples a second."""

from __future__ import annotations

from typing import Any

import numpy as np


def resample_audio_array(audio: Any, orig_sample_rate: int, sample_rate: int) -> Any:
    count = round(len(audio) * sample_rate / orig_sample_rate)
    return np.interp(np.linspace(0, len(audio) - 1, count), np.arange(len(audio)), audio).astype(np.float32)
