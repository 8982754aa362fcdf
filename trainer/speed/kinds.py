"""Models whose layers mix tokens by attention alone, and by attention to those in front.

Their rows may share a sequence (packing.py), and need no mask for what stands behind them
(masks.py).
"""

from typing import Any

# To whose attention all arguments of the forward pass come.
TEXT = (
    *("arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4"),
    *("granite", "helium", "llama", "ministral", "ministral3", "mistral", "mixtral", "olmo"),
    *("olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("seed_oss", "smollm3", "starcoder2"),
)
PICTURES = (
    *("idefics3", "llava", "smolvlm"),
    *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),
)
LAYERS = {"full_attention", "sliding_attention"}
KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Of a config: transformers then makes a mask that hides nothing but padding.
SEES_ALL = {"is_causal": False, "use_bidirectional_attention": True}


def reason_against_kind(base: Any) -> str | None:
    """Behind "a student" or "a teacher"."""
    config, text = base.config, base.config.get_text_config()
    names = TEXT if text is config else PICTURES
    if config.model_type not in names:
        return f"of the type {config.model_type}; {', '.join(names)} are known"
    if text.model_type not in (*TEXT, f"{config.model_type}_text"):
        return f"whose text is of the type {text.model_type}; {', '.join(TEXT)} are known"
    if others := set(getattr(text, "layer_types", None) or ()) - LAYERS:
        return f"with layers of the kind {min(others)}; attention is known"
    for name, value in SEES_ALL.items():
        if getattr(text, name, None) is value:
            return f"with {name}={value}, whose tokens see those behind them"
    return None
