"""What each agent gets in its environment: the model for each role, a context that fits, and time."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.command import parser
from mlx_overlay_server.command.agents import AGENTS, Endpoint, environment
from mlx_overlay_server.command.launch import Candidate

AT = Endpoint("http://127.0.0.1:1", "secret", "org/m", 40_000)


def test_the_command_line_knows_all_agents() -> None:
    assert tuple(AGENTS) == parser.AGENTS


def test_claude_code_has_the_model_in_each_role_and_no_other_account() -> None:
    environ = environment(AGENTS["claude"].start(AT), {"ANTHROPIC_API_KEY": "of the user", "LANG": "C"})
    roles = [name for name in environ if name.endswith("_MODEL")]
    assert len(roles) == 7
    assert {environ[name] for name in roles} == {"org/m"}
    assert "ANTHROPIC_API_KEY" not in environ
    assert environ["LANG"] == "C"
    assert (environ["ANTHROPIC_BASE_URL"], environ["ANTHROPIC_AUTH_TOKEN"]) == (AT.url, "secret")


@given(st.integers(32_000, 1_000_000))
def test_claude_code_compacts_before_the_context_is_full(context: int) -> None:
    environ = environment(AGENTS["claude"].start(AT._replace(context=context)), {})
    answer = int(environ["CLAUDE_CODE_MAX_OUTPUT_TOKENS"])
    # As Claude Code 2.1.197 works it out.
    whole = int(environ.get("CLAUDE_CODE_MAX_CONTEXT_TOKENS", 200_000))
    window = min(whole, max(100_000, int(environ["CLAUDE_CODE_AUTO_COMPACT_WINDOW"])))
    room = window - min(answer, 20_000)
    percent = int(environ.get("CLAUDE_AUTOCOMPACT_PCT_OVERRIDE", 100))
    compacts_at = min(room * percent // 100, room - 13_000)
    assert 0.65 * context <= compacts_at <= context - answer


def test_codex_gets_a_provider_of_its_own_and_the_key_in_its_environment_alone() -> None:
    start = AGENTS["codex"].start(AT)
    text = " ".join(start.arguments)
    for part in ("model_context_window=40000", "token_limit=30000", "stream_idle_timeout_ms = 10800000"):
        assert part in text
    assert "secret" not in text, "arguments are seen by everybody"
    assert start.environ == {"MLX_OMNI_API_KEY": "secret"}


def test_opencode_gets_its_configuration_as_a_variable() -> None:
    config = json.loads(AGENTS["opencode"].start(AT).environ["OPENCODE_CONFIG_CONTENT"])
    provider = config["provider"]["mlx-omni"]
    assert config["model"] == config["small_model"] == "mlx-omni/org/m"
    assert provider["models"]["org/m"]["limit"] == {"context": 40_000, "output": 10_000}
    assert provider["options"]["timeout"] is False


def test_aider_learns_the_context_from_a_file_that_is_there_while_it_runs() -> None:
    start = AGENTS["aider"].start(AT)
    assert json.loads(start.files["AIDER_MODEL_METADATA_FILE"])["openai/org/m"]["max_input_tokens"] == 40_000
    roles = {start.environ[name] for name in ("AIDER_MODEL", "AIDER_WEAK_MODEL", "AIDER_EDITOR_MODEL")}
    assert roles == {"openai/org/m"}


@pytest.mark.parametrize(
    ("context", "calls_tools", "why"),
    [(64_000, True, None), (64_000, False, "no tools"), (None, True, "nobody knows"), (8192, True, "is 8192 tokens")],
)
def test_a_model_is_able_or_it_is_said_why_not(context: int | None, calls_tools: bool, why: str | None) -> None:
    found = Candidate("org/m", context, 1, False, False, calls_tools).why_not(AGENTS["claude"])
    assert found is None if why is None else found is not None and why in found
