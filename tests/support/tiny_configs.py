"""A tiny model of any architecture that transformers has: config fields of known names get small
values, in sub-configs too, and everything else keeps its default.
"""

import inspect
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from support.tiny_config_overrides import OVERRIDES

VOCAB_SIZE = 448  # of tiny tokenizers, padded
MAX_PARAMETERS = 20_000_000
# On all weights: a default of 0.02 makes predictions uniform, and zeros hide what they gate.
NOISE = 0.05

# Value -> the names that config classes have for what it means.
NAMES: list[tuple[Any, str]] = [
    (
        64,
        "hidden_size d_model n_embd embedding_size emb_dim word_embed_proj_dim dim_model embed_dim",
    ),
    (
        64,
        "cross_attention_hidden_size attention_hidden_size lru_width embed_dims "
        "qformer_hidden_size",
    ),
    (
        64,
        "encoder_hidden_size model_dim hidden_dim text_hidden_size out_hidden_size "
        "hidden_size_global",
    ),
    (64, "projection_dim projector_hidden_size projection_hidden_dim output_dim projector_dim"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth"),
    (2, "num_decoder_layers num_blocks vision_layers num_encoder_layers num_memory_blocks"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads"),
    (4, "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    (2, "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads"),
    (4, "swa_num_attention_heads linear_num_key_heads linear_num_value_heads"),
    (16, "head_dim attention_head_dim d_kv kv_channels swa_head_dim global_head_dim"),
    (16, "linear_key_head_dim linear_value_head_dim v_head_dim q_lora_rank kv_lora_rank"),
    (8, "qk_nope_head_dim qk_rope_head_dim rotary_dim patch_size"),
    (96, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff ffn_hidden_size"),
    (96, "dim_ff d_ff shared_expert_intermediate_size block_ff_dim num_encoder_ffn mlp_dim"),
    (96, "shared_intermediate_size expert_ffn_hidden_size intermediate_size_mlp inner_dim"),
    (32, "moe_intermediate_size image_size max_image_size img_size"),
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (512, "max_position_embeddings n_positions max_seq_len max_seq_length seq_length"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts"),
    (1, "n_group topk_group n_shared_experts first_k_dense_replace num_dense_layers"),
    (16, "hidden_size_per_layer_input num_position_embeddings"),
    (4, "index_n_heads"),
    (8, "mamba_n_heads mamba_d_state n_mamba_heads state_size"),
    (16, "mamba_chunk_size chunk_size_mamba adapter_rank"),
    (440, "image_token_id image_token_index"),
    (441, "video_token_id video_token_index"),
    (442, "vision_start_token_id boi_token_id boi_token_index"),
    (443, "vision_end_token_id eoi_token_id eoi_token_index"),
    (444, "audio_token_id audio_token_index"),
    (1, "num_nextn_predict_layers"),
    (False, "use_cache"),
    (16, "index_head_dim"),
]
SIZES = {name: value for value, names in NAMES for name in names.split()}


def fields_of(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Fields with their annotations."""
    parameters = inspect.signature(config_class.__init__).parameters.values()
    fields: dict[str, Any] = {p.name: p.annotation for p in parameters}
    for parent in reversed(config_class.__mro__):
        fields |= vars(parent).get("__annotations__", {})
    return fields


def kinds_of_layers(config_class: type[PretrainedConfig]) -> list[str]:
    """One layer of each kind that the default config has, at least two layers."""
    try:
        types = getattr(config_class(), "layer_types", None) or []
    except Exception:  # a default config that is none: nothing to take kinds from
        return []
    kinds = list(dict.fromkeys(types))
    return kinds * 2 if len(kinds) == 1 else kinds


def shrunk_rope(config_class: type[PretrainedConfig]) -> dict[str, Any] | None:
    """Sections of a head of 16 where the default config has them, of a larger one."""
    try:
        rope = deepcopy(getattr(config_class(), "rope_parameters", None))
    except Exception:
        return None
    if not isinstance(rope, dict) or len(rope.get("mrope_section") or ()) != 3:
        return None
    half = int(8 * rope.get("partial_rotary_factor", 1.0))
    return rope | {"mrope_section": {8: [2, 3, 3], 4: [1, 1, 2], 2: [0, 1, 1]}[half]}


def tiny_config(
    config_class: type[PretrainedConfig], overrides: dict[str, Any], **common: Any
) -> PretrainedConfig:
    fields, own = fields_of(config_class), {}
    for name, value in (SIZES | common).items():
        if name in fields and name not in config_class.attribute_map:
            is_list = str(fields[name]).startswith(("list", "tuple"))
            own[name] = [value, value] if is_list else value
    if "kv_lora_rank" in fields:
        own["num_key_value_heads"] = own.get("num_attention_heads", 4)
    if (rope := shrunk_rope(config_class)) is not None:
        own["rope_parameters"] = rope
    kinds = kinds_of_layers(config_class)
    if "layer_types" in fields and kinds:
        own |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    for name, sub_class in config_class.sub_configs.items():
        given = overrides.get(name, {})
        if sub_class.__name__ == "AutoConfig":
            default = getattr(config_class(), name, None)
            model_type = given.get("model_type") or getattr(default, "model_type", None)
            if model_type is None:
                continue
            sub_class = CONFIG_MAPPING[model_type]
        own[name] = tiny_config(sub_class, given, **common).to_dict()
    own |= {key: value for key, value in overrides.items() if key not in config_class.sub_configs}
    return config_class(**own)


def architecture(name: str) -> type[PreTrainedModel]:
    return getattr(transformers, name)


def tiny_models(
    model_type: str, class_name: str, seeds: Iterable[int], **ids: int
) -> Iterator[list[PreTrainedModel]]:
    """Models that differ in their weights; once for each number of key heads that an architecture
    may want. Raises what building them raises.
    """
    model_class = architecture(class_name)
    given = OVERRIDES.get(model_type, {})
    for heads in ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}):
        config = tiny_config(model_class.config_class, given, **ids, **heads)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(deepcopy(config)).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"{size:,} parameters in the smallest that is known")
        yield [initialised(model_class, deepcopy(config), seed) for seed in seeds]


def initialised(
    model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int
) -> PreTrainedModel:
    """The model in eval mode, with noise on all weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others have no float64
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(NOISE * torch.randn_like(parameter))
    return model
