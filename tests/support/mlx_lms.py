"""The releases of mlx-lm that the server admits: those installed aside by `make`, and the installed one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hf_overlay
import mlx_overlay_server

ASIDE = ("0.32.2",)
"""As MLX_LM_VERSIONS in the Makefile: every release in the range of server/pyproject.toml."""
INSTALLED = "installed"
ALL = (*ASIDE, INSTALLED)


def python_path(release: str) -> str:
    """Return the PYTHONPATH of a Python that imports that release. Raises AssertionError when it is not there."""
    path = [str(Path(each.__file__ or "").parents[1]) for each in (hf_overlay, mlx_overlay_server)]
    path.append(str(Path(__file__).parents[2]))
    if release != INSTALLED:
        folder = Path(sys.prefix, "mlx-lms", release)
        assert (folder / "mlx_lm").is_dir(), (
            f"mlx-lm {release} is not installed aside in {folder}: run `make test`, which sets it up, or "
            f"{sys.executable} -m pip install --no-deps --target {folder} mlx-lm=={release}"
        )
        path.insert(0, str(folder))
    return os.pathsep.join(path)
