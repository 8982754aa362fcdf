"""How much memory the student's activations take, roughly: docs/memory.md has the formula."""

from typing import Any

BYTES = {True: 2, False: 4}  # of a number, in 16 bits and in float32


def activation_bytes(
    config: Any,  # of the student's language model
    num_tokens: int,  # of a micro-batch
    *,
    is_checkpointed: bool,
    is_16_bit: bool,
) -> int | None:
    """None for a model whose config does not have the usual sizes."""
    hidden, layers = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    heads = getattr(config, "num_attention_heads", None)
    if not hidden or not layers or not isinstance(heads, int) or heads < 1:
        return None
    head = getattr(config, "head_dim", None) or hidden // heads
    key_value = getattr(config, "num_key_value_heads", None) or heads
    wide = _intermediate(config) or 4 * hidden
    # norms, residuals and outputs; queries, keys, values and what they sum to; gate, up, product
    layer = 6 * hidden + 2 * heads * head + 2 * key_value * head + 4 * wide
    kept = layers * hidden + layer if is_checkpointed else layers * layer
    return num_tokens * kept * BYTES[is_16_bit]


def _intermediate(config: Any) -> int | None:
    """Width of the gated product; where there are experts, of all that a token meets."""
    experts, wide = (
        getattr(config, name, None) for name in ("num_experts_per_tok", "moe_intermediate_size")
    )
    if isinstance(experts, int) and isinstance(wide, int):
        return experts * wide
    wide = getattr(config, "intermediate_size", None)
    return wide if isinstance(wide, int) else None
