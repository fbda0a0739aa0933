"""All contact with mlx-audio: one class for each family of models, with what it can do and what it refuses by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import mlx.core as mx
import numpy as np
from hf_overlay.catalog.speech import family

from mlx_overlay_server import memory
from mlx_overlay_server.errors import InvalidRequest, ServerError, Unavailable
from mlx_overlay_server.speech import sound
from mlx_overlay_server.speech.values import Segment, Sound, SpeakRequest, TranscribeRequest, Transcript, Word

DEFAULT_VOICE = "default"
"""The voice of models that have no voices to choose from."""


class Model(Protocol):
    """A model that was loaded."""

    def __init__(self, folder: Path) -> None: ...


class Transcriber(Model, Protocol):
    """A model that hears."""

    def check(self, request: TranscribeRequest) -> None:
        """Raise InvalidRequest for what the model cannot do."""

    def hear(self, samples: sound.Samples, request: TranscribeRequest) -> Transcript:
        """Transcribe a part of a recording."""


class Speaker(Model, Protocol):
    """A model that speaks."""

    def check(self, request: SpeakRequest) -> None:
        """Raise InvalidRequest for what the model cannot do."""

    def speak(self, request: SpeakRequest) -> Iterator[Any]:
        """Yield mlx-audio's results, which hold samples and their rate."""


