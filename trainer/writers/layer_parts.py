"""Weights of a decoder layer of the usual kind, that of Llama: norms in front of attention and of a
gated product, both added to what came in; perhaps norms of heads, or biases of queries, keys and
values.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
GATED = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
NORMS = "input_layernorm", "post_attention_layernorm"
HEAD_NORMS = "self_attn.q_norm", "self_attn.k_norm"


class Parts(NamedTuple):
    """A layer's weights, as they are now."""

    matrices: list[Tensor]  # queries, keys, values, out, gate, up, down
    biases: list[Tensor] | None  # of queries, keys, values
    norms: list[Tensor]
    head_norms: list[Tensor] | None
    eps: tuple[float, float]  # of the norms
    head_eps: tuple[float, float]
    scaling: float


def parts_of(layer: nn.Module) -> Parts | None:
    """None where it is another kind, or does more than its class says."""
    modules, parameters = dict(layer.named_modules()), dict(layer.named_parameters())
    needed = {f"{name}.weight" for name in (*ATTENTION, *GATED, *NORMS)}
    biases = [f"{name}.bias" for name in ATTENTION[:3]]
    head_norms = [f"{name}.weight" for name in HEAD_NORMS]
    known = needed.union(*(names for names in (biases, head_norms) if names[0] in parameters))
    if set(parameters) != known or any(True for _ in layer.buffers()):
        return None
    if any(type(parameter) is not nn.Parameter for parameter in parameters.values()):
        return None  # of torchao: it says a dtype in which its numbers are not
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules.values()):
        return None
    if any("forward" in vars(module) for module in modules.values()):
        return None
    linears: list[Any] = [modules[name] for name in (*ATTENTION, *GATED)]
    if any(type(module).forward is not nn.Linear.forward for module in linears):
        return None
    norms: list[Any] = [modules[name] for name in (*NORMS, *HEAD_NORMS) if name in modules]
    eps: list[Any] = [
        getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms
    ]
    attention = modules["self_attn"]
    scaling = getattr(attention, "scaling", None)
    if None in eps or scaling is None or _scales_far_queries(attention):
        return None
    first, second, *of_heads = map(float, eps)
    return Parts(
        [module.weight for module in linears],
        [parameters[name] for name in biases] if biases[0] in parameters else None,
        [module.weight for module in norms[:2]],
        [parameters[name] for name in head_norms] if of_heads else None,
        (first, second),
        (of_heads[0], of_heads[1]) if of_heads else (0.0, 0.0),
        scaling,
    )


def _scales_far_queries(attention: nn.Module) -> bool:
    """Ministral 3 does: from 16,384 tokens on, behind which no step is compared."""
    config: Any = getattr(attention, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(rope.get("llama_4_scaling_beta"))
