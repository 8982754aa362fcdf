"""A tiny student of another family: stock Idefics3 classes, a chat template and a tokenizer of its
own whose words fall into other pieces than the teacher's.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    set_seed,
)

from gold_trainer.demo.digits import DIGIT_NAMES, PICTURE_SIZE, QUESTIONS, answer_of
from gold_trainer.demo.tiny_vlm import INITIALIZER_RANGE, PATCH_SIZE, VLMSize, text_sizes

NUM_MERGES = 50  # the teacher's has about 100 and spells most words of an answer in one token
BOS, EOS, PAD = "<|begin_of_text|>", "<end_of_utterance>", "<|end_of_text|>"
IMAGE = "<image>"
SPECIAL_TOKENS = [BOS, EOS, PAD, IMAGE, "<fake_token_around_image>", "<global-img>"]
OTHER_SIZE = VLMSize(hidden_size=128, num_layers=2, vision_hidden_size=96, vision_depth=2)

CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{%- for message in messages -%}"
    "{{ message.role | capitalize + ':' }}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{%- endfor -%}{{ '<end_of_utterance>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)


def build_other_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sentences = [*QUESTIONS, *map(answer_of, range(len(DIGIT_NAMES)))]
    bpe.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=256 + NUM_MERGES,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
    )


def build_other_processor() -> Idefics3Processor:
    """Pictures keep their 32 x 32 pixels: one tile of 4 image tokens."""
    pixels = {"longest_edge": PICTURE_SIZE}
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size=pixels, max_image_size=pixels),
        tokenizer=build_other_tokenizer(),
        image_seq_len=(PICTURE_SIZE // PATCH_SIZE // 2) ** 2,
        chat_template=CHAT_TEMPLATE,
    )


def build_other_model(processor: Idefics3Processor, seed: int) -> Idefics3ForConditionalGeneration:
    """An Idefics3 model with fresh random weights."""
    tokenizer, size = processor.tokenizer, OTHER_SIZE
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            **text_sizes(size, len(tokenizer)),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": 2 * size.vision_hidden_size,
            "num_hidden_layers": size.vision_depth,
            "num_attention_heads": size.vision_hidden_size // 32,
            "patch_size": PATCH_SIZE,
            "image_size": PICTURE_SIZE,
            "initializer_range": INITIALIZER_RANGE,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        # every config takes it, which the annotations of this one leave out
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]
    )
    set_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
