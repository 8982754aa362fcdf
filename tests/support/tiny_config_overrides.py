"""What an architecture needs beside the names that tiny_configs knows: model type -> config fields,
of sub-configs under their names.
"""

from typing import Any

from gold_trainer.models import CAUSAL_IF

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MROPE_OF_4 = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    **{name: {"is_decoder": True} for name, field in CAUSAL_IF.items() if field == "is_decoder"},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "xlm": {"causal": True},
    "blt": {
        "vocab_size": 448,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_nb_functions": 1,
    },
    "chameleon": {"vocabulary_map": {"<image>": 440}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "emu3": {"vocabulary_map": {"<image>": 440, "<|extra_200|>": 441}},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 64, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX", "is_decoder": True},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "glm4v": {"text_config": {"rope_parameters": MROPE}},
    "glm46v": {"text_config": {"rope_parameters": MROPE}},
    "glmga": {"text_config": {"rope_parameters": MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "hunyuan_vl": {"text_config": {"rope_parameters": MROPE}},
    "cosmos3_edge": {"text_config": {"rope_parameters": MROPE}},
    "hy_v4_vl": {"text_config": {"rope_parameters": MROPE_OF_4}},
    "glm4v_moe": {"text_config": {"rope_parameters": MROPE_OF_4}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 442},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 442,
        "text_config": {"rope_parameters": MROPE},
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
}
