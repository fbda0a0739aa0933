"""Downloads models from the Hub into the real Hugging Face cache, each in a process of its own.

A process can be ended when the server stops. It leaves partial files, which a later download continues.
"""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import hf_overlay

from mlx_overlay_server import children, logs
from mlx_overlay_server.children import Child
from mlx_overlay_server.errors import Forbidden, ServerError, Unavailable, UnknownModel

logger = logging.getLogger("mlx_overlay_server")

LOOK_UPS = 4
"""How many processes ask the Hub at once whether it has a model; further ids wait."""
DOWNLOADS = 4
"""How many models are downloaded at once; further ones wait."""
UNKNOWN_SECONDS = 30.0
"""Seconds for which the Hub is not asked again for a model that it does not have."""
BESIDE = (
    "*_Dense/model.safetensors",  # of modules of sentence-transformers
    "kokoro*.safetensors",
    "voices/*.safetensors",
    "speech_tokenizer/*.safetensors",
)
"""Weights that mlx-lm does not download, and that other models need than its own; all JSON files it does."""
_MAX_UNKNOWN = 10_000
_MAX_ENDED = 20
"""How many ended downloads lists show."""
State = Literal["waiting", "downloading", "done", "cancelled", "failed"]
"""`waiting`: for the Hub's answer, or until fewer downloads run."""
_NOT_FOUND = frozenset({"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"})
_NO_ANSWER = frozenset({"TransportError", "ConnectionError", "Timeout"})
"""The types of errors in httpx and requests that mean that a host cannot be reached."""


class Progress(NamedTuple):
    """How far a download is, or how it ended."""

    id: str
    state: State
    done: int = 0
    """Bytes that have arrived."""
    total: int = 0
    """Bytes of all its files; 0 while that is not known."""
    message: str = ""
    """Why it failed."""


@dataclass(slots=True)
class _Download:
    """A download, or the question to the Hub before it, shared by all who wait for one model."""

    now: Progress
    progress: Callable[[str], None] = lambda _: None
    is_wanted: bool = False
    """Whether it goes on when no request waits for it, even before the Hub has answered."""
    waiting: int = 0
    """Number of callers that wait for it."""
    is_found: bool = False
    """Whether the Hub has the model. From then on the download goes on even if no request waits for it.
    """
    task: asyncio.Task[None] | None = None


