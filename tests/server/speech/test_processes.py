"""The processes of models that transcribe or speak, with a stand-in for mlx-audio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mlx_overlay_server.errors import NotFound, Unavailable
from mlx_overlay_server.speech import processes
from mlx_overlay_server.speech.processes import Speech
from mlx_overlay_server.speech.values import LoadedSpeech, TranscribeRequest

from tests.support.folders import lay_model
from tests.support.speech_models import STAND_IN_ENVIRONMENT, recording


def test_without_the_extra_no_model_is_loaded_and_the_refusal_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "EXTRA", ("mlx_audio_that_is_not_there",))
    with pytest.raises(NotFound, match=r"pip install 'mlx-overlay-server\[speech\]'") as refused:
        asyncio.run(Speech(60).load(LoadedSpeech("0:m", "/nowhere", "speech", 0)))
    assert refused.value.code == "not_supported"


def test_a_stop_ends_a_transcription_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    monkeypatch.setattr(processes, "EXTRA", ())
    monkeypatch.setenv("PYTHONPATH", STAND_IN_ENVIRONMENT["PYTHONPATH"])
    folder = str(lay_model(tmp_path / "m", model_type="whisper"))

    async def chunks() -> AsyncIterator[bytes]:
        yield recording()

    async def stopped() -> int:
        speech = Speech(60)
        model = await speech.load(LoadedSpeech("0:m", folder, "transcription", 0))
        process = speech._held["0:m"].process
        assert process is not None
        made = speech.run(model, TranscribeRequest("m", prompt="be slow"), chunks())
        transcript = asyncio.ensure_future(anext(made))
        await asyncio.sleep(0.2)
        speech.abort()
        with pytest.raises(Unavailable, match="shutting down"):
            await transcript
        await speech.stop()
        with pytest.raises(Unavailable, match="shutting down"):
            await anext(speech.run(model, TranscribeRequest("m"), chunks()))
        return process.pid

    pid = asyncio.run(stopped())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
