"""How a command ends: here, and nowhere else, errors become a line on stderr and an exit status."""

from __future__ import annotations

from collections.abc import Callable

from hf_overlay import streams
from hf_overlay.errors import OverlayError, UsageError


def exit_status(command: Callable[[], int], say: Callable[[str], None]) -> int:
    """Run a command and return its exit status: 0 done, 1 an expected failure, 2 a usage error, 130 after Ctrl-C.

    `say` tells a person what went wrong. argparse ends `--help` and mistakes on the command line by SystemExit.
    """
    try:
        try:
            return command()
        finally:
            streams.flush()
    except OverlayError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:  # such as a full disk that the output goes to
        streams.discard(1)
        if isinstance(error, BrokenPipeError):  # the reader has gone, as in `hf-overlay ls | head`
            return 0
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
