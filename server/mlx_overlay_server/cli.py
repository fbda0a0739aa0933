"""The command `mlx-omni-server`. 0 done, 1 expected failure, 2 usage."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from mlx_overlay_server import settings as settings_
from mlx_overlay_server.settings import API_KEY_VARIABLE, Settings, device_memory, size

EXAMPLES = """\
examples:
  mlx-omni-server --model-path /Volumes/LLMS/models
  mlx-omni-server --model-path /Volumes/LLMS/models --model mlx-community/Llama-3-8B-Instruct
  MLX_OMNI_MODEL_PATH=/Volumes/LLMS/models MLX_OMNI_API_KEY=… mlx-omni-server --host 0.0.0.0
  mlx-omni-server --offline --memory-budget 24G --idle-ttl 600
  mlx.launch -n 2 -- mlx-omni-server --model-path /Volumes/LLMS/models --model org/large

model paths:
  --model-path, as often as you like (the first wins), else MLX_OMNI_MODEL_PATH (several, separated like PATH),
  else the Hugging Face cache alone. Your folders are only ever read.

then:
  curl http://127.0.0.1:10240/v1/models
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; the one place that turns errors into exit codes."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from importlib.metadata import version

        print(f"mlx-omni-server {version('mlx-overlay-server')}")
        return 0
    if arguments.print_completion:
        import shtab

        print(shtab.complete(parser, arguments.print_completion))
        return 0
    try:
        chosen = read(arguments, os.environ)
    except ValueError as error:
        parser.error(str(error))
    from mlx_overlay_server import run

    status = run.serve(chosen)
    if status and settings_.rank(os.environ) is not None:
        sys.stderr.flush()
        os._exit(status)  # a thread that waits for lost ranks would keep the process for ever
    return status


