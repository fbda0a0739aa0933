"""What the engine assumes about mlx-lm holds with every release that the server admits; a failure names what broke."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support import mlx_contract, mlx_lms
from tests.support.processes import PYTHON, environment, succeed

_ROOT = Path(__file__).parents[2]


@cache
def _checked(release: str, folder: Path) -> dict[str, Any]:
    """Run all checks in one process: importing mlx-lm takes seconds."""
    environ = environment(folder, PYTHONPATH=mlx_lms.python_path(release), PYTHONWARNINGS="ignore")
    done = succeed([PYTHON, "-P", mlx_contract.__file__, str(folder)], environ)
    answer: dict[str, Any] = json.loads(done.lines()[-1])
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture
def answer(release: str, folder: Path) -> dict[str, Any]:
    own = folder / release
    own.mkdir(exist_ok=True)
    return _checked(release, own)


@pytest.mark.parametrize("release", mlx_lms.ALL)
@pytest.mark.parametrize("assumption", mlx_contract.CHECKS)
def test_of_mlx_lm_it_holds_that(assumption: str, answer: dict[str, Any]) -> None:
    problem = answer["problems"][assumption]
    assert problem is None, f"{assumption}: engine/mlx.py says what rests on it\n{problem}"


@pytest.mark.parametrize("release", mlx_lms.ASIDE)
def test_the_release_that_is_checked_is_the_one_set_up_aside(release: str, answer: dict[str, Any]) -> None:
    assert f"mlx-lms/{release}/" in answer["file"]


def test_the_releases_set_up_aside_begin_where_the_range_begins() -> None:
    requirements = (_ROOT / "server" / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r"mlx-lm[^>\n]*>=([\d.]+)", requirements)) == {mlx_lms.ASIDE[0]}
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"MLX_LM_VERSIONS := {' '.join(mlx_lms.ASIDE)}\n" in makefile
