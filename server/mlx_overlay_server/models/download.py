"""Models that are nowhere here, from the Hub into the real Hugging Face cache: by a process of its own.

A process can be ended when the server stops, and leaves partial files that a later download goes on with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable

import hf_overlay

from mlx_overlay_server.errors import Forbidden, Unavailable, UnknownModel

logger = logging.getLogger("mlx_overlay_server")

PATTERNS = (
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)
"""What mlx-lm fetches (mlx_lm/utils.py, `_download`)."""
_NOT_FOUND = frozenset({"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"})


class Downloader:
    """Downloads for one overlay session."""

    def __init__(self, session: hf_overlay.Session) -> None:
        self._session = session

    async def fetch(self, model_id: str, progress: Callable[[str], None]) -> None:
        """Download a model.

        Raises UnknownModel when the Hub has none, Forbidden for one that is gated, Unavailable when it does not answer.
        """
        progress(f"downloading {model_id}")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mlx_overlay_server.models.download",
            model_id,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._session.environment,
            pass_fds=(self._session.owner_fd,),  # if this process is killed, the download goes on, and needs its tree
        )
        assert process.stdin is not None  # noqa: S101 - asked for below, as the next
        assert process.stdout is not None  # noqa: S101
        problem: tuple[str, str] | None = None
        said = -1
        try:
            async for line in process.stdout:
                told = json.loads(line)
                if "error" in told:
                    problem = (told["error"], told["message"])
                    continue
                if "found" in told:  # only now: ids are what clients send, and must not leave folders in a cache
                    self._session.expect_model(model_id)
                    process.stdin.write(b"\n")
                    continue
                progress(f"downloading {model_id}: {told['done'] / 1e6:.0f} of {told['total'] / 1e6:.0f} MB")
                if (percent := told["done"] * 10 // max(told["total"], 1) * 10) != said:
                    said = percent
                    logger.info("downloading %s: %d %% of %.1f MB", model_id, percent, told["total"] / 1e6)
            await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        if problem is None and process.returncode == 0:
            return
        kind, message = problem or ("", f"it ended with status {process.returncode}")
        if kind == "GatedRepoError":
            raise Forbidden(
                f"{model_id} is gated: ask for access on its page on the Hub, then `hf auth login` on the server",
                field="model",
                code="model_gated",
            )
        if kind in _NOT_FOUND:
            raise UnknownModel(
                f"no model {model_id} in the model paths, the cache or on the Hub ({kind})", field="model"
            )
        raise Unavailable(f"{model_id} cannot be downloaded: {message}", code="download_failed")


def main() -> int:
    """In the process: download the model named by the first argument; say how it goes as JSON lines."""
    from typing import Any

    from huggingface_hub import HfApi, snapshot_download  # noqa: TID251 - the environment is the overlay's by now
    from huggingface_hub.utils import tqdm  # noqa: TID251

    def say(**words: Any) -> None:
        try:
            print(json.dumps(words), flush=True)
        except BrokenPipeError:  # the server was killed: what is under way is still wanted in the cache
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end, when Python flushes it

    class Progress(tqdm):  # type: ignore[misc]
        """Tells of bytes, not of files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B" and self.total:
                say(done=int(self.n), total=int(self.total))

    try:
        HfApi().model_info(sys.argv[1])
        say(found=True)
        if not sys.stdin.readline():  # waits until there is a place for it; nothing: the server has ended
            return 1
        snapshot_download(sys.argv[1], allow_patterns=list(PATTERNS), tqdm_class=Progress)
    except Exception as error:  # noqa: BLE001 - the boundary: whatever it is, the server tells its client
        lines = str(error).strip().splitlines()
        say(error=type(error).__name__, message=lines[0] if lines else type(error).__name__)
        return 1
    return 0


class _Nowhere:
    """Where tqdm's own bar goes."""

    def write(self, _: str) -> None:
        pass

    def flush(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
