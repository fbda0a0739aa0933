"""What a model does, and which encoders and models of speech mlx-omni-server takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_overlay
import pytest
from hf_overlay.catalog import kinds, tasks
from hf_overlay.catalog.scan import Scanner
from hf_overlay.models import Model, Reject

pytestmark = pytest.mark.mlx_lm

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
HEAD = {"architectures": ["BertForSequenceClassification"]}
ONE = {"id2label": {"0": "LABEL_0"}}


def _make(models: Path, name: str, config: dict[str, Any], files: dict[str, Any]) -> str:
    folder = models / name
    contents = {"config.json": config, "tokenizer.json": {}, **files}
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return str(folder)


def _found(models: Path, name: str, config: dict[str, Any], **files: Any) -> Model | Reject:
    """What a server finds in a folder."""
    path = _make(models, name, config, files)
    types = kinds.installed(encoders=True)
    return Scanner((str(models),), str(models.parent / "hub"), types).read(path, name, str(models))


def _modules(*modules: dict[str, str]) -> list[dict[str, str]]:
    return [dict(each) for each in modules]


@pytest.mark.parametrize("model_type", sorted(tasks.ENCODERS))
def test_an_encoder_embeds_or_ranks(model_type: str, models: Path) -> None:
    found = _found(models, "m", {"model_type": model_type, "architectures": ["XModel"]})
    assert isinstance(found, Model)
    assert found.task == "embedding"
    if model_type == "nomic_bert":
        return
    ranks = _found(models, "r", {"model_type": model_type, **HEAD, **ONE})
    assert isinstance(ranks, Model)
    assert ranks.task == "reranker"


@pytest.mark.parametrize(
    ("name", "config", "files", "task"),
    [
        ("m", {}, {}, "text"),
        ("Qwen3-Embedding-0.6B-4bit", {}, {}, "embedding"),
        ("org/mxbai-embed-large", {}, {}, "embedding"),
        ("embeds/chat", {}, {}, "text"),
        ("Qwen3-Reranker-4B", {}, {}, "reranker"),
        ("m", {"architectures": ["Qwen3ForSequenceClassification"], **ONE}, {}, "reranker"),
        ("m", {"architectures": ["Qwen3ForSequenceClassification"]}, {}, "text"),
        ("m", {}, {"modules.json": _modules(TRANSFORMER, POOLING), "1_Pooling/config.json": {}}, "embedding"),
        ("m", {}, {"modules.json": _modules(TRANSFORMER, {"path": "1", "type": "x.LogitScore"})}, "reranker"),
    ],
)
def test_what_models_of_mlx_lm_do(
    name: str, config: dict[str, Any], files: dict[str, Any], task: str, models: Path
) -> None:
    found = _found(models, name, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **config}, **files)
    assert isinstance(found, Model), found
    assert found.task == task


@pytest.mark.parametrize(
    ("config", "files", "text"),
    [
        ({"architectures": ["BertForMaskedLM"]}, {}, "is a BertForMaskedLM without modules.json"),
        ({}, {}, "without architectures"),
        (HEAD, {}, "sorts texts into 2 classes"),
        ({**HEAD, "id2label": {"0": "a", "1": "b", "2": "c"}}, {}, "into 3 classes"),
        ({"auto_map": {"AutoModel": "x.Y"}}, {"modules.json": _modules(TRANSFORMER)}, "its own code"),
        ({"position_embedding_type": "alibi"}, {"modules.json": _modules(TRANSFORMER)}, "'alibi'"),
        ({"hidden_act": "mish"}, {"modules.json": _modules(TRANSFORMER)}, "'mish'"),
        ({"is_decoder": True}, {"modules.json": _modules(TRANSFORMER)}, "decoder"),
        ({}, {"modules.json": _modules({"path": "", "type": "x.models.WordWeights"})}, "asks for WordWeights"),
        ({}, {"modules.json": _modules(TRANSFORMER, POOLING)}, "has no 1_Pooling/config.json"),
        (
            {},
            {"modules.json": _modules(TRANSFORMER, POOLING), "1_Pooling/config.json": {"pooling_mode": "magic"}},
            "'magic'",
        ),
        (
            {},
            {"modules.json": _modules(TRANSFORMER, POOLING), "1_Pooling/config.json": {"include_prompt": False}},
            "leaves prompts out",
        ),
        ({}, {"modules.json": _modules(TRANSFORMER, {"path": "2", "type": "x.Dense"})}, "2/model.safetensors"),
        ({}, {"modules.json": {}}, "not a JSON array"),
        ({}, {"modules.json": [{"path": ""}]}, "not a list of modules"),
        ({}, {"modules.json": "{"}, "not valid JSON"),
    ],
)
def test_why_an_encoder_is_left_out(config: dict[str, Any], files: dict[str, Any], text: str, models: Path) -> None:
    found = _found(models, "m", {"model_type": "bert", **config}, **files)
    assert isinstance(found, Reject)
    assert text in found.reason.text


def test_a_model_of_mlx_lm_that_looks_both_ways_is_left_out(models: Path) -> None:
    """mlx-lm would load it, and its vectors would be wrong."""
    files = {"modules.json": _modules(TRANSFORMER, POOLING, NORMALIZE), "1_Pooling/config.json": {}}
    known = {"model_type": "qwen3", "is_causal": False}
    for config in ({**known, "use_sliding_window": True}, {**GEMMA, "model_type": "gemma2"}):
        found = _found(models, "m", config, **files)
        assert isinstance(found, Reject)
        assert "both directions" in found.reason.text
    embeds = _found(models, "e", known, **files)
    assert isinstance(embeds, Model)
    assert embeds.task == "embedding"
    ranks = _found(models, "r", {**GEMMA, "architectures": ["Gemma3TextForSequenceClassification"], **ONE})
    assert isinstance(ranks, Reject)


GEMMA = {"model_type": "gemma3_text", "use_bidirectional_attention": True}
JINA = {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}
DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"1_Pooling/config.json": {}, "2_Dense/config.json": {}, "2_Dense/model.safetensors": "x"}, ""),
        ({"model.safetensors.index.json": {"weight_map": {"dense.0.weight": "model.safetensors"}}}, ""),
        ({"model.safetensors.index.json": {"weight_map": {"w": "model.safetensors"}}}, "has no projections"),
        ({}, "has no projections"),
        ({"1_Pooling/config.json": {}, "2_Dense/config.json": {}}, "2_Dense/model.safetensors"),
    ],
)
def test_embedding_gemma_has_its_projections_in_folders_or_among_its_weights(
    files: dict[str, Any], why: str, models: Path
) -> None:
    listed = _modules(TRANSFORMER, POOLING, DENSE, NORMALIZE)
    found = _found(models, "m", GEMMA, **{"modules.json": listed, **files})
    if why:
        assert isinstance(found, Reject)
        assert why in found.reason.text
    else:
        assert isinstance(found, Model)
        assert found.task == "embedding"


@pytest.mark.parametrize(
    ("model_type", "config", "why"),
    [
        ("nomic_bert", {"auto_map": {"AutoModel": "x.Y"}, "activation_function": "swiglu", "num_experts": None}, None),
        ("nomic_bert", {"num_experts": 8, "moe_every_n_layers": 2, "activation_function": "gelu"}, None),
        ("nomic_bert", {"num_experts": 8, "moe_every_n_layers": 1}, "moe_every_n_layers '1'"),
        ("nomic_bert", {"prenorm": True}, "prenorm 'True'"),
        ("nomic_bert", {**HEAD, **ONE}, "nomic_bert that ranks"),
        ("gte", {"auto_map": {"AutoModel": "x.Y"}, "position_embedding_type": "rope", "rope_scaling": None}, None),
        ("gte", {"rope_parameters": {"rope_type": "default", "rope_theta": 160000.0}}, None),
        ("gte", {"rope_parameters": {"rope_type": "dynamic"}}, "positions of type 'dynamic'"),
        ("gte", {**HEAD, **ONE}, None),
        ("new", {"auto_map": {"AutoModel": "x.Y"}, "rope_scaling": {"type": "ntk", "factor": 8.0}}, None),
        ("new", {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.6}}, "rope_scaling"),
        ("new", {"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope_scaling"),
        ("bert", {"auto_map": JINA, "position_embedding_type": "alibi", "feed_forward_type": "geglu"}, None),
        ("bert", {"auto_map": JINA, "position_embedding_type": "alibi", "feed_forward_type": "reglu"}, "'reglu'"),
        ("albert", {"num_hidden_groups": 2}, "groups"),
        ("gte", {"position_embedding_type": "absolute"}, "position_embedding_type 'absolute'"),
        ("gte", {"hidden_act": "mish"}, "'mish'"),
    ],
)
def test_which_encoders_that_bring_code_or_positions_of_their_own_are_taken(
    model_type: str, config: dict[str, Any], why: str | None, models: Path
) -> None:
    found = _found(models, "m", {"model_type": model_type, "architectures": ["XModel"], **config})
    assert isinstance(found, Model) == (why is None)
    assert why is None or (isinstance(found, Reject) and why in found.reason.text)


def test_only_who_asks_for_encoders_gets_them(models: Path) -> None:
    _make(models, "bert", {"model_type": "bert", "architectures": ["BertModel"]}, {})
    _make(models, "nli", {"model_type": "bert", **HEAD}, {})
    with hf_overlay.open_session([models], kind="mlx") as without:
        assert not without.models
        (place,) = [each for each in without._catalog.explain("bert") if each.path.endswith("models/bert")]
        assert "mlx-omni-server embeds or ranks with it" in place.reason.text
    with hf_overlay.open_session([models], kind="mlx", encoders=True) as with_them:
        assert [(model.id, model.task) for model in with_them.models] == [("bert", "embedding")]


TOKENIZER_12HZ = {"speech_tokenizer/config.json": {}, "speech_tokenizer/model.safetensors": "weights"}
VOICES = {"voices/af_heart.safetensors": "a voice"}
FEATURES: dict[str, Any] = {"preprocessor_config.json": {}}


@pytest.mark.parametrize(
    ("config", "files", "task"),
    [
        ({"model_type": "whisper"}, FEATURES, "transcription"),
        ({"model_type": "whisper"}, {"processor_config.json": {}}, "transcription"),
        ({"model_type": "qwen3_asr"}, FEATURES, "transcription"),
        ({"target": "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel"}, {}, "transcription"),
        ({"model_type": "kokoro"}, VOICES, "speech"),
        ({"model_type": "qwen3_tts"}, TOKENIZER_12HZ, "speech"),
    ],
)
def test_a_model_transcribes_or_speaks(config: dict[str, Any], files: dict[str, Any], task: str, models: Path) -> None:
    found = _found(models, "named-after-nothing", config, **files)
    assert isinstance(found, Model)
    assert found.task == task
    (models / "named-after-nothing/model.safetensors").rename(models / "named-after-nothing/weights.safetensors")
    again = Scanner((str(models),), str(models.parent / "hub"), kinds.installed(encoders=True)).scan()[0]
    assert [each.task for each in again.models] == [task]  # mlx-audio takes weights under any name


@pytest.mark.parametrize(
    ("config", "files", "why"),
    [
        ({"model_type": "whisper"}, {}, "has no preprocessor_config.json"),
        ({"model_type": "kokoro"}, {}, "has no voices"),
        (
            {"model_type": "qwen3_asr", "thinker_config": {"model_type": "qwen3_forced_aligner"}},
            FEATURES,
            "transcribes nothing",
        ),
        ({"model_type": "qwen3_tts"}, {}, "has no speech_tokenizer/config.json"),
        ({"target": "nemo.collections.asr.models.x.EncDecOtherModel"}, {}, "names no model_type"),
        ({"model_type": "parakeet"}, {}, "'parakeet' is not one"),
        ({"model_type": "kokoro_v9"}, VOICES, "'kokoro_v9' is not one"),
    ],
)
def test_why_a_model_does_not_transcribe_or_speak(
    config: dict[str, Any], files: dict[str, Any], why: str, models: Path
) -> None:
    found = _found(models, "kokoro-whisper", config, **files)
    assert isinstance(found, Reject)
    assert why in found.reason.text


def test_mlx_lm_alone_transcribes_nothing(models: Path) -> None:
    path = _make(models, "w", {"model_type": "whisper"}, FEATURES)
    found = Scanner((str(models),), str(models.parent / "hub"), kinds.installed()).read(path, "w", str(models))
    assert isinstance(found, Reject)
    assert "mlx-omni-server transcribes or speaks with it" in found.reason.text


def test_pooling_modes_have_an_older_form() -> None:
    assert tasks.pooling_modes({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": True}) == ("cls", "lasttoken")
    assert tasks.pooling_modes({"pooling_mode": "max", "pooling_mode_cls_token": True}) == ("max",)
    assert tasks.pooling_modes({}) == ("mean",)
