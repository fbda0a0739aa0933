"""What a model does: it generates text, embeds it as a vector, ranks it by a query, transcribes, or speaks.

Models of mlx-lm generate text, unless the files of sentence-transformers in their folder, the head that config.json
names, or, where both were lost in a conversion, their name says that they embed or rank. Encoders, which mlx-lm does
not load, do nothing else: mlx-omni-server has code of its own for the types in `ENCODERS`, and for attention in both
directions in the types in `BOTH_WAYS`. `speech` knows the models that transcribe or speak.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from hf_overlay.catalog import speech
from hf_overlay.catalog.files import Unfit, read_json, read_list
from hf_overlay.models import Code, Task

ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "gte",
        "modernbert",
        "mpnet",
        "new",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
    }
)
"""Values of `model_type` that mlx-omni-server loads beside those of mlx-lm; `new` is an older name of `gte`."""
BOTH_WAYS = frozenset({"gemma3_text", "llama", "qwen2", "qwen3"})
"""Types of mlx-lm's that mlx-omni-server also embeds with where their attention is to go in both directions."""
ACTIVATIONS = frozenset({"gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"})
"""Values of `hidden_act` that it knows."""
MODULES = "modules.json"
"""The file in which sentence-transformers lists the modules of a model."""
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

_INDEX = "model.safetensors.index.json"
_OF_GTE: Mapping[str, tuple[object, ...]] = {
    "layer_norm_type": ("layer_norm",),
    "logn_attention_scale": (False,),
    "position_embedding_type": ("rope",),
}
_SETTINGS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "gte": _OF_GTE,
    "new": _OF_GTE,
    "nomic_bert": {
        "activation_function": ("swiglu", "gelu"),
        "causal": (False,),
        "expert_choice_router": (False,),
        "ffn_div": (1,),
        "moe_every_n_layers": (0, 2),
        "moe_normalize_expert_weights": (False,),
        "num_shared_experts": (0,),
        "parallel_block": (False,),
        "prenorm": (False,),
        "rotary_emb_fraction": (1.0,),
        "rotary_emb_interleaved": (False,),
        "use_rms_norm": (False,),
    },
}
"""By type, the values that mlx-omni-server knows of settings that a config.json may hold.

What was code of these models' own is part of transformers now, so an `auto_map` asks for nothing else.
"""

_JINA = "jinaai/jina-bert-implementation--"
"""What the code is named after that jina-embeddings-v2 asks for, which is part of mlx-omni-server."""
_EMBEDDING = frozenset({"Transformer", "Pooling", "Normalize", "Dense"})
_RANKING = frozenset({"Transformer", "LogitScore"})
_HEAD = "ForSequenceClassification"
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Module(NamedTuple):
    """One module of a sentence-transformers model; what each returns is what the next one gets."""

    type: str
    """The name of its class, without the package."""
    path: str
    """Its folder in the model's; empty for the model's own."""


def looks_both_ways(config: Mapping[str, Any]) -> bool:
    """Return whether a model of mlx-lm's asks for attention in both directions, which mlx-lm does not have."""
    return config.get("is_causal") is False or bool(config.get("use_bidirectional_attention"))


def embeds_both_ways(config: Mapping[str, Any]) -> bool:
    """Return whether mlx-omni-server embeds with a model of mlx-lm's whose attention is to go in both directions."""
    return config.get("model_type") in BOTH_WAYS and looks_both_ways(config)


def is_gemma(config: Mapping[str, Any]) -> bool:
    """Return whether a model is Gemma 3 with attention in both directions: EmbeddingGemma."""
    return config.get("model_type") == "gemma3_text" and looks_both_ways(config)


