"""The kinds of model there are, and the models that the installed mlx-lm can load, or mlx-vlm beside it.

For mlx-lm it is the answer of its own `_get_classes` for a `config.json`, without importing it: importing mlx_lm costs
two seconds (MLX, transformers), reading its source does not. `mlx_lm/models/<type>.py` must define `Model` and
`ModelArgs`, after MODEL_ARCHITECTURE_REMAPPING and MODEL_REMAPPING of `mlx_lm/utils.py` are applied (mlx-lm 0.32).
mlx-vlm loads models that see: `mlx_vlm/models/<type>/` is there, after its own MODEL_REMAPPING (mlx-vlm 0.7).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from hf_overlay.catalog import speech
from hf_overlay.catalog.tasks import ENCODERS, may_encode
from hf_overlay.config import Kind
from hf_overlay.errors import OverlayError, check_descriptors
from hf_overlay.models import Model

_IN_NAMES_OF_TOKENIZERS = ("token", "vocab")
_SUFFIXES_OF_TOKENIZERS = (".model", ".tiktoken", ".spm", ".codes")
_TOKENIZERS = frozenset({"tekken.json", "merges.txt", "dict.txt"})
_BESIDE_TOKENIZERS = frozenset({"special_tokens_map.json", "added_tokens.json"})

_OF_SENTENCE_TRANSFORMERS = frozenset({"modules.json", "config_sentence_transformers.json"})


def restriction(kind: Kind | None, *, trusts_code: bool = False, encoders: bool = False) -> ModelTypes | None:
    """The model types that a scan must keep to; None takes models of every kind.

    Without a `kind`, those that mlx-lm loads where it is installed, else every kind, since nothing can tell which
    models mlx-lm loads. `encoders`: also the model types that mlx-omni-server loads beside those.
    Raises OverlayError for the kind `mlx` without mlx-lm.
    """
    if kind == "any":
        return None
    types = installed(trusts_code=trusts_code, encoders=encoders)
    if types is None and kind == "mlx":
        raise OverlayError(
            f"mlx-lm is not installed for {sys.executable}, so nothing can tell which models it loads; "
            "install it there (pip install mlx-lm), or use --kind any"
        )
    return types


def installed(*, trusts_code: bool = False, encoders: bool = False) -> ModelTypes | None:
    """The model types of the mlx-lm in this Python environment; None without one."""
    mlx_lm = _folder_of("mlx_lm")
    if mlx_lm is None:
        return None
    return ModelTypes(mlx_lm, mlx_vlm=_folder_of("mlx_vlm"), trusts_code=trusts_code, encoders=encoders)


def _folder_of(package: str) -> str | None:
    spec = find_spec(package)
    return None if spec is None or not spec.submodule_search_locations else spec.submodule_search_locations[0]


def version(types: ModelTypes | None) -> list[object]:
    """Equal for restrictions that take the same models, also in another process."""
    return ["any"] if types is None else types.version


def may_be_tokenizer(name: str) -> bool:
    """Whether a file directly in a model's folder can be what transformers, and so mlx-lm, makes a tokenizer of.

    In doubt it can: names differ a lot (VOCAB_FILES_NAMES in the modules of transformers 5; DEFAULT_ALLOW_PATTERNS in
    mlx_lm/utils.py), code may come with a model, and `tokenizer_config.json` may name a class that needs no other file.
    """
    if "/" in name or name in _BESIDE_TOKENIZERS:
        return False
    is_named_so = any(word in name for word in _IN_NAMES_OF_TOKENIZERS)
    return is_named_so or name in _TOKENIZERS or name.endswith(_SUFFIXES_OF_TOKENIZERS)


def kind_of(model: Model, types: ModelTypes | None) -> str:
    """The kind of a model: `mlx` when `types` say that mlx-lm loads it, else the library its files are made for.

    That is `diffusers`, `sentence-transformers`, `adapter`, `gguf`, `transformers`, or `other` for unknown files.
    """
    names = {file.name for file in model.files}
    has_mlx_files = any(name.startswith("model") and name.endswith(".safetensors") for name in names) and any(
        map(may_be_tokenizer, names)
    )
    if types is not None and has_mlx_files and types.why_not(_config(model)) is None:
        return "mlx"
    if "model_index.json" in names:
        return "diffusers"
    if names & _OF_SENTENCE_TRANSFORMERS:
        return "sentence-transformers"
    if "adapter_config.json" in names:
        return "adapter"
    if any(name.endswith(".gguf") for name in names) and not any(
        name.endswith((".safetensors", ".bin")) for name in names
    ):
        return "gguf"
    return "transformers" if model.model_type is not None else "other"


def _config(model: Model) -> Mapping[str, Any]:
    try:
        with open(f"{model.path}/config.json", encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):  # none, or changed since the scan that read it
        return {}
    return config if isinstance(config, dict) else {}


class ModelTypes:
    """The model types one mlx-lm installation can load, and mlx-vlm beside it for models that see."""

    def __init__(
        self, mlx_lm: str, *, mlx_vlm: str | None = None, trusts_code: bool = False, encoders: bool = False
    ) -> None:
        """`mlx_lm` and `mlx_vlm` are the packages' folders, which are not looked at before a model is to be judged.

        `trusts_code`: whoever loads models tells mlx-lm to run code that comes with them; `encoders`: they are
        mlx-omni-server, which also loads `tasks.ENCODERS`, and models that transcribe or speak.
        """
        self.takes_encoders = encoders
        self._trusts_code = trusts_code
        self._package = mlx_lm
        self._models = os.path.join(mlx_lm, "models")
        self._loadable: dict[str, bool] = {}
        self._vision = None if mlx_vlm is None else _VisionTypes(mlx_vlm)

    @cached_property
    def _known(self) -> _Known:
        """What mlx-lm's source says. A process that finds all its models in the index needs none of it."""
        return _Known(self._package)

    @property
    def version(self) -> list[object]:
        """Equal for objects that take the same models. Packages beside mlx-lm may be what a model's module imports.

        Raises OverlayError when mlx-lm is not laid out as expected.
        """
        package = os.path.abspath(self._package)
        paths = [os.path.dirname(package), os.path.join(package, "utils.py"), self._models]
        if self._vision is not None:
            paths += self._vision.paths
        try:
            looked = [[status.st_ino, status.st_mtime_ns] for status in map(os.stat, paths)]
        except OSError as error:
            raise _unreadable("mlx-lm", package, error) from error
        return [package, self._trusts_code, *looked]

    def why_not(self, config: Mapping[str, Any]) -> str | None:
        """None when a model with this config can be loaded, else the reason.

        Raises OverlayError when mlx-lm, or mlx-vlm, is not laid out as expected.
        """
        is_encoder = isinstance(config.get("model_type"), str) and config["model_type"] in ENCODERS
        is_of_speech = speech.family(config) is not None
        if self.takes_encoders and (is_encoder or is_of_speech):
            return None
        if is_of_speech:
            return "is not one that mlx-lm loads; mlx-omni-server transcribes or speaks with it"
        if "model_type" not in config:
            return "config.json names no model_type"
        if config.get("model_file") is not None:
            if self._trusts_code:
                return None
            return "config.json asks to run its own code (model_file), which mlx-lm does only when told to trust it"
        model_type = config["model_type"]
        if isinstance(model_type, str) and self._is_loadable(self._module(model_type, config)):
            return None
        if self._vision is not None and self._vision.can_load(config):
            return None
        problem = f"model type {str(model_type)[:80]!r} is not one that the installed mlx-lm can load"
        if self.takes_encoders and may_encode(config):
            return f"{problem}, nor one that mlx-omni-server embeds or ranks with: {', '.join(sorted(ENCODERS))}"
        return f"{problem}; mlx-omni-server embeds or ranks with it" if is_encoder else problem

    def _module(self, model_type: str, config: Mapping[str, Any]) -> str | None:
        architectures = config.get("architectures") or ()
        if isinstance(architectures, str):
            architectures = (architectures,)
        try:
            for architecture in architectures:
                if (model_type, architecture) in self._known.by_architecture:
                    return self._known.by_architecture[model_type, architecture]
        except TypeError:  # as mlx-lm itself fails
            return None
        return self._known.remapping.get(model_type, model_type)

    def _is_loadable(self, module: str | None) -> bool:
        if module is None:
            return False
        if module not in self._loadable:
            self._loadable[module] = module in self._known.modules and self._defines_a_model(module)
        return self._loadable[module]

    def _defines_a_model(self, module: str) -> bool:
        """Whether importing it gives Model and ModelArgs; helpers (`cache`, `rope_utils`) lie beside the models."""
        with open(os.path.join(self._models, module + ".py"), encoding="utf-8") as file:
            source = file.read()
        # `import hf_olmo` fails without ai2-olmo, and then ends the whole process: an import to check beforehand.
        packages = set(re.findall(r"^\s*(?:import|from) +(\w+)", source, re.M)) - sys.stdlib_module_names
        if any(find_spec(package) is None for package in packages):
            return False
        # Nearly always both are classes; parsing 500 lines for the rest costs milliseconds.
        if re.search(r"^class Model\b", source, re.M) and re.search(r"^class ModelArgs\b", source, re.M):
            return True
        return {"Model", "ModelArgs"} <= _bound_names(source)


