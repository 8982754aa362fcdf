"""Two stock families from configs, with tokenizers trained on the questions and answers.

Idefics3   teacher and student; 64 patches of 8 pixels, 16 image tokens; shorter tokens
LLaVA      the student of another family; 16 patches of 16 pixels; longer tokens
"""

from collections.abc import Iterable
from typing import Any

import torch
from PIL.Image import Resampling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    set_seed,
)

from quality.pictures import DEVIATION, MEAN, SIZE
from quality.remembered import Idefics3Pictures, LlavaPictures
from quality.scales import Size

PATCH, WIDE_PATCH, SHUFFLE = 8, 16, 2
IMAGE_TOKENS = (SIZE // PATCH // SHUFFLE) ** 2
# A patch is mostly paper. Positions as weak as a fresh model has them are lost beside its ink.
POSITION_SCALE = 8.0

IDEFICS_TEMPLATE = (
    "<|begin_of_text|>{%- for message in messages -%}"
    "{{ message.role | capitalize + ':\n' }}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{%- endfor -%}{{ '<end_of_utterance>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\n' }}{%- endif -%}"
)
LLAVA_TEMPLATE = (
    "<s>{%- for message in messages -%}"
    "{{ '[' + message.role + ']\n' }}"
    "{%- for part in message.content -%}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}"
    "{%- endfor -%}{{ '</s>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant]\n' }}{%- endif -%}"
)


# family -> merges of its tokenizer, tokens (beginning, end of turn, padding), template
FAMILIES = {
    "idefics3": (
        190,
        ("<|begin_of_text|>", "<end_of_utterance>", "<|end_of_text|>"),
        ("<image>", "<fake_token_around_image>", "<global-img>"),
        IDEFICS_TEMPLATE,
    ),
    "llava": (260, ("<s>", "</s>", "<pad>"), ("<image>",), LLAVA_TEMPLATE),
}


def build_tokenizer(family: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    num_merges, special, extra, template = FAMILIES[family]
    bpe = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if family == "idefics3" else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_of])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([*special, *extra])
    begin = (special[0], bpe.token_to_id(special[0]))
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[begin]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        padding_side="left",
    )
    tokenizer.chat_template = template
    return tokenizer


def build_processor(family: str, texts: Iterable[str]) -> ProcessorMixin:
    """Pictures keep their pixels on both sides."""
    tokenizer = build_tokenizer(family, texts)
    levels = {"image_mean": [MEAN] * 3, "image_std": [DEVIATION] * 3}
    if family == "idefics3":
        side = {"longest_edge": SIZE}
        return Idefics3Processor(
            image_processor=Idefics3Pictures(
                size=side, max_image_size=side, resample=Resampling.BICUBIC, **levels
            ),
            tokenizer=tokenizer,
            image_seq_len=IMAGE_TOKENS,
            chat_template=tokenizer.chat_template,
        )
    crop = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        LlavaPictures(size={"shortest_edge": SIZE}, crop_size=crop, **levels),
        tokenizer,
        patch_size=WIDE_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def text_config(tokenizer: PreTrainedTokenizerFast, size: Size) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // size.head_dim,
        "num_key_value_heads": size.hidden // size.head_dim,
        "head_dim": size.head_dim,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": size.initializer_range,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_model(family: str, size: Size, processor: Any, seed: int) -> PreTrainedModel:
    """A model with fresh random weights."""
    tokenizer = processor.tokenizer
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    vision = {
        "hidden_size": size.vision_hidden,
        "intermediate_size": 4 * size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_hidden // size.head_dim,
        "image_size": SIZE,
        "initializer_range": size.initializer_range,
    }
    set_seed(seed)
    model: Any
    if family == "idefics3":
        config = Idefics3Config(
            text_config=text_config(tokenizer, size),
            vision_config={**vision, "patch_size": PATCH},
            scale_factor=SHUFFLE,
            image_token_id=image_token_id,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = Idefics3ForConditionalGeneration(config)
    else:
        clip = {"model_type": "clip_vision_model", "projection_dim": size.vision_hidden}
        config = LlavaConfig(
            text_config=text_config(tokenizer, size),
            vision_config={**vision, **clip, "patch_size": WIDE_PATCH},
            image_token_index=image_token_id,
            image_seq_length=(SIZE // WIDE_PATCH) ** 2,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position_embedding" in name:
                weight.mul_(POSITION_SCALE)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
