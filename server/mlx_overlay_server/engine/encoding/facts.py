"""What the files of a model's folder say about how it embeds or ranks. Takes as long as its disk does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_overlay.catalog import tasks
from hf_overlay.catalog.files import Unfit, read_json

_ACTIVATIONS = ("Identity", "Tanh")
_LARGEST = 1 << 24
"""A longer text than this is a number that stands for none."""


class Dense(NamedTuple):
    """A projection of the pooled vector."""

    path: str
    """The file of its weights."""
    activation: str
    """`Identity` or `Tanh`."""


@dataclass(frozen=True, slots=True)
class Facts:
    """How a model embeds or ranks."""

    modes: tuple[str, ...]
    """The ways of pooling, whose vectors are joined."""
    steps: tuple[Dense | None, ...]
    """What is done with the vector afterwards; None: it is normalised."""
    answers: tuple[int, ...] = ()
    """The tokens for yes and no of a model that ranks by what it would say; (): it has none."""
    has_template: bool = False
    """Whether such a model reads what its chat template makes of a query and a document."""
    longest: int | None = None
    """Tokens that a text may have; None: the files do not say."""
    lowers: bool = False
    """Whether texts are in lower case."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Texts that go before what is embedded, by name."""
    default_prompt: str | None = None


def read(path: Path, *, default: str) -> Facts:
    """Read a folder. Without modules of sentence-transformers, texts are pooled by the mode `default`, and normalised.

    Raises ValueError or OSError.
    """
    prompts = _json(path / "config_sentence_transformers.json")
    texts = _json(path / "sentence_bert_config.json")
    modes: tuple[str, ...] = (default,)
    steps: tuple[Dense | None, ...] = (None,)
    answers, has_template = _yes_and_no(path), False
    try:
        if (path / tasks.MODULES).is_file():
            modes, steps, named = _modules(path)
            has_template, answers = bool(named), named or answers
    except Unfit as error:
        raise ValueError(error.reason.text) from None
    tokenizer = _json(path / "tokenizer_config.json")
    said = [each for each in (texts.get("max_seq_length"), tokenizer.get("model_max_length")) if isinstance(each, int)]
    default_prompt = prompts.get("default_prompt_name")
    return Facts(
        modes,
        steps,
        answers,
        has_template,
        min((each for each in said if 0 < each < _LARGEST), default=None),
        texts.get("do_lower_case") is True,
        {name: text for name, text in _mapping(prompts.get("prompts")).items() if isinstance(text, str)},
        default_prompt if isinstance(default_prompt, str) else None,
    )


def _modules(path: Path) -> tuple[tuple[str, ...], tuple[Dense | None, ...], tuple[int, ...]]:
    modes: tuple[str, ...] = ("mean",)
    steps: list[Dense | None] = []
    answers: tuple[int, ...] = ()
    for module in tasks.modules(str(path)):
        if module.type == "Normalize":
            steps.append(None)
        if not module.path or not (path / module.path / "config.json").is_file():
            continue  # the model itself, or what a conversion put among its weights
        config = read_json(f"{path}/{module.path}/config.json")
        if module.type == "Pooling":
            modes = tasks.pooling_modes(config)
        elif module.type == "Dense":
            name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
            if name not in _ACTIVATIONS or config.get("use_residual"):
                raise ValueError(
                    f"{module.path}/config.json asks for {name[:80]}, or a residual, which is not done here"
                )
            steps.append(Dense(f"{path}/{module.path}/model.safetensors", name))
        elif module.type == "LogitScore":
            ids = [config.get("true_token_id"), config.get("false_token_id")]
            answers = tuple(each for each in ids if isinstance(each, int))
    return modes, tuple(steps), answers


def _yes_and_no(path: Path) -> tuple[int, ...]:
    """Return the tokens `yes` and `no` of a folder's tokenizer.json; () where it lacks one."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - the tokenizers library raises no other; who needs them hears that there are none
        return ()
    ids = [tokenizer.token_to_id(word) for word in ("yes", "no")]
    return tuple(each for each in ids if each is not None) if None not in ids else ()


def _json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; {} where there is none."""
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