def read(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Settings from the command line, which wins, and the environment. Raises ValueError."""
    aliases = {}
    for each in arguments.alias:
        name, separator, id_ = each.partition("=")
        if not (name and separator and id_):
            raise ValueError(f"--alias takes NAME=ID, not {each!r}")
        aliases[name] = id_
    if (arguments.draft_model or arguments.adapter_path) and not arguments.model:
        raise ValueError("--draft-model and --adapter-path belong to a model: name it with --model")
    if settings_.rank(environ) is not None and (arguments.draft_model or arguments.adapter_path):
        raise ValueError("under mlx.launch, mlx-lm loads neither draft models nor adapters")
    budget = arguments.memory_budget if arguments.memory_budget is not None else device_memory()
    return Settings(
        model_paths=tuple(arguments.model_path),
        exclude=tuple(arguments.exclude),
        host=arguments.host,
        port=arguments.port,
        models=tuple(arguments.model),
        is_offline=arguments.offline,
        hold_downloads=arguments.hold_downloads,
        api_key=arguments.api_key or environ.get(API_KEY_VARIABLE) or None,
        origins=tuple(
            origin.strip() for each in arguments.cors_allow_origins for origin in each.split(",") if origin.strip()
        ),
        aliases=aliases,
        default_model=arguments.default_model,
        log_level=arguments.log_level,
        memory_budget=budget,
        idle_ttl=arguments.idle_ttl,
        cache_bytes=arguments.prompt_cache if arguments.prompt_cache is not None else budget // 8,
        batch_size=arguments.max_batch,
        max_queue=arguments.max_queue,
        max_body=arguments.max_body,
        max_messages=arguments.max_messages,
        max_prompt=arguments.max_prompt,
        max_tokens=arguments.max_tokens,
        prefill_step=arguments.prefill_step,
        shutdown_seconds=arguments.shutdown_seconds,
        draft_model=arguments.draft_model,
        num_draft_tokens=arguments.num_draft_tokens,
        adapter_path=arguments.adapter_path,
        kv_bits=arguments.kv_bits,
        kv_group_size=arguments.kv_group_size,
        quantized_kv_start=arguments.quantized_kv_start,
        trust_remote_code=arguments.trust_remote_code,
        is_pipeline=arguments.pipeline,
    )


def make_parser() -> argparse.ArgumentParser:
    """The whole command line, for `main` and for shell completion."""
    parser = argparse.ArgumentParser(
        prog="mlx-omni-server",
        description="Chat with the models in your folders and your Hugging Face cache, as OpenAI's and Anthropic's "
        "clients do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", action="append", default=[], metavar="DIR", help="a folder of models; repeat it for more")
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="ID",
        help="let the Hugging Face cache and the Hub answer for this id, not your folder; repeat it for more",
    )
    add("--offline", action="store_true", help="download nothing")
    add(
        "--hold-downloads",
        action="store_true",
        help="download even while the Hugging Face cache is away or read-only, and hold it until a later start can "
        "move it there",
    )
    add(
        "--model",
        action="append",
        default=[],
        metavar="ID",
        help="load it at the start and keep it; repeat it for more",
    )
    add("--alias", action="append", default=[], metavar="NAME=ID", help="a name that clients insist on, for a model")
    add("--default-model", metavar="ID", help="answers to names that are not known; without it they are 404")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0 for the whole network")
    add("--port", type=_port, default=10240, help="default: 10240; 0 for any that is free")
    add(
        "--api-key",
        metavar="KEY",
        help=f"what clients must send; better in {API_KEY_VARIABLE}, where `ps` shows it to nobody",
    )
    add(
        "--cors-allow-origins",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may use the server, as http://localhost:3000; several with commas; * for all",
    )
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="default: info")

    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--memory-budget", type=_size, metavar="SIZE", help="for models at once, as 24G; default: 3/4 of the machine's"
    )
    memory.add_argument(
        "--idle-ttl", type=_seconds, default=0, metavar="SECONDS", help="unload what is idle so long; default: never"
    )
    memory.add_argument(
        "--prompt-cache",
        type=_size,
        metavar="SIZE",
        help="KV caches kept for prompts to come; default: 1/8 of the budget",
    )
    memory.add_argument(
        "--kv-bits", type=int, choices=[2, 3, 4, 6, 8], help="quantise KV caches; requests then run one by one"
    )
    memory.add_argument("--kv-group-size", type=int, choices=[32, 64, 128], default=64, help="default: 64")
    memory.add_argument("--quantized-kv-start", type=_count, default=5000, metavar="TOKENS", help="default: 5000")

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch", type=_positive, default=32, metavar="N", help="sequences at once; default: 32")
    limits.add_argument(
        "--max-queue", type=_count, default=512, metavar="N", help="requests that may wait; default: 512"
    )
    limits.add_argument("--max-body", type=_size, default=64 * 10**6, metavar="SIZE", help="of a request; default: 64M")
    limits.add_argument("--max-messages", type=_positive, default=10_000, metavar="N", help="default: 10000")
    limits.add_argument("--max-prompt", type=_positive, metavar="TOKENS", help="default: the model's context")
    limits.add_argument(
        "--max-tokens",
        type=_positive,
        metavar="TOKENS",
        help="of an answer, where a request does not say; default: to the context's end",
    )
    limits.add_argument(
        "--prefill-step", type=_positive, default=2048, metavar="TOKENS", help="of a prompt at once; default: 2048"
    )
    limits.add_argument(
        "--shutdown-seconds", type=_seconds, default=5, metavar="SECONDS", help="for running streams to end; default: 5"
    )

    models = parser.add_argument_group("models (of the first --model)")
    models.add_argument("--draft-model", metavar="ID", help="guesses ahead for it; requests then run one by one")
    models.add_argument("--num-draft-tokens", type=_positive, default=3, metavar="N", help="default: 3")
    models.add_argument("--adapter-path", metavar="DIR", help="LoRA weights for it")
    models.add_argument("--trust-remote-code", action="store_true", help="run Python files that come with models")
    models.add_argument("--pipeline", action="store_true", help="under mlx.launch: share out layers instead of tensors")
    add("--version", action="store_true", help="print the version and exit")
    add("--print-completion", choices=["bash", "zsh", "fish", "tcsh"], help="print a completion script for your shell")
    return parser


def _size(text: str) -> int:
    try:
        return size(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give it as 24G or 512M") from None


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535)")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no count")
    return int(text)


def _positive(text: str) -> int:
    if (count := _count(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds
