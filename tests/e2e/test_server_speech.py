"""Transcripts and speech at a real server, by OpenAI's SDK and by hand, with a stand-in for mlx-audio alone."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("soundfile", reason="soundfile is not installed")
pytest.importorskip("python_multipart", reason="python-multipart is not installed")
import soundfile

from tests.support.folders import lay_model
from tests.support.models import make_model
from tests.support.processes import SECONDS, eventually
from tests.support.server import Server, serving
from tests.support.speech_models import STAND_IN_ENVIRONMENT, recording

HEARS, SPEAKS, NEEDS, CHAT = "acme/whisper", "acme/kokoro", "acme/needs", "acme/chat"
VOICE = "zf_one"
SECOND = 24_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("models")
    features = {"preprocessor_config.json": b"{}"}
    lay_model(top / "models" / HEARS, features, model_type="whisper")
    lay_model(
        top / "models" / SPEAKS, dict.fromkeys(_voices("zf_one", "zf_two", "af_heart"), b"."), model_type="kokoro"
    )
    lay_model(top / "models" / NEEDS, {**features, "config.json": b'{"model_type": "whisper", "needs": "sox"}'})
    make_model(top / "models" / CHAT, "Hello.")
    with serving(
        top / "home", top / "models", options=["--offline", "--max-body", "4MB"], environ=STAND_IN_ENVIRONMENT
    ) as server:
        yield server


def _voices(*names: str) -> list[str]:
    return [f"voices/{name}.safetensors" for name in names]


def _transcribe(server: Server, seconds: float = 1.0, **options: Any) -> Any:
    file = ("speech.wav", recording(seconds, 8000))
    return server.unchecked_openai.audio.transcriptions.create(model=HEARS, file=file, **options)


def _post(server: Server, path: str = "transcriptions", *, file: bytes | None = None, **form: Any) -> Any:
    sent = recording(1.0) if file is None else file
    return server.http.post(f"/v1/audio/{path}", data={"model": HEARS, **form}, files={"file": ("a.wav", sent)})


def _speak(server: Server, text: str = "Hi.", **options: Any) -> bytes:
    return server.openai.audio.speech.create(**{"model": SPEAKS, "voice": VOICE, **options}, input=text).read()


def _refused(answer: Any) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def _processes(server: Server) -> list[int]:
    """The processes of models that transcribe or speak."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    found = []
    for pid in children:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        found += [int(pid)] if b"speech.program" in command else []
    return found


_linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks at the server's children in /proc")


# Transcripts ------------------------------------------------------------------------------------------------------


def test_models_are_listed_with_their_kind(server: Server) -> None:
    kinds = {each["id"]: each["kind"] for each in server.http.get("/v1/models").json()["data"]}
    assert kinds == {HEARS: "transcription", NEEDS: "transcription", SPEAKS: "speech", CHAT: "text"}
    anthropic = server.http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert [each["id"] for each in anthropic["data"]] == [CHAT]


def test_a_recording_is_transcribed_as_it_was_asked(server: Server) -> None:
    assert _transcribe(server).text == "16000 samples, None, None, transcribe, None."
    asked = _transcribe(server, language="German", prompt="Ohm", temperature=0.5)
    assert asked.text == "16000 samples, de, Ohm, transcribe, 0.5."
    assert asked.usage.seconds == 1


def test_a_recording_is_translated(server: Server) -> None:
    made = _post(server, "translations", prompt="Ohm")  # the SDK warns that OpenAI's own is deprecated
    assert made.json()["text"] == "16000 samples, None, Ohm, translate, None."
    told = _post(server, "translations", language="de")
    assert _refused(told)[:2] == (400, "language")  # OpenAI's has no such field


def test_transcripts_have_five_forms(server: Server) -> None:
    assert _transcribe(server, response_format="text") == "16000 samples, None, None, transcribe, None.\n"
    assert _transcribe(server, response_format="srt") == (
        "1\n00:00:00,000 --> 00:00:00,500\nPart -> <0>\n\n2\n00:00:00,500 --> 00:00:01,000\nPart -> <1>\n"
    )
    assert _transcribe(server, response_format="vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.500\nPart -&gt; &lt;0&gt;\n"
        "\n00:00:00.500 --> 00:00:01.000\nPart -&gt; &lt;1&gt;\n"
    )
    verbose = _transcribe(server, response_format="verbose_json")
    assert (verbose.task, verbose.language, verbose.duration) == ("transcribe", "english", 1.0)
    assert [(each.id, each.start, each.end) for each in verbose.segments] == [(0, 0.0, 0.5), (1, 0.5, 1.0)]
    assert verbose.words is None
    words = _transcribe(server, response_format="verbose_json", timestamp_granularities=["word"])
    assert [(each.word, each.start, each.end) for each in words.words] == [("Part", 0.0, 0.25), ("Part", 0.5, 0.75)]
    assert words.segments is None


def test_a_transcript_comes_in_pieces_as_it_is_heard(server: Server) -> None:
    before = _seconds_heard(server)
    *pieces, done = _transcribe(server, 45.0, stream=True)
    assert len(pieces) > 1
    assert {each.type for each in pieces} == {"transcript.text.delta"}
    assert (done.type, done.text) == ("transcript.text.done", "".join(each.delta for each in pieces))
    assert sum(int(each.delta.split()[0]) for each in pieces) == 45 * 16_000
    assert _refused(_post(server, stream="true", file=b"hello " * 100))[:2] == (400, "file")
    assert _seconds_heard(server) == before + 45


def _seconds_heard(server: Server) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("mlx_omni_heard_seconds_total "))


@pytest.mark.parametrize("kind", [("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")])
def test_recordings_come_in_many_formats(kind: tuple[str, str], server: Server) -> None:
    samples, rate = soundfile.read(io.BytesIO(recording(0.5)))
    file = io.BytesIO()
    soundfile.write(file, [[each, each] for each in samples], rate, format=kind[0], subtype=kind[1])
    told = _post(server, file=file.getvalue())
    assert told.status_code == 200
    assert abs(int(told.json()["text"].split()[0]) - 8000) < 1200


