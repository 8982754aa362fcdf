"""Tiny models of families that scale or cap their logits."""

import torch
import transformers

from support.tiny_models import tiny

SIZES = ("student", "teacher")
FORMS = {  # family -> what differs from Llama, on the student and on the teacher
    "Gemma2": (
        {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 32},
        {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32},
    ),
    "Cohere": ({"logit_scale": 0.25}, {"logit_scale": 3.0}),
    "Granite": ({"logits_scaling": 0.5}, {"logits_scaling": 4.0}),
    "FalconH1": ({"lm_head_multiplier": 2.0}, {"lm_head_multiplier": 0.5}),
}


def build(name: str, size: str, **fields):
    """A model of Llama's tiny sizes with another family's logits."""
    model, tokenizer = tiny("llama", size)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    sizes += ("num_hidden_layers", "num_key_value_heads", "initializer_range")
    sizes += ("bos_token_id", "eos_token_id", "pad_token_id")
    options = {size: getattr(model.config, size) for size in sizes} | fields
    if name == "FalconH1":
        options |= {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(size))
        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def pair(name: str):
    return [build(name, size, **fields) for size, fields in zip(SIZES, FORMS[name], strict=True)]
