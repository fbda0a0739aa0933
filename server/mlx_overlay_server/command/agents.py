"""What each coding agent needs in its environment and arguments to use a model of a server. Pure functions.

Nothing is written to files, so an agent that is started without `launch` is not affected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PATIENCE_MS = 3 * 3_600_000
"""Milliseconds that an agent waits for an answer. A slow machine reads a long prompt for many minutes."""
_COMPACT = 0.75
"""The part of the context that, once filled, makes an agent sum up its conversation. The rest is for the answer."""
_CLAUDE_LEAST = 100_000
"""The smallest window that Claude Code accepts in CLAUDE_CODE_AUTO_COMPACT_WINDOW."""
_CLAUDE_ANSWER = 20_000
"""The most tokens of an answer that Claude Code reserves, before it takes a percentage of the rest."""


class Endpoint(NamedTuple):
    """A model of a server, as an agent reaches it."""

    url: str
    """As http://127.0.0.1:10240."""
    api_key: str
    model: str
    context: int
    """Tokens that prompt and answer may have together."""

    @property
    def answer(self) -> int:
        """Tokens that one answer may have."""
        return max(1024, min(32_000, self.context // 4))


@dataclass(frozen=True)
class Start:
    """How an agent is started."""

    arguments: list[str] = field(default_factory=list)
    """The agent's arguments that come before those of the user."""
    environ: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    """Variables to remove, because they would lead the agent to another server or model."""
    files: dict[str, str] = field(default_factory=dict)
    """Temporary files, which exist while the agent runs: the variable that names each -> its text."""


@dataclass(frozen=True)
class Agent:
    """A coding agent."""

    program: str
    context: int
    """The least tokens of context with which it is useful. Its own prompt takes a good part of them."""
    install: str
    """The command that installs it."""
    start: Callable[[Endpoint], Start]


def environment(start: Start, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of an agent, except for the variables of its files."""
    return {name: value for name, value in environ.items() if name not in start.unset} | start.environ


def _claude(at: Endpoint) -> Start:
    roles = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")
    families = ("OPUS", "SONNET", "HAIKU", "FABLE")
    names = [*roles, *(f"ANTHROPIC_DEFAULT_{family}_MODEL" for family in families)]
    environ = {
        **dict.fromkeys(names, at.model),
        "ANTHROPIC_BASE_URL": at.url,
        "ANTHROPIC_AUTH_TOKEN": at.api_key,
        "API_TIMEOUT_MS": str(PATIENCE_MS),
        # Its watchdogs end streams that are silent for 5 minutes, and they do not count pings.
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(PATIENCE_MS),
        # Another watchdog ends its background agents after 10 minutes without a message.
        "CLAUDE_ASYNC_AGENT_STALL_TIMEOUT_MS": str(PATIENCE_MS),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(at.answer),
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(max(at.context, _CLAUDE_LEAST)),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    if at.context < _CLAUDE_LEAST:
        # The percentage is of a larger context: of the true one, it would keep 13,000 tokens free beside the answer.
        percent = (at.context - at.answer) * 100 // (_CLAUDE_LEAST - min(at.answer, _CLAUDE_ANSWER))
        environ["CLAUDE_AUTOCOMPACT_PCT_OVERRIDE"] = str(max(1, percent))
    else:  # for models that it does not know, it assumes a context of 200,000 tokens
        environ["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(at.context)
    return Start([], environ, unset=("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX"))


def _codex(at: Endpoint) -> Start:
    provider = {
        "name": "mlx-omni-server",
        "base_url": f"{at.url}/v1",
        "env_key": "MLX_OMNI_API_KEY",
        "wire_api": "responses",
        "stream_idle_timeout_ms": PATIENCE_MS,
        "request_max_retries": 1,
        "stream_max_retries": 1,
    }
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in provider.items())
    settings = {
        "model_providers.mlx-omni": f"{{ {table} }}",
        "model_provider": '"mlx-omni"',
        "model_context_window": str(at.context),
        "model_auto_compact_token_limit": str(int(at.context * _COMPACT)),
        "check_for_update_on_startup": "false",
    }
    arguments = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    return Start([*arguments, "--model", at.model], {"MLX_OMNI_API_KEY": at.api_key})


def _opencode(at: Endpoint) -> Start:
    options = {"baseURL": f"{at.url}/v1", "apiKey": at.api_key}
    waits: dict[str, object] = dict.fromkeys(("timeout", "headerTimeout", "chunkTimeout"), False)
    limit = {"context": at.context, "output": at.answer}
    config = {
        "model": f"mlx-omni/{at.model}",
        "small_model": f"mlx-omni/{at.model}",
        "provider": {
            "mlx-omni": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "mlx-omni-server",
                "options": {**options, **waits},
                "models": {at.model: {"limit": limit}},
            }
        },
    }
    return Start([], {"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def _aider(at: Endpoint) -> Start:
    name = f"openai/{at.model}"
    limits = {"max_tokens": at.answer, "max_input_tokens": at.context, "max_output_tokens": at.answer}
    known = {name: {**limits, "litellm_provider": "openai", "mode": "chat"}}
    return Start(
        [],
        files={"AIDER_MODEL_METADATA_FILE": json.dumps(known)},
        environ={
            "OPENAI_API_BASE": f"{at.url}/v1",
            "OPENAI_API_KEY": at.api_key,
            "AIDER_MODEL": name,
            "AIDER_WEAK_MODEL": name,
            "AIDER_EDITOR_MODEL": name,
            "AIDER_TIMEOUT": str(PATIENCE_MS // 1000),
            "AIDER_MAX_CHAT_HISTORY_TOKENS": str(at.context // 4),
            "AIDER_SHOW_MODEL_WARNINGS": "false",
            "AIDER_CHECK_UPDATE": "false",
            "AIDER_ANALYTICS": "false",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
    )


AGENTS: dict[str, Agent] = {
    "claude": Agent("claude", 32_000, "npm install -g @anthropic-ai/claude-code", _claude),
    "codex": Agent("codex", 16_000, "npm install -g @openai/codex", _codex),
    "opencode": Agent("opencode", 16_000, "npm install -g opencode-ai", _opencode),
    "aider": Agent("aider", 8_000, "uv tool install aider-chat", _aider),
}
"""The agents that `launch` knows, by their names there."""
