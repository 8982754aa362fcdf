"""Rows -> examples -> padded inputs: what is scored, where, and that pictures wait their turn."""

import pytest
import torch

from gold_trainer.data.dataset import RowDataset
from gold_trainer.models import placeholder_ids_of
from gold_trainer.rendering.collator import IGNORE_INDEX, GOLDCollator, build_inputs, until_end
from gold_trainer.rendering.prompts import process_prompts, prompt_ids, text_ids, tokenizer_of
from support.eager_step import completion_of, prompt_inputs
from support.tiny_models import (
    FAMILIES,
    TEXT_FAMILIES,
    VLM_FAMILIES,
    tiny,
    tiny_picture,
    tiny_processor,
    tiny_rows,
)


def collator_of(processor, max_length=None, placeholder_ids=()):
    end_ids = [tokenizer_of(processor).eos_token_id]
    return GOLDCollator(processor, end_ids, max_length, placeholder_ids)


def examples_of(family, rows, max_length=None):
    processor = tiny_processor(family)
    dataset = RowDataset(rows, needs_completion=True, is_text=family in TEXT_FAMILIES)
    batch = collator_of(processor, max_length)([dataset[i] for i in range(len(rows))])
    return processor, batch.examples


def rows_of(family, count=3):
    return tiny_rows(count, images="mixed" if family in VLM_FAMILIES else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_are_what_the_family_writes(family):
    rows = rows_of(family)
    processor, examples = examples_of(family, rows)
    end = tokenizer_of(processor).eos_token_id
    for row, example in zip(rows, examples, strict=True):
        assert example.completion_ids == completion_of(family, processor, row)
        assert example.completion_ids.count(end) == 1 and example.completion_ids[-1] == end
        expected = prompt_inputs(processor, row)["input_ids"]
        assert example.prompt_length == expected.shape[1]
        actual = process_prompts(processor, [example.prompt_text], [example.images])["input_ids"]
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_completion_tokens_are_scored_each_from_the_position_before(family, side):
    rows = rows_of(family)
    processor, examples = examples_of(family, rows)
    tokenizer_of(processor).padding_side = side
    inputs = build_inputs(processor, examples)
    ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]

    assert len(inputs.scored_rows) == sum(len(example.completion_ids) for example in examples)
    assert (inputs.labels != IGNORE_INDEX).sum() == len(inputs.scored_rows)
    scored = [completion for example in examples for completion in example.completion_ids]
    assert ids.flatten()[inputs.scored_rows + 1].tolist() == scored
    assert inputs.labels.flatten()[inputs.scored_rows + 1].tolist() == scored

    lengths = [example.prompt_length + len(example.completion_ids) for example in examples]
    assert len(set(lengths)) > 1, "some row must be padded"
    assert mask.sum(1).tolist() == lengths
    for b, (row, example) in enumerate(zip(rows, examples, strict=True)):
        used = ids[b][mask[b].bool()].tolist()
        assert (
            used == prompt_inputs(processor, row)["input_ids"][0].tolist() + example.completion_ids
        )
        assert not mask[b, lengths[b] :].any(), "padding stands behind, whatever the side"


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_every_token_tensor_is_extended_and_pixels_pass_through(family):
    processor, examples = examples_of(family, rows_of(family))
    inputs = build_inputs(processor, examples)
    shape = inputs.tensors["input_ids"].shape
    prompts = process_prompts(
        processor, [e.prompt_text for e in examples], [e.images for e in examples]
    )
    assert inputs.tensors.keys() == prompts.keys()
    extended = {
        name for name, tensor in prompts.items() if tensor.shape == prompts["input_ids"].shape
    }
    assert {"input_ids", "attention_mask"} <= extended
    is_completion = inputs.labels != IGNORE_INDEX
    for name, tensor in inputs.tensors.items():
        if name not in extended:
            assert torch.equal(tensor, prompts[name])
            continue
        assert tensor.shape == shape
        if name.endswith("token_type_ids"):
            assert not tensor[is_completion].any(), "a completion is text"
            assert tensor.sum() == prompts[name].sum()


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_image_tokens_are_counted_without_reading_pixels(family, monkeypatch):
    processor = tiny_processor(family)
    kind = type(processor.image_processor)
    process, devices = kind.__call__, []

    def record(self, images, *args, **kwargs):
        devices.extend(getattr(picture, "device", None) for row in images for picture in row)
        return process(self, images, *args, **kwargs)

    collator = collator_of(processor)
    dataset = RowDataset(tiny_rows(3, images=2), needs_completion=True, is_text=False)
    for i in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "__call__", record)
            example = collator.example(dataset[i])
        inputs = process_prompts(tiny_processor(family), [example.prompt_text], [example.images])
        assert example.prompt_length == inputs["input_ids"].shape[1]
        assert all(not isinstance(image, torch.Tensor) for image in example.images)
    # LLaVA's processor reads pixels whatever it is asked: the pictures follow.
    expected = [torch.device("meta")] * 2 + [None] * 2 * (family == "llava")
    assert devices == expected * 3


def test_rows_without_pictures_and_plain_text_have_their_own_length():
    processor = tiny_processor("llama")
    assert prompt_ids(processor, "What is this?", []) == processor("What is this?")["input_ids"]


