"""Transcripts as clients ask for them: JSON, plain text, and subtitles."""

from __future__ import annotations

from typing import Literal, NotRequired

from starlette.responses import Response
from typing_extensions import TypedDict

from mlx_overlay_server.api.transport import answer
from mlx_overlay_server.speech.values import Segment, Transcript

TranscriptFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
TIMED: frozenset[TranscriptFormat] = frozenset({"srt", "verbose_json", "vtt"})
"""The formats that say when each segment is said."""


class Seconds(TypedDict):
    """What was heard, as OpenAI counts it."""

    type: Literal["duration"]
    seconds: int


class TranscriptAnswer(TypedDict):
    """`json`."""

    text: str
    usage: NotRequired[Seconds]


class WordAnswer(TypedDict):
    """When a word is said."""

    word: str
    start: float
    end: float


class SegmentAnswer(TypedDict):
    """When a segment is said. What else the model tells of it, such as Whisper's `avg_logprob`, is there too."""

    id: int
    start: float
    end: float
    text: str


class VerboseAnswer(TypedDict):
    """`verbose_json`."""

    task: str
    language: str | None
    duration: float
    text: str
    segments: NotRequired[list[SegmentAnswer]]
    words: NotRequired[list[WordAnswer]]
    usage: NotRequired[Seconds]


def encoded(transcript: Transcript, form: TranscriptFormat, task: str, *, words: bool, segments: bool) -> Response:
    """Return a transcript in one of the formats; `words` and `segments` are what `verbose_json` is to hold."""
    if form == "text":
        return Response(f"{transcript.text}\n", media_type="text/plain; charset=utf-8")
    if form == "srt":
        return Response(srt(transcript.segments), media_type="application/x-subrip; charset=utf-8")
    if form == "vtt":
        return Response(vtt(transcript.segments), media_type="text/vtt; charset=utf-8")
    usage: Seconds = {"type": "duration", "seconds": round(transcript.seconds)}
    if form == "json":
        plain: TranscriptAnswer = {"text": transcript.text, "usage": usage}
        return answer(plain)
    told: VerboseAnswer = {
        "task": task,
        "language": transcript.language,
        "duration": round(transcript.seconds, 2),
        "text": transcript.text,
        "usage": usage,
    }
    if segments:
        told["segments"] = [_segment(number, each) for number, each in enumerate(transcript.segments)]
    if words:
        told["words"] = [
            {"word": word.word, "start": round(word.start, 2), "end": round(word.end, 2)}
            for each in transcript.segments
            for word in each.words
        ]
    return answer(told)


def srt(segments: tuple[Segment, ...]) -> str:
    """Return segments as SubRip subtitles."""
    return "\n".join(
        f"{number}\n{_time(each.start, ',')} --> {_time(each.end, ',')}\n{_line(each)}\n"
        for number, each in enumerate(segments, 1)
    )


def vtt(segments: tuple[Segment, ...]) -> str:
    """Return segments as WebVTT subtitles."""
    cues = (f"\n{_time(each.start, '.')} --> {_time(each.end, '.')}\n{_escaped(_line(each))}\n" for each in segments)
    return "WEBVTT\n" + "".join(cues)


def _segment(number: int, segment: Segment) -> SegmentAnswer:
    told: SegmentAnswer = {
        "id": number,
        "start": round(segment.start, 2),
        "end": round(segment.end, 2),
        "text": segment.text,
    }
    told.update(segment.details)  # type: ignore[typeddict-item] # what models tell differs
    return told


def _line(segment: Segment) -> str:
    """Return a segment's text as one line: an empty one would end a subtitle, and an arrow begin another."""
    return " ".join(segment.text.split()).replace("-->", "->")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _time(seconds: float, point: str) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