@pytest.mark.parametrize(
    ("form", "param", "why"),
    [
        ({"stream": "true", "response_format": "srt"}, "response_format", "in events"),
        ({"language": "klingon"}, "language", "knows no language 'klingon'"),
        ({"temperature": "2"}, "temperature", "less than or equal to 1"),
        ({"response_format": "diarized_json"}, "response_format", "'json', 'text', 'srt'"),
        ({"chunking_strategy": "auto"}, "chunking_strategy", "not supported"),
        ({"include[]": "logprobs"}, "include", "not supported"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities", "needs the response_format"),
        ({"timestamp_granularities[]": "line"}, "timestamp_granularities[0]", "'word' or 'segment'"),
        ({"file": b""}, "file", "cannot|can be read"),
        ({"file": b"hello " * 100}, "file", "ffmpeg -i"),
        ({"file": recording(0)}, "file", "empty"),
        ({"model": CHAT}, "model", "/v1/chat/completions"),
        ({"model": SPEAKS}, "model", "/v1/audio/speech"),
        ({"model": NEEDS}, "model", "pip install sox"),
        ({"model": "acme/gone"}, "model", "no model 'acme/gone'"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(form: dict[str, Any], param: str, why: str, server: Server) -> None:
    status, named, message = _refused(_post(server, **form))
    assert (status, named) == (404 if form.get("model") == "acme/gone" else 400, param)
    assert any(part in message for part in why.split("|"))


@pytest.mark.parametrize(
    ("content_type", "body", "why"),
    [
        ("application/json", json.dumps({"model": HEARS}).encode(), "send a form"),
        ("multipart/form-data", b"--x\r\n", "boundary"),
        ("multipart/form-data; boundary=x", b"nonsense", "form cannot be read"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nX\r\n--x--',
            "file",
        ),
    ],
)
def test_a_form_that_is_none_is_refused(content_type: str, body: bytes, why: str, server: Server) -> None:
    told = server.http.post("/v1/audio/transcriptions", content=body, headers={"Content-Type": content_type})
    status, _, message = _refused(told)
    assert status == 400
    assert why in message.lower()


def test_a_recording_may_be_as_large_as_a_body_and_no_larger(server: Server) -> None:
    marks = b"{[," * 1_200_000  # were it JSON, it would have too many values
    assert _refused(_post(server, file=marks))[1] == "file"
    assert _post(server, file=recording(130.0)).status_code == 413


# Speech -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "media", "begin"),
    [
        ({}, "audio/mpeg", b"\xff"),
        ({"response_format": "mp3"}, "audio/mpeg", b"\xff"),
        ({"response_format": "wav"}, "audio/wav", b"RIFF"),
        ({"response_format": "flac", "speed": 2.0}, "audio/flac", b"fLaC"),
        ({"response_format": "opus", "stream_format": "audio"}, "audio/ogg", b"OggS"),
        ({"response_format": "pcm"}, "audio/pcm", b"\x00\x00"),
    ],
)
def test_a_text_is_spoken_in_the_format_that_is_asked_for(
    form: dict[str, Any], media: str, begin: bytes, server: Server
) -> None:
    told = server.http.post("/v1/audio/speech", json={"model": SPEAKS, "voice": VOICE, "input": "Hi.\nYou.", **form})
    assert (told.status_code, told.headers["content-type"]) == (200, media)
    assert told.content.startswith(begin)
    if begin == b"\x00\x00":
        assert len(told.content) == 2 * SECOND * 2
    else:
        samples, rate = soundfile.read(io.BytesIO(told.content))
        assert abs(len(samples) / rate - 2 / form.get("speed", 1.0)) < 0.2


def test_the_sdk_speaks(server: Server) -> None:
    with wave.open(io.BytesIO(_speak(server, response_format="wav"))) as sound:
        assert (sound.getnframes(), sound.getframerate(), sound.getnchannels()) == (SECOND, SECOND, 1)
    with server.openai.audio.speech.with_streaming_response.create(
        model=SPEAKS, voice=VOICE, input="Hi.\nwait", response_format="pcm"
    ) as sound_so_far:
        assert len(next(iter(sound_so_far.iter_bytes(1000)))) == 1000  # of the first line, while the second one waits


def test_sound_comes_in_events(server: Server) -> None:
    body = {"model": SPEAKS, "voice": VOICE, "input": "Hi.\nYou.", "response_format": "pcm"}
    told = server.http.post("/v1/audio/speech", json={**body, "stream_format": "sse"})
    assert told.headers["content-type"].startswith("text/event-stream")
    *pieces, done = [json.loads(line[6:]) for line in told.text.splitlines() if line.startswith("data: ")]
    assert [each["type"] for each in pieces] == ["speech.audio.delta"] * 2
    assert done == {"type": "speech.audio.done"}
    sound = b"".join(base64.b64decode(each["audio"]) for each in pieces)
    assert sound == server.http.post("/v1/audio/speech", json=body).content
    failed = server.http.post("/v1/audio/speech", json={**body, "input": "Hi.\nfail", "stream_format": "sse"}).text
    assert "unexpected ValueError" in failed
    assert "speech.audio.done" not in failed


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({"response_format": "aac"}, "response_format", "'wav', 'flac', 'mp3', 'opus' or 'pcm'"),
        ({"stream_format": "wave"}, "stream_format", "'audio' or 'sse'"),
        ({"voice": "alloy"}, "voice", "it has af_heart, zf_one, zf_two"),
        ({"voice": "../x"}, "voice", "no voice"),
        ({"voice": {"id": "v"}}, "voice", "string"),
        ({"voice": "af_heart"}, "voice", "spacy"),
        ({"instructions": "Whisper."}, "instructions", "no `instructions`"),
        ({"speed": 9}, "speed", "less than or equal to 4"),
        ({"input": " "}, "input", "nothing to say"),
        ({"input": "..."}, "input", "nothing to say"),
        ({"input": "x" * 40_000}, "input", "32768"),
        ({"lang_code": "a"}, "lang_code", "not supported"),
        ({"model": HEARS}, "model", "/v1/audio/transcriptions"),
    ],
)
def test_what_is_not_spoken_is_refused_by_its_name(body: dict[str, Any], param: str, why: str, server: Server) -> None:
    told = server.http.post("/v1/audio/speech", json={"model": SPEAKS, "voice": VOICE, "input": "Hi.", **body})
    status, named, message = _refused(told)
    assert (status, named) == (400, param)
    assert why in message


def test_other_routes_refuse_models_of_speech(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/audio/transcriptions"):
        server.chat(HEARS, "hi")
    with pytest.raises(openai.BadRequestError, match="/v1/audio/speech"):
        server.openai.embeddings.create(model=SPEAKS, input="hi")


# Their processes --------------------------------------------------------------------------------------------------


def test_what_fails_in_a_process_is_not_told_and_harms_no_other_request(server: Server) -> None:
    told = _post(server, prompt="fail")
    assert told.status_code == 500
    assert "unexpected ValueError" in told.json()["error"]["message"]
    assert "secret" not in told.text + server.log()
    assert _transcribe(server).text.startswith("16000 samples")


def test_a_process_that_is_killed_ends_its_request_and_the_next_one_gets_another(server: Server) -> None:
    told = _post(server, prompt="be killed")
    assert (told.status_code, told.json()["error"]["code"]) == (500, "process_ended")
    assert _post(server).status_code == 200


@_linux
def test_a_client_that_leaves_ends_the_work(server: Server) -> None:
    _post(server)
    _speak(server)
    before = set(_processes(server))
    assert len(before) == 2
    with pytest.raises(openai.APITimeoutError):
        server.openai.with_options(timeout=0.5).audio.transcriptions.create(
            model=HEARS, file=("a.wav", recording()), prompt="be slow"
        )
    with server.http.stream(
        "POST",
        "/v1/audio/speech",
        json={"model": SPEAKS, "voice": VOICE, "input": "Hi.\nwait", "response_format": "pcm"},
    ) as told:
        next(told.iter_raw())
    eventually(lambda: not before & set(_processes(server)), "both processes have ended")
    assert _post(server).status_code == 200
    assert _speak(server)


@_linux
def test_requests_for_one_model_wait_for_each_other_and_other_models_do_not(server: Server) -> None:
    _post(server)
    slow = Later(lambda: _post(server, prompt="be slow"))
    eventually(lambda: _loaded(server, HEARS)["users"] == 1, "the first request has come")
    waiting = Later(lambda: _post(server))
    eventually(lambda: _loaded(server, HEARS)["users"] == 2, "the second request has come")
    assert server.chat(CHAT, "hi").choices[0].message.content == "Hello."
    assert _speak(server)
    assert waiting.is_alive()
    for pid in _processes(server):
        os.kill(pid, signal.SIGKILL)
    assert (slow.result().status_code, waiting.result().status_code) == (500, 200)
    assert _speak(server), "its process was killed, too, and the next request starts another"


def test_a_model_is_unloaded_with_its_process_and_its_request(server: Server) -> None:
    _post(server)
    slow = Later(lambda: _post(server, prompt="be slow"))
    eventually(lambda: _loaded(server, HEARS)["users"] == 1, "the request has come")
    path = "/manage/v1/models/unload"
    assert server.http.post(path, json={"model": HEARS}).status_code == 409
    assert server.http.post(path, json={"model": HEARS, "force": True}).status_code == 200
    assert (slow.result().status_code, slow.result().json()["error"]["code"]) == (503, "model_unloaded")


def test_a_request_is_stopped_from_the_page(server: Server) -> None:
    slow = Later(lambda: _post(server, prompt="be slow"))
    eventually(lambda: _transcribing(server) != [], "the request is being worked for")
    (running,) = _transcribing(server)
    assert server.http.post(f"/manage/v1/requests/{running}/stop").status_code == 200
    assert slow.result().status_code == 410
    assert _post(server).status_code == 200


def _transcribing(server: Server) -> list[str]:
    requests = server.http.get("/manage/v1/requests").json()["running"]
    return [each["id"] for each in requests if each["note"] == "transcribing"]


def _loaded(server: Server, model_id: str) -> Any:
    models = server.http.get("/manage/v1/status").json()["models"]
    return next(each for each in models if each["id"] == model_id)


class Later(threading.Thread):
    """A request that is sent while the test goes on."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._ask = ask
        self._answers: list[Any] = []
        self.start()

    def run(self) -> None:
        self._answers.append(self._ask())

    def result(self) -> Any:
        self.join(SECONDS)
        assert not self.is_alive(), "there is no answer"
        return self._answers[0]
