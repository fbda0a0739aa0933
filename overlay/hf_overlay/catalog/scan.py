"""From folders to models: which ones hold a model somebody can load, and why each other one does not.

A scan reads and never writes. It collects what is broken and goes on, so that one bad folder hides only itself.
A `Scanner` remembers the folders it has seen; scanning again costs two `stat` calls for an unchanged model.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from hf_overlay import hfcache
from hf_overlay.catalog.kinds import ModelTypes
from hf_overlay.config import OWNER_FILE
from hf_overlay.models import File, Model, Reject, Source

MAX_JSON_BYTES = 64 * 2**20
"""No real config.json or shard index comes near; a larger one is something else under that name."""
MAX_DEPTH = 50
"""Folders within folders in one model; no real model comes near."""
SETTLED_SECONDS = 600
"""Files untouched for so long are taken as unchanged while their folder and config.json are (see `_Seen`)."""

_MARKERS = ("config.json", "model_index.json")
_MARKERS_OF_OTHER_KINDS = ("modules.json", "config_sentence_transformers.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".npz", ".pt", ".pth", ".onnx", ".mlpackage")
_SYSTEM_FOLDERS = frozenset({"$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", "__pycache__"})
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class _Unfit(Exception):
    """Internal: this folder is no model, for the reason in the text."""


class _Seen(NamedTuple):
    """An accepted model, with what must be unchanged for it to be the same without looking at each file.

    Adding, removing or renaming a file changes its folder's times. Writing into an existing file does not, so a
    model counts as seen only once all of its files are old (nobody is copying it), and config.json, which every
    tool that writes models rewrites, is looked at each time.
    """

    model: Model
    stamps: tuple[tuple[str, tuple[int, int, int, int]], ...]
    junk: int


class Scanner:
    """Scans model paths, again and again, at a cost that follows the changes."""

    def __init__(self, roots: tuple[str, ...], hub_cache: str, types: ModelTypes | None) -> None:
        """`types` None takes every kind of model. `hub_cache` found inside a root stays the cache's."""
        self._roots = roots
        self._hub_cache = hub_cache
        self._types = types
        self._seen: dict[str, _Seen] = {}
        self._seen_cached: dict[str, _Seen] = {}

    def scan(self) -> tuple[Source, ...]:
        """Each root in order; never raises for what lies on the disk."""
        before, self._seen = self._seen, {}
        return tuple(_Walk(self, root, before, self._seen).source() for root in self._roots)

    def scan_cache(self) -> Source:
        """The real cache's models, as `mlx_lm.load(id)` would find them with the network down."""
        seen: dict[str, _Seen] = {}
        found = _Walk(self, self._hub_cache, self._seen_cached, seen).cache()
        self._seen_cached = seen  # replaced as a whole: other threads read it
        return found

    def read(self, path: str, model_id: str, root: str) -> Model | Reject:
        """What the folder `path` of a model path is, for an id asked for; one that scans pass over has a reason too."""
        try:
            return _Walk(self, root, {}, {}).model(path, model_id, _list(path), "custom")
        except (_Unfit, OSError) as error:
            return Reject(path, model_id, _reason(error), root)

    def read_cached(self, model_id: str) -> Model | Reject:
        """What the real cache holds under one id."""
        walk = _Walk(self, self._hub_cache, {}, {})
        repo = f"{self._hub_cache}/{hfcache.repo_folder(model_id)}"
        if not os.path.isdir(repo):
            return Reject(repo, model_id, "does not exist", self._hub_cache)
        return walk.snapshot(repo, model_id, "cache")

    @property
    def types(self) -> ModelTypes | None:
        return self._types

    @property
    def hub_cache(self) -> str:
        return self._hub_cache


class _Folder(NamedTuple):
    """One directory listing, links followed; what a name is, not yet how large."""

    files: list[str]
    folders: list[str]
    broken: list[str]
    junk: int
    has_links: bool


