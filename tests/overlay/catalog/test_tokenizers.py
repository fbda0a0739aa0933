"""A model without a tokenizer, which mlx-lm cannot load, is left out with that reason (P12)."""

from __future__ import annotations

from pathlib import Path

import hf_overlay
import pytest
from hf_overlay.catalog.kinds import ModelTypes, installed, may_be_tokenizer
from hf_overlay.catalog.scan import Scanner
from hf_overlay.models import Code, Reject

from tests.support.folders import lay_model


def rejects(models: Path, types: ModelTypes | None) -> tuple[Reject, ...]:
    (source,) = Scanner((str(models),), "/nonexistent", types).scan()
    return source.rejects


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
        "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "qwen.tiktoken", "tiktoken.model",
        "tekken.json", "tokenization_chatglm.py", "hf_rwkv_tokenizer.py", "rwkv_vocab_v20230424.txt",
        "tokenizer.jsonl", "prophetnet.tokenizer", "bpe.codes", "dict.txt",
    ],
)  # fmt: skip
def test_whatever_can_be_a_tokenizer_counts(name: str) -> None:
    assert may_be_tokenizer(name)
    assert not may_be_tokenizer(f"sub/{name}"), "transformers looks in the model's own folder"


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
     "chat_template.jinja", "README.md", "modeling_llama.py"],
)  # fmt: skip
def test_what_lies_beside_a_tokenizer_does_not(name: str) -> None:
    assert not may_be_tokenizer(name)


@pytest.mark.mlx_lm
@pytest.mark.parametrize("settled", [False, True])
def test_without_a_tokenizer_there_is_no_model_until_it_is_there(models: Path, settled: bool) -> None:
    folder = lay_model(models / "org/name", {"special_tokens_map.json": b"{}"}, settled=settled)
    with hf_overlay.open_session([models], kind="mlx") as session:
        assert [model.id for model in session.models] == ["org/name"]
        (folder / "tokenizer.json").unlink()
        session.refresh()
        assert not session.models
        with pytest.raises(hf_overlay.IncompleteModel, match="has no tokenizer"):
            session.resolve("org/name")
        (folder / "tokenizer.model").write_bytes(b"spm")
        session.refresh()
        assert [model.id for model in session.models] == ["org/name"]


@pytest.mark.mlx_lm
def test_a_link_is_named_that_was_to_be_the_tokenizer(models: Path) -> None:
    folder = lay_model(models / "org/name")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/unplugged/tokenizer.json")
    (reject,) = rejects(models, installed())
    assert reject.reason == (
        Code.INCOMPLETE,
        "has no tokenizer (tokenizer.json is a broken link): still being copied?",
    )


def test_models_for_other_programs_need_none(models: Path) -> None:
    (lay_model(models / "org/speech", model_type="whisper") / "tokenizer.json").unlink()
    assert rejects(models, None) == ()