class Downloader:
    """Downloads for one overlay session, a few at a time."""

    def __init__(self, session: hf_overlay.Session) -> None:
        self._session = session
        self._running: dict[str, _Download] = {}
        self._past: dict[str, Progress] = {}
        """The last downloads that have ended, by id, oldest first."""
        self._look_ups = asyncio.Semaphore(LOOK_UPS)
        self._downloads = asyncio.Semaphore(DOWNLOADS)
        self._unknown: dict[str, float] = {}
        """Ids that the Hub does not have, with the time of its answer in monotonic seconds; oldest first."""

    @property
    def has_work(self) -> bool:
        """Whether a model is being downloaded, or the Hub is being asked for one."""
        return bool(self._running)

    @property
    def shown(self) -> list[Progress]:
        """The running downloads and the last ones that ended, in the order in which they began."""
        return [*self._past.values(), *(each.now for each in self._running.values())]

    def progress_of(self, model_id: str) -> Progress | None:
        """Return how far a model's download is; None where there was none lately."""
        running = self._running.get(model_id)
        return running.now if running is not None else self._past.get(model_id)

    def start(self, model_id: str) -> None:
        """Begin to download a model, or continue an earlier download; requests need not wait for it.

        Raises UnknownModel when the Hub has said a moment ago that it does not have the model, and Unavailable when
        nothing is downloaded at the moment.
        """
        self._begin(model_id).is_wanted = True

    def cancel(self, model_id: str) -> bool:
        """End a download, and return whether there was one. Its files stay for the next one."""
        download = self._running.get(model_id)
        if download is None or download.task is None:
            return False
        self._end(model_id, download, download.now._replace(state="cancelled"))
        download.task.cancel()
        return True

    async def fetch(self, model_id: str, progress: Callable[[str], None]) -> None:
        """Download a model, and wait for it.

        Raises UnknownModel when the Hub does not have it, Forbidden when it is gated, and Unavailable when the Hub does
        not answer.
        """
        download = self._begin(model_id)
        progress(f"downloading {model_id}")
        assert download.task is not None  # noqa: S101 - set where it began
        download.progress = progress
        download.waiting += 1
        try:
            await asyncio.shield(download.task)
        except asyncio.CancelledError:
            if download.task.done() and download.now.state == "cancelled":
                raise Unavailable(f"the download of {model_id} was cancelled", code="download_cancelled") from None
            raise
        finally:
            download.waiting -= 1
            if not (download.waiting or download.is_found or download.is_wanted):  # nobody need know any more
                self._forget(model_id, download)
                download.task.cancel()

    def _begin(self, model_id: str) -> _Download:
        """Return the download of a model, and begin it unless it runs already. Raises UnknownModel and Unavailable."""
        if (why := self._session.why_no_downloads) is not None:
            raise Unavailable(f"{model_id} is not downloaded: {why}", code="download_refused")
        if self._is_unknown(model_id):
            raise _no_model(model_id, "asked a moment ago")
        download = self._running.get(model_id)
        if download is None:
            download = self._running[model_id] = _Download(Progress(model_id, "waiting"))
            download.task = asyncio.create_task(self._run(model_id, download))
            download.task.add_done_callback(lambda task: self._ended(model_id, download, task))
            self._past.pop(model_id, None)
        return download

    async def close(self) -> None:
        """End all downloads. What they have fetched stays for the next ones."""
        tasks = [each.task for each in self._running.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, model_id: str, download: _Download) -> None:
        async with AsyncExitStack() as held:
            async with self._look_ups:
                child = await held.enter_async_context(
                    children.running(
                        __name__,
                        model_id,
                        environ=self._session.environment,
                        # The session's lock: should the server be killed, the download still needs the session's tree.
                        inherit=(self._session.owner_fd,),
                    )
                )
                reports = _reports(child)
                first: dict[str, Any] = await anext(reports, {})
                if "found" not in first:
                    await self._fail(model_id, child, first)
                await held.enter_async_context(self._downloads)  # the process waits for a line
            download.is_found = True
            self._session.expect_model(model_id)  # only now: clients choose the ids, which must not leave folders
            child.write(b"\n")
            download.now = Progress(model_id, "downloading")
            async for report in reports:
                if "error" in report:
                    await self._fail(model_id, child, report)
                download.now = Progress(model_id, "downloading", report["done"], report["total"])
                download.progress(
                    f"downloading {model_id}: {report['done'] / 1e6:.0f} of {report['total'] / 1e6:.0f} MB"
                )
                logs.downloading(model_id, report["done"], report["total"])
            if await child.wait():
                await self._fail(model_id, child, {})

    async def _fail(self, model_id: str, child: Child, report: Mapping[str, Any]) -> NoReturn:
        """Raise the ServerError that stands for what the process reported, or for its end without a report."""
        error = failure(model_id, report, 0 if report else await child.wait())
        if isinstance(error, UnknownModel):
            self._remember_unknown(model_id)
        raise error

    def _ended(self, model_id: str, download: _Download, task: asyncio.Task[None]) -> None:
        if task.cancelled() or download.now.state == "cancelled":
            self._forget(model_id, download)
            return
        error = task.exception()
        if error is None:
            self._end(model_id, download, download.now._replace(state="done", done=download.now.total))
            return
        message = " ".join(str(error).split())
        self._end(model_id, download, download.now._replace(state="failed", message=message))
        if not download.waiting:
            logger.warning("%s", message)

    def _end(self, model_id: str, download: _Download, last: Progress) -> None:
        """Remember an ended download for lists. One that only requests waited for is left out if it never began."""
        download.now = last
        self._forget(model_id, download)
        if not (
            download.is_wanted or download.is_found
        ):  # clients choose the ids: they must neither be shown to others nor pile up
            return
        self._past.pop(model_id, None)
        if len(self._past) >= _MAX_ENDED:
            del self._past[next(iter(self._past))]
        self._past[model_id] = last

    def _forget(self, model_id: str, download: _Download) -> None:
        if self._running.get(model_id) is download:
            del self._running[model_id]
            logs.download_ended(model_id)

    def _is_unknown(self, model_id: str) -> bool:
        """Return whether the Hub said a moment ago that it has no such model."""
        now = time.monotonic()
        while self._unknown and now - (oldest := next(iter(self._unknown.items())))[1] >= UNKNOWN_SECONDS:
            del self._unknown[oldest[0]]
        return model_id in self._unknown

    def _remember_unknown(self, model_id: str) -> None:
        self._unknown.pop(model_id, None)
        if len(self._unknown) >= _MAX_UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[model_id] = time.monotonic()


