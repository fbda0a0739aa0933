"""What is asked of a model that transcribes or speaks, and what it answers; fields are named as in OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from hf_overlay import Task

OF_SPEECH: frozenset[Task] = frozenset({"transcription", "speech"})
"""What the models do that run in processes of their own."""

SoundFormat = Literal["wav", "flac", "mp3", "opus", "pcm"]
"""The form of spoken text; `opus` is in an Ogg file, `pcm` is 16 bits a sample at 24 kHz without a head."""


@dataclass(frozen=True, slots=True)
class TranscribeRequest:
    """The text of a recording."""

    task: ClassVar[Task] = "transcription"
    model: str
    language: str | None = None
    """The language that is spoken, as a code or in English; None: the model finds out."""
    prompt: str | None = None
    """A text that goes before, for the spelling of names and the style."""
    temperature: float | None = None
    to_english: bool = False
    """Whether to translate what is said."""
    times: bool = False
    """Whether the client needs to know when each segment is said."""
    words: bool = False
    """Whether it needs to know the same of each word."""
    streams: bool = False
    """Whether the client wants the text piece by piece, as it is heard."""


@dataclass(frozen=True, slots=True)
class SpeakRequest:
    """A text, spoken."""

    task: ClassVar[Task] = "speech"
    model: str
    input: str
    voice: str
    speed: float = 1.0
    instructions: str | None = None
    """How to speak."""
    response_format: SoundFormat = "mp3"


SpeechRequest = TranscribeRequest | SpeakRequest


class Word(NamedTuple):
    """One word of a transcript."""

    word: str
    start: float
    """When it begins, in seconds."""
    end: float


class Segment(NamedTuple):
    """A part of a transcript: a sentence or so."""

    text: str
    start: float
    """When it begins, in seconds."""
    end: float
    words: tuple[Word, ...] = ()
    details: Mapping[str, object] = {}
    """What else the model tells of it, named as in OpenAI's API."""

    def later(self, seconds: float) -> Segment:
        """Return the same, as part of a recording in which it comes later by some seconds."""
        words = tuple(Word(each.word, each.start + seconds, each.end + seconds) for each in self.words)
        return self._replace(start=self.start + seconds, end=self.end + seconds, words=words)


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is said in a recording."""

    text: str
    seconds: float
    """The recording's length."""
    language: str | None = None
    """In English, lower case; None: the model does not say."""
    segments: tuple[Segment, ...] = field(default=())
    """Empty where the model tells no times."""


class Sound(NamedTuple):
    """A piece of what is spoken."""

    data: bytes
    """Bytes of a file, or samples, in the format that was asked for."""
    seconds: float
    """How long it takes to say."""


Piece = Transcript | Sound | str
"""What a request comes to, piece by piece: a text that is heard, then the whole transcript; or sound."""


@dataclass(frozen=True, eq=False)
class LoadedSpeech:
    """A resident model that transcribes or speaks: it is in the memory of a process of its own."""

    key: str
    """From `Loader.new_key`."""
    path: str
    """Its folder."""
    task: Task
    nbytes: int
    """Bytes that its process may take."""
    sees: ClassVar[bool] = False
    context: ClassVar[None] = None
    """Tokens that it takes at once, which nobody counts."""
