"""The server with a watch on its event loop: the longest piece of work that kept everything else waiting.

Run as `python -m tests.support.stalls FILE ARGUMENT…`, it is mlx-omni-server with these arguments, and FILE always
holds the longest stall so far, in seconds. A stall counts as long as it took and at most the processor time that the
loop's thread spent in it: what others on the machine take from it is not the server's doing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from mlx_overlay_server.service import Service

BEAT_SECONDS = 0.005


async def _watch(file: Path) -> None:
    longest = 0.0
    while True:
        begun, spent = time.monotonic(), time.thread_time()
        await asyncio.sleep(BEAT_SECONDS)
        stall = min(time.monotonic() - begun - BEAT_SECONDS, time.thread_time() - spent)
        if stall > longest:
            longest = stall
            file.write_text(f"{longest:.4f}")


def longest_stall(file: Path) -> float:
    """Return the longest stall so far, in seconds, of the server that writes to a file."""
    return float(file.read_text())


def main(file: Path, arguments: list[str]) -> int:
    """Run the server."""
    from mlx_overlay_server.cli import main as serve

    original = Service.start
    tasks: list[asyncio.Task[None]] = []

    def start(self: Service) -> None:
        original(self)
        tasks.append(asyncio.get_running_loop().create_task(_watch(file)))

    Service.start = start  # type: ignore[method-assign]
    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