def failure(model_id: str, report: Mapping[str, Any], status: int) -> ServerError:
    """Return the error for a process's report, or for its end with `status` and without a report."""
    kind = report.get("error", "")
    if kind == "GatedRepoError":
        return Forbidden(
            f"{model_id} is gated: ask for access on its page on the Hub, then `hf auth login` on the server",
            field="model",
            code="model_gated",
        )
    if kind in _NOT_FOUND:
        return _no_model(model_id, kind)
    message = report["message"] if kind else f"it ended with status {status}"
    if _NO_ANSWER & {*report.get("kinds", ())}:
        message = f"the Hub does not answer ({message}); look at the network, proxies and HF_ENDPOINT"
    return Unavailable(f"{model_id} cannot be downloaded: {message}", code="download_failed")


def _no_model(model_id: str, kind: str) -> UnknownModel:
    return UnknownModel(f"no model {model_id} in the model paths, the cache or on the Hub ({kind})", field="model")


async def _reports(child: Child) -> AsyncIterator[dict[str, Any]]:
    async for line in child.lines():
        yield json.loads(line)


def patterns() -> list[str]:
    """Return the patterns of the files that mlx-lm downloads, read from its source. Raises LookupError.

    Importing mlx-lm, and with it MLX, would take seconds.
    """
    spec = find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise LookupError("mlx-lm is not installed; install mlx-overlay-server again")
    utils = Path(spec.submodule_search_locations[0], "utils.py")
    for statement in ast.parse(utils.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "DEFAULT_ALLOW_PATTERNS":
            return list(ast.literal_eval(statement.value))
    raise LookupError(f"{utils} has no DEFAULT_ALLOW_PATTERNS; install a version of mlx-lm that is supported")


def main() -> int:
    """Run in the process: download the model named by the first argument, and report progress as JSON lines."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: TID251 - the environment is the overlay's by now
    from huggingface_hub.utils import tqdm  # noqa: TID251

    def report(**values: Any) -> None:
        try:
            print(json.dumps(values), flush=True)
        except BrokenPipeError:  # the server was killed: what is under way is still wanted in the cache
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end, when Python flushes it

    class Progress(tqdm):  # type: ignore[misc]
        """Reports bytes, not files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B" and self.total:
                report(done=int(self.n), total=int(self.total))

    try:
        HfApi().model_info(sys.argv[1])
        report(found=True)
        if not sys.stdin.readline():  # waits until the server lets it begin; empty: the server has ended
            return 1
        snapshot_download(sys.argv[1], allow_patterns=[*patterns(), *BESIDE], tqdm_class=Progress)
    except Exception as error:  # noqa: BLE001 - the boundary: the server reports any error to its client
        lines = str(error).strip().splitlines()
        kinds = [each.__name__ for each in type(error).__mro__]
        report(error=kinds[0], kinds=kinds, message=lines[0] if lines else kinds[0])
        return 1
    return 0


class _Nowhere:
    """A file that drops everything: tqdm writes its own progress bar into it."""

    def write(self, _: str) -> None:
        pass

    def flush(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
