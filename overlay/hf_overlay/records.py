"""What Hub clients write down about files: listings, records of downloads, and etags as names of blobs."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from hf_overlay.errors import check_descriptors

_COMMIT = r"[0-9a-f]{40}"
_ETAG = r"[0-9a-f]{40}|[0-9a-f]{64}"
_SHA256 = r"[0-9a-f]{64}"


def listed_blobs(listing: bytes) -> dict[str, str]:
    """The etag of each file that a listing (`trees/<commit>.json`) names; nothing where it is none."""
    try:
        files = json.loads(listing)["files"]
        found = {name: entry.get("lfs_sha256") or entry["blob_id"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        name: blob
        for name, blob in found.items()
        if isinstance(blob, str) and re.fullmatch(_ETAG, blob) and not {"", ".", ".."} & {*name.split("/")}
    }


def listed_xet_hashes(listing: bytes) -> dict[str, str]:
    """The Xet hash of each file in LFS that a listing names, by its etag."""
    try:
        listed = json.loads(listing)["files"].values()
        return checked_hashes({entry.get("lfs_sha256"): entry.get("xet_hash") for entry in listed})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def checked_hashes(xet_hashes: Mapping[Any, Any]) -> dict[str, str]:
    """Those of some Xet hashes by etag where both have the form of a SHA-256."""
    return {
        etag: xet_hash
        for etag, xet_hash in xet_hashes.items()
        if all(isinstance(each, str) and re.fullmatch(_SHA256, each) for each in (etag, xet_hash))
    }


def blob_name(path: str) -> str | None:
    """The etag in the name of the blob that a file in a cached snapshot links to; None when it has none."""
    try:
        name = os.path.basename(os.readlink(path))
    except OSError:
        return None
    return name if re.fullmatch(_ETAG, name) else None


def local_dir_identity(folder: str, mtimes_ns: Mapping[str, int]) -> tuple[str, dict[str, str]] | None:
    """The Hub's commit, and its etag for each file, of a folder made by `hf download --local-dir`.

    It leaves `.cache/huggingface/download/<file>.metadata` (three lines: commit, etag, time of writing). None unless
    every file is covered, none is newer than its metadata, and all agree on the commit.
    """
    commits = set()
    etags = {}
    for name, mtime_ns in mtimes_ns.items():
        try:
            with open(f"{folder}/.cache/huggingface/download/{name}.metadata", encoding="ascii") as file:
                commit, etag, saved = (file.readline(128).strip() for _ in range(3))
            is_older = mtime_ns / 1e9 - 1 <= float(saved)
        except OSError as error:
            check_descriptors(error)
            return None
        except ValueError:
            return None
        if not is_older or not re.fullmatch(_COMMIT, commit) or not re.fullmatch(_ETAG, etag):
            return None
        commits.add(commit)
        etags[name] = etag
    return (commits.pop(), etags) if len(commits) == 1 else None


def local_dir_records(folder: str) -> list[str]:
    """The record that `hf download --local-dir` rewrites with each newer commit, where there is one."""
    record = f"{folder}/.cache/huggingface/download/config.json.metadata"
    return [record] if os.path.isfile(record) else []
