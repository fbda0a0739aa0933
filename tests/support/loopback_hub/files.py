"""Files as the Hub keeps them: in git or in LFS, real or made up as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import NamedTuple

from tests.support.hfcache import git_blob_id

BLOCK = 1 << 20


def in_lfs(name: str, size: int) -> bool:
    """What is kept in LFS unless `add_repo` is told otherwise."""
    return name.endswith(".safetensors") or size > 10 << 20


def virtual_bytes(start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a virtual file. Each MiB of it starts with its number, so none can stand in another's place."""
    for number in range(start // BLOCK, -(-stop // BLOCK)):
        first = number * BLOCK
        block = memoryview(number.to_bytes(8, "big") + _noise())
        yield block[max(0, start - first) : stop - first]


@cache
def _noise() -> bytes:
    return Random(0).randbytes(BLOCK - 8)


class File(NamedTuple):
    name: str
    size: int
    content: bytes | None
    """None: virtual."""
    oid: str
    """Of the git blob, which for a file in LFS is the pointer to it."""
    sha256: str | None
    """For a file in LFS. Made up where the file is virtual."""
    pointer_size: int

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def read(self, start: int, stop: int) -> Iterator[memoryview]:
        if self.content is None:
            yield from virtual_bytes(start, stop)
        else:
            yield memoryview(self.content)[start:stop]


def make_file(name: str, content: bytes, *, lfs: bool) -> File:
    if not lfs:
        return File(name, len(content), content, git_blob_id(content), None, 0)
    return lfs_file(name, len(content), content, hashlib.sha256(content).hexdigest())


def lfs_file(name: str, size: int, content: bytes | None, sha256: str) -> File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return File(name, size, content, git_blob_id(pointer), sha256, len(pointer))
