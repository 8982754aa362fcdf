"""The tiny models are usable stand-ins: they build, see pictures, generate, save and reload."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from support.tiny_models import FAMILIES, TEXT_FAMILIES, VLM_FAMILIES, tiny, tiny_picture, tiny_rows


def conversation(num_images: int) -> list[dict]:
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": parts}]


def encode(family, processor, numbers=(1, 2, 3)):
    """Two rows, with one and with two pictures (text families: none), padded to the left."""
    if family in TEXT_FAMILIES:
        messages = [
            [{"role": "user", "content": text}] for text in ("What is this?", "Name it, please.")
        ]
        texts = [
            processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
            for m in messages
        ]
        return processor(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    texts = [
        processor.apply_chat_template(conversation(n), add_generation_prompt=True) for n in (1, 2)
    ]
    images = [[tiny_picture(numbers[0])], [tiny_picture(number) for number in numbers[1:]]]
    return processor(
        text=texts, images=images, return_tensors="pt", padding=True, add_special_tokens=False
    )


@pytest.mark.parametrize("size", ["student", "teacher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_is_small_and_gives_finite_logits(family, size):
    model, processor = tiny(family, size)
    assert 50_000 < model.num_parameters() < 1_000_000
    assert model.config.get_text_config().get_text_config().hidden_size % 32 == 0
    tokenizer = getattr(processor, "tokenizer", processor)
    assert model.get_output_embeddings().weight.shape[0] >= len(tokenizer)
    logits = model(**encode(family, processor)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.1, "predictions are almost uniform: gradients would hide mistakes"


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_the_weights(family):
    first, second, other = (
        tiny(family, seed=seed)[0].get_output_embeddings().weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_pictures_change_the_logits_and_receive_gradients(family):
    model, processor = tiny(family)
    # Same sizes (5 apart), other contents: only the pixels differ.
    inputs, others = encode(family, processor, (1, 2, 3)), encode(family, processor, (6, 7, 8))
    assert torch.equal(inputs["input_ids"], others["input_ids"])
    logits = model(**inputs).logits
    assert (logits - model(**others).logits).abs().max() > 1e-3
    logits.square().mean().backward()
    vision = [p for name, p in model.named_parameters() if "vision" in name or "visual" in name]
    assert sum(float(p.grad.norm()) for p in vision if p.grad is not None) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_model_and_processor_generate_the_same(family, tmp_path):
    model, processor = tiny(family)
    inputs = encode(family, processor)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert expected.shape[1] > inputs["input_ids"].shape[1]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if family in TEXT_FAMILIES:
        model_class, processor_class = AutoModelForCausalLM, AutoTokenizer
    else:
        model_class, processor_class = AutoModelForImageTextToText, AutoProcessor
    reloaded = processor_class.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == type(processor).__name__ or family in TEXT_FAMILIES
    inputs = encode(family, reloaded)
    assert torch.equal(
        model_class.from_pretrained(tmp_path).generate(**inputs, **options), expected
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_student_and_teacher_share_the_tokenizer(family):
    tokenizers = [getattr(p, "tokenizer", p) for p in (tiny(family)[1], tiny(family, "teacher")[1])]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_rows_have_the_asked_number_of_pictures_and_mixed_sizes():
    assert "images" not in tiny_rows(1)[0]
    assert [len(row["images"]) for row in tiny_rows(4, images="mixed")] == [1, 2, 0, 1]
    rows = tiny_rows(6, images=2)
    assert len({picture.size for row in rows for picture in row["images"]}) > 2
    assert len({len(row["messages"][-1]["content"]) for row in rows}) > 2


def test_unknown_family_or_size_names_the_choices():
    with pytest.raises(ValueError, match="one of qwen3_vl"):
        tiny("gpt")
    with pytest.raises(ValueError, match='"student" or "teacher"'):
        tiny("qwen3_vl", "huge")
