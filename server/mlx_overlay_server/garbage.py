"""When Python's garbage collector runs, and what it looks at.

It stops all threads, and a full pass goes through every object in its sight: a fifth of a second with all modules
imported, and as much for a large request that is being decoded, which makes objects fast enough for several passes. So
passes are rare here, and what is there to stay, the modules and the loaded models, is out of their sight. Most objects
do not need the collector: they are freed when the last reference to them goes.
"""

from __future__ import annotations

import gc

_THRESHOLDS = (10_000, 10, 50)
"""The objects more than there were, after which the newest are looked at; how many such looks lead to one at the next
older objects; and how many of these to one at all (https://docs.python.org/3/library/gc.html#gc.set_threshold).
"""


def begin() -> None:
    """Let the collector run as a server needs it, and pass over everything that has been made until now."""
    gc.set_threshold(*_THRESHOLDS)
    keep()


def keep() -> None:
    """Let the collector pass over every object that is there now, garbage included, until `collect`."""
    gc.freeze()


def collect() -> None:
    """Free what nothing refers to any more, wherever it is, and pass over the rest from now on."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
