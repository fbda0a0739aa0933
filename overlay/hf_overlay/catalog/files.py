"""Reading one folder: its listing, all files of a model in it, and JSON files."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hf_overlay import hfcache
from hf_overlay.catalog import links
from hf_overlay.errors import check_descriptors, privacy_advice
from hf_overlay.models import Code, File, Reason
from hf_overlay.patience import NoAnswer
from hf_overlay.progress import alive

MAX_JSON_BYTES = 64 * 2**20
"""No real config.json or shard index comes near; a larger one is something else under that name."""
MAX_DEPTH = 50
"""Folders within folders in one model; no real model comes near."""
BROKEN = "is a broken link"
AWAY = "is a link to a file that is not a model's"
"""Ends of sentences that say why a link does not count."""

_DATALESS = 0x40000000
"""macOS: the flag of a file or folder (`stat.SF_DATALESS`) that is not on this machine."""


class Unfit(Exception):
    """A folder holds no model that can be loaded."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.reason = Reason(code, text)


def reason_of(error: Unfit | hfcache.NoSnapshot | OSError) -> Reason:
    """Why a folder is left out, from what reading it raised. Raises OutOfFiles where that tells nothing of it."""
    if isinstance(error, Unfit):
        return error.reason
    if isinstance(error, hfcache.NoSnapshot):
        return Reason(Code.NO_SNAPSHOT, str(error))
    if isinstance(error, NoAnswer):
        return Reason(Code.NO_ANSWER, "does not answer")
    check_descriptors(error)
    if isinstance(error, FileNotFoundError):
        return Reason(Code.MISSING, "does not exist")
    if (advice := privacy_advice(error)) is not None:
        return Reason(Code.NO_PERMISSION, f"cannot be read: macOS does not allow it; {advice}")
    if isinstance(error, PermissionError):
        return Reason(Code.NO_PERMISSION, "cannot be read: permission denied")
    return Reason(Code.UNREADABLE, f"cannot be read: {error.strerror or error}")


class Listing(NamedTuple):
    """The names in one folder by what they are, links followed."""

    files: list[str]
    folders: list[str]
    broken: list[str]
    """Links that lead nowhere."""
    junk: int
    """Number of AppleDouble files."""
    has_links: bool


class Contents(NamedTuple):
    """All that is in a model's folder, at any depth."""

    files: tuple[File, ...]
    """Sorted by name."""
    folders: tuple[str, ...]
    """Absolute paths, the model's own first."""
    junk: int
    """Number of AppleDouble files."""
    has_links: bool
    """Whether any part is reached through a link."""
    left_out: Mapping[str, str]
    """Name of a link that does not count -> the end of a sentence that says why."""


def list_folder(path: str) -> Listing:
    """One folder without dot-names, OS helper files and unfinished downloads. Raises OSError."""
    files, folders, broken, junk, has_links = [], [], [], 0, False
    with os.scandir(path) as entries:
        for entry in entries:
            alive()
            name = entry.name
            if name.startswith("._"):
                junk += 1
            if hfcache.is_junk(name):
                continue
            has_links = has_links or entry.is_symlink()
            try:
                if entry.is_dir():
                    if not name.startswith(".") and name != "__pycache__":
                        folders.append(name)
                elif entry.is_file():
                    files.append(name)
                elif entry.is_symlink():
                    broken.append(name)
            except OSError:  # a link loop, or a target in a folder we may not enter
                broken.append(name)
    return Listing(files, folders, broken, junk, has_links)


