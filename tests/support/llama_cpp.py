"""What llama.cpp asks and writes for `-hf org/model[:tag]`, as a program: prints the files it loads, path -> bytes.

`cached` is a release of 2026, which keeps files in the Hugging Face cache (common/hf-cache.cpp, common/download.cpp);
`copied` is one of 2025, which has its own folder of copies (common_get_hf_file, common_download_file_single there).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import Request, urlopen


class File(NamedTuple):
    """One file of a repo in the cache."""

    blob: Path
    """Where its bytes are written, and where they are unless `place` is there."""
    place: Path
    """In the snapshot."""


Files = dict[str, File]
"""By name in the repo."""

_CACHES = (
    ("LLAMA_CACHE", ""),
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub"),
)
_BESIDE_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def cached(repo: str, tag: str, *, offline: bool) -> list[str]:
    """The files of a release that reads the Hugging Face cache."""
    cache = next(Path(os.environ[name], below) for name, below in _CACHES if os.environ.get(name))
    folder = cache / f"models--{repo.replace('/', '--')}"
    files = {} if offline else _in_repo(repo, folder)
    files = files or _in_cache(folder)
    model = best(list(files), tag)
    wanted = _shards(list(files), model)
    wanted += [name for name in files if "mmproj" in name][:1]
    for blob, place in (files[name] for name in wanted):
        if not place.exists():
            commit, *names = place.relative_to(folder / "snapshots").parts
            _download(f"{_endpoint()}{repo}/resolve/{commit}/{'/'.join(names)}", blob)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
    return [str(files[name].place) for name in wanted]


def copied(repo: str, tag: str, *, offline: bool) -> list[str]:
    """The files of a release that copies them into a folder of its own."""
    assert not offline, "it reads what it noted the time before"
    cache = Path(os.environ.get("LLAMA_CACHE") or Path(os.environ["HOME"], ".cache/llama.cpp"))
    manifest = _get_json(f"v2/{repo}/manifests/{tag or 'latest'}")
    names = [manifest[key]["rfilename"] for key in ("ggufFile", "mmprojFile") if key in manifest]
    paths = []
    for name in names:
        path = cache / f"{repo}_{name}".replace("/", "_")
        _download(f"{_endpoint()}{repo}/resolve/main/{quote(name)}", path)
        paths.append(str(path))
    return paths


def _in_repo(repo: str, folder: Path) -> Files:
    """All files of the newest revision, as `get_repo_files` lists them; none where anything goes wrong."""
    try:
        branches = _get_json(f"api/models/{repo}/refs")["branches"]
        [commit] = [branch["targetCommit"] for branch in branches if branch["name"] == "main"]
        assert re.fullmatch("[0-9a-f]{40}", commit)
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs/main.tmp").write_text(commit)
        (folder / "refs/main.tmp").rename(folder / "refs/main")
        files = {}
        for item in _get_json(f"api/models/{repo}/tree/{commit}?recursive=true"):
            if item["type"] == "file":
                oid = item["lfs"]["oid"] if "lfs" in item else item["oid"]
                assert re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", oid)
                files[item["path"]] = File(folder / "blobs" / oid, folder / "snapshots" / commit / item["path"])
        return files
    except (OSError, URLError) as error:
        print(f"get_repo_files: {error}", file=sys.stderr)
        return {}


def _in_cache(folder: Path) -> Files:
    snapshot = folder / "snapshots" / (folder / "refs/main").read_text()
    return {str(path.relative_to(snapshot)): File(path, path) for path in snapshot.rglob("*") if path.is_file()}


def best(names: Sequence[str], tag: str) -> str:
    models = [
        name
        for name in names
        if name.endswith(".gguf")
        and not any(each in name.rpartition("/")[2] for each in _BESIDE_MODELS)
        and ((split := _SPLIT.fullmatch(name)) is None or int(split[2]) == 1)
    ]
    for each in [tag] if tag else ["Q4_K_M", "Q8_0"]:
        for name in models:
            if re.search(f"{each}[.-]", name, re.IGNORECASE):
                return name
    assert not tag, f"no GGUF files found for {tag} among {names}"
    return models[0]


def _shards(names: Sequence[str], model: str) -> list[str]:
    split = _SPLIT.fullmatch(model)
    if split is None:
        return [model]
    return sorted(
        name for name in names if (other := _SPLIT.fullmatch(name)) and other.group(1, 3) == split.group(1, 3)
    )


def _endpoint() -> str:
    return f"{os.environ.get('MODEL_ENDPOINT') or os.environ['HF_ENDPOINT']}/"


def _get_json(path: str) -> Any:
    with _ask("GET", f"{_endpoint()}{path}", {"Accept": "application/json"}) as answer:
        return json.load(answer)


def _download(url: str, path: Path) -> None:
    """As `common_download_file_single_online`: a HEAD first, and a name of its own while it is under way."""
    _ask("HEAD", url, {}).close()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.downloadInProgress")
    with _ask("GET", url, {}) as answer:
        partial.write_bytes(answer.read())
    partial.rename(path)


def _ask(method: str, url: str, headers: Mapping[str, str]) -> Any:
    return urlopen(Request(url, headers={"User-Agent": "llama-cpp/b11739", **headers}, method=method), timeout=60)


if __name__ == "__main__":
    release, given, *options = sys.argv[1:]
    repo, _, tag = given.partition(":")
    find = {"cached": cached, "copied": copied}[release]
    print(json.dumps({path: Path(path).read_bytes().hex() for path in find(repo, tag, offline="--offline" in options)}))
