"""The doctor finds what would show only when a model answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server.command.folders import examine


def _written(folder: Path, **files: Any) -> str:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return str(folder)


def _codes(folder: str) -> list[str]:
    return [finding.kind for finding in examine(folder)]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        [{"name": "default", "template": "{{ messages }}"}],
        None,
    ],
)
def test_a_folder_without_problems_has_none(template: Any, tmp_path: Path) -> None:
    assert _codes(_written(tmp_path, tokenizer_config={"chat_template": template, "eos_token": "</s>"})) == []


def test_a_template_that_is_not_valid_is_named_with_its_line(tmp_path: Path) -> None:
    folder = _written(tmp_path, tokenizer_config={"chat_template": "\n{% if %}", "eos_token": "</s>"})
    (finding,) = examine(folder)
    assert finding.what.startswith("line 2 of the chat template in tokenizer_config.json is not valid: ")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", "utf-8")  # which counts then
    assert examine(folder) == []


@pytest.mark.parametrize(
    ("files", "codes"),
    [
        ({"tokenizer_config": {"a": 1}}, ["end"]),
        ({"tokenizer_config": {"a": 1}, "config": {"eos_token_id": 0}}, []),
        ({"tokenizer_config": {"a": 1}, "config": {"text_config": {"eos_token_id": [1, 2]}}}, []),
        ({"tokenizer_config": {"a": 1}, "generation_config": {"eos_token_id": 2}}, []),
        ({"tokenizer_config": {"a": 1}, "special_tokens_map": {"eos_token": {"content": "</s>"}}}, []),
        ({}, []),
    ],
)
def test_a_model_that_never_ends_its_answers_is_named(files: Any, codes: list[str], tmp_path: Path) -> None:
    assert _codes(_written(tmp_path, **files)) == codes