class _Walk:
    """One scan of one root."""

    def __init__(self, scanner: Scanner, root: str, before: dict[str, _Seen], after: dict[str, _Seen]) -> None:
        self._types = scanner.types
        self._hub_cache = scanner.hub_cache
        self._root = root
        self._before = before
        self._after = after
        self._real_root = os.path.realpath(root)
        self._models: list[Model] = []
        self._rejects: list[Reject] = []
        self._junk = 0

    def source(self) -> Source:
        try:
            status = os.stat(self._root)
            if not stat.S_ISDIR(status.st_mode):
                return Source(self._root, "is not a folder")
            top = _list(self._root)
        except OSError as error:
            return Source(self._root, _reason(error))
        if "config.json" in top.files and any(name.endswith(".safetensors") for name in top.files):
            self._reject(self._root, None, "is itself a model folder; give the folder above it as model path")
        self._walk(top, (status.st_dev, status.st_ino))
        return self._result(status.st_dev)

    def cache(self) -> Source:
        try:
            status = os.stat(self._root)
            names = sorted(os.listdir(self._root))
        except FileNotFoundError:
            return Source(self._root, None)
        except OSError as error:
            return Source(self._root, _reason(error))
        for name in names:
            model_id = hfcache.model_id(name)
            repo = f"{self._root}/{name}"
            if model_id is not None and not self._unchanged(repo):
                self._take(self.snapshot(repo, model_id, "cache"))
        return self._result(status.st_dev)

    def _result(self, device: int) -> Source:
        return Source(
            self._root,
            None,
            models=tuple(sorted(self._models, key=self._precedence)),
            rejects=tuple(sorted(self._rejects, key=lambda reject: reject.path)),
            junk=self._junk,
            device=device,
        )

    def _precedence(self, model: Model) -> tuple[str, bool, str]:
        """In one root a plain folder comes before a repo in cache layout, then the path decides."""
        return model.id, model.path != f"{self._root}/{model.id}", model.path

    def _reject(self, path: str, model_id: str | None, reason: str) -> None:
        self._rejects.append(Reject(path, model_id, reason, self._root))

    # Folders -------------------------------------------------------------------------------------------------

    def _walk(self, top: _Folder, identity: tuple[int, int]) -> None:
        """Depth first through the folders that group models; `chain` holds the folders above, to end loops."""
        hub_identity = _identity(self._hub_cache)
        linked: set[tuple[int, int]] = set()
        pending: list[tuple[str, _Folder, tuple[tuple[int, int], ...]]] = [("", top, (identity,))]
        if identity == hub_identity:
            self._reject(self._root, None, "is the Hugging Face cache itself, which is always looked at")
            return
        while pending:
            group, folder, chain = pending.pop()
            self._junk += folder.junk
            for name in sorted(folder.folders, reverse=True):
                model_id = f"{group}/{name}" if group else name
                path = f"{self._root}/{model_id}"
                if self._unchanged(path) or hfcache.is_other_repo(name):
                    continue
                try:
                    name.encode("utf-8")
                    if "\\" in name:
                        raise _Unfit("has a backslash in its name, which no id may have; rename it")
                    status = os.stat(path)
                    inside = _list(path)
                except UnicodeEncodeError:
                    self._reject(path, None, "its name is not valid UTF-8; rename it")
                    continue
                except _Unfit as error:
                    self._reject(path, None, str(error))
                    continue
                except OSError as error:
                    self._reject(path, model_id, _reason(error))
                    continue
                here = (status.st_dev, status.st_ino)
                if here == hub_identity or OWNER_FILE in inside.files:
                    continue
                cached_id = hfcache.model_id(name)
                if cached_id is not None and "snapshots" in inside.folders:
                    self._take(self.snapshot(path, cached_id, "custom"))
                elif not self._is_model(path, model_id, inside):
                    if here in chain or (os.path.islink(path) and _holds(os.path.realpath(path), self._real_root)):
                        self._reject(path, None, "is a link back to a folder above it")
                    elif os.path.islink(path) and here in linked:
                        self._reject(path, None, "links to a folder that another link has shown already")
                    else:
                        if os.path.islink(path):
                            linked.add(here)
                        pending.append((model_id, inside, (*chain, here)))

    def _is_model(self, path: str, model_id: str, folder: _Folder) -> bool:
        """Take the folder as a model, or reject it as one; False: look for models inside it."""
        is_pipeline = "model_index.json" in folder.files
        has_weights = any(name.endswith(_WEIGHTS) for name in folder.files)
        if not is_pipeline and not has_weights and not self._has_marker(folder):
            return False
        try:
            model = self.model(path, model_id, folder, "custom")
        except (_Unfit, OSError) as error:
            self._reject(path, model_id, _reason(error))
            # A stray config.json in a folder of models must not hide them; a model's own subfolders stay its own.
            return is_pipeline or (has_weights and "config.json" in folder.files) or not folder.folders
        self._models.append(model)
        return True

    def _has_marker(self, folder: _Folder) -> bool:
        markers = _MARKERS if self._types else _MARKERS + _MARKERS_OF_OTHER_KINDS
        return any(marker in folder.files for marker in markers)

    def _take(self, found: Model | Reject) -> None:
        if isinstance(found, Model):
            self._models.append(found)
        else:
            self._rejects.append(found)

    def snapshot(self, repo: str, model_id: str, source: Literal["custom", "cache"]) -> Model | Reject:
        """A repo folder in Hugging Face cache layout: its main revision is the model."""
        try:
            commit = hfcache.main_commit(repo, any_single=source == "custom")
            path = hfcache.snapshot(repo, commit)
            model = self.model(path, model_id, _list(path), source, commit)
            if source == "cache" and _is_settled(model):
                folders = {os.path.dirname(f"{path}/{file.name}") for file in model.files}
                watched = (*hfcache.watched(repo), f"{path}/config.json", *sorted(folders))
                self._after[repo] = _Seen(model, tuple((name, _stamp(name)) for name in watched), 0)
            return model
        except (_Unfit, hfcache.NoSnapshot, OSError) as error:
            return Reject(repo, model_id, _reason(error), self._root)

    # Models --------------------------------------------------------------------------------------------------

    def model(
        self,
        path: str,
        model_id: str,
        folder: _Folder,
        source: Literal["custom", "cache"],
        commit: str | None = None,
    ) -> Model:
        """The model in a listed folder. Raises _Unfit or OSError when it holds none that loads."""
        if not self._has_marker(folder):
            formats = {name.rsplit(".", 1)[1] for name in folder.files if name.endswith(_WEIGHTS)}
            raise _Unfit("has no config.json" + (f" (only .{', .'.join(sorted(formats))} files)" if formats else ""))
        config = _read_json(f"{path}/config.json") if "config.json" in folder.files else {}
        if self._types is not None:
            if "config.json" not in folder.files:
                raise _Unfit("is a diffusers pipeline, which mlx-lm does not load; --all-kinds takes it")
            if (reason := self._types.why_not(config)) is not None:
                raise _Unfit(reason)
        files, folders, junk, has_links = _files(path, folder)
        _check_weights(path, files, folder.broken, required=self._types is not None)
        if source == "custom":
            files, commit = _identified(path, files, commit)
        model_type = config.get("model_type")
        model = Model(
            id=model_id,
            source=source,
            path=path,
            model_type=model_type if isinstance(model_type, str) else None,
            size_bytes=sum(file.size for file in files),
            files=files,
            root=self._root,
            commit=commit,
        )
        self._junk += junk
        if source == "custom" and not has_links and _is_settled(model):
            watched = [*folders, *(f"{path}/{name}" for name in _MARKERS if name in folder.files)]
            watched += hfcache.local_dir_records(path) if commit is not None else ()
            self._after[path] = _Seen(model, tuple((name, _stamp(name)) for name in watched), junk)
        return model

    def _unchanged(self, path: str) -> bool:
        """Take over what the scan before found at `path`, if nothing there moved since."""
        seen = self._before.get(path)
        if seen is None:
            return False
        try:
            if any(_stamp(name) != stamp for name, stamp in seen.stamps):
                return False
        except OSError:
            return False
        self._after[path] = seen
        self._models.append(seen.model)
        self._junk += seen.junk
        return True


