"""Tiny folders of models that embed or rank, with random weights under the names that transformers gives them.

Their tokenizer knows some words, and the letters of all others. Equal arguments give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, INNER, CONTEXT = 32, 2, 4, 48, 96
WORDS = ("cats", "purr", "dogs", "bark", "a", "the", "why", "do", "and", "rain", "falls", "yes", "no")
UNKNOWN, PAD, FIRST, LAST = "<unk>", "<pad>", "<s>", "</s>"
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz?<>|:_.\",'-")
_SPECIAL = (UNKNOWN, PAD, FIRST, LAST)
VOCABULARY = (*_SPECIAL, *dict.fromkeys((*WORDS, *LETTERS)), *(f"##{letter}" for letter in LETTERS))
_NAMES = {
    "bert": "Bert",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "modernbert": "ModernBert",
    "mpnet": "MPNet",
    "qwen3": "Qwen3",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "gemma3_text": "Gemma3Text",
    "nomic_bert": "NomicBert",
    "gte": "Gte",
    "albert": "Albert",
    "electra": "Electra",
    "new": "New",
    "jina": "JinaBert",
    "nomic_moe": "NomicBert",
}
TYPES = tuple(_NAMES)
_MODEL_TYPES = {"jina": "bert", "nomic_moe": "nomic_bert"}
"""The `model_type` of those whose config.json says another one than the name that they have here."""
NTK = {"type": "ntk", "factor": 8.0}
_EMBEDDING, _EXPERTS = 16, 4
"""The size of the embeddings of those that project them, and the experts of those that have some."""


def make_encoder(
    folder: Path,
    model_type: str = "bert",
    *,
    head: str | None = None,
    modes: Sequence[str] | None = ("mean",),
    normalizes: bool = True,
    dense: int | None = None,
    longest: int | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
    labels: int = 1,
    **config: Any,
) -> Path:
    """Write a model's folder; return it.

    `head`: the end of the name of its class, such as `ForSequenceClassification`. `modes`: those of its Pooling module;
    None: it has no modules of sentence-transformers. `dense`: the size of the vector after a Dense module. `longest`:
    its `max_seq_length`; other arguments change its config.json.
    """
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    random = np.random.default_rng(TYPES.index(model_type))
    ranks = head == "ForSequenceClassification"
    tensors = {
        name: (random.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1) + (name.endswith("orm.weight"))).astype(
            np.float32
        )
        for name, shape in _shapes(model_type, ranks=ranks, labels=labels)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", _config(model_type, head or "Model", labels) | config)
    _write_tokenizer(folder, model_type)
    if modes is not None and head is None:
        _write_modules(folder, modes, normalizes=normalizes, dense=dense, random=random)
    if longest is not None:
        _write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    if prompts is not None:
        text = {"prompts": dict(prompts), "default_prompt_name": default_prompt}
        _write(folder / "config_sentence_transformers.json", text)
    return folder


def make_pairs_template(folder: Path, each: str, *, default_prompt: str | None = None) -> None:
    """Make a chat model one that ranks by its chat template, which writes `each` for each message `m`."""
    listed = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_LogitScore",
            "type": "sentence_transformers.cross_encoder.modules.LogitScore",
        },
    ]
    _write(folder / "modules.json", listed)
    (folder / "1_LogitScore").mkdir()
    yes, no = (VOCABULARY.index(word) for word in ("yes", "no"))
    _write(folder / "1_LogitScore/config.json", {"true_token_id": yes, "false_token_id": no})
    template = f"{{% for m in messages %}}{each}{{% endfor %}}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    known = json.loads((folder / "config_sentence_transformers.json").read_text())
    _write(
        folder / "config_sentence_transformers.json",
        {**known, "default_prompt_name": default_prompt, "model_type": "CrossEncoder"},
    )


def _config(model_type: str, head: str, labels: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_NAMES[model_type] + head],
        "model_type": _MODEL_TYPES.get(model_type, model_type),
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 1,
    }
    if head == "ForSequenceClassification":
        config["id2label"] = {str(label): f"LABEL_{label}" for label in range(labels)}
    if model_type == "distilbert":
        return config | {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, "activation": "gelu"}
    if model_type in ("nomic_bert", "nomic_moe"):
        sizes: dict[str, Any] = {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_positions": 4 * CONTEXT,
        }
        sizes |= {"max_trained_positions": CONTEXT, "activation_function": "swiglu", "type_vocab_size": 2}
        if model_type == "nomic_moe":
            own: dict[str, Any] = {"activation_function": "gelu", "type_vocab_size": 1, "rotary_emb_base": 10000}
            own |= dict.fromkeys(("mlp_fc1_bias", "mlp_fc2_bias", "qkv_proj_bias"), True)
            sizes |= own | {"num_experts": _EXPERTS, "moe_top_k": 2, "moe_every_n_layers": 2}
        return config | sizes
    config |= {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
    }
    if model_type in ("gte", "new"):
        own = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "type_vocab_size": 1, "rope_theta": 10000}
        own |= {"layer_norm_type": "layer_norm", "position_embedding_type": "rope", "rope_scaling": None}
        return config | own | ({"rope_scaling": NTK} if model_type == "new" else {})
    if model_type in ("albert", "electra"):
        config |= {"embedding_size": _EMBEDDING}
    if model_type == "albert":
        config |= {"num_hidden_groups": 1, "inner_group_num": 1}
    if model_type == "jina":
        code = {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}
        config |= {"position_embedding_type": "alibi", "feed_forward_type": "geglu", "auto_map": code}
    if model_type == "modernbert":
        local = {"local_attention": 8, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"}
        return config | local | {"hidden_activation": "gelu", "norm_eps": 1e-5}
    if model_type == "gemma3_text":
        shape = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
        return config | shape | {"sliding_window_pattern": 2, "use_bidirectional_attention": True}
    if model_type == "qwen3":
        own = {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
        return config | own | {"tie_word_embeddings": True, "max_position_embeddings": 2048, "hidden_act": "silu"}
    return config | {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "type_vocab_size": 2}


def _shapes(model_type: str, *, ranks: bool, labels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a model's weights."""
    if model_type == "modernbert":
        yield from _of_modernbert(ranks=ranks, labels=labels)
    elif model_type in ("nomic_bert", "nomic_moe"):
        yield from _of_nomic_bert() if model_type == "nomic_bert" else _of_nomic_moe()
    elif model_type in ("gte", "new"):
        yield from _of_gte("new." if ranks else "")
        if ranks:
            yield from _linear("new.pooler.dense", HIDDEN, HIDDEN)
            yield from _linear("classifier", labels, HIDDEN)
    elif model_type == "albert":
        yield from _of_albert("albert." if ranks else "")
        if ranks:
            yield from _linear("albert.pooler", HIDDEN, HIDDEN)
            yield from _linear("classifier", labels, HIDDEN)
    elif model_type in ("gemma3_text", "qwen3"):
        yield from _of_decoder("model." if ranks else "", is_gemma=model_type == "gemma3_text")
        if ranks:
            yield "score.weight", (labels, HIDDEN)
    else:
        yield from _of_bert(model_type, ranks=ranks, labels=labels)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _norm(name: str, size: int = HIDDEN) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _of_bert(model_type: str, *, ranks: bool, labels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = (
        {each: f"{each}." for each in ("bert", "distilbert", "electra", "mpnet")}.get(model_type, "roberta.")
        if ranks
        else ""
    )
    size = _EMBEDDING if model_type == "electra" else HIDDEN
    yield f"{prefix}embeddings.word_embeddings.weight", (len(VOCABULARY), size)
    if model_type != "jina":
        yield f"{prefix}embeddings.position_embeddings.weight", (CONTEXT, size)
    if model_type not in ("distilbert", "mpnet"):
        yield f"{prefix}embeddings.token_type_embeddings.weight", (2, size)
    yield from _norm(f"{prefix}embeddings.LayerNorm", size)
    if model_type == "electra":
        yield from _linear(f"{prefix}embeddings_project", HIDDEN, size)
    if model_type == "mpnet":
        yield f"{prefix}encoder.relative_attention_bias.weight", (32, HEADS)
    for number in range(LAYERS):
        if model_type == "distilbert":
            layer = f"{prefix}transformer.layer.{number}"
            attention = [f"attention.{name}_lin" for name in ("q", "k", "v", "out")]
            others = ("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
        elif model_type == "mpnet":
            layer = f"{prefix}encoder.layer.{number}"
            attention = [f"attention.attn.{name}" for name in ("q", "k", "v", "o")]
            others = ("attention.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
        else:
            layer = f"{prefix}encoder.layer.{number}"
            attention = [*(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense"]
            others = ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
        for name in attention:
            yield from _linear(f"{layer}.{name}", HIDDEN, HIDDEN)
        yield from _norm(f"{layer}.{others[0]}")
        if model_type == "jina":
            yield f"{layer}.mlp.gated_layers.weight", (2 * INNER, HIDDEN)
            yield from _linear(f"{layer}.mlp.wo", HIDDEN, INNER)
            yield from _norm(f"{layer}.mlp.layernorm")
            continue
        yield from _linear(f"{layer}.{others[1]}", INNER, HIDDEN)
        yield from _linear(f"{layer}.{others[2]}", HIDDEN, INNER)
        yield from _norm(f"{layer}.{others[3]}")
    if ranks:
        first, second = {
            "bert": ("bert.pooler.dense", "classifier"),
            "distilbert": ("pre_classifier", "classifier"),
        }.get(model_type, ("classifier.dense", "classifier.out_proj"))
        yield from _linear(first, HIDDEN, HIDDEN)
        yield from _linear(second, labels, HIDDEN)


def _of_modernbert(*, ranks: bool, labels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = "model." if ranks else ""
    yield f"{prefix}embeddings.tok_embeddings.weight", (len(VOCABULARY), HIDDEN)
    norms = ["embeddings.norm", "final_norm", *(f"layers.{number}.mlp_norm" for number in range(LAYERS))]
    norms += [f"layers.{number}.attn_norm" for number in range(1, LAYERS)]
    yield from ((f"{prefix}{name}.weight", (HIDDEN,)) for name in norms)
    for number in range(LAYERS):
        layer = f"{prefix}layers.{number}"
        yield f"{layer}.attn.Wqkv.weight", (3 * HIDDEN, HIDDEN)
        yield f"{layer}.attn.Wo.weight", (HIDDEN, HIDDEN)
        yield f"{layer}.mlp.Wi.weight", (2 * INNER, HIDDEN)
        yield f"{layer}.mlp.Wo.weight", (HIDDEN, INNER)
    if ranks:
        yield "head.dense.weight", (HIDDEN, HIDDEN)
        yield "head.norm.weight", (HIDDEN,)
        yield from _linear("classifier", labels, HIDDEN)


def _of_nomic_bert() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.word_embeddings.weight", (len(VOCABULARY), HIDDEN)
    yield "embeddings.token_type_embeddings.weight", (2, HIDDEN)
    yield from ((f"emb_ln.{name}", (HIDDEN,)) for name in ("weight", "bias"))
    for number in range(LAYERS):
        layer = f"encoder.layers.{number}"
        yield f"{layer}.attn.Wqkv.weight", (3 * HIDDEN, HIDDEN)
        yield f"{layer}.attn.out_proj.weight", (HIDDEN, HIDDEN)
        yield from ((f"{layer}.mlp.{name}.weight", (INNER, HIDDEN)) for name in ("fc11", "fc12"))
        yield f"{layer}.mlp.fc2.weight", (HIDDEN, INNER)
        yield from ((f"{layer}.{norm}.{name}", (HIDDEN,)) for norm in ("norm1", "norm2") for name in ("weight", "bias"))


def _of_nomic_moe() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.word_embeddings.weight", (len(VOCABULARY), HIDDEN)
    yield "embeddings.token_type_embeddings.weight", (1, HIDDEN)
    yield from _norm("emb_ln")
    for number in range(LAYERS):
        layer = f"encoder.layers.{number}"
        yield from _linear(f"{layer}.attn.Wqkv", 3 * HIDDEN, HIDDEN)
        yield from _linear(f"{layer}.attn.out_proj", HIDDEN, HIDDEN)
        if number % 2:
            yield f"{layer}.mlp.router.layer.weight", (_EXPERTS, HIDDEN)
            yield from ((f"{layer}.mlp.experts.mlp.{name}", (_EXPERTS * INNER, HIDDEN)) for name in ("w1", "w2"))
            yield f"{layer}.mlp.experts.bias", (HIDDEN,)
        else:
            yield from _linear(f"{layer}.mlp.fc1", INNER, HIDDEN)
            yield from _linear(f"{layer}.mlp.fc2", HIDDEN, INNER)
        yield from (each for norm in ("norm1", "norm2") for each in _norm(f"{layer}.{norm}"))


def _of_albert(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, rows in (("word", len(VOCABULARY)), ("position", CONTEXT), ("token_type", 2)):
        yield f"{prefix}embeddings.{name}_embeddings.weight", (rows, _EMBEDDING)
    yield from _norm(f"{prefix}embeddings.LayerNorm", _EMBEDDING)
    yield from _linear(f"{prefix}encoder.embedding_hidden_mapping_in", HIDDEN, _EMBEDDING)
    layer = f"{prefix}encoder.albert_layer_groups.0.albert_layers.0"
    for name in ("query", "key", "value", "dense"):
        yield from _linear(f"{layer}.attention.{name}", HIDDEN, HIDDEN)
    yield from _norm(f"{layer}.attention.LayerNorm")
    yield from _linear(f"{layer}.ffn", INNER, HIDDEN)
    yield from _linear(f"{layer}.ffn_output", HIDDEN, INNER)
    yield from _norm(f"{layer}.full_layer_layer_norm")


def _of_gte(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}embeddings.word_embeddings.weight", (len(VOCABULARY), HIDDEN)
    yield f"{prefix}embeddings.token_type_embeddings.weight", (1, HIDDEN)
    yield from _norm(f"{prefix}embeddings.LayerNorm")
    for number in range(LAYERS):
        layer = f"{prefix}encoder.layer.{number}"
        yield from _linear(f"{layer}.attention.qkv_proj", 3 * HIDDEN, HIDDEN)
        yield from _linear(f"{layer}.attention.o_proj", HIDDEN, HIDDEN)
        yield f"{layer}.mlp.up_gate_proj.weight", (2 * INNER, HIDDEN)
        yield from _linear(f"{layer}.mlp.down_proj", HIDDEN, INNER)
        yield from (each for norm in ("attn_ln", "mlp_ln") for each in _norm(f"{layer}.{norm}"))


def _of_decoder(prefix: str, *, is_gemma: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}embed_tokens.weight", (len(VOCABULARY), HIDDEN)
    yield f"{prefix}norm.weight", (HIDDEN,)
    for number in range(LAYERS):
        layer = f"{prefix}layers.{number}"
        for name, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, HIDDEN)
        for name in ("q", "k"):
            yield f"{layer}.self_attn.{name}_norm.weight", (8,)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            yield f"{layer}.mlp.{name}_proj.weight", shape
        others = ("pre_feedforward", "post_feedforward") if is_gemma else ()
        for name in ("input", "post_attention", *others):
            yield f"{layer}.{name}_layernorm.weight", (HIDDEN,)


def _write_modules(folder: Path, modes: Sequence[str], *, normalizes: bool, dense: int | None, random: Any) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    types = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalizes else [])]
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(types[1:], 1))]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(zip(types, paths, strict=True))
    ]
    _write(folder / "modules.json", listed)
    for path in paths[1:]:
        (folder / path).mkdir()
    _write(folder / "1_Pooling/config.json", {"word_embedding_dimension": HIDDEN, "pooling_mode": list(modes)})
    if dense:
        size = HIDDEN * len(modes)
        matrix = (random.standard_normal((dense, size)) / size).astype(np.float32)
        save_file({"linear.weight": matrix, "linear.bias": matrix[:, 0].copy()}, folder / "2_Dense/model.safetensors")
        activation = "torch.nn.modules.activation.Tanh"
        known = {"in_features": size, "out_features": dense, "bias": True, "activation_function": activation}
        _write(folder / "2_Dense/config.json", known)


def _write_tokenizer(folder: Path, model_type: str) -> None:
    """A WordPiece tokenizer with marks at both ends, or, as a decoder's, at the end alone."""
    appends_end = model_type == "qwen3"
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.WordPiece(
            {token: at for at, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN, max_input_chars_per_word=99
        )
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(_SPECIAL))
    ids = [(name, VOCABULARY.index(name)) for name in (FIRST, LAST)]
    single, pair = f"{FIRST} $A {LAST}", f"{FIRST} $A {LAST} $B:1 {LAST}:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {LAST}" if appends_end else single,
        pair=f"$A {LAST} $B:1" if appends_end else pair,
        special_tokens=ids,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": FIRST, "eos_token": LAST}
    own = {"cls_token": FIRST, "sep_token": LAST, "tokenizer_class": "PreTrainedTokenizerFast"}
    has_types = model_type in ("bert", "camembert", "roberta", "xlm-roberta")
    names = ["input_ids", *(["token_type_ids"] if has_types else []), "attention_mask"]
    _write(folder / "tokenizer_config.json", {**marks, **own, "model_input_names": names, "model_max_length": 1 << 40})


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
