"""What the folders of well-known repos are taken for, by what their config.json and modules.json say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_overlay.catalog import kinds, tasks
from hf_overlay.catalog.files import Unfit

pytestmark = pytest.mark.mlx_lm

ST = ("Transformer", "Pooling", "Normalize")
"""The modules of most models that embed."""
ONE = {"id2label": {"0": "LABEL_0"}}
CODE = {"auto_map": {"AutoModel": "modeling.Model"}}
OF_GTE = {**CODE, "position_embedding_type": "rope", "layer_norm_type": "layer_norm", "hidden_act": "gelu"}
NTK = {"type": "ntk", "factor": 2.0}
JINA = {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}
NOMIC = {**CODE, "prenorm": False, "rotary_emb_fraction": 1.0, "rotary_scaling_factor": None, "use_rms_norm": False}
EXPERTS = {"num_experts": 8, "moe_every_n_layers": 2, "moe_top_k": 2, "activation_function": "gelu", "ffn_div": 1}
SEES: dict[str, Any] = {"vision_config": {}}
NO_MLX = "is not one that the installed mlx-lm can load"

REPOS: list[tuple[str, str, str, dict[str, Any], tuple[str, ...], str]] = [
    ("sentence-transformers/all-MiniLM-L6-v2", "bert", "BertModel", {}, ST, "embedding"),
    ("sentence-transformers/all-mpnet-base-v2", "mpnet", "MPNetForMaskedLM", {}, ST, "embedding"),
    ("sentence-transformers/all-distilroberta-v1", "roberta", "RobertaForMaskedLM", {}, ST, "embedding"),
    ("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", "bert", "BertModel", {}, ST[:2], "embedding"),
    ("sentence-transformers/paraphrase-albert-small-v2", "albert", "AlbertModel", {}, ST[:2], "embedding"),
    ("sentence-transformers/LaBSE", "bert", "BertModel", {}, (*ST[:2], "Dense", "Normalize"), "embedding"),
    ("BAAI/bge-small-en-v1.5", "bert", "BertModel", {}, ST, "embedding"),
    ("BAAI/bge-m3", "xlm-roberta", "XLMRobertaModel", {}, ST, "embedding"),
    ("intfloat/multilingual-e5-large", "xlm-roberta", "XLMRobertaModel", {}, ST, "embedding"),
    ("intfloat/e5-mistral-7b-instruct", "mistral", "MistralModel", {}, ST, "embedding"),
    ("mixedbread-ai/mxbai-embed-large-v1", "bert", "BertModel", {}, ST[:2], "embedding"),
    ("Snowflake/snowflake-arctic-embed-l-v2.0", "xlm-roberta", "XLMRobertaModel", {}, ST, "embedding"),
    ("Snowflake/snowflake-arctic-embed-m-v2.0", "gte", "GteModel", OF_GTE, ST, "embedding"),
    ("Alibaba-NLP/gte-large-en-v1.5", "new", "NewModel", {**OF_GTE, "rope_scaling": NTK}, ST[:2], "embedding"),
    ("Alibaba-NLP/gte-modernbert-base", "modernbert", "ModernBertModel", {}, ST[:2], "embedding"),
    ("Alibaba-NLP/gte-Qwen2-1.5B-instruct", "qwen2", "Qwen2ForCausalLM", {**CODE, "is_causal": False}, ST, "embedding"),
    ("nomic-ai/nomic-embed-text-v1.5", "nomic_bert", "NomicBertModel", NOMIC, ST[:2], "embedding"),
    ("nomic-ai/nomic-embed-text-v2-moe", "nomic_bert", "NomicBertModel", {**NOMIC, **EXPERTS}, ST, "embedding"),
    (
        "jinaai/jina-embeddings-v2-base-en",
        "bert",
        "JinaBertForMaskedLM",
        {"auto_map": JINA, "position_embedding_type": "alibi", "feed_forward_type": "geglu"},
        ST[:2],
        "embedding",
    ),
    ("jinaai/jina-embeddings-v3", "xlm-roberta", "XLMRobertaModel", CODE, ST, "its own code"),
    ("Qwen/Qwen3-Embedding-0.6B", "qwen3", "Qwen3ForCausalLM", {}, ST, "embedding"),
    ("mlx-community/Qwen3-Embedding-0.6B-4bit-DWQ", "qwen3", "Qwen3ForCausalLM", {}, (), "embedding"),
    ("Qwen/Qwen3-VL-Embedding-2B", "qwen3_vl", "Qwen3VLForConditionalGeneration", SEES, (), "part for images"),
    ("sentence-transformers/sentence-t5-base", "t5", "T5EncoderModel", {}, ST, NO_MLX),
    ("naver/splade-v3", "bert", "BertForMaskedLM", {}, ("MLMTransformer", "SpladePooling"), "MLMTransformer"),
    ("colbert-ir/colbertv2.0", "bert", "HF_ColBERT", {}, (), "without modules.json"),
    ("google-bert/bert-base-uncased", "bert", "BertForMaskedLM", {}, (), "without modules.json"),
    ("google/electra-base-discriminator", "electra", "ElectraForPreTraining", {}, (), "without modules.json"),
    ("dslim/bert-base-NER", "bert", "BertForTokenClassification", {}, (), "without modules.json"),
    ("ProsusAI/finbert", "bert", "BertForSequenceClassification", {"num_labels": 3}, (), "3 classes"),
    ("cross-encoder/ms-marco-MiniLM-L6-v2", "bert", "BertForSequenceClassification", ONE, (), "reranker"),
    ("cross-encoder/ms-marco-electra-base", "electra", "ElectraForSequenceClassification", ONE, (), "reranker"),
    ("cross-encoder/nli-deberta-v3-base", "deberta-v2", "DebertaV2ForSequenceClassification", {}, (), NO_MLX),
    ("BAAI/bge-reranker-v2-m3", "xlm-roberta", "XLMRobertaForSequenceClassification", ONE, (), "reranker"),
    (
        "Alibaba-NLP/gte-multilingual-reranker-base",
        "new",
        "NewForSequenceClassification",
        {**OF_GTE, **ONE},
        (),
        "reranker",
    ),
    (
        "jinaai/jina-reranker-v2-base-multilingual",
        "xlm-roberta",
        "XForSequenceClassification",
        {**CODE, **ONE},
        (),
        "code",
    ),
    ("jinaai/jina-reranker-v3", "qwen3", "JinaForRanking", CODE, (), "dialogue of its own"),
    ("Qwen/Qwen3-Reranker-0.6B", "qwen3", "Qwen3ForCausalLM", {}, (), "reranker"),
    ("mixedbread-ai/mxbai-rerank-base-v2", "qwen2", "Qwen2ForCausalLM", {}, (), "dialogue of its own"),
    ("mixedbread-ai/mxbai-rerank-base-v2", "qwen2", "Qwen2ForCausalLM", {}, ("Transformer", "LogitScore"), "reranker"),
    ("Skywork/Skywork-Reward-V2-Qwen3-8B", "qwen3", "Qwen3ForSequenceClassification", ONE, (), "rewards answers"),
    ("meta-llama/Llama-3.2-3B-Instruct", "llama", "LlamaForCausalLM", {}, (), "text"),
    ("mlx-community/Qwen3-4B-4bit", "qwen3", "Qwen3ForCausalLM", {}, (), "text"),
    ("openai/gpt-oss-20b", "gpt_oss", "GptOssForCausalLM", {}, (), "text"),
    ("google/gemma-3-4b-it", "gemma3", "Gemma3ForConditionalGeneration", SEES, (), "text"),
    ("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", "Qwen3VLForConditionalGeneration", SEES, (), "text"),
    ("openai/whisper-large-v3", "whisper", "WhisperForConditionalGeneration", {}, (), "transcription"),
]


@pytest.mark.parametrize(
    ("repo", "model_type", "architecture", "more", "listed", "expected"), REPOS, ids=[each[0] for each in REPOS]
)
def test_a_repo_is_what_it_is(
    repo: str,
    model_type: str,
    architecture: str,
    more: dict[str, Any],
    listed: tuple[str, ...],
    expected: str,
    tmp_path: Path,
) -> None:
    names = {"tokenizer.json", "preprocessor_config.json", "model.safetensors"}
    modules = [{"path": f"{at}_{name}" if at else "", "type": f"x.{name}"} for at, name in enumerate(listed)]
    for each in modules if listed else ():
        if each["path"]:
            (tmp_path / each["path"]).mkdir()
            (tmp_path / each["path"] / "config.json").write_text("{}")
            names |= {f"{each['path']}/config.json", f"{each['path']}/model.safetensors"}
    if listed:
        (tmp_path / tasks.MODULES).write_text(json.dumps(modules))
        names.add(tasks.MODULES)
    config = {"model_type": model_type, "architectures": [architecture], **more}
    types = kinds.installed(encoders=True)
    assert types is not None
    found = types.why_not(config)
    if found is None:
        try:
            found = tasks.read(str(tmp_path), repo, config, names, is_strict=True)
        except Unfit as unfit:
            found = unfit.reason.text
    assert expected == found or (expected not in ("text", "embedding", "reranker") and expected in found)