def _is_settled(model: Model) -> bool:
    """Whether nobody has written to any file for long enough."""
    return max(file.mtime_ns for file in model.files) < time.time_ns() - SETTLED_SECONDS * 10**9


def _list(path: str) -> _Folder:
    """One directory, without what is never part of a model: dot-names, OS helper files, unfinished downloads."""
    files, folders, broken, junk, has_links = [], [], [], 0, False
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("._"):
                junk += 1
            if hfcache.is_junk(name):
                continue
            has_links = has_links or entry.is_symlink()
            try:
                if entry.is_dir():
                    if not name.startswith(".") and name not in _SYSTEM_FOLDERS:
                        folders.append(name)
                elif entry.is_file():
                    files.append(name)
                elif entry.is_symlink():
                    broken.append(name)
            except OSError:  # a link loop, or a target in a folder we may not enter
                broken.append(name)
    return _Folder(files, folders, broken, junk, has_links)


def _files(path: str, top: _Folder) -> tuple[tuple[File, ...], list[str], int, bool]:
    """All files of a model, its folders, the junk in it, and whether any part is reached through a link."""
    files: list[File] = []
    folders: list[str] = []
    junk = 0
    has_links = False
    for prefix, folder in _subfolders(path, top):
        folders.append(f"{path}/{prefix}".rstrip("/"))
        junk += folder.junk
        has_links = has_links or folder.has_links
        for name in folder.files:
            if _is_utf8(name):
                status = os.stat(f"{path}/{prefix}{name}")
                files.append(File(prefix + name, status.st_size, status.st_mtime_ns))
    return tuple(sorted(files)), folders, junk, has_links


