"""Tiny random models of every tested family, their processors, and rows of pictures and sentences.

    model, processor = tiny("qwen3_vl", size="teacher")  # text families: a tokenizer
    rows = tiny_rows(8, images="mixed")  # [{"messages": [...], "images": [...]}, ...]

Stock transformers classes throughout, a few hundred thousand parameters each, nothing downloaded.
Kept is what makes the real families hard: a beginning-of-sequence token that both template and
tokenizer add (LFM2-VL, Gemma 3, Idefics3, Llama), contents that must be lists of parts (SmolVLM,
Idefics3, LLaVA) or plain strings (Qwen3, Llama), answers that start with a space (SmolVLM,
Idefics3, LLaVA), an answer without an end token (LLaVA), heads with more rows than the tokenizer
has entries, and a teacher whose head has more of them than the student's (Qwen2.5-VL).
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from support.tiny_data import tiny_picture, tiny_rows, with_lengths
from support.tiny_processors import (
    FAMILIES,
    NUM_MERGES,
    TEXT_FAMILIES,
    VLM_FAMILIES,
    tiny_processor,
)

__all__ = [
    "FAMILIES",
    "TEXT_FAMILIES",
    "VLM_FAMILIES",
    "save_tiny",
    "save_tiny_pair",
    "tiny",
    "tiny_picture",
    "tiny_processor",
    "tiny_rows",
    "tiny_text",
    "with_lengths",
]


def tiny(
    family: str, size: str = "student", seed: int = 0, num_merges: int = NUM_MERGES
) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerFast]:
    """Model (float32, eval mode, random weights of a fixed seed) and its processor or tokenizer.

    Student and teacher of a family share the tokenizer and differ in width, depth and weights.
    """
    if size not in ("student", "teacher"):
        raise ValueError(f'tiny: size must be "student" or "teacher", got {size!r}.')
    processor = tiny_processor(family, num_merges)
    tokenizer = getattr(processor, "tokenizer", processor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + (1000 if size == "teacher" else 0))
        model = _MODELS[family](tokenizer, size).eval()
        if family == "gemma3":
            # A fresh projector is zero: no picture would reach the language model.
            projector = model.model.multi_modal_projector
            torch.nn.init.normal_(projector.mm_input_projection_weight, std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model, processor


def save_tiny(folder: Path, family: str, size: str = "student", **options: int) -> Path:
    """tiny() as from_pretrained reads it: model and processor in one folder."""
    for part in tiny(family, size, **options):
        part.save_pretrained(folder)
    return folder


def save_tiny_pair(folder: Path, family: str) -> Path:
    """folder / "student" and folder / "teacher"."""
    for size in ("student", "teacher"):
        save_tiny(folder / size, family, size)
    return folder


def tiny_text(model_type: str, **fields: Any) -> PreTrainedModel:
    """A text model of any type, of 64 entries and no tokenizer, in eval mode. Attention reaches
    three tokens back where the type has windows.
    """
    sizes = {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        "shared_expert_intermediate_size": 8,
    }
    config = AutoConfig.for_model(model_type, **sizes | fields)
    return AutoModelForCausalLM.from_config(config).eval()


def _text_config(tokenizer, size: str, **extra) -> dict[str, Any]:
    """Two query heads a key head, head_dim 32; weights wide enough for uneven predictions."""
    teacher = size == "teacher"
    return {
        "vocab_size": -(-len(tokenizer) // 64)
        * 64,  # padded beyond the tokenizer, as real heads are
        "hidden_size": 128 if teacher else 64,
        "intermediate_size": 192 if teacher else 128,
        "num_hidden_layers": 3 if teacher else 2,
        "num_attention_heads": 4 if teacher else 2,
        "num_key_value_heads": 2 if teacher else 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **extra,
    }


def _vision_config(size: str, **extra) -> dict[str, Any]:
    width = 48 if size == "teacher" else 32
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "initializer_range": 0.1,
        **extra,
    }


def _qwen_vision(size: str, text: dict[str, Any], **extra) -> dict[str, Any]:
    vision = _vision_config(size, spatial_merge_size=2, temporal_patch_size=2, **extra)
    vision["depth"] = vision.pop("num_hidden_layers")
    vision["num_heads"] = vision.pop("num_attention_heads")
    del vision["image_size"]
    return vision | {"out_hidden_size": text["hidden_size"]}


def _qwen_ids(tokenizer) -> dict[str, int]:
    return {
        f"{role}_token_id": tokenizer.convert_tokens_to_ids(token)
        for role, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }


def _qwen3_vl(tokenizer, size: str):
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    text = _text_config(tokenizer, size, head_dim=32, rope_parameters=rope)
    vision = _qwen_vision(size, text, num_position_embeddings=64, deepstack_visual_indexes=[0])
    tied = size == "student"  # as Qwen3-VL-2B and 8B
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **_qwen_ids(tokenizer)
        )
    )


def _qwen2_5_vl(tokenizer, size: str):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = _text_config(tokenizer, size, rope_parameters=rope)
    if size == "teacher":
        text["vocab_size"] += 64  # Qwen2.5-VL: 152064 rows in 7B, 151936 in 3B
    vision = _qwen_vision(size, text, window_size=32, fullatt_block_indexes=[1])
    tied = size == "student"
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **_qwen_ids(tokenizer)
        )
    )


def _lfm2_vl(tokenizer, size: str):
    layers = ["conv", "full_attention", "conv"][: 3 if size == "teacher" else 2]
    text = _text_config(
        tokenizer, size, layer_types=layers, block_auto_adjust_ff_dim=False, model_type="lfm2"
    )
    vision = _vision_config(
        size, num_patches=16, vision_use_head=False, model_type="siglip2_vision_model"
    )
    del vision["image_size"]
    return transformers.Lfm2VlForConditionalGeneration(
        transformers.Lfm2VlConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            projector_hidden_size=64,
        )
    )


def _idefics(tokenizer, size: str, name: str):
    text = _text_config(tokenizer, size, model_type="llama", head_dim=32)
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=_vision_config(size),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _gemma3(tokenizer, size: str):
    layers = ["sliding_attention", "full_attention", "sliding_attention"][
        : 3 if size == "teacher" else 2
    ]
    text = _text_config(
        tokenizer,
        size,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=layers,
    )
    vision = _vision_config(size, vision_use_head=False, model_type="siglip_vision_model")
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
            image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        )
    )


def _llava(tokenizer, size: str):
    text = _text_config(tokenizer, size, model_type="llama", head_dim=32)
    vision = _vision_config(size, model_type="clip_vision_model", projection_dim=32)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
        )
    )


def _text_model(tokenizer, size: str, name: str):
    config = getattr(transformers, f"{name}Config")(
        **_text_config(tokenizer, size, head_dim=32), tie_word_embeddings=size == "student"
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


_MODELS = {
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "lfm2_vl": _lfm2_vl,
    "smolvlm": lambda tokenizer, size: _idefics(tokenizer, size, "SmolVLM"),
    "idefics3": lambda tokenizer, size: _idefics(tokenizer, size, "Idefics3"),
    "gemma3": _gemma3,
    "llava": _llava,
    "qwen3": lambda tokenizer, size: _text_model(tokenizer, size, "Qwen3"),
    "llama": lambda tokenizer, size: _text_model(tokenizer, size, "Llama"),
}
