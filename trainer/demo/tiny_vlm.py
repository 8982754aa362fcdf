"""Tiny Qwen3-VL models and their processor, made on the spot from stock transformers classes."""

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    set_seed,
)

from gold_trainer.demo.digits import DIGIT_NAMES, PICTURE_SIZE, QUESTIONS, answer_of

INITIALIZER_RANGE = 0.05
PATCH_SIZE = 8
PAD, TURN, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = [PAD, TURN, EOS, VISION_START, VISION_END, IMAGE, VIDEO]

# Qwen's format: turns between <|im_start|> and <|im_end|>, a picture as one placeholder that the
# processor repeats for each of its image tokens.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class VLMSize:
    """Sizes of one model; text heads have head_dim 32."""

    hidden_size: int
    num_layers: int
    vision_hidden_size: int
    vision_depth: int


TEACHER_SIZE = VLMSize(hidden_size=128, num_layers=4, vision_hidden_size=96, vision_depth=3)
STUDENT_SIZE = VLMSize(hidden_size=128, num_layers=2, vision_hidden_size=96, vision_depth=2)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the demo's own questions and answers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sentences = [*QUESTIONS, *map(answer_of, range(len(DIGIT_NAMES))), "user\n", "assistant\n"]
    bpe.train_from_iterator(
        sentences * 2,  # a pair must occur twice to be merged
        trainers.BpeTrainer(
            vocab_size=512,
            min_frequency=2,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens=[TURN, VISION_START, VISION_END, IMAGE, VIDEO],
    )


def build_processor() -> Qwen3VLProcessor:
    """Build a stock Qwen3-VL processor whose pictures keep their 32 x 32 pixels."""
    pixels = {"shortest_edge": PICTURE_SIZE**2, "longest_edge": PICTURE_SIZE**2}
    patches = {"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "merge_size": 2}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **patches),
        tokenizer=build_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(size=pixels, **patches),
        chat_template=CHAT_TEMPLATE,
    )


def text_sizes(size: VLMSize, vocab_size: int) -> dict[str, Any]:
    """Fields that the text configs of both families share."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": 2 * size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.hidden_size // 32,
        "num_key_value_heads": size.hidden_size // 64,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "initializer_range": INITIALIZER_RANGE,
    }


def build_model(
    size: VLMSize, processor: Qwen3VLProcessor, seed: int
) -> Qwen3VLForConditionalGeneration:
    """Build a Qwen3-VL model of this size with fresh random weights."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            **text_sizes(size, len(tokenizer)),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": token_id(PAD),
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": 2 * size.vision_hidden_size,
            "num_heads": size.vision_hidden_size // 32,
            "patch_size": PATCH_SIZE,
            "out_hidden_size": size.hidden_size,
            "num_position_embeddings": (PICTURE_SIZE // PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [0],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token_id(IMAGE),
        video_token_id=token_id(VIDEO),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        tie_word_embeddings=True,
    )
    set_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token_id(EOS)
    model.generation_config.pad_token_id = token_id(PAD)
    return model
