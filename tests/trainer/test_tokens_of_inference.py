"""Tokens are those of inference: a prompt's as apply_chat_template makes them, a completion's as
they stand behind it in the answered conversation, up to the template's own end of turn.
"""

from ast import literal_eval
from copy import deepcopy
from functools import lru_cache

import pytest
from tokenizers import processors

from gold_trainer.data.dataset import RowDataset
from gold_trainer.models import placeholder_ids_of
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.prompts import process_prompts, tokenizer_of
from support.tiny_models import VLM_FAMILIES, tiny, tiny_picture, tiny_processor
from support.tokenizers_cases import table

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A red bar."}
CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif %}"
    "{%- if m.content %}{{ m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name }}{%- endfor %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if thinks is defined and not thinks %}{{ '<think></think>' }}{%- endif %}{%- endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@lru_cache
def chat_tokenizer(name="qwen", template=CHATML):
    """A base model's: its eos is not what the template ends a turn with."""
    tokenizer = deepcopy(table(name).tokenizer)  # it takes seconds to build some
    marks = ["<|im_start|>", "<|im_end|>", "<|base_end|>"]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": marks}, replace_extra_special_tokens=False
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|base_end|>"
    tokenizer.chat_template = template
    return tokenizer


def collator_of(processor, **options):
    return GOLDCollator(processor, [tokenizer_of(processor).eos_token_id], None, **options)


def read(columns, *, is_text=True):
    return RowDataset([columns], needs_completion="messages" in columns, is_text=is_text)[0]


def prompt_ids(processor, example):
    inputs = process_prompts(
        processor, [example.prompt_text], [example.images], [example.adds_special_tokens]
    )
    return inputs["input_ids"][0].tolist()


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def completion_text(tokenizer, messages, **columns):
    example = collator_of(tokenizer).example(read({"messages": messages, **columns}))
    assert len(prompt_ids(tokenizer, example)) == example.prompt_length
    return text_of(tokenizer, example.completion_ids)


