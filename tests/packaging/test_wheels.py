"""Both distributions, built by `make dist` and installed from their wheels.

hf-overlay is installed into an empty environment, with the dependencies that pip finds. The server's dependencies are
large, so they are borrowed from the environment that runs the tests.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.folders import lay_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


ROOT = Path(__file__).resolve().parents[2]
STEP_SECONDS = 180
"""The limit for one step: a build, an installation, a command."""
PROBE_SECONDS = 60
MAX_INSTALLED_BYTES = 16 * 2**20
"""The limit for hf-overlay with its dependencies and all bytecode; it was 10 MB when this was written."""
NOT_IN_OVERLAY = ("mlx", "mlx_lm", "fastapi", "transformers", "huggingface_hub", "numpy", "torch", "pydantic")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` filled."""
    probe = tmp_path_factory.mktemp("probe")
    pip = [sys.executable, "-m", "pip", "--retries", "1", "--timeout", "15"]
    try:
        with_pip([*pip, "download", "--quiet", "--no-deps", "--dest", str(probe), "hatchling>=1.27"], PROBE_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"pip reaches no package index here, not even for hatchling: {error}")
    folder = tmp_path_factory.mktemp("dist")
    # This environment builds, whichever it is; `--assume-old` keeps make from setting up another one.
    variables = [f"DIST={folder}", f"BIN={Path(sys.executable).parent}"]
    with_pip(["make", "-C", str(ROOT), "--assume-old=.venv/.ready", "dist", *variables], 2 * STEP_SECONDS)
    return folder


@pytest.mark.parametrize(("project", "name"), [("overlay", "hf_overlay"), ("server", "mlx_overlay_server")])
def test_make_dist_builds_a_wheel_and_an_sdist(project: str, name: str, wheels: Path) -> None:
    version = declared_version(project)
    built = {path.name for path in wheels.iterdir()}
    assert {f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.tar.gz"} <= built


def test_the_server_s_page_is_in_the_wheel_and_in_the_sdist(wheels: Path) -> None:
    page = ROOT / "server/mlx_overlay_server/page"
    parts = {f"mlx_overlay_server/page/{path.relative_to(page)}" for path in page.rglob("*") if path.is_file()}
    assert "mlx_overlay_server/page/index.html" in parts
    assert parts <= set(zipfile.ZipFile(wheel(wheels, "mlx_overlay_server")).namelist())
    (sdist,) = wheels.glob("mlx_overlay_server-*.tar.gz")
    with tarfile.open(sdist) as packed:
        assert parts <= {name.partition("/")[2] for name in packed.getnames()}


def test_hf_overlay_installs_and_runs_alone(wheels: Path, models: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    packages = make_environment(environment)
    install(environment, [wheel(wheels, "hf_overlay")])
    lay_model(models / "acme/tiny")

    command = environment / "bin/hf-overlay"
    usage = run([str(command), "--help"])
    listing = run([str(command), "ls", "--model-path", str(models), "--all-kinds"])

    assert usage.startswith("usage: hf-overlay")
    assert "acme/tiny" in listing
    installed = {path.name for path in packages.iterdir()}
    assert "hf_overlay" in installed
    assert installed.isdisjoint(NOT_IN_OVERLAY)
    size = sum(path.lstat().st_size for path in packages.rglob("*"))
    assert size < MAX_INSTALLED_BYTES, f"hf-overlay and its dependencies take {size / 2**20:.0f} MB"


def test_the_server_installs_beside_it_and_both_run_and_print_their_versions(wheels: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    install_server(environment, wheels)

    printed = [run([str(environment / "bin" / name), "--version"]) for name in ("hf-overlay", "mlx-omni-server")]
    usage = run([str(environment / "bin/mlx-omni-server"), "--help"])
    imported = "import hf_overlay, mlx_overlay_server as server; print(hf_overlay.__file__, server.__file__, sep='\\n')"
    files = run([str(environment / "bin/python"), "-c", imported]).split()

    assert [line.split()[-1] for line in printed] == [declared_version("overlay"), declared_version("server")]
    assert usage.startswith("usage: mlx-omni-server")
    assert [Path(file).is_relative_to(environment) for file in files] == [True, True]


def with_pip(command: Sequence[str], timeout: float = STEP_SECONDS) -> None:
    """Run a command that uses pip, which finds the user's configuration and its cache in the real home."""
    run(command, timeout, {**os.environ, "HOME": pwd.getpwuid(os.getuid()).pw_dir})


def run(command: Sequence[str], timeout: float = STEP_SECONDS, environment: Mapping[str, str] | None = None) -> str:
    """The standard output of a command that must succeed within `timeout` seconds."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if result.returncode:
        print(result.stdout, result.stderr, sep="\n")
        result.check_returncode()
    return result.stdout


def make_environment(path: Path) -> Path:
    """Make an environment without any package, pip included; its site-packages folder."""
    venv.create(path, with_pip=False, symlinks=True)
    (packages,) = path.glob("lib/python3*/site-packages")
    return packages


def install(environment: Path, arguments: Sequence[str]) -> None:
    """Install into another environment with this one's pip."""
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "--quiet"]
    with_pip([*pip, "install", *arguments])


def install_server(environment: Path, wheels: Path) -> None:
    """Install both distributions without their dependencies, and borrow those of this environment."""
    packages = make_environment(environment)
    install(environment, ["--no-deps", wheel(wheels, "hf_overlay"), wheel(wheels, "mlx_overlay_server")])
    # Python appends this folder to sys.path without reading the .pth files in it, so that editable installs of the
    # two distributions that are tested here stay out of sight.
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "outer.pth").write_text("\n".join(outer) + "\n")


def wheel(folder: Path, name: str) -> str:
    (path,) = folder.glob(f"{name}-*.whl")
    return str(path)


def declared_version(project: str) -> str:
    version = tomllib.loads((ROOT / project / "pyproject.toml").read_text())["project"]["version"]
    assert isinstance(version, str)
    return version
