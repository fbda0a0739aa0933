"""The options for serving: their command line, and the settings that it makes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from mlx_overlay_server import arguments
from mlx_overlay_server.settings import (
    API_KEY_VARIABLE,
    KV_BITS,
    KV_GROUP_SIZES,
    EngineOptions,
    Limits,
    Settings,
    rank,
)

PROGRAM = "mlx-omni-server"
SHELLS = ("bash", "zsh", "fish", "tcsh")
"""Shells for which completion scripts can be printed."""

EXAMPLES = """\
examples:
  mlx-omni-server --model-path /Volumes/LLMS/models
  mlx-omni-server --model-path /Volumes/LLMS/models --model mlx-community/Llama-3-8B-Instruct
  MLX_OMNI_MODEL_PATH=/Volumes/LLMS/models MLX_OMNI_API_KEY=… mlx-omni-server --host 0.0.0.0
  mlx-omni-server --offline --memory-budget 24G --idle-ttl 600
  mlx.launch -n 2 -- mlx-omni-server --model-path /Volumes/LLMS/models --model org/large
  mlx-omni-server pull mlx-community/Qwen3-0.6B-4bit
  mlx-omni-server doctor

model paths:
  --model-path, which may be repeated (the first folder that has a model wins), else MLX_OMNI_MODEL_PATH (several
  folders, separated as in PATH), else the file that `hf-overlay config` names, else the Hugging Face cache alone.
  Your folders are only ever read.

then:
  curl http://127.0.0.1:10240/v1/models
"""


def given(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags that were given, by the names of their fields."""
    found = {name: tuple(each) if isinstance(each, list) else each for name, each in vars(parsed).items()}
    found["aliases"] = dict(parsed.aliases)
    found["maps"] = dict(parsed.maps)
    return {name: value for name, value in found.items() if value is not None and value not in ((), {}, "")}


