"""The configuration file: TOML that says once for all which folders there are.

    model_path = ["/Volumes/LLMS/models", "~/models"]
    below = ["/shared/huggingface/hub"]
    exclude = ["org/name"]

    [map]
    "org/name" = "/data/my-model"

    [server]
    default_model = "org/name"

The last table is for mlx-omni-server, which reads it itself.
Every mistake in it is a UsageError that names the file, the line, and what to do.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping, Sequence

from hf_overlay import config
from hf_overlay.config import ConfigFile
from hf_overlay.errors import UsageError, check_descriptors

MAX_BYTES = 1 << 20
"""No file that a person writes is larger; a larger one is something else under that name."""
_LISTS = {"model_path": "folders", "below": "folders", "exclude": "ids"}
"""Settings that are lists of texts, and of what."""
_TABLES = ("map", "server")
_KEYS = (*_LISTS, *_TABLES)


def read(environ: Mapping[str, str]) -> ConfigFile:
    """Read the configuration file of an environment; it need not exist. Raises UsageError for a mistake in it."""
    path = config.file_path(environ)
    if path is None:
        return config.NO_FILE
    try:
        text = read_file(path).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if config.FILE_VARIABLE in environ:
            raise UsageError(f"{config.FILE_VARIABLE} names {path}, which is not there; correct or unset it") from None
        return ConfigFile(path)
    except OSError as error:
        check_descriptors(error)
        raise UsageError(
            f"cannot read {path}: {error.strerror}; correct that, or go without it: {config.FILE_VARIABLE}="
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: this is not UTF-8; save the file as UTF-8") from error
    return parse(path, text)


def read_file(path: str) -> bytes:
    """All of a file that a person has written. Raises OSError, also for what no person writes, such as a pipe."""
    with open(path, "rb", opener=_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", path)
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"Larger than {MAX_BYTES >> 20} MiB", path)
    return content


def _at_once(path: str, flags: int) -> int:
    """Open a file; where it is a pipe, without waiting for somebody to write into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse(path: str, text: str) -> ConfigFile:
    """The settings in the text of a configuration file. Raises UsageError."""
    import tomllib  # some milliseconds, for those who have such a file

    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).partition(" (at ")
        line = re.search(r"line (\d+)", where)
        number = int(line[1]) if line else len(text.splitlines())
        raise UsageError(f"{path}:{number}: this is not TOML ({what}); correct the line") from error
    for key, value in found.items():
        if (mistake := _mistake(key, value)) is not None:
            raise UsageError(f"{path}:{line_of(text, key)}: {mistake}")
    for name, folder in found.get("map", {}).items():
        if (mistake := _not_mapped(name, folder)) is not None:
            raise UsageError(f"{path}:{line_of(text, 'map', name)}: {mistake}")
    lists = {key: tuple(found.get(key, ())) for key in _LISTS}
    return ConfigFile(path, text, map=found.get("map", {}), server=found.get("server", {}), **lists)


def line_of(text: str, *keys: str) -> int:
    """The number of the line at which a key's statement begins; further keys are those of the table below it.

    The parser tells no lines. So the beginning of the text is read up to a line in the middle of those in question: the
    statement is before that line if the key is there, else after it.
    """
    lines = text.splitlines(keepends=True)
    begin, end = 0, len(lines)
    while end - begin > 1:
        middle = (begin + end) // 2
        # Where no statement ends at the line in the middle, the next line counts at which one does.
        cuts = ((cut, tables) for cut in range(middle, end) if (tables := _tables(lines[:cut])) is not None)
        cut, tables = next(cuts, (middle, None))
        if tables is None or _holds(tables, keys):
            end = middle
        else:
            begin = cut
    return begin + 1


def _tables(lines: Sequence[str]) -> dict[str, object] | None:
    """What the first lines of a file say; None where they end in the middle of a statement."""
    import tomllib

    try:
        return tomllib.loads("".join(lines))
    except tomllib.TOMLDecodeError:
        return None


def _holds(tables: object, keys: Sequence[str]) -> bool:
    return not keys or (isinstance(tables, dict) and keys[0] in tables and _holds(tables[keys[0]], keys[1:]))


def _mistake(key: str, value: object) -> str | None:
    """What is wrong with a setting, and what to do; None when nothing is."""
    if key not in _KEYS:
        from difflib import get_close_matches

        near = get_close_matches(key.replace("-", "_"), _KEYS, 1)
        return f"there is no setting {key!r}; " + (f"write {near[0]}" if near else f"there are {', '.join(_KEYS)}")
    if key in _TABLES and isinstance(value, dict):
        return None
    if key == "server":
        return "server must be a table; write [server], and below it the server's settings"
    if key == "map":
        return 'map must be a table of folders; write [map], and below it "org/name" = "/data/my-model"'
    if not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        return f'{key} must be a list of {_LISTS[key]}; write {key} = ["…", "…"]'
    return next((mistake for each in value if (mistake := _not_good(key, each))), None)


def _not_mapped(name: str, folder: object) -> str | None:
    """What is wrong with a line of the table of maps, and what to do; None when nothing is."""
    if name in _KEYS:
        return f"{name} is in the table map; put it above [map]"
    if not isinstance(folder, str):
        return f'{name!r} must lead to a folder; write "{name}" = "/data/my-model"'
    return config.why_not_mappable(name) or _not_good("map", folder)


def _not_good(key: str, text: str) -> str | None:
    if not text or "\0" in text:
        return f"{key} holds an empty or malformed text, {text!r}; remove it"
    if key != "exclude" and not (os.path.isabs(text) or text.startswith("~")):
        return f"{text!r} is a relative path; write the whole path, or one that begins with ~/"
    return None