def contents(path: str, top: Listing) -> Contents:
    """Everything in the model's folder `path`, whose listing is `top`. Raises Unfit or OSError.

    Left out are files that links lead away to, by the rule of `links`. A config.json among them is Unfit.
    """
    home = ""
    files: list[File] = []
    folders: list[str] = []
    junk = 0
    has_links = False
    left_out: dict[str, str] = {}
    for prefix, folder in _subfolders(path, top):
        folders.append(f"{path}/{prefix}".rstrip("/"))
        junk += folder.junk
        if folder.has_links and not has_links:
            has_links, home = True, links.home_of(path)  # not asked before it is needed: it looks at every folder above
        left_out.update({f"{prefix}{name}": BROKEN for name in folder.broken})
        for name in folder.files:
            # Below a linked folder, whose own files are none, all of them may lie elsewhere.
            if has_links and links.leads_away(path, f"{prefix}{name}", home):
                if not prefix and name == "config.json":
                    raise Unfit(Code.BAD_CONFIG, f"config.json {AWAY}")
                left_out[f"{prefix}{name}"] = AWAY
                continue
            if is_utf8(name):
                status = os.stat(f"{path}/{prefix}{name}")
                alive()
                _refuse_elsewhere(prefix + name, status)
                files.append(File(prefix + name, status.st_size, status.st_mtime_ns))
    return Contents(tuple(sorted(files)), tuple(folders), junk, has_links, left_out)


def _subfolders(path: str, top: Listing) -> Iterator[tuple[str, Listing]]:
    """The model's folder and those inside it as (prefix, listing); linked ones once, never one that holds it."""
    yield "", top
    if not top.folders:
        return
    home = os.path.realpath(path)
    entered = {home}
    pending = [("", top)]
    while pending:
        prefix, folder = pending.pop()
        for name in folder.folders:
            real = os.path.realpath(f"{path}/{prefix}{name}")
            if prefix.count("/") > MAX_DEPTH:
                raise Unfit(Code.TOO_DEEP, f"has folders more than {MAX_DEPTH} deep")
            if is_utf8(name) and real not in entered and not holds(real, home):
                entered.add(real)
                inside = list_folder(f"{path}/{prefix}{name}")
                yield f"{prefix}{name}/", inside
                pending.append((f"{prefix}{name}/", inside))


def holds(folder: str, inner: str) -> bool:
    """Whether one real path is the other or above it."""
    return f"{inner}/".startswith(folder.rstrip("/") + "/")


def is_utf8(name: str) -> bool:
    """Whether a name from the disk is valid UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_elsewhere(name: str, status: os.stat_result) -> None:
    """Raise Unfit for a file whose bytes iCloud keeps: whoever reads it waits until all of them are downloaded."""
    if getattr(status, "st_flags", 0) & _DATALESS:
        raise Unfit(
            Code.INCOMPLETE, f"{name} is in iCloud and not on this Mac; in Finder, choose Keep Downloaded for it"
        )


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises Unfit when it holds none, PermissionError when it may not be read."""
    value = _read(path)
    if not isinstance(value, dict):
        raise Unfit(Code.BAD_CONFIG, f"{os.path.basename(path)} is not a JSON object")
    return value


def read_list(path: str) -> list[Any]:
    """The JSON array in a file. Raises as `read_json`."""
    value = _read(path)
    if not isinstance(value, list):
        raise Unfit(Code.BAD_CONFIG, f"{os.path.basename(path)} is not a JSON array")
    return value


def _read(path: str) -> Any:
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            # Asked first: reading with a limit would set aside the whole of it for each small file.
            status = os.fstat(file.fileno())
            _refuse_elsewhere(name, status)
            is_small = status.st_size <= MAX_JSON_BYTES
            data = file.read() if is_small else b""
    except PermissionError:
        raise  # a matter of the folder, as for any other file
    except OSError as error:
        raise Unfit(Code.BAD_CONFIG, f"{name} {reason_of(error).text}") from error
    if not is_small:
        raise Unfit(Code.BAD_CONFIG, f"{name} is larger than {MAX_JSON_BYTES // 2**20} MiB: not a configuration")
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unfit(Code.BAD_CONFIG, f"{name} is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise Unfit(Code.BAD_CONFIG, f"{name} is not valid JSON ({str(error)[:100]})") from error
