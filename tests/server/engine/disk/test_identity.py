"""KV caches are found again for the model that made them, wherever it is, and for no other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlx_overlay_server.engine.disk.identity import identity

_TIME = (10**18, 10**18)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "modeling.py"):
        (folder / name).write_bytes(bytes(3 << 20) if name.endswith("s") else name.encode())
        os.utime(folder / name, ns=_TIME)
    return folder


def _changed(path: Path, at: int, byte: bytes) -> int:
    """Overwrite a byte, and leave size and time as they were; return where."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(byte)
    os.utime(path, ns=_TIME)
    return at


_OTHERS: dict[str, Callable[[Path], object]] = {
    "weights of another time": lambda model: os.utime(model / "model.safetensors", ns=(1, 1)),
    "weights of another size": lambda model: os.truncate(model / "model.safetensors", 5),
    "a header that says something else": lambda model: _changed(model / "model.safetensors", 20, b"x"),
    "other weights of the same size and time": lambda model: [
        _changed(model / "model.safetensors", at, b"x") for at in range(2 << 20, 3 << 20, 1000)
    ],
    "another configuration of the same size and time": lambda model: _changed(model / "config.json", 0, b"x"),
    "another shard": lambda model: shutil.copy2(model / "model.safetensors", model / "model-2.safetensors"),
    "a shard of another name": lambda model: (model / "model.safetensors").rename(model / "weights.safetensors"),
    "other code": lambda model: _changed(model / "modeling.py", 0, b"x"),
    "an adapter": lambda model: (model / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", _OTHERS.values(), ids=_OTHERS.keys())
def test_another_model_is_another_one(change: Callable[[Path], object], model: Path) -> None:
    before = identity(str(model))
    change(model)
    assert identity(str(model)) != before


def test_a_model_is_the_same_in_another_folder_and_through_links(model: Path, tmp_path: Path) -> None:
    before = identity(str(model))
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(path)
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    (moved / "README.md").unlink()
    (moved / "tokenizer.json").write_text("anything")
    assert identity(str(linked)) == identity(str(moved)) == before


def test_no_pipe_is_waited_for(model: Path) -> None:
    os.mkfifo(model / "model-2.safetensors")
    assert identity(str(model))