def read(parsed: argparse.Namespace, environ: Mapping[str, str], file: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings: the command line wins over the environment, and that over the configuration file.

    `file`: the values of the configuration file, by the names of their fields. Raises ValueError.
    """
    values = dict(file or {})
    if key := environ.get(API_KEY_VARIABLE):
        values["api_key"] = key
    values |= given(parsed)
    has_extras = values.get("draft_model") or values.get("adapter_path")
    if has_extras and not values.get("models"):
        raise ValueError("--draft-model and --adapter-path belong to a model: name it with --model")
    if rank(environ) is not None and has_extras:
        raise ValueError("under mlx.launch, mlx-lm loads neither draft models nor adapters")
    settings = Settings(**_fields_of(Settings, values))
    if values.get("cache_bytes") is None and settings.memory_budget is not None:
        values["cache_bytes"] = settings.memory_budget // 8
    return replace(
        settings,
        engine=EngineOptions(**_fields_of(EngineOptions, values)),
        limits=Limits(**_fields_of(Limits, values)),
    )


def _fields_of(owner: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values of a dataclass's fields. None stands for a field's default, and is left out."""
    return {each.name: given[each.name] for each in fields(owner) if given.get(each.name) is not None}


def make_parser(declared: dict[str, argparse.Action] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options for serving. Also put them into `declared`, by the names of their fields."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [options]\n       {PROGRAM} COMMAND [options]",
        description="Serve the models in your folders and Hugging Face cache with the APIs of OpenAI and Anthropic.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, declared)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


def add_options(parser: argparse.ArgumentParser, declared: dict[str, argparse.Action] | None = None) -> None:
    """Add the options for serving. Also put them into `declared`, by the names of their fields."""
    declared = {} if declared is None else declared
    add_folders(parser, declared)
    add = _Adder(parser, Settings, declared)
    add("is_offline", "--offline", "download nothing")
    add(
        "hold_downloads",
        "--hold-downloads",
        "download even while the Hugging Face cache is away or read-only, and hold it until a later start can move it",
    )
    add("models", "--model", "load this model at the start and keep it; may be repeated", many=True, metavar="ID")
    add(
        "aliases",
        "--alias",
        "another name for a model, for clients that insist on one; may be repeated",
        many=True,
        action=arguments.Pairs,
        type=arguments.alias,
        metavar="NAME=ID",
    )
    add("default_model", "--default-model", "the model for unknown names; default: they get 404", metavar="ID")
    add("host", "--host", "address to listen on, 0.0.0.0 for the whole network")
    add("port", "--port", "port to listen on, 0 for any free one", type=arguments.port)
    add(
        "api_key",
        "--api-key",
        f"key that clients must send; safer in {API_KEY_VARIABLE}, which `ps` does not show",
        metavar="KEY",
    )
    add(
        "origins",
        "--cors-allow-origins",
        "web pages that may use the server, such as http://localhost:3000; several with commas; * for all",
        action="extend",
        type=arguments.origins,
        metavar="ORIGIN",
    )
    add("log_level", "--log-level", "least important messages to log", choices=["debug", "info", "warning", "error"])
    add("log_format", "--log-format", "lines for people, or JSON for programs", choices=["text", "json"])

    add = _Adder(parser.add_argument_group("memory"), Settings, declared)
    add(
        "memory_budget",
        "--memory-budget",
        "memory for the weights of all loaded models, such as 24G; default: what other uses leave of the machine's",
        type=arguments.size,
        metavar="SIZE",
    )
    add(
        "idle_ttl",
        "--idle-ttl",
        "unload models that were idle for so long; default: never",
        type=arguments.seconds,
        metavar="SECONDS",
    )
    add = add.of(EngineOptions)
    add(
        "cache_bytes",
        "--prompt-cache",
        "memory for KV caches kept for later prompts; default: 1/8 of --memory-budget, else of the machine's",
        type=arguments.size,
        metavar="SIZE",
    )
    add(
        "kv_disk",
        "--kv-disk",
        "disk space for KV caches kept for later prompts, also after a restart; 0: none; default: 20G",
        type=arguments.size,
        metavar="SIZE",
    )
    add(
        "no_wired_memory",
        "--no-wired-memory",
        "on macOS: let the system page models out; slower for large ones, but no kernel panics of wired memory",
    )
    add("kv_bits", "--kv-bits", "quantise KV caches; disables batching", type=int, choices=KV_BITS)
    add(
        "kv_group_size",
        "--kv-group-size",
        "numbers that share a scale in quantised KV caches",
        type=int,
        choices=KV_GROUP_SIZES,
    )
    add(
        "quantized_kv_start",
        "--quantized-kv-start",
        "quantise a KV cache from this many tokens on",
        type=arguments.count,
        metavar="TOKENS",
    )

    add = _Adder(parser.add_argument_group("limits"), EngineOptions, declared)
    add(
        "load_seconds",
        "--load-seconds",
        "give up loading a model after so long without progress",
        type=arguments.seconds,
        metavar="SECONDS",
    )
    add("batch_size", "--max-batch", "sequences of a model that generate at once", type=arguments.positive, metavar="N")
    add = add.of(Limits)
    add(
        "waiting_requests",
        "--max-queue",
        "requests that may wait; further requests get 429",
        type=arguments.count,
        metavar="N",
    )
    add("body", "--max-body", "largest body of a request", type=arguments.size, metavar="SIZE")
    add("messages", "--max-messages", "most messages in a conversation", type=arguments.positive, metavar="N")
    add(
        "prompt_tokens",
        "--max-prompt",
        "longest prompt; default: the model's context",
        type=arguments.positive,
        metavar="TOKENS",
    )
    add(
        "preparation_seconds",
        "--preparation-seconds",
        "longest preparation of a request: template, images, tokens, grammar; more is refused",
        type=arguments.seconds,
        metavar="SECONDS",
    )
    add(
        "answer_tokens",
        "--max-tokens",
        "longest answer when a request sets no limit; default: to the end of the context",
        type=arguments.positive,
        metavar="TOKENS",
    )
    add = add.of(EngineOptions)
    add(
        "prefill_step",
        "--prefill-step",
        "most tokens of all prompts that are read at once",
        type=arguments.positive,
        metavar="TOKENS",
    )
    add(
        "max_stall_ms",
        "--max-stall-ms",
        "longest pause of running answers while prompts are read",
        type=arguments.positive,
        metavar="MILLISECONDS",
    )
    add = add.of(Settings)
    add(
        "shutdown_seconds",
        "--shutdown-seconds",
        "time for running streams to end when the server stops",
        type=arguments.seconds,
        metavar="SECONDS",
    )

    add = _Adder(parser.add_argument_group("models (of the first --model)"), Settings, declared)
    add("draft_model", "--draft-model", "draft model for speculative decoding; disables batching", metavar="ID")
    add("adapter_path", "--adapter-path", "folder of LoRA weights", metavar="DIR")
    add = add.of(EngineOptions)
    add(
        "num_draft_tokens",
        "--num-draft-tokens",
        "tokens that the draft model proposes in each step",
        type=arguments.positive,
        metavar="N",
    )
    add("trust_remote_code", "--trust-remote-code", "run Python files that come with models")
    add("is_pipeline", "--pipeline", "under mlx.launch: distribute layers instead of splitting tensors")


def add_folders(parser: argparse.ArgumentParser, declared: dict[str, argparse.Action] | None = None) -> None:
    """Add the options for where the models are, which most commands have."""
    add = _Adder(parser, Settings, {} if declared is None else declared)
    add("model_paths", "--model-path", "a folder of models; may be repeated", many=True, metavar="DIR")
    add(
        "below",
        "--below",
        "a Hugging Face cache or a folder of models behind your own cache, only read; may be repeated",
        many=True,
        metavar="DIR",
    )
    add(
        "maps",
        "--map",
        "this folder answers to this id, before all else; may be repeated",
        many=True,
        action=arguments.Pairs,
        type=arguments.map_,
        metavar="ID=DIR",
    )
    add(
        "exclude",
        "--exclude",
        "take this model from the Hugging Face cache or the Hub, not from your folders; may be repeated",
        many=True,
        metavar="ID",
    )


class _Adder:
    """Adds options to a parser, or to a group of one. Each stands for a field of a dataclass, and has its default."""

    def __init__(
        self, parser: argparse._ActionsContainer, owner: type[Any], declared: dict[str, argparse.Action]
    ) -> None:
        self._parser = parser
        self._declared = declared
        self._owner = owner
        self._fields = {each.name: each for each in fields(owner)}

    def of(self, owner: type[Any]) -> _Adder:
        """Return an adder to the same group for the fields of another dataclass."""
        return _Adder(self._parser, owner, self._declared)

    def __call__(self, name: str, flag: str, text: str, *, many: bool = False, **options: Any) -> None:
        """Add an option for the field `name`; its help is `text` and the default. `many`: it may be repeated."""
        default = self._fields[name].default
        if default is False:
            options["action"] = "store_true"
        elif many:
            options.setdefault("action", "append")
        elif default not in (MISSING, None, ()) and "default:" not in text:
            shown = f"{default // 10**6}M" if options.get("type") is arguments.size else default
            text = f"{text}; default: {shown}"
        is_list = options.get("action") in ("append", "extend", arguments.Pairs)
        # The default None means that the option was not given. Options that may be repeated need a list to add to.
        self._declared[name] = self._parser.add_argument(
            flag, dest=name, default=[] if is_list else None, help=text, **options
        )