def load(folder: str) -> Transcriber | Speaker:
    """Load the model in a folder. Raises ServerError."""
    path = Path(folder)
    config = json.loads((path / "config.json").read_text("utf-8"))
    mx.set_cache_limit(memory.SPEECH // 4)
    known = family(config)
    try:
        return _FAMILIES[known](path) if known is not None else _unknown(folder)
    except ServerError:
        raise
    except ImportError as error:
        raise InvalidRequest(
            f"the model needs a package that is not installed: pip install {error.name}",
            param="model",
            code="not_installed",
        ) from None


def transcribe(model: Transcriber, file: BinaryIO, request: TranscribeRequest) -> Iterator[str | Transcript]:
    """Transcribe a recording: with `streams`, yield the text as it is heard; then the whole. Raises InvalidRequest."""
    model.check(request)
    texts: list[str] = []
    segments: list[Segment] = []
    language, seconds = None, 0.0
    for start, samples in sound.parts(file, sound.STREAMED_SECONDS if request.streams else sound.PART_SECONDS):
        heard = model.hear(samples, request)
        if text := heard.text.strip():
            if request.streams:
                yield f" {text}" if texts else text
            texts.append(text)
        segments += [each.later(start) for each in heard.segments]
        language = language or heard.language
        seconds = start + len(samples) / sound.HEARD_RATE
    if not seconds:
        raise InvalidRequest("the recording is empty", param="file")
    yield Transcript(" ".join(texts), seconds, language, tuple(segments))


def speak(model: Speaker, request: SpeakRequest) -> Iterator[Sound]:
    """Speak a text: `pcm` as it comes, everything else in one piece. Raises InvalidRequest."""
    model.check(request)
    pieces: list[sound.Samples] = []
    for made in model.speak(request):
        samples = sound.spoken(np.array(made.audio.astype(mx.float32)), made.sample_rate)
        if request.response_format != "pcm":
            pieces.append(samples)
        elif len(samples):
            yield Sound(sound.raw(samples), len(samples) / sound.SPOKEN_RATE)
    if pieces:
        seconds = sum(map(len, pieces)) / sound.SPOKEN_RATE
        yield Sound(sound.written(pieces, request.response_format), seconds)


class Whisper:
    """OpenAI's Whisper."""

    def __init__(self, folder: Path) -> None:
        from mlx_audio.stt.models.whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE
        from mlx_audio.stt.utils import load_model

        self._model = load_model(folder, model_type="whisper", model_name_parts=[])
        self._names: dict[str, str] = LANGUAGES
        self._codes: dict[str, str] = TO_LANGUAGE_CODE
        if self._model._processor is None:  # noqa: SLF001 - mlx-audio only warns of it
            raise Unavailable("the model's tokenizer or preprocessor_config.json cannot be read; copy it again")

    def check(self, request: TranscribeRequest) -> None:
        code = self._code(request.language)
        if not self._model.is_multilingual and (code not in (None, "en") or request.to_english):
            raise InvalidRequest("this model knows English alone", param="language" if code else "model")

    def hear(self, samples: sound.Samples, request: TranscribeRequest) -> Transcript:
        more: dict[str, Any] = {"temperature": request.temperature} if request.temperature else {}
        heard = self._model.generate(
            samples,
            language=self._code(request.language),
            initial_prompt=request.prompt,
            task="translate" if request.to_english else "transcribe",
            word_timestamps=request.words,
            **more,
        )
        segments = tuple(self._segment(each) for each in heard.segments if each["text"])
        return Transcript(heard.text, 0, self._names.get(heard.language, heard.language), segments)

    def _code(self, language: str | None) -> str | None:
        if language is None:
            return None
        code = self._codes.get(language.lower(), language.lower())
        if code not in self._names:
            raise InvalidRequest(
                f"the model knows no language {language!r}; send a code such as 'en'", param="language"
            )
        return code

    def _segment(self, given: dict[str, Any]) -> Segment:
        words = tuple(Word(each["word"].strip(), each["start"], each["end"]) for each in given.get("words", ()))
        details = {name: given[name] for name in ("seek", "tokens")}
        for name in ("temperature", "avg_logprob", "compression_ratio", "no_speech_prob"):
            if math.isfinite(given[name]):  # JSON has no other numbers
                details[name] = float(given[name])
        return Segment(given["text"], given["start"], given["end"], words, details)


class Parakeet:
    """NVIDIA's Parakeet."""

    def __init__(self, folder: Path) -> None:
        from mlx_audio.stt.utils import load_model

        self._model = load_model(folder, model_type="parakeet", model_name_parts=[])

    def check(self, request: TranscribeRequest) -> None:
        _refuse(request, "prompt", "temperature", "language")
        _refuse_translation(request)

    def hear(self, samples: sound.Samples, request: TranscribeRequest) -> Transcript:
        # Its attention takes memory by the square of the time: two minutes at once, with an overlap.
        heard = self._model.generate(mx.array(samples), chunk_duration=120.0, overlap_duration=15.0)
        segments = tuple(
            Segment(each.text, each.start, each.end, tuple(_words(each.tokens)) if request.words else ())
            for each in heard.sentences
        )
        return Transcript(heard.text, 0, None, segments)


class Qwen3ASR:
    """Alibaba's Qwen3-ASR."""

    def __init__(self, folder: Path) -> None:
        from mlx_audio.stt.models.whisper.tokenizer import LANGUAGES
        from mlx_audio.stt.utils import load_model

        _check_no_code(folder)
        self._model = load_model(folder, model_type="qwen3_asr", model_name_parts=[])
        self._names: dict[str, str] = LANGUAGES

    def check(self, request: TranscribeRequest) -> None:
        _refuse_translation(request)
        if request.times or request.words:
            raise InvalidRequest(
                "this model does not tell when something is said: ask for `json` or `text`", param="response_format"
            )

    def hear(self, samples: sound.Samples, request: TranscribeRequest) -> Transcript:
        language = request.language
        heard = self._model.generate(
            samples,
            language=None if language is None else self._names.get(language.lower(), language).title(),
            system_prompt=request.prompt,
            temperature=request.temperature or 0.0,
        )
        told = heard.language[0] if isinstance(heard.language, list) and heard.language else heard.language
        return Transcript(heard.text, 0, told.lower() if isinstance(told, str) else None)


class Kokoro:
    """Kokoro, which speaks phonemes: `misaki` turns texts into those."""

    def __init__(self, folder: Path) -> None:
        from mlx_audio.tts.utils import load_model

        self._voices = sorted(each.stem for each in (folder / "voices").glob("*.safetensors"))
        self._model = load_model(folder, model_type="kokoro", model_name_parts=[])

    def check(self, request: SpeakRequest) -> None:
        _refuse(request, "instructions")
        for voice in request.voice.split(","):  # several are mixed
            _check_voice(voice, self._voices)
        _check_phonemes(request.voice[0])

    def speak(self, request: SpeakRequest) -> Iterator[Any]:
        made: Iterator[Any] = self._model.generate(
            request.input, voice=request.voice, speed=request.speed, lang_code=request.voice[0]
        )
        return made


class Qwen3TTS:
    """Alibaba's Qwen3-TTS: with voices of its own, with voices by description, or with none to choose from."""

    def __init__(self, folder: Path) -> None:
        from mlx_audio.tts.utils import load_model

        self._model = load_model(folder, model_type="qwen3_tts", model_name_parts=[])
        if self._model.tokenizer is None or self._model.speech_tokenizer is None:
            raise Unavailable("the model's tokenizer or speech_tokenizer cannot be read; copy it again")
        self._kind: str = self._model.config.tts_model_type
        self._voices = [each.lower() for each in self._model.get_supported_speakers()] or [DEFAULT_VOICE]

    def check(self, request: SpeakRequest) -> None:
        _check_voice(request.voice.lower(), self._voices)
        if request.speed != 1:
            raise InvalidRequest("this model speaks at its own speed: leave `speed` out", param="speed")
        if self._kind == "base" or (self._kind == "custom_voice" and self._model.config.tts_model_size == "0b6"):
            _refuse(request, "instructions")
        if self._kind == "voice_design" and not request.instructions:
            raise InvalidRequest(
                "this model makes a voice as `instructions` describe it: send some", param="instructions"
            )

    def speak(self, request: SpeakRequest) -> Iterator[Any]:
        voice = request.voice.lower()
        made: Iterator[Any] = self._model.generate(
            request.input,
            voice=None if voice == DEFAULT_VOICE else voice,
            instruct=request.instructions,
            stream=request.response_format == "pcm",
        )
        return made


_FAMILIES: dict[str, Callable[[Path], Transcriber | Speaker]] = {
    "whisper": Whisper,
    "parakeet": Parakeet,
    "qwen3_asr": Qwen3ASR,
    "kokoro": Kokoro,
    "qwen3_tts": Qwen3TTS,
}


def _unknown(folder: str) -> Transcriber:
    raise Unavailable(f"{folder} holds another model than a moment ago; try again")


def _refuse(request: TranscribeRequest | SpeakRequest, *names: str) -> None:
    """Refuse fields that are set and that a model has no use for."""
    for name in names:
        if getattr(request, name):
            raise InvalidRequest(f"this model takes no `{name}`: leave it out", param=name)


def _refuse_translation(request: TranscribeRequest) -> None:
    if request.to_english:
        raise InvalidRequest("this model does not translate: of those known here, Whisper does", param="model")


def _check_voice(voice: str, voices: list[str]) -> None:
    if voice not in voices:
        raise InvalidRequest(f"the model has no voice {voice!r}; it has {', '.join(voices)}", param="voice")


def _check_phonemes(language: str) -> None:
    """Raise InvalidRequest where what Kokoro reads a language with is missing, which spaCy would download."""
    if language in "ab":
        needed = {"misaki": "misaki[en]", "spacy": "misaki[en]", "en_core_web_sm": ""}
    else:
        needed = {"misaki": {"j": "misaki[ja]", "z": "misaki[zh]"}.get(language, "misaki[en]")}
    for module, package in needed.items():
        if find_spec(module) is None:
            how = f"pip install '{package}'" if package else f"python -m spacy download {module}"
            raise InvalidRequest(
                f"Kokoro reads texts in this voice's language with {module}, which is not installed: {how}",
                param="voice",
                code="not_installed",
            )


def _check_no_code(folder: Path) -> None:
    """Raise Unavailable for a tokenizer that is code in the model's folder, which mlx-audio would run unasked."""
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if path.is_file() and "auto_map" in json.loads(path.read_text("utf-8")):
            raise Unavailable("the model's tokenizer is code of its own, which is not run for models that transcribe")


def _words(tokens: list[Any]) -> Iterator[Word]:
    """Join tokens to words: each begins with a token that begins with a space."""
    text, start, end = "", 0.0, 0.0
    for token in tokens:
        if token.text.startswith(" ") and text:
            yield Word(text, start, end)
            text = ""
        if not text:
            start = token.start
        text, end = text + token.text.strip(), token.end
    if text:
        yield Word(text, start, end)
