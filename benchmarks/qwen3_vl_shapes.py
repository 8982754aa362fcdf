"""Random Qwen3-VL models of published sizes and rows with a picture, for benchmarks of steps."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from gold_trainer.demo.tiny_vlm import build_processor


@dataclass(frozen=True)
class Shape:
    """Published sizes of a Qwen3-VL model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    is_tied: bool


STUDENT_2B = Shape(2048, 6144, 28, 16, 24, 1024, 4096, True)
TEACHER_8B = Shape(4096, 12288, 36, 32, 27, 1152, 4304, False)
TINY_STUDENT = Shape(256, 256, 2, 2, 2, 64, 64, True)
TINY_TEACHER = Shape(512, 512, 2, 4, 2, 64, 64, False)
# Of the configs of trainers that are measured, and of their adapters.
QUIET = {"save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True}
LORA = {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def build_model(
    shape: Shape,
    processor: Qwen3VLProcessor,
    is_tiny: bool,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Any:
    """Random weights made on the device, by default in bf16 (tiny: float32)."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 1024 if is_tiny else 151936,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": 2 if is_tiny else 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": 2 if is_tiny else 16,
            "out_hidden_size": shape.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0] if is_tiny else [5, 11, 17],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=shape.is_tied,
    )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float32 if is_tiny else torch.bfloat16
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default_dtype)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.model.visual.requires_grad_(False)
    return model


def rows(
    processor: Qwen3VLProcessor, completion_tokens: int, num_rows: int
) -> list[dict[str, Any]]:
    """Answers of exactly completion_tokens tokens, end of turn included, and one picture each."""
    num_bytes = completion_tokens - 1
    answer = "a" * (num_bytes % 2) + " a" * (num_bytes // 2)
    num_tokens = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
    assert num_tokens == num_bytes, "the tokenizer must have a token for each byte of the answer"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (448, 448, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(pixels.numpy())
    question = {"role": "user", "content": "Describe the picture."}
    row = {
        "prompt": [question],
        "completion": [{"role": "assistant", "content": answer}],
        "images": [picture],
    }
    return [row] * num_rows


def processor_of_448_pixels() -> Qwen3VLProcessor:
    processor = build_processor()
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 448 * 448}
    processor.image_processor.patch_size, processor.image_processor.size = 16, pixels
    return processor


def build_student(
    processor: Qwen3VLProcessor, is_tiny: bool, dtype: torch.dtype | None = None
) -> Any:
    """The same student in each process."""
    torch.manual_seed(0)
    return build_model(TINY_STUDENT if is_tiny else STUDENT_2B, processor, is_tiny, dtype)


def build_teacher(processor: Qwen3VLProcessor, is_tiny: bool) -> Any:
    torch.manual_seed(1)
    return build_model(TINY_TEACHER if is_tiny else TEACHER_8B, processor, is_tiny)


def build_pair(processor: Qwen3VLProcessor, is_tiny: bool) -> tuple[Any, Any]:
    """Student and teacher."""
    return build_student(processor, is_tiny), build_teacher(processor, is_tiny)
