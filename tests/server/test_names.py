"""Short names of models: what they stand for, and that they never stand for two."""

from __future__ import annotations

import pytest
from hf_overlay import ModelNotFound, UsageError
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.names import matches, resolved

IDS = ["HuggingFaceTB/SmolLM2-135M-Instruct", "mlx-community/Qwen3-8B-4bit", "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "gpt2"]


@pytest.mark.parametrize(
    ("text", "id_"),
    [
        ("smollm2", IDS[0]),
        ("SmolLM2-135M-Instruct", IDS[0]),
        ("huggingfacetb/smollm2-135m-instruct", IDS[0]),
        ("qwen3 8b 4bit", IDS[1]),
        ("qwen3-8b", IDS[2]),  # the whole name after the slash, though another id begins like it
        ("Qwen/Qwen3-8B", IDS[2]),
        ("0.6b", IDS[3]),
        ("gpt", IDS[4]),
    ],
)
def test_a_short_name_stands_for_the_one_model_that_it_fits(text: str, id_: str) -> None:
    assert resolved(text, IDS) == id_


def test_a_name_that_fits_several_is_refused_with_all_of_them() -> None:
    with pytest.raises(UsageError, match=r"may be Qwen/Qwen3-0\.6B, Qwen/Qwen3-8B, mlx-"):
        resolved("qwen3", IDS)


@pytest.mark.parametrize("text", ["llama", "", "/", "qwen3-9b"])
def test_a_name_that_fits_none_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ModelNotFound, match="there are HuggingFaceTB/SmolLM2-135M-Instruct, "):
        resolved(text, IDS)


@given(st.lists(st.text("abAB/-3", min_size=1, max_size=6), max_size=6), st.text("abAB/-3", max_size=4))
def test_a_whole_id_always_stands_for_itself_alone(ids: list[str], text: str) -> None:
    for id_ in ids:
        assert matches(id_, ids) == [id_]
    assert set(matches(text, ids)) <= set(ids)