def test_plain_text_gets_an_end_token_once():
    processor, examples = examples_of(
        "qwen3",
        [
            {"prompt": "2 + 2 =", "completion": " 4"},
            {"prompt": "2 + 2 =", "completion": " 4<|im_end|>"},
            {"prompt": "2 + 2 =", "completion": " 4<|im_end|>\n<|endoftext|>\n"},
            {"prompt": "2 + 2 =", "completion": ""},
        ],
    )
    end = processor.eos_token_id
    four = processor(" 4")["input_ids"]
    assert [e.completion_ids for e in examples] == [[*four, end]] * 3 + [[end]]
    assert {e.prompt_text for e in examples} == {"2 + 2 ="}


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n<|endoftext|>"])
def test_plain_text_with_more_behind_its_end_is_refused(end):
    row = {"prompt": "2 + 2 =", "completion": f" 4{end} and more"}
    with pytest.raises(ValueError, match=r"^row 0: a completion must end with .*'and more' behind"):
        examples_of("qwen3", [row])


def test_empty_prompt_is_refused_where_no_token_would_predict_the_completion():
    row = {"prompt": "", "completion": "4"}
    _, (example,) = examples_of("llama", [row])
    assert example.prompt_length == 1, "a beginning-of-sequence token predicts it"
    with pytest.raises(ValueError, match=r"^row 0: a prompt must have at least one token, got ''"):
        examples_of("qwen3", [row])


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_conversations_and_plain_text_in_one_batch_are_prompted_as_alone(family):
    """Llama's template writes the token that its tokenizer puts before plain text."""
    rows = [*rows_of(family, 2), {"prompt": "2 + 2 =", "completion": " 4"}]
    processor, examples = examples_of(family, rows)
    alone = [build_inputs(processor, [example]).tensors["input_ids"][0] for example in examples]
    for order in ([0, 1, 2], [2, 0, 1]):
        tensors = build_inputs(processor, [examples[i] for i in order]).tensors
        for b, i in enumerate(order):
            assert torch.equal(tensors["input_ids"][b][tensors["attention_mask"][b] == 1], alone[i])


def test_long_completion_is_cut_at_its_end():
    row = tiny_rows(1, images=1)
    _, (whole,) = examples_of("qwen3_vl", row)
    _, (cut,) = examples_of("qwen3_vl", row, max_length=whole.prompt_length + 3)
    assert cut.completion_ids == whole.completion_ids[:3]
    _, (fits,) = examples_of("qwen3_vl", row, whole.prompt_length + len(whole.completion_ids))
    assert fits.completion_ids == whole.completion_ids


def test_prompt_without_room_names_row_length_and_field():
    rows = tiny_rows(2, images=2)
    _, examples = examples_of("qwen3_vl", rows)
    length = examples[1].prompt_length
    dataset = RowDataset(rows, needs_completion=True, is_text=False)
    collator = collator_of(tiny_processor("qwen3_vl"), max_length=length)
    message = (
        f"^row 1: the prompt has {length} tokens with 2 pictures, max_length={length} leaves no "
        "room for a completion; raise max_length"
    )
    with pytest.raises(ValueError, match=message):
        collator.example(dataset[1])


def test_placeholder_in_an_answer_or_a_prompt_names_the_row():
    model, processor = tiny("idefics3")
    collator = collator_of(processor, placeholder_ids=placeholder_ids_of(model.config))
    picture = {"images": [tiny_picture(1)]}
    system = {"role": "system", "content": "An <image> comes."}
    user = {"role": "user", "content": "What is this?"}
    rows = [
        {"prompt": "What is this?", "completion": "An <image>.", **picture},
        {"prompt": [system, user], "completion": "A bar.", **picture},
    ]
    dataset = RowDataset(rows, needs_completion=True, is_text=False)
    with pytest.raises(
        ValueError, match=r"^row 0: a completion must be text, got a picture's place"
    ):
        collator.example(dataset[0])
    with pytest.raises(ValueError, match=r"^row 1: the processor refuses the prompt .* 1 pictures"):
        collator.example(dataset[1])


def test_conversation_without_a_chat_template_is_refused():
    processor = tiny_processor("qwen3")
    processor.chat_template = None
    dataset = RowDataset(tiny_rows(1), needs_completion=True, is_text=True)
    with pytest.raises(ValueError, match=r"^row 0: a conversation needs a chat template"):
        collator_of(processor).example(dataset[0])


def test_template_that_rewrites_the_prompt_is_refused():
    processor = tiny_processor("qwen3")
    processor.chat_template = "{{ messages | length }}:" + processor.chat_template
    dataset = RowDataset(tiny_rows(1), needs_completion=True, is_text=True)
    with pytest.raises(ValueError, match=r"^row 0: the chat template must render an answered"):
        collator_of(processor).example(dataset[0])


def test_ids_end_with_the_first_end_token():
    assert until_end([5, 2, 7, 2], [2, 3]) == [5, 2]
    assert until_end([5, 7], [2]) == [5, 7]
    assert until_end([], [2]) == []


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_a_thread_that_asks_for_ids_leaves_the_padding_of_a_batch_in_another(family):
    processor = tiny_processor(family)
    texts = ["one", "one two three"]
    expected = [tokenizer_of(processor)(t, add_special_tokens=False)["input_ids"] for t in texts]
    process_prompts(processor, texts, [[], []], [False, False])
    backend = tokenizer_of(processor).backend_tokenizer
    padding = backend.padding
    assert padding is not None, "the tokenizer keeps how it has padded"
    assert [text_ids(processor, text, False) for text in texts] == expected
    process_prompts(processor, texts, [[], []], [False, True])  # a conversation and plain text
    assert backend.padding == padding
