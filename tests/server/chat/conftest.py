"""A model whose answers tests of the reader read and whose template tests of the prompt render."""

from __future__ import annotations

import pytest
from mlx_overlay_server.chat.loaded import Loaded

from tests.server.chat.answers import LONGEST, SCRIPT
from tests.support.loaded import loaded
from tests.support.models import make_model


@pytest.fixture(scope="module")
def pieces() -> list[bytes]:
    """Every way to cut the script into tokens of up to a few bytes, inside of characters and tags, too."""
    data = SCRIPT.encode()
    return [
        piece
        for size in range(1, LONGEST + 1)
        for start in range(size)
        for piece in (data[:start], *(data[at : at + size] for at in range(start, len(data), size)))
        if piece
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> Loaded:
    """A model with reasoning and tools, whose vocabulary holds the script in every cut."""
    says = b"".join(pieces).decode()
    folder = tmp_path_factory.mktemp("models") / "cuts"
    return loaded(make_model(folder, says, thinks=True, calls_tools=True, pieces=pieces, dtype="float16"))
