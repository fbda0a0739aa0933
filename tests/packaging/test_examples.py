"""Every example of README and docs is run, as far as a test can: commands of ours that end are run as they stand.

Those that serve until they are stopped, or that change the system, are read by their own parsers instead. Programs of
others are stand-ins that do nothing; `make` knows its targets. docs/macos.md is a checklist for a person at a Mac.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest
from hf_overlay import configfile

from tests.support.encoders import make_encoder
from tests.support.folders import lay_model
from tests.support.models import make_model
from tests.support.processes import environment
from tests.support.server import serving
from tests.support.speech_models import STAND_IN_ENVIRONMENT, recording

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "overlay/README.md", "server/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "macos.md"),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
HERE = "mlx-community/Llama-3-8B-Instruct"

_READ = """#!{python} -P
import os, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
split = words.index("--") if "--" in words else len(words)
if name == "hf-overlay":
    from hf_overlay.command.cli import main
    from hf_overlay.command.parser import make_parser
    runs = ("ls", "config", "run", "completion")
    parse = lambda: make_parser().parse_args(words[:split])
else:
    from mlx_overlay_server.cli import main
    from mlx_overlay_server.command import NAMES
    from mlx_overlay_server.command.parser import make_parser
    runs = ("ls", "config", "key", "completion")
    parse = lambda: make_parser(words[0] if words and words[0] in NAMES else "").parse_args(words[:split])
if words and words[0] in runs:
    sys.exit(main(words))
parse()
if words and words[0] == "service" and words[split:]:
    from mlx_overlay_server.options import make_parser as options
    from hf_overlay.command.parser import make_parser as overlay
    rest = words[split + 1 :]
    is_server = name != "hf-overlay" or "--server" in words
    options().parse_args(rest) if is_server else overlay().parse_args(["serve", *rest])
"""
"""A stand-in for `mlx-omni-server` and `hf-overlay`: it runs what ends by itself, and reads the options of the rest."""
_LAUNCHER = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n'
_MAKE = f"""#!/bin/sh
for word; do case "$word" in *=*) ;; *) grep -q "^$word:" {ROOT}/Makefile || exit 1 ;; esac; done
"""
_STAND_INS = {
    "make": _MAKE,
    "mlx.launch": _LAUNCHER,
    **dict.fromkeys(
        ("pip", "uv", "claude", "codex", "docker", "hf", "launchctl", "pytest", "python", "CMD", "source"),
        "#!/bin/sh\nexit 0\n",
    ),
}


class Example(NamedTuple):
    """One block of a page."""

    page: str
    line: int
    language: str
    text: str


def _examples() -> Iterator[Example]:
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        for match in BLOCK.finditer(text):
            yield Example(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


EXAMPLES = [each for each in _examples() if each.language]


class Place(NamedTuple):
    """What examples find: the folders that they name, stand-ins, and a server."""

    folder: Path
    environ: dict[str, str]
    replaced: dict[str, str]

    def of(self, text: str) -> str:
        """An example with names of this place in it."""
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        return text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    top = tmp_path_factory.mktemp("examples")
    models, programs, work = top / "drive" / "models", top / "programs", top / "work"
    for folder in (top / "hub", top / "home", programs, work / ".venv" / "bin", work / "dist"):
        folder.mkdir(parents=True)
    make_model(models / HERE, "Hello.", is_brief=True)
    shutil.copytree(models / HERE, models / "org" / "name")
    make_encoder(models / "org" / "embed", prompts={"query": "a "})
    lay_model(models / "org" / "whisper", {"preprocessor_config.json": b"{}"}, model_type="whisper")
    lay_model(models / "org" / "kokoro", {"voices/zf_one.safetensors": b"."}, model_type="kokoro")
    (work / "speech.mp3").write_bytes(recording())
    for name, text in _STAND_INS.items():
        (programs / name).write_text(text)
    for name in ("mlx-omni-server", "hf-overlay"):
        (programs / name).write_text(_READ.replace("{python}", sys.executable))
    (work / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 0\n")
    for path in (*programs.iterdir(), work / ".venv" / "bin" / "python"):
        path.chmod(0o755)
    (top / "home" / ".curlrc").write_text("fail\nsilent\n")
    environ = environment(top / "home", HF_OVERLAY_DIR=str(top / "sessions"))
    environ["PATH"] = f"{programs}{os.pathsep}{environ['PATH']}"
    with serving(top / "home", models, options=["--offline"], environ=STAND_IN_ENVIRONMENT) as server:
        yield Place(
            work,
            environ,
            {
                "/Volumes/LLMS/models": str(models),
                "/Volumes/NAS/lmstudio": str(top / "nowhere"),
                "/shared/huggingface/hub": str(top / "hub"),
                "/data/experiment-3": str(models / "org" / "name"),
                "$RUNNER_TEMP": str(top / "runner"),
                "http://127.0.0.1:10240": server.url,
                "af_heart": "zf_one",
                "…": "x",
                "| source": "| cat",
                'eval "$(': '_="$(',
            },
        )


def _script(example: Example) -> str:
    """The commands of an example, as a shell takes them: in a session on a terminal, what follows each prompt."""
    if example.language == "sh":
        return example.text
    return "\n".join(_command(part) for part in re.split(r"^\$ ", example.text, flags=re.M)[1:])


def _command(text: str) -> str:
    """The command at the beginning of a text, without its output: up to a line that ends no part of it."""
    taken: list[str] = []
    for line in text.splitlines():
        taken.append(line)
        if not line.endswith("\\") and "\n".join(taken).count("'") % 2 == 0:
            break
    return "\n".join(taken)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{each.page}:{each.line}" for each in EXAMPLES])
def test_an_example_works(example: Example, place: Place, tmp_path: Path) -> None:
    text = place.of(_script(example) if example.language == "console" else example.text)
    if "speech.mp3" in text and any(find_spec(name) is None for name in ("soundfile", "python_multipart")):
        pytest.skip("soundfile or python-multipart is not installed")
    environ = place.environ | {"XDG_CONFIG_HOME": str(tmp_path)}  # what it configures is not for the next one
    if example.language in ("sh", "console"):
        if "curl" in text and shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        done = subprocess.run(
            ["sh", "-e"], input=text, cwd=place.folder, env=environ, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    elif example.language == "python":
        for name in re.findall(r"^(?:import|from) (\w+)", text, re.M):
            if find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
        done = subprocess.run(
            [sys.executable, "-P", "-c", text],
            cwd=place.folder,
            env=environ,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    elif example.language == "toml":
        from mlx_overlay_server import configuration

        assert tomllib.loads(text)
        configuration.parse(configfile.parse("/config.toml", text))
    elif example.language == "json":
        assert json.loads(text)
    elif example.language == "xml":
        assert len(ET.fromstring(text)) == 1
    else:
        assert example.language == "yaml", f"{example.page}:{example.line}: say how an example of this kind is run"
        yaml = pytest.importorskip("yaml")
        assert yaml.safe_load(text)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, "docs/macos.md"]:
        text = (ROOT / page).read_text("utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page} leads to {link}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page} leads to {link}"
