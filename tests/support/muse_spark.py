"""mlx-lm's Muse Spark, also where there is no Metal: tests copy this file into the folder of a tiny model.

mlx-lm has parts of it as Metal kernels only. Elsewhere they are replaced by what they compute, step by step.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import muse_spark
from mlx_lm.models.muse_spark import Model, ModelArgs

__all__ = ["Model", "ModelArgs"]


def _qk_norm(
    qkvg: Any, *, n_heads: int, n_kv_heads: int, head_dim: int, eps: float, query_scale: float
) -> tuple[Any, Any]:
    count = n_heads + n_kv_heads
    heads = qkvg[..., : count * head_dim].reshape(*qkvg.shape[:-1], count, head_dim)
    normed = mx.fast.rms_norm(heads, None, eps)
    return normed[..., :n_heads, :] * query_scale, normed[..., n_heads:, :]


def _qk_norm_rope(qkvg: Any, *, rope_base: float, offset: Any, head_dim: int, **rest: Any) -> tuple[Any, ...]:
    def rotated(heads: Any) -> Any:
        turned = mx.fast.rope(
            heads.transpose(0, 2, 1, 3), head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset
        )
        return turned.transpose(0, 2, 1, 3)

    return tuple(rotated(heads) for heads in _qk_norm(qkvg, head_dim=head_dim, **rest))


def _norm_add_norm(
    branch: Any, stream: Any, *, alpha: Any, beta: Any, post_weight: Any, post_eps: float, next_norm: Any
) -> tuple[Any, Any]:
    scaled = branch if post_weight is None else post_weight * branch
    added = alpha * stream + beta * mx.fast.rms_norm(scaled, None, post_eps)
    return added, None if next_norm is None else next_norm(added).astype(branch.dtype)


def _rms_norm_sigmoid_gate(x: Any, gate: Any, *, eps: float) -> Any:
    return mx.fast.rms_norm(x, None, eps).transpose(0, 2, 1, 3).reshape(gate.shape) * mx.sigmoid(gate)


def _expert_routing(
    logits: Any, bias: Any, *, top_k: int, multiplier: float, score_eps: float, route_scale: float
) -> tuple[Any, Any]:
    scores = mx.sigmoid(logits * multiplier)
    best = mx.argsort(-(scores + bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, best, axis=-1)
    return best, weights / (weights.sum(-1, keepdims=True) + score_eps) * route_scale


def _post_expert_norm_combine(experts: Any, weights: Any, *, norm_weight: Any, eps: float) -> Any:
    normed = mx.fast.rms_norm(norm_weight * experts, None, eps)
    return (normed * weights[..., None]).sum(-2).astype(experts.dtype)


if not mx.metal.is_available():
    for kernel in (
        _qk_norm,
        _qk_norm_rope,
        _norm_add_norm,
        _rms_norm_sigmoid_gate,
        _expert_routing,
        _post_expert_norm_combine,
    ):
        setattr(muse_spark, kernel.__name__.removeprefix("_"), kernel)
