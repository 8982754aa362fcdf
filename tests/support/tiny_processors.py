"""Tokenizers and stock processors of the tiny models, one of each a family."""

from dataclasses import dataclass
from functools import lru_cache

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from support.tiny_data import tiny_rows
from support.tiny_templates import TEMPLATES


@dataclass(frozen=True)
class Family:
    """The tokens of a family: extra is every special token beside bos, eos and pad."""

    bos: str | None
    eos: str  # ends a turn
    pad: str
    extra: tuple[str, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()  # tokenizer attributes that the processor reads
    adds_bos: bool = False  # the tokenizer itself prepends bos


def _grid(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(row, column) for row in range(1, 7) for column in range(1, 7))


_QWEN = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IDEFICS = ("<fake_token_around_image>", "<image>", "<global-img>", *_grid("<row_{}_col_{}>"))

FAMILIES = {
    "qwen3_vl": Family(None, "<|im_end|>", "<|endoftext|>", _QWEN),
    "qwen2_5_vl": Family(None, "<|im_end|>", "<|endoftext|>", _QWEN),
    "lfm2_vl": Family(
        "<|startoftext|>",
        "<|im_end|>",
        "<|pad|>",
        (
            *("<|endoftext|>", "<|im_start|>", "<image>", "<|image_start|>", "<|image_end|>"),
            *("<|img_thumbnail|>", *_grid("<|img_row_{}_col_{}|>")),
        ),
        adds_bos=True,
    ),
    "smolvlm": Family("<|im_start|>", "<end_of_utterance>", "<|im_end|>", _IDEFICS),
    "idefics3": Family(
        "<|begin_of_text|>", "<end_of_utterance>", "<|end_of_text|>", _IDEFICS, adds_bos=True
    ),
    "gemma3": Family(
        "<bos>",
        "<end_of_turn>",
        "<pad>",
        ("<eos>", "<start_of_turn>", "<start_of_image>", "<image_soft_token>", "<end_of_image>"),
        roles=(
            ("boi_token", "<start_of_image>"),
            ("image_token", "<image_soft_token>"),
            ("eoi_token", "<end_of_image>"),
        ),
        adds_bos=True,
    ),
    "llava": Family("<s>", "</s>", "<pad>", ("<image>",), adds_bos=True),
    "qwen3": Family(None, "<|im_end|>", "<|endoftext|>", ("<|im_start|>",)),
    "llama": Family(
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        adds_bos=True,
    ),
}
NUM_MERGES = 128  # of the byte-level BPE
TEXT_FAMILIES = ("qwen3", "llama")
VLM_FAMILIES = tuple(name for name in FAMILIES if name not in TEXT_FAMILIES)


@lru_cache
def _trained_tokenizer(family: str, num_merges: int) -> str:
    """Byte-level BPE as JSON, trained on the sentences of the rows; special tokens come last."""
    spec = FAMILIES[family]
    special = [token for token in (spec.bos, spec.eos, spec.pad, *spec.extra) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [message["content"] for row in tiny_rows(60) for message in row["messages"]]
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens(special)
    if spec.adds_bos:
        bos = (spec.bos, tokenizer.token_to_id(spec.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{spec.bos} $A", pair=f"{spec.bos} $A {spec.bos} $B", special_tokens=[bos]
        )
    return tokenizer.to_str()


def tiny_tokenizer(family: str, num_merges: int = NUM_MERGES) -> PreTrainedTokenizerFast:
    """A fresh tokenizer object each time: some processors add tokens to the one they get. Fewer
    merges make shorter tokens.
    """
    spec = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer(family, num_merges)),
        bos_token=spec.bos,
        eos_token=spec.eos,
        pad_token=spec.pad,
        extra_special_tokens=dict(spec.roles),
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def tiny_processor(
    family: str, num_merges: int = NUM_MERGES
) -> ProcessorMixin | PreTrainedTokenizerFast:
    if family not in FAMILIES:
        raise ValueError(f"tiny: family must be one of {', '.join(FAMILIES)}, got {family!r}.")
    tokenizer = tiny_tokenizer(family, num_merges)
    return tokenizer if family in TEXT_FAMILIES else _PROCESSORS[family](tokenizer)


def _qwen_processor(tokenizer, name: str):
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}  # areas
    options = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    image_processor = transformers.Qwen2VLImageProcessor(**options)
    video_class = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    return getattr(transformers, f"{name}Processor")(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=getattr(transformers, video_class)(**options),
        chat_template=tokenizer.chat_template,
    )


def _idefics_processor(tokenizer, name: str):
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    video = {}
    if name == "SmolVLM":
        video = {"video_processor": transformers.SmolVLMVideoProcessor(**sizes)}
    return getattr(transformers, f"{name}Processor")(
        image_processor=getattr(transformers, f"{name}ImageProcessor")(**sizes),
        tokenizer=tokenizer,
        image_seq_len=4,  # 32 pixels, patches of 8, pixel shuffle 2
        chat_template=tokenizer.chat_template,
        **video,
    )


def _lfm2_processor(tokenizer):
    image_processor = transformers.Lfm2VlImageProcessor(
        tile_size=32, encoder_patch_size=8, min_image_tokens=2, max_image_tokens=8, max_tiles=4
    )
    return transformers.Lfm2VlProcessor(
        image_processor, tokenizer, chat_template=tokenizer.chat_template
    )


def _gemma3_processor(tokenizer):
    image_processor = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return transformers.Gemma3Processor(
        image_processor, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )


def _llava_processor(tokenizer):
    image_processor = transformers.LlavaImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


_PROCESSORS = {
    "qwen3_vl": lambda tokenizer: _qwen_processor(tokenizer, "Qwen3VL"),
    "qwen2_5_vl": lambda tokenizer: _qwen_processor(tokenizer, "Qwen2_5_VL"),
    "lfm2_vl": _lfm2_processor,
    "smolvlm": lambda tokenizer: _idefics_processor(tokenizer, "SmolVLM"),
    "idefics3": lambda tokenizer: _idefics_processor(tokenizer, "Idefics3"),
    "gemma3": _gemma3_processor,
    "llava": _llava_processor,
}
