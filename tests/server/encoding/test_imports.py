"""A server that only chats imports nothing of the encoders."""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import PYTHON, environment, succeed

_PROGRAM = """
import sys
import mlx_overlay_server.app
import mlx_overlay_server.engine.mlx
import mlx_overlay_server.engine.loading
import mlx_overlay_server.preparation.work
print(sorted(name for name in sys.modules if "engine.encoding" in name or "encoding.texts" in name))
"""


def test_a_server_that_only_chats_imports_no_encoder(tmp_path: Path) -> None:
    assert succeed([PYTHON, "-c", _PROGRAM], environment(tmp_path)).out.strip() == "[]"
