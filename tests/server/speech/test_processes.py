"""Models that transcribe or speak without the extra, and sound that is cut and written."""

from __future__ import annotations

import asyncio

import pytest
from mlx_overlay_server.errors import NotFound
from mlx_overlay_server.speech import processes
from mlx_overlay_server.speech.processes import Speech
from mlx_overlay_server.speech.values import LoadedSpeech


def test_without_the_extra_no_model_is_loaded_and_the_refusal_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "EXTRA", ("mlx_audio_that_is_not_there",))
    with pytest.raises(NotFound, match=r"pip install 'mlx-overlay-server\[speech\]'") as refused:
        asyncio.run(Speech(60).load(LoadedSpeech("0:m", "/nowhere", "speech", 0)))
    assert refused.value.code == "not_supported"
