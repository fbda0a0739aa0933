"""What scans found, kept for later processes, so that they need not read what has not changed.

A file for each place that is scanned, in a folder of this program's own. Each process looks at every folder and file
of a kept model once, and takes over the model only if all of them look as they did. So a file that is lost, damaged or
old, or that another version wrote, costs the time of reading the models again, and nothing else.

The files are in Python's `marshal` format, which is read in a fifth of the time of JSON. Such data runs nothing, but
must come from no stranger: the folder is this user's alone, and a checksum goes before the data.
"""

from __future__ import annotations

import marshal
import os
import sys
import time
from binascii import crc32
from contextlib import suppress
from typing import Any

from hf_overlay.catalog.memo import Kept, Memo, Stamps
from hf_overlay.catalog.reading import Found
from hf_overlay.catalog.weights import Problems
from hf_overlay.errors import check_descriptors
from hf_overlay.models import File, Model
from hf_overlay.progress import alive
from hf_overlay.trust import why_untrusted

_FORMAT = 4
"""To be raised by each change of what is kept, or of what a scan makes of a folder."""
_FILES = Model._fields.index("files")
_KEPT_SECONDS = 90 * 86_400
"""A file that nothing was written to for so long goes. It is made again where it was still of use."""


class Index:
    """The kept results of scans. Nothing that goes wrong with it is an error."""

    def __init__(self, folder: str, versions: list[object]) -> None:
        """`versions` are what results depend on beside the disk; results of others do not count."""
        self.folder = folder
        self._versions = (_FORMAT, sys.implementation.cache_tag, *versions)

    def load(self, place: tuple[str, ...]) -> tuple[Memo[Found], Problems]:
        """What was kept of a place; nothing where there is none that can be used."""
        try:
            if why_untrusted(self.folder) is None:
                with open(self._path(place), "rb") as file:
                    return self._decoded(place, file.read())
        except OSError as error:
            check_descriptors(error)
        except (ValueError, TypeError, EOFError, IndexError, KeyError, RecursionError):
            pass  # damaged
        return Memo(), Memo()

    def keep(self, place: tuple[str, ...], found: Memo[Found], problems: Problems) -> None:
        """Keep what a scan of a place has found, if it found anything."""
        if not found.kept and not problems.kept:  # perhaps a drive that is away
            return
        path = self._path(place)
        aside = f"{path}.{os.getpid()}"
        try:
            os.makedirs(self.folder, 0o700, exist_ok=True)
            if why_untrusted(self.folder) is not None:
                return
            with open(os.open(aside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                file.write(self._encoded(place, found, problems))
            os.replace(aside, path)
            self._remove_old()
        except OSError as error:
            with suppress(OSError):
                os.unlink(aside)
            check_descriptors(error)

    def _path(self, place: tuple[str, ...]) -> str:
        return f"{self.folder}/{crc32(repr((self._versions, place)).encode('utf-8', 'surrogateescape')):08x}"

    def _encoded(self, place: tuple[str, ...], found: Memo[Found], problems: Problems) -> bytes:
        models = [(path, _fields(kept.value.model), kept.value.junk, kept.stamps) for path, kept in found.kept.items()]
        folders = {kept.value.model.path for kept in found.kept.values()}
        weights = [(path, *kept) for path, kept in problems.kept.items() if os.path.dirname(path) not in folders]
        content = marshal.dumps((repr(self._versions), place, models, weights))
        return b"%08x\n%s" % (crc32(content), content)

    def _decoded(self, place: tuple[str, ...], data: bytes) -> tuple[Memo[Found], Problems]:
        checksum, _, content = data.partition(b"\n")
        if int(checksum, 16) != crc32(content):
            raise ValueError
        versions, of_place, models, weights = marshal.loads(content)  # noqa: S302 - its origin was checked
        if versions != repr(self._versions) or of_place != place:
            raise ValueError
        found = {path: _found(*row) for path, *row in models}
        problems = {path: Kept(value, stamps) for path, value, stamps in weights}
        return Memo(found, is_same=_is_same), Memo(problems)

    def _remove_old(self) -> None:
        oldest = time.time() - _KEPT_SECONDS
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)


def _is_same(_key: str, found: Found) -> bool:
    """Whether each file of a model has the size and time that it had: any may have been written to since."""
    path = found.model.path
    try:
        for name, size, mtime_ns, _ in found.model.files:
            if name == "config.json":  # the stamps of every model tell of it
                continue
            status = os.stat(f"{path}/{name}")
            if status.st_mtime_ns != mtime_ns or status.st_size != size:
                return False
    except OSError as error:
        check_descriptors(error)
        return False
    alive()
    return True


def _fields(model: Model) -> list[Any]:
    """A model as `marshal` takes it, which knows no named tuples."""
    fields: list[Any] = list(model)
    fields[_FILES] = [tuple(file) for file in model.files]
    return fields


def _found(fields: list[Any], junk: int, stamps: Stamps) -> Kept[Found]:
    new = tuple.__new__  # as File._make, which takes twice as long
    fields[_FILES] = tuple([new(File, file) for file in fields[_FILES]])
    return Kept(Found(Model(*fields), junk, None), stamps)
