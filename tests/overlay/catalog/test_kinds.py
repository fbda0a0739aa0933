"""Which models mlx-lm can load: the answer of its own `_get_classes`, which one process gives for all configs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hf_overlay.catalog import kinds
from hf_overlay.catalog.kinds import ModelTypes
from hf_overlay.errors import OverlayError
from hf_overlay.models import File, Model

# A module that lacks a package may end the whole process, which is an answer too.
ASK_MLX_LM = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from mlx_lm import utils

def loads(config):
    try:
        utils._get_classes(config=config)
    except (Exception, SystemExit):
        return False
    return True

given = json.load(sys.stdin)
types = [*given["types"], *utils.MODEL_REMAPPING, *utils.MODEL_REMAPPING.values()]
configs = [{"model_type": each} for each in types]
for (model_type, architecture), target in utils.MODEL_ARCHITECTURE_REMAPPING.items():
    for each in (architecture, [architecture], ["Other", architecture], [architecture, "Other"], {architecture: 1}):
        configs += [{"model_type": model_type, "architectures": each}, {"model_type": target, "architectures": each}]
configs += given["configs"]
json.dump([[config, loads(config)] for config in configs], answers)
"""
STRANGE_TYPES: list[Any] = [
    *("", " ", "llama ", " llama", "LLAMA", "Llama", "llama.py", "llama.Model", ".llama", "..utils", "../llama"),
    *("models.llama", "llama/..", "cache", "base", "__init__", "__pycache__", "utils", "os", "ünïcode", "a\nb", "\0"),
    *("switch_layers", "rope_utils", "\ud800", "x" * 5000, "9lives", "import", "_", "llama-2", "llama_"),
    *(None, 0, 7, 1.5, True, [], ["llama"], {}, {"llama": 1}),
]
STRANGE_ARCHITECTURES: list[Any] = [
    *(None, "", "LlamaForCausalLM", [], ["LlamaForCausalLM"], [None], [7], [["LlamaForCausalLM"]], [{}]),
    *({}, {"LlamaForCausalLM": 1}, 0, 7, 1.5, True, False),
]
STRANGE_CONFIGS: list[Any] = [
    {},
    {"architectures": ["LlamaForCausalLM"]},
    {"type": "llama"},
    {"Model_Type": "llama"},
    *({"model_type": "llama", "architectures": each} for each in STRANGE_ARCHITECTURES),
    *({"model_type": "mistral", "architectures": each} for each in STRANGE_ARCHITECTURES),
    *({"model_type": "no_such", "architectures": each} for each in STRANGE_ARCHITECTURES),
]


@pytest.fixture(scope="module")
def installed() -> Path:
    spec = find_spec("mlx_lm")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def installed_types() -> ModelTypes:
    types = kinds.installed()
    assert types is not None
    return types


