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
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import hf_overlay

from mlx_overlay_server.errors import Forbidden, Unavailable, UnknownModel

logger = logging.getLogger("mlx_overlay_server")

_NOT_FOUND = frozenset({"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"})


class Downloader:
    """Downloads for one overlay session."""

    def __init__(self, session: hf_overlay.Session) -> None:
        self._session = session

    async def fetch(self, model_id: str, progress: Callable[[str], None]) -> None:
        """Download a model.

        Raises UnknownModel when the Hub has none, Forbidden for one that is gated, Unavailable when it does not answer.
        """
        if (why := self._session.why_no_downloads) is not None:
            raise Unavailable(f"{model_id} is not downloaded: {why}", code="download_refused")
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
        logged = -1  # percent
        try:
            async for line in process.stdout:
                report = json.loads(line)
                if "error" in report:
                    problem = (report["error"], report["message"])
                    continue
                if "found" in report:  # only now: ids are what clients send, and must not leave folders in a cache
                    self._session.expect_model(model_id)
                    process.stdin.write(b"\n")
                    continue
                progress(f"downloading {model_id}: {report['done'] / 1e6:.0f} of {report['total'] / 1e6:.0f} MB")
                if (percent := report["done"] * 10 // max(report["total"], 1) * 10) != logged:
                    logged = percent
                    logger.info("downloading %s: %d %% of %.1f MB", model_id, percent, report["total"] / 1e6)
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
    """Download the model named by the first argument, and report progress as JSON lines; runs in the process."""
    from typing import Any

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
        if not sys.stdin.readline():  # waits for a place in the cache; '' means that the server has ended
            return 1
        snapshot_download(sys.argv[1], allow_patterns=patterns(), tqdm_class=Progress)
    except Exception as error:  # noqa: BLE001 - the boundary: the server reports any error to its client
        lines = str(error).strip().splitlines()
        report(error=type(error).__name__, message=lines[0] if lines else type(error).__name__)
        return 1
    return 0


class _Nowhere:
    """A file for tqdm's own progress bar, which nobody sees."""

    def write(self, _: str) -> None:
        pass

    def flush(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