def modules(path: str) -> tuple[Module, ...]:
    """Return what a folder's modules.json lists. Raises Unfit or OSError."""
    listed = read_list(f"{path}/{MODULES}")
    try:
        return tuple(Module(str(each["type"]).rsplit(".", 1)[-1], str(each["path"])) for each in listed)
    except (TypeError, KeyError):
        raise Unfit(Code.BAD_CONFIG, f"{MODULES} is not a list of modules; copy it again") from None


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modes that the config.json of a Pooling module names, the older form of it included."""
    named = config.get("pooling_mode")
    if named is not None:
        return (named,) if isinstance(named, str) else tuple(map(str, named))
    return tuple(mode for key, mode in _LEGACY_MODES.items() if config.get(key)) or ("mean",)


def read(path: str, model_id: str, config: Mapping[str, Any], names: Collection[str], *, is_strict: bool) -> Task:
    """Return what the model in a folder does; `names` are its files.

    If `is_strict`, raises Unfit for a model that does something else than generate text in a way that mlx-omni-server
    cannot, or without a file for it; OSError.
    """
    if (spoken := speech.task(config)) is not None:
        if is_strict and (problem := speech.problem(config, names)) is not None:
            raise Unfit(Code.INCOMPLETE, problem)
        return spoken
    try:
        listed = modules(path) if MODULES in names else None
        task = _task(model_id, config, listed)
        if is_strict and (problem := _problem(path, model_id, task, config, listed, names)) is not None:
            raise Unfit(Code.OTHER_KIND, problem)
    except Unfit:
        if is_strict:
            raise
        return "text"
    return task


def _task(model_id: str, config: Mapping[str, Any], listed: Collection[Module] | None) -> Task:
    types = {each.type for each in listed or ()}
    if types:
        return "reranker" if "LogitScore" in types or _has_head(config) else "embedding"
    if _has_head(config) and (config.get("model_type") in ENCODERS or _labels(config) == 1):
        return "reranker"
    if config.get("model_type") in ENCODERS:
        return "embedding"
    name = model_id.rsplit("/", 1)[-1].lower()
    return "reranker" if "rerank" in name else "embedding" if "embed" in name else "text"


def _problem(
    path: str,
    model_id: str,
    task: Task,
    config: Mapping[str, Any],
    listed: Collection[Module] | None,
    names: Collection[str],
) -> str | None:
    """Return why the server cannot embed or rank with a model, as the end of a sentence; None where it can."""
    if task == "text":
        return None
    known = _RANKING if task == "reranker" else _EMBEDDING
    if other := sorted({each.type for each in listed or ()} - known):
        return f"{MODULES} asks for {other[0][:80]}, which mlx-omni-server does not have"
    if looks_both_ways(config) and not (task == "embedding" and embeds_both_ways(config) and _is_global(config)):
        return f"config.json asks for attention in both directions, which {_named(config)} does not have here"
    if is_gemma(config) and _is_converted(listed, names):
        return _problem_of_converted(path, listed, names)
    if "vision_config" in config:
        return f"is a model for {task} with a part for images, which mlx-omni-server does not have for that"
    if task == "reranker" and (problem := _problem_of_ranker(model_id, config, listed)) is not None:
        return problem
    if config.get("model_type") in ENCODERS and (problem := _problem_of_encoder(config, listed)) is not None:
        return problem
    for each in listed or ():
        if each.type == "Pooling" and (problem := _problem_of_pooling(path, each, names)) is not None:
            return problem
        if each.type == "Dense" and f"{each.path}/model.safetensors" not in names:
            return f"has no {each.path}/model.safetensors, which {MODULES} asks for"
    return None


def _problem_of_ranker(model_id: str, config: Mapping[str, Any], listed: Collection[Module] | None) -> str | None:
    if _has_head(config):
        labels = _labels(config)
        if labels != 1:
            return f"sorts texts into {labels} classes; a model that ranks has one"
        return "rewards answers, and ranks no documents" if "reward" in model_id.lower() else None
    asks = config.get("model_type") == "qwen3" and _architecture(config).endswith("ForCausalLM")
    if asks or any(each.type == "LogitScore" for each in listed or ()):
        return None
    return (
        "ranks by a dialogue of its own; of models without a head and without a LogitScore in modules.json, "
        "mlx-omni-server knows Qwen3-Reranker"
    )


def _is_converted(listed: Collection[Module] | None, names: Collection[str]) -> bool:
    """Return whether a folder lacks those of the modules, as after a conversion by mlx-embeddings."""
    return not any(f"{each.path}/config.json" in names for each in listed or () if each.path)


def _problem_of_converted(path: str, listed: Collection[Module] | None, names: Collection[str]) -> str | None:
    """Return what is wrong with a Gemma whose weights hold the projections that follow the pooling."""
    needed = 2 if listed is None else sum(each.type == "Dense" for each in listed)
    weights = read_json(f"{path}/{_INDEX}").get("weight_map") if _INDEX in names else None
    if all(f"dense.{number}.weight" in (weights or ()) for number in range(needed)):
        return None
    return "has no projections, which follow the pooling: neither 2_Dense/model.safetensors nor dense.0 in its weights"


def _problem_of_encoder(config: Mapping[str, Any], listed: Collection[Module] | None) -> str | None:
    architecture = _architecture(config)
    if listed is None and not architecture.endswith(("Model", _HEAD)):
        return f"is a {architecture[:80] or 'model without architectures'} without {MODULES}: it embeds nothing"
    if (settings := _SETTINGS.get(config["model_type"])) is not None:
        return _problem_of_rotary(config, settings)
    positions = config.get("position_embedding_type", "absolute")
    if positions == "alibi" and config["model_type"] == "bert":
        return _problem_of_jina(config)
    if "auto_map" in config:
        return "config.json asks to run its own code (auto_map)"
    if positions != "absolute":
        return f"config.json asks for positions of type {str(positions)[:80]!r}"
    if config.get("is_decoder"):
        return "config.json asks for a decoder of a type that is loaded as an encoder alone"
    groups = [config.get(key, 1) for key in ("num_hidden_groups", "inner_group_num")]
    if config["model_type"] == "albert" and groups != [1, 1]:
        return "config.json asks for layers in groups that do not share all of their weights"
    return _problem_of_activation(config)


def _problem_of_rotary(config: Mapping[str, Any], settings: Mapping[str, tuple[object, ...]]) -> str | None:
    if _has_head(config) and config["model_type"] == "nomic_bert":
        return "is a nomic_bert that ranks, which mlx-omni-server does not have"
    other = [key for key, values in settings.items() if config.get(key, values[0]) not in (*values, None)]
    if other:
        return f"config.json asks for {other[0]} {str(config[other[0]])[:80]!r}"
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", "default") != "default":
        return f"config.json asks for positions of type {str(rope['rope_type'])[:80]!r}"
    if config["model_type"] == "nomic_bert":
        return None
    scaling = config.get("rope_scaling")
    if scaling is not None and not _is_ntk(scaling):
        return f"config.json asks for rope_scaling {str(scaling)[:80]!r}"
    return _problem_of_activation(config)


def _is_ntk(scaling: object) -> bool:
    """Return whether a `rope_scaling` is by NTK's rule, with one factor for all."""
    if not isinstance(scaling, dict) or scaling.get("type") != "ntk" or scaling.get("mixed_b") is not None:
        return False
    return isinstance(scaling.get("factor"), (int, float)) and scaling["factor"] >= 1