@pytest.mark.mlx_lm
def test_every_config_gets_the_answer_of_mlx_lm(home: Path, installed: Path) -> None:
    modules = sorted(path.stem for path in (installed / "models").iterdir())
    assert len(modules) > 50
    done = subprocess.run(
        [sys.executable, "-c", ASK_MLX_LM],
        input=json.dumps({"types": [*modules, *STRANGE_TYPES], "configs": STRANGE_CONFIGS}),
        capture_output=True,
        text=True,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    types = installed_types()
    answers = json.loads(done.stdout)
    assert sum(loads for _, loads in answers) > 100, "mlx-lm loads most of its own types"
    wrong = {
        json.dumps(config)[:200]: types.why_not(config) or "is said to load"
        for config, loads in answers
        if (types.why_not(config) is None) != loads
    }
    assert not wrong, f"mlx-lm's own answer differs for {wrong}"


@pytest.mark.mlx_lm
def test_custom_code_is_refused_as_mlx_lm_does_unless_told_to_trust_it() -> None:
    types = installed_types()
    assert "own code" in (types.why_not({"model_type": "llama", "model_file": "model.py"}) or "")
    assert types.why_not({"model_type": "llama", "model_file": None}) is None


@pytest.mark.mlx_lm
@pytest.mark.parametrize("model_type", STRANGE_TYPES, ids=lambda value: ascii(value)[:20])
def test_every_reason_is_one_short_line_that_can_be_printed(model_type: object) -> None:
    reason = installed_types().why_not({"model_type": model_type})
    assert reason is not None
    assert len(reason) < 200
    assert "\n" not in reason
    reason.encode()


def empty(package: Path) -> None:
    package.mkdir()


def without_remapping(package: Path) -> None:
    (package / "models").mkdir(parents=True)
    (package / "utils.py").write_text("MODEL_REMAPPING = {}\n")


def computed_remapping(package: Path) -> None:
    (package / "models").mkdir(parents=True)
    (package / "utils.py").write_text("MODEL_REMAPPING = {}\nMODEL_ARCHITECTURE_REMAPPING = {name(): 1}\n")


@pytest.mark.parametrize("lay", [empty, without_remapping, computed_remapping])
def test_an_mlx_lm_laid_out_otherwise_is_an_error_that_names_it(tmp_path: Path, lay: Callable[[Path], None]) -> None:
    """P12: with another mlx-lm the answers would be guesses."""
    lay(tmp_path / "mlx_lm")
    with pytest.raises(OverlayError, match=str(tmp_path)):
        ModelTypes(str(tmp_path / "mlx_lm")).why_not({"model_type": "llama"})


def test_a_module_with_model_and_arguments_by_other_means_counts(tmp_path: Path) -> None:
    package = tmp_path / "mlx_lm"
    (package / "models").mkdir(parents=True)
    (package / "utils.py").write_text(
        'MODEL_REMAPPING = {"old": "plain"}\nMODEL_ARCHITECTURE_REMAPPING: dict = {\n    ("a", "B"): "plain",\n}\n'
    )
    sources = {
        "plain": "class ModelArgs: ...\nclass Model(Base): ...\n",
        "imported": "from .plain import Model, ModelArgs\n",
        "renamed": "from .plain import Model as Model, ModelArgs as ModelArgs\n",
        "assigned": "from . import plain\nModel = plain.Model\nModelArgs = plain.ModelArgs\n",
        "half": "class Model: ...\n",
        "mentioned": '"""class Model and class ModelArgs."""\n',
        "lacking": "import no_such_package_anywhere\nclass ModelArgs: ...\nclass Model: ...\n",
    }
    for name, source in sources.items():
        (package / "models" / f"{name}.py").write_text(source)
    types = ModelTypes(str(package))
    loadable = [name for name in sources if types.why_not({"model_type": name}) is None]
    assert loadable == ["plain", "imported", "renamed", "assigned"]
    assert types.why_not({"model_type": "old"}) is None
    assert types.why_not({"model_type": "a"}) is not None
    assert types.why_not({"model_type": "a", "architectures": "B"}) is None


def _mlx_vlm(folder: Path) -> str:
    """A package laid out as mlx-vlm is."""
    (folder / "models" / "seer").mkdir(parents=True)
    (folder / "models" / "seer" / "__init__.py").touch()
    (folder / "utils.py").write_text('import os\n\nMODEL_REMAPPING = {\n    "old-seer": "seer",\n}\n')
    return str(folder)


def test_models_that_see_are_loaded_by_mlx_vlm_where_it_is(tmp_path: Path) -> None:
    package = tmp_path / "mlx_lm"
    (package / "models").mkdir(parents=True)
    (package / "utils.py").write_text("MODEL_REMAPPING = {}\nMODEL_ARCHITECTURE_REMAPPING = {}\n")
    types = ModelTypes(str(package), mlx_vlm=_mlx_vlm(tmp_path / "mlx_vlm"))
    sees: dict[str, Any] = {"model_type": "seer", "vision_config": {}, "image_token_id": 5}
    for config in (sees, {**sees, "model_type": "Old-Seer"}, {**sees, "image_token_id": None, "image_token_index": 1}):
        assert types.why_not(config) is None
        assert ModelTypes(str(package)).why_not(config) is not None
    for change in ({"vision_config": None}, {"image_token_id": None}, {"model_type": "x"}, {"model_type": "../seer"}):
        assert types.why_not({**sees, **change}) is not None
    assert types.why_not({**sees, "model_file": "own.py"}) is not None


def test_a_mlx_vlm_that_is_laid_out_otherwise_is_named(tmp_path: Path) -> None:
    package = tmp_path / "mlx_lm"
    (package / "models").mkdir(parents=True)
    (package / "utils.py").write_text("MODEL_REMAPPING = {}\nMODEL_ARCHITECTURE_REMAPPING = {}\n")
    with pytest.raises(OverlayError, match="mlx-vlm"):
        ModelTypes(str(package), mlx_vlm=str(tmp_path / "nowhere")).why_not({"model_type": "x", "vision_config": {}})


# The kind of a model -------------------------------------------------------------------------------------------


def lay(folder: Path, *names: str, model_type: str | None = None) -> Model:
    """A model of empty files, and a config.json where it has a model type."""
    folder.mkdir(parents=True)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        names = (*names, "config.json")
    files = tuple(File(name, 1, 0) for name in names)
    return Model("org/name", "custom", str(folder), model_type, 1, files, str(folder.parent))


@pytest.mark.mlx_lm
@pytest.mark.parametrize(
    ("names", "model_type", "with_mlx_lm", "without"),
    [
        (("model.safetensors", "tokenizer.json"), "llama", "mlx", "transformers"),
        (("model.safetensors",), "llama", "transformers", "transformers"),
        (("model.safetensors",), "no_such", "transformers", "transformers"),
        (("pytorch_model.bin",), "llama", "transformers", "transformers"),
        (("model_index.json", "unet/diffusion_pytorch_model.safetensors"), None, "diffusers", "diffusers"),
        (("modules.json", "model.safetensors"), "bert", "sentence-transformers", "sentence-transformers"),
        (("modules.json", "model.safetensors", "tokenizer.json"), "qwen3", "mlx", "sentence-transformers"),
        (("adapter_config.json", "adapter_model.safetensors"), None, "adapter", "adapter"),
        (("llama-Q4.gguf",), "llama", "gguf", "gguf"),
        (("model.onnx",), None, "other", "other"),
    ],
)
def test_the_kind_of_a_model_is_what_its_files_say(
    tmp_path: Path, names: tuple[str, ...], model_type: str | None, with_mlx_lm: str, without: str
) -> None:
    model = lay(tmp_path / "model", *names, model_type=model_type)
    assert kinds.kind_of(model, installed_types()) == with_mlx_lm
    assert kinds.kind_of(model, None) == without


@pytest.mark.mlx_lm
def test_without_a_kind_the_models_are_those_of_mlx_lm_where_it_is_installed() -> None:
    for types in (kinds.restriction(None), kinds.restriction("mlx")):
        assert types is not None
        assert types.why_not({"model_type": "llama"}) is None
    assert kinds.restriction("any") is None
