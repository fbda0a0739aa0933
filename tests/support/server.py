"""A real mlx-omni-server in a process of its own, the clients that ask it, and what they are told."""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client, DefaultHttpx2Client, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support import hubs
from tests.support.processes import PYTHON, SECONDS, environment, eventually, start

_LISTENING = re.compile(r"listening on (http://\S+) ")


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    url: str
    """http://127.0.0.1:PORT, without a slash at its end."""
    openai: OpenAI
    """Tries once, so that every answer is seen, and checks all it is told against the SDK's types."""
    http: httpx2.Client
    """For what the SDK does not send; relative to `url`."""
    api_key: str
    process: Popen[bytes]
    _log: Path

    def log(self) -> str:
        """All that it wrote to stderr so far."""
        return self._log.read_text("utf-8", "replace")

    @property
    def unchecked_openai(self) -> OpenAI:
        """As `openai`, without the check: for what OpenAI itself answers in another shape than its SDK's types have."""
        return self.openai.with_options(_extra_kwargs={"_strict_response_validation": False})

    @asynccontextmanager
    async def async_openai(self) -> AsyncIterator[AsyncOpenAI]:
        """As `openai`, for one event loop."""
        http = DefaultAsyncHttpx2Client(trust_env=False)
        async with AsyncOpenAI(**_openai_options(self.url, self.api_key), http_client=http) as client:
            yield client

    def chat(self, model: str, messages: str | Sequence[Any], **options: Any) -> ChatCompletion:
        """A chat completion; a text is a user's only message."""
        completion: ChatCompletion = self.openai.chat.completions.create(
            model=model, messages=_messages(messages), **options
        )
        return completion

    def chat_stream(self, model: str, messages: str | Sequence[Any], **options: Any) -> list[ChatCompletionChunk]:
        """The same as a stream, read to its end."""
        with self.openai.chat.completions.create(
            model=model, messages=_messages(messages), stream=True, **options
        ) as chunks:
            return list(chunks)

    def chat_answers(
        self, model: str, messages: str | Sequence[Any], *, stream: bool, **options: Any
    ) -> list[ChatAnswer]:
        """What a client makes of a chat completion, streamed or not: its choices."""
        if stream:
            return joined(self.chat_stream(model, messages, **options))
        return [_whole(choice) for choice in self.chat(model, messages, **options).choices]

    def chat_answer(self, model: str, messages: str | Sequence[Any], *, stream: bool, **options: Any) -> ChatAnswer:
        """The same of one choice."""
        (answer,) = self.chat_answers(model, messages, stream=stream, **options)
        return answer

    def complete(self, model: str, prompt: Any, **options: Any) -> Completion:
        """A plain completion."""
        completion: Completion = self.openai.completions.create(model=model, prompt=prompt, **options)
        return completion

    def complete_stream(self, model: str, prompt: Any, **options: Any) -> list[Completion]:
        """The same as a stream, read to its end. Until then `finish_reason` is null, which the SDK's type has not."""
        with self.unchecked_openai.completions.create(model=model, prompt=prompt, stream=True, **options) as chunks:
            return list(chunks)


@dataclass
class ChatAnswer:
    """A choice of a chat completion, as a client shows it."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """(name, arguments) of each tool call."""
    finish: str | None = None


def joined(chunks: Iterable[ChatCompletionChunk]) -> list[ChatAnswer]:
    """A stream put together again; AssertionError where something comes after the end of a choice."""
    answers: dict[int, ChatAnswer] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            answer = answers.setdefault(choice.index, ChatAnswer())
            assert answer.finish is None, "a choice went on after its finish_reason"
            answer.content += choice.delta.content or ""
            answer.reasoning += _reasoning(choice.delta)
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                if call.index == len(answer.calls):
                    answer.calls.append(("", ""))
                name, arguments = answer.calls[call.index]
                answer.calls[call.index] = (
                    name + (call.function.name or ""),
                    arguments + (call.function.arguments or ""),
                )
            answer.finish = choice.finish_reason
    return [answers[index] for index in sorted(answers)]


def _whole(choice: Any) -> ChatAnswer:
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return ChatAnswer(message.content or "", _reasoning(message), calls, choice.finish_reason)


def _reasoning(message: Any) -> str:
    return getattr(message, "reasoning_content", None) or ""


def _messages(messages: str | Sequence[Any]) -> Any:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


@contextmanager
def serving(
    home: Path,
    *model_paths: Path,
    options: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    api_key: str = "any",
    program: Sequence[str] = ("mlx_overlay_server",),
) -> Iterator[Server]:
    """A server with these folders of models, in the environment of somebody whose home is `home`, and `environ`.

    `api_key` is what the clients send, `program` the module that is run, with its first arguments. In the end it is
    told to stop: it must exit 0, leave no session and have logged no traceback.
    """
    home.mkdir(parents=True, exist_ok=True)
    sessions = home / "sessions"
    own = {**hubs.environment(hubs.INSTALLED), "HF_OVERLAY_DIR": str(sessions), **(environ or {})}
    environ = environment(home, **own)
    log = home / f"server-{len(list(home.glob('server-*.log')))}.log"
    folders = [part for path in model_paths for part in ("--model-path", str(path))]
    command = [PYTHON, "-m", *program, "--port", "0", *folders, *options]
    with log.open("wb") as stderr, start(command, environ, stderr=stderr) as process:
        url = _listening(process, log)
        with ExitStack() as clients:
            http = clients.enter_context(DefaultHttpx2Client(trust_env=False))
            openai = clients.enter_context(OpenAI(**_openai_options(url, api_key), http_client=http))
            raw = clients.enter_context(httpx2.Client(base_url=url, timeout=SECONDS, trust_env=False))
            server = Server(url, openai, raw, api_key, process, log)
            yield server
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0, f"the server exited {process.returncode}: {server.log()}"
        assert "Traceback" not in server.log(), server.log()
        assert not list(sessions.glob("session-*")), "the server left its session behind"


def _listening(process: Popen[bytes], log: Path) -> str:
    found: list[str] = []

    def has_started() -> bool:
        said = log.read_text("utf-8", "replace")
        found.extend(_LISTENING.findall(said))
        assert found or process.poll() is None, f"the server exited {process.returncode}: {said}"
        return bool(found)

    eventually(has_started, "the server says that it listens")
    return found[0]


def _openai_options(url: str, api_key: str) -> dict[str, Any]:
    return {
        "base_url": f"{url}/v1",
        "api_key": api_key,
        "max_retries": 0,
        "timeout": SECONDS,
        "_strict_response_validation": True,
    }