def _subfolders(path: str, top: _Folder) -> Iterator[tuple[str, _Folder]]:
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
                raise _Unfit(f"has folders more than {MAX_DEPTH} deep")
            if _is_utf8(name) and real not in entered and not _holds(real, home):
                entered.add(real)
                inside = _list(f"{path}/{prefix}{name}")
                yield f"{prefix}{name}/", inside
                pending.append((f"{prefix}{name}/", inside))


def _holds(folder: str, inner: str) -> bool:
    """Whether one real path is the other or above it."""
    return f"{inner}/".startswith(folder.rstrip("/") + "/")


def _check_weights(path: str, files: tuple[File, ...], broken: list[str], *, required: bool) -> None:
    """Raise _Unfit while weights are missing, empty or still being copied."""
    sizes = {file.name: file.size for file in files}
    named: set[str] = set()
    if "model.safetensors.index.json" in sizes:
        weight_map = _read_json(f"{path}/model.safetensors.index.json").get("weight_map")
        if not isinstance(weight_map, dict):
            raise _Unfit("model.safetensors.index.json has no weight_map; copy it again")
        named.update(str(shard) for shard in weight_map.values())
    found = {name for name in sizes if name.endswith(".safetensors") and "/" not in name}
    for name in found:
        if shard := _SHARD.fullmatch(name):
            named.update(f"{shard[1]}-{number:05}-of-{shard[3]}.safetensors" for number in range(1, int(shard[3]) + 1))
    if missing := sorted(named - sizes.keys()):
        kind = "a broken link" if missing[0] in broken else "missing"
        raise _Unfit(f"{len(missing)} of {len(named)} shards not there ({missing[0]} is {kind}): still being copied?")
    if empty := sorted(name for name in named | found if sizes[name] == 0):
        raise _Unfit(f"{empty[0]} is empty: still being copied?")
    # The pattern is the one mlx_lm.utils.load_model globs for.
    if required and not any(name.startswith("model") for name in found):
        dangling = [name for name in broken if name.endswith(".safetensors")]
        raise _Unfit(f"{dangling[0]} is a broken link" if dangling else "has no weights (model*.safetensors)")


def _identified(path: str, files: tuple[File, ...], commit: str | None) -> tuple[tuple[File, ...], str | None]:
    """The files with the Hub's etags, and its commit, where the user's folder proves them."""
    if commit is not None:
        return tuple(file._replace(etag=hfcache.blob_name(f"{path}/{file.name}")) for file in files), commit
    known = hfcache.local_dir_identity(path, {file.name: file.mtime_ns for file in files})
    if known is None:
        return files, None
    return tuple(file._replace(etag=known[1][file.name]) for file in files), known[0]


def _read_json(path: str) -> dict[str, Any]:
    """A JSON object. Raises _Unfit with what is wrong with it."""
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            # Asked first: reading with a limit would set aside the whole of it for each small file.
            is_small = os.fstat(file.fileno()).st_size <= MAX_JSON_BYTES
            data = file.read() if is_small else b""
    except PermissionError:
        raise  # a matter of the folder, as for any other file
    except OSError as error:
        raise _Unfit(f"{name} {_reason(error)}") from error
    if not is_small:
        raise _Unfit(f"{name} is larger than {MAX_JSON_BYTES // 2**20} MiB: not a configuration")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unfit(f"{name} is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise _Unfit(f"{name} is not valid JSON ({str(error)[:100]})") from error
    if not isinstance(value, dict):
        raise _Unfit(f"{name} is not a JSON object")
    return value


def _stamp(path: str) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    """An exception as the end of a sentence that begins with a path."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)