def _problem_of_jina(config: Mapping[str, Any]) -> str | None:
    """Return why a BERT with ALiBi's biases is not one of those that Jina has published as version 2."""
    code = config.get("auto_map")
    if not isinstance(code, dict) or not all(str(each).startswith(_JINA) for each in code.values()):
        return "config.json asks for positions of type 'alibi' in a model that is none of jina-embeddings-v2"
    if config.get("feed_forward_type") != "geglu":
        return f"config.json asks for feed_forward_type {str(config.get('feed_forward_type'))[:80]!r}"
    return None


def _problem_of_activation(config: Mapping[str, Any]) -> str | None:
    named = next((config[key] for key in ("hidden_act", "hidden_activation", "activation") if key in config), "gelu")
    return None if named in ACTIVATIONS else f"config.json asks for the activation {str(named)[:80]!r}"


def _problem_of_pooling(path: str, module: Module, names: Collection[str]) -> str | None:
    file = f"{module.path}/config.json"
    if file not in names:
        return f"has no {file}, which {MODULES} asks for"
    config = read_json(f"{path}/{file}")
    if config.get("include_prompt") is False:
        return f"{file} leaves prompts out of the pooling"
    other = [mode for mode in pooling_modes(config) if mode not in POOLING_MODES]
    return f"{file} asks for the mode {other[0][:80]!r}" if other else None


def _is_global(config: Mapping[str, Any]) -> bool:
    """Return whether no layer attends to near tokens alone; Gemma's layers, which do, are known."""
    kinds = config.get("layer_types")
    is_local = bool(config.get("use_sliding_window")) or (isinstance(kinds, list) and set(kinds) != {"full_attention"})
    return is_gemma(config) or not is_local


def _named(config: Mapping[str, Any]) -> str:
    return f"the type {str(config.get('model_type'))[:80]!r}"


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else architectures
    return first if isinstance(first, str) else ""


def _has_head(config: Mapping[str, Any]) -> bool:
    return _architecture(config).endswith(_HEAD)


def _labels(config: Mapping[str, Any]) -> int:
    """Return the number of classes of a model with a head, by the rule of transformers."""
    if isinstance(config.get("id2label"), dict):
        return len(config["id2label"])
    return config["num_labels"] if isinstance(config.get("num_labels"), int) else 2