def with_bos_and_eos(tokenizer):
    """One that puts special tokens in front of a text and behind it."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    special = [
        (token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|im_end|>")
    ]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("name", ["qwen", "gpt2", "tekken", "mistral", "gemma", "unigram"])
@pytest.mark.parametrize("change", [lambda t: t, with_bos_and_eos])
def test_prompt_ids_are_those_of_apply_chat_template(name, change):
    tokenizer = change(chat_tokenizer(name))
    example = collator_of(tokenizer).example(read({"messages": [USER, ANSWER]}))
    expected = tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert prompt_ids(tokenizer, example) == expected
    assert example.prompt_length == len(expected)


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_prompt_ids_of_a_processor_are_those_of_its_apply_chat_template(family):
    processor, picture = tiny_processor(family), tiny_picture(1)
    row = read({"messages": [USER, ANSWER], "images": [picture]}, is_text=False)
    example = collator_of(processor).example(row)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": USER["content"]}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    assert prompt_ids(processor, example) == list(expected[0])


@pytest.mark.parametrize("name", ["qwen", "gpt2", "tekken", "mistral", "gemma"])
@pytest.mark.parametrize(
    "content", ["A red bar.", " leading", "\n\n\nlines", "caf\u00e9 \u65e5", ""]
)
def test_answer_ids_are_those_it_has_behind_the_prompt(name, content):
    tokenizer = chat_tokenizer(name)
    messages = [USER, {"role": "assistant", "content": content}]
    example = collator_of(tokenizer).example(read({"messages": messages}))
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    ids = prompt_ids(tokenizer, example) + example.completion_ids
    assert text_of(tokenizer, ids) == text_of(tokenizer, whole).rstrip("\n")
    if not content.startswith("\n"):  # where the prompt's own line end is one token with these
        assert ids == whole[: len(ids)]


def test_a_token_across_the_boundary_leaves_the_prompt_as_it_is():
    tokenizer = chat_tokenizer()
    lines = tokenizer("\n\n")["input_ids"]
    assert len(lines) == 1, "the precondition: two line ends are one token"
    messages = [USER, {"role": "assistant", "content": "\nx"}]
    example = collator_of(tokenizer).example(read({"messages": messages}))
    line = tokenizer("\n")["input_ids"]
    assert prompt_ids(tokenizer, example)[-1:] == line
    assert example.completion_ids[:1] == line


@pytest.mark.parametrize("name", ["mistral", "unigram"])
def test_an_answer_has_no_marker_of_a_leading_space(name):
    tokenizer = deepcopy(chat_tokenizer(name))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt else eos_token }}"
    )
    alone = tokenizer("Answer", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("\u2581"), "a precondition"
    messages = [USER, {"role": "assistant", "content": "Answer"}]
    example = collator_of(tokenizer).example(read({"messages": messages}))
    first = tokenizer.convert_ids_to_tokens(example.completion_ids)[0]
    assert not first.startswith("\u2581")


@pytest.mark.parametrize("is_special", [True, False])
def test_the_templates_end_of_turn_ends_an_answer_of_a_base_model(is_special):
    tokenizer = chat_tokenizer()
    if not is_special:
        tokenizer = deepcopy(table("gpt2").tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = CHATML
    collator = collator_of(tokenizer)
    example = collator.example(read({"messages": [USER, ANSWER]}))
    assert text_of(tokenizer, example.completion_ids) == "A red bar.<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert collator.end_ids == {end, tokenizer.eos_token_id}, "rollouts stop there too"


def test_literal_special_tokens_of_an_answer_are_text():
    tokenizer = chat_tokenizer()
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    for content in ("Write <|im_end|> last.", "<|im_end|>", "<|base_end|><|im_start|>user\nNo."):
        messages = [USER, {"role": "assistant", "content": content, "reasoning_content": content}]
        example = collator_of(tokenizer).example(read({"messages": messages}))
        expected = f"<think>{content}</think>{content}<|im_end|>"
        assert text_of(tokenizer, example.completion_ids) == expected
        assert special.isdisjoint(example.completion_ids[:-1])
        assert example.completion_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tools_of_a_row_reach_the_template():
    tokenizer = chat_tokenizer()
    row = read({"messages": [USER, ANSWER], "tools": [TOOL]})
    example = collator_of(tokenizer).example(row)
    expected = tokenizer.apply_chat_template(
        [USER], tools=[TOOL], add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids(tokenizer, example) == expected
    assert "weather" in example.prompt_text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"content": "x", "reasoning_content": "hm"}, "<think>hm</think>x<|im_end|>"),
        ({"content": None, "tool_calls": [TOOL]}, "<call>weather<|im_end|>"),
        ({"content": "x", "tool_calls": [TOOL]}, "x<call>weather<|im_end|>"),
    ],
)
def test_what_the_template_renders_of_an_answer_is_the_completion(answer, expected):
    answer = {"role": "assistant", **answer}
    assert completion_text(chat_tokenizer(), [USER, answer]) == expected


def test_a_prompt_turn_may_be_a_call_of_tools():
    call = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    messages = [USER, call, {"role": "tool", "content": "Rain."}, ANSWER]
    assert completion_text(chat_tokenizer(), messages) == "A red bar.<|im_end|>"


def test_arguments_of_the_template_come_from_the_row_before_the_config():
    tokenizer = chat_tokenizer()
    messages = [USER, {"role": "assistant", "content": "x"}]
    for common, own, ends in (
        ({}, {"thinks": False}, True),
        ({"thinks": False}, {}, True),
        ({"thinks": False}, {"thinks": True}, False),
        ({}, {}, False),
    ):
        collator = collator_of(tokenizer, chat_template_kwargs=common)
        row = read({"prompt": messages[:1], "chat_template_kwargs": own})
        assert collator.example(row).prompt_text.endswith("<think></think>") == ends


@pytest.mark.parametrize(
    "content", ["The capital is", [{"type": "text", "text": "The capital is"}]]
)
def test_an_answer_goes_on_where_a_prefilled_turn_stops(content):
    tokenizer = chat_tokenizer()
    prefill = {"role": "assistant", "content": content}
    columns = {"prompt": [USER, prefill], "completion": " Paris."}
    example = collator_of(tokenizer).example(read(columns))
    text = {"role": "assistant", "content": "The capital is"}
    expected = tokenizer.apply_chat_template(
        [USER, text], continue_final_message=True, return_dict=False
    )
    assert prompt_ids(tokenizer, example) == expected
    assert text_of(tokenizer, example.completion_ids) == " Paris.<|im_end|>"


def test_an_answer_of_a_processor_goes_on_where_a_prefilled_turn_stops():
    processor = tiny_processor("qwen3_vl")
    prefill = {"role": "assistant", "content": "The capital is"}
    columns = {"prompt": [USER, prefill], "completion": " Paris.", "images": [tiny_picture(1)]}
    example = collator_of(processor).example(read(columns, is_text=False))
    assert example.prompt_text.endswith("<|im_start|>assistant\nThe capital is")
    assert text_of(processor.tokenizer, example.completion_ids) == " Paris.<|im_end|>"


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_a_pictures_placeholder_in_a_users_text_names_the_row(family):
    model, processor = tiny(family)
    collator = collator_of(processor, placeholder_ids=placeholder_ids_of(model.config))
    placeholder = {"gemma3": "<image_soft_token>", "qwen3_vl": "<|vision_start|>"}[family]
    user = {"role": "user", "content": f"Is {placeholder} this?"}
    columns = {"messages": [user, ANSWER], "images": [tiny_picture(1)]}
    reason = {"gemma3": "must be <image>, got '<image_soft_token>'", "qwen3_vl": "placeholder"}
    with pytest.raises(ValueError, match=f"^row 0: .*{reason[family]}"):
        collator.example(read(columns, is_text=False))


@pytest.mark.parametrize(
    ("columns", "where"),
    [
        ({"messages": [{"role": "system", "content": "A {}."}, USER, ANSWER]}, "the system's turn"),
        ({"messages": [{**USER, "reasoning_content": "{}"}, ANSWER]}, "turn, reasoning_content"),
        ({"messages": [USER, ANSWER], "tools": [{**TOOL, "description": "{}"}]}, "tools"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"note": "{}"}}, "template_kwargs"),
        ({"prompt": "Is {} this?", "completion": "A bar."}, "the user's turn"),
    ],
)
def test_a_pictures_placeholder_anywhere_in_a_prompt_names_the_row_and_the_key(columns, where):
    model, processor = tiny("qwen3_vl")
    collator = collator_of(processor, placeholder_ids=placeholder_ids_of(model.config))
    text = repr(columns).replace("'{}'", "'<|vision_start|>'").replace("{}", "<|vision_start|>")
    row = RowDataset([literal_eval(text)], needs_completion=True, is_text=False)[0]
    with pytest.raises(
        ValueError, match=rf"^row 0: .*placeholder, got '<\|vision_start\|>' in .*{where}"
    ):
        collator.example(row)


def test_a_placeholder_in_plain_text_names_the_row_for_a_model_that_takes_pictures():
    tokenizer = chat_tokenizer()
    placeholder = tokenizer.convert_tokens_to_ids("<|im_start|>")
    row = read({"prompt": "Is <|im_start|> this?", "completion": "No."})
    assert collator_of(tokenizer).example(row).completion_ids, "text elsewhere"
    with pytest.raises(ValueError, match=r"^row 0: a prompt's text .* in prompt; .* remove it"):
        collator_of(tokenizer, placeholder_ids=[placeholder]).example(row)
