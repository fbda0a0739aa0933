"""What the server makes of mlx-audio's own models, where that is installed."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from mlx_overlay_server.errors import InvalidRequest, Unavailable
from mlx_overlay_server.speech.values import TranscribeRequest, Transcript

from tests.support.speech_models import make_whisper, recording

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("mlx_audio", "soundfile")), reason="the extra `speech` is not installed"
)


@pytest.mark.slow
def test_a_whisper_of_mlx_audio_transcribes_with_times(tmp_path: Path) -> None:
    from mlx_overlay_server.speech import adapter

    model = adapter.load(str(make_whisper(tmp_path / "parakeet-kokoro")))  # a folder's name decides nothing
    assert isinstance(model, adapter.Whisper)
    wanted = TranscribeRequest("m", times=True, words=True)
    (made,) = adapter.transcribe(model, io.BytesIO(recording(1.0)), wanted)
    assert isinstance(made, Transcript)
    assert made.seconds == 1.0
    assert made.language == "english"
    assert made.text
    assert made.text == "".join(each.text for each in made.segments).strip()
    assert made.segments[0].words[0].word
    json.dumps([each.details for each in made.segments], allow_nan=False)
    for refused in (TranscribeRequest("m", language="de"), TranscribeRequest("m", to_english=True)):
        with pytest.raises(InvalidRequest, match="English alone"):
            model.check(refused)


def test_a_tokenizer_that_is_code_is_not_run(tmp_path: Path) -> None:
    from mlx_overlay_server.speech import adapter

    (tmp_path / "config.json").write_text('{"model_type": "qwen3_asr"}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    with pytest.raises(Unavailable, match="code of its own"):
        adapter.load(str(tmp_path))