class _Known:
    """What the source of one mlx-lm installation says of the models that it loads."""

    def __init__(self, mlx_lm: str) -> None:
        """Raises OverlayError when it is not laid out as expected."""
        try:
            with open(os.path.join(mlx_lm, "utils.py"), encoding="utf-8") as file:
                source = file.read()
            self.remapping: Mapping[str, str] = _constant(source, "MODEL_REMAPPING")
            self.by_architecture: Mapping[tuple[str, str], str] = _constant(source, "MODEL_ARCHITECTURE_REMAPPING")
            with os.scandir(os.path.join(mlx_lm, "models")) as entries:
                self.modules = {entry.name.removesuffix(".py") for entry in entries if entry.name.endswith(".py")}
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable("mlx-lm", mlx_lm, error) from error


class _VisionTypes:
    """The model types that one mlx-vlm installation shows images to."""

    def __init__(self, mlx_vlm: str) -> None:
        self._package = mlx_vlm
        self._models = os.path.join(mlx_vlm, "models")
        self._utils = os.path.join(mlx_vlm, "utils.py")
        self.paths = (self._utils, self._models)
        """What says which types they are."""

    @cached_property
    def _remapping(self) -> Mapping[str, str]:
        try:
            with open(self._utils, encoding="utf-8") as file:
                remapping: Mapping[str, str] = _constant(file.read(), "MODEL_REMAPPING")
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable("mlx-vlm", self._package, error) from error
        return remapping

    def can_load(self, config: Mapping[str, Any]) -> bool:
        """Return whether it loads a model with this config, which has a part for images and a token that marks them."""
        marks = (config.get("image_token_id"), config.get("image_token_index"))
        model_type = config.get("model_type")
        if not isinstance(config.get("vision_config"), Mapping) or not isinstance(model_type, str):
            return False
        name = self._remapping.get(model_type.lower(), model_type.lower())
        has_module = name.isidentifier() and os.path.isfile(os.path.join(self._models, name, "__init__.py"))
        return has_module and any(isinstance(mark, int) for mark in marks)


def _unreadable(name: str, package: str, error: Exception) -> OverlayError:
    """Return what to raise for a package that is not laid out as expected. Raises OutOfFiles."""
    if isinstance(error, OSError):
        check_descriptors(error)
    return OverlayError(f"cannot read which models {name} at {package} loads: {error}; reinstall it")


def _constant(source: str, name: str) -> Any:
    """The literal a module assigns to `name` at its top level; only those lines are parsed (speed)."""
    match = re.search(rf"^{name}\b[^=\n]*=\s*(\{{[^\n]*\}}|\{{.*?^\}})", source, re.M | re.S)
    if match is None:
        raise ValueError(f"no {name} in it")
    import ast  # takes longer to import than all else here; not every command needs it

    return ast.literal_eval(match[1])


def _bound_names(source: str) -> set[str]:
    import ast

    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names
