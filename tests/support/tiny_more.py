"""More tiny vision-language models: those that take other tensors than the families of tiny_models.

    model, processor = tiny_more("mllama", size="teacher")

mllama: pictures enter by cross-attention, whose mask has a place for each token of the text.
paligemma: token types that say which tokens see those behind them; its processor makes labels.
granite_vision: LLaVA-NeXT around Granite, whose scale of the logits the wrapper does not apply.
"""

import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from support.tiny_processors import tiny_tokenizer

PICTURES = {"mllama": "<|image|>", "paligemma": "<image>", "granite_vision": "<image>"}
# Pictures in front, as these processors want them; Llama's bos is the tokenizer's.
TEMPLATE = (
    "{{%- for message in messages -%}}{{%- for part in message.content -%}}"
    "{{%- if part.type == 'image' -%}}{{{{ '{picture}' }}}}{{%- endif -%}}{{%- endfor -%}}"
    "{{%- for part in message.content -%}}"
    "{{%- if part.type == 'text' -%}}{{{{ message.role + ': ' + part.text }}}}"
    "{{%- if message.role == 'assistant' -%}}{{{{ '<|eot_id|>' }}}}{{%- endif -%}}{{{{ '\n' }}}}"
    "{{%- endif -%}}{{%- endfor -%}}{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ 'assistant: ' }}}}{{%- endif -%}}"
)


def tiny_more(name: str, size: str = "student") -> tuple[PreTrainedModel, ProcessorMixin]:
    """Float32, eval mode, random weights of a fixed seed; nothing of them is zero."""
    processor = tiny_more_processor(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name) + (1000 if size == "teacher" else 0))
        model = _MODELS[name](processor.tokenizer, size).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.generation_config, key, getattr(processor.tokenizer, key))
    return model, processor


def tiny_more_processor(name: str) -> ProcessorMixin:
    base = tiny_tokenizer("llama")
    backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
    backend.add_special_tokens([PICTURES[name]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=base.bos_token,
        eos_token=base.eos_token,
        pad_token=base.pad_token,
        extra_special_tokens={"image_token": PICTURES[name]},
        padding_side="left",
    )
    return _PROCESSORS[name](tokenizer, TEMPLATE.format(picture=PICTURES[name]))


def _mllama_processor(tokenizer, template: str):
    sizes = {"size": {"height": 32, "width": 32}, "max_image_tiles": 4}
    image_processor = transformers.MllamaImageProcessor(**sizes)
    return transformers.MllamaProcessor(image_processor, tokenizer, chat_template=template)


def _paligemma_processor(tokenizer, template: str):
    image_processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    return transformers.PaliGemmaProcessor(image_processor, tokenizer, chat_template=template)


def _granite_processor(tokenizer, template: str):
    image_processor = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return transformers.LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


_PROCESSORS = {
    "mllama": _mllama_processor,
    "paligemma": _paligemma_processor,
    "granite_vision": _granite_processor,
}


def _text(tokenizer, size: str, **fields):
    width = 96 if size == "teacher" else 64
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }


def _vision(**fields):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": 2, "patch_size": 8, "image_size": 32, **fields}


def _mllama(tokenizer, size: str):
    text = _text(tokenizer, size, cross_attention_layers=[1])
    del text["head_dim"]
    vision = _vision(
        num_global_layers=1, attention_heads=2, intermediate_layers_indices=[0, 1], max_num_tiles=4
    )
    vision["vision_output_dim"] = 3 * vision["hidden_size"]
    del vision["num_attention_heads"]
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(
            text_config=text, vision_config=vision, image_token_index=tokenizer.image_token_id
        )
    )


def _paligemma(tokenizer, size: str):
    text = _text(tokenizer, size, model_type="gemma")
    vision = _vision(
        model_type="siglip_vision_model", projection_dim=text["hidden_size"], vision_use_head=False
    )
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=tokenizer.image_token_id,
            projection_dim=text["hidden_size"],
        )
    )


def _granite_vision(tokenizer, size: str):
    text = _text(tokenizer, size, model_type="granite", logits_scaling=8.0)
    del text["head_dim"]
    vision = _vision(model_type="clip_vision_model", projection_dim=32)
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=tokenizer.image_token_id,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
            image_seq_length=16,
        )
    )


_MODELS = {"mllama": _mllama, "paligemma": _paligemma, "granite_vision": _granite_vision}
