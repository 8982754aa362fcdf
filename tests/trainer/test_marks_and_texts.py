"""Of an answer texts are compared across tokenizers, whatever a template or an author writes around
them; what a template leaves out is told.
"""

from dataclasses import replace

import pytest

from gold_trainer.rendering.collator import GOLDCollator
from support.template_pairs import (
    ANSWER,
    CHATML,
    OPENS,
    THINKS,
    chat_tokenizer,
    grouped_texts,
    pair_collator,
    row_of,
    seen,
)

INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
SPACED = CHATML.replace("'<|im_end|>", "' <|im_end|>")
THOUGHT_TAG = CHATML.replace(
    "{{ m.content",
    "{{ '<thought>' + m.thinking + '</thought>\\n' if m.thinking else '' }}{{ m.content",
)
CALLS = CHATML.replace("{{ m.content +", "{{ m.content + (m.tool_calls or '') | string +")
SHOUTED = CALLS.replace("| string", "| string | upper")
TWO_ENDS = CHATML.replace("'<|im_end|>", "('<|eom_id|>' if m.tool_calls else '<|im_end|>') + '")
OPENED = "hm\n</think>\n\nA bar.<|im_end|>"
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
THINKING = {**ANSWER, "reasoning_content": "Long and red"}


def batch_of(own, other, answer, sample=None):
    student, teacher = chat_tokenizer("qwen", own), chat_tokenizer("gpt2", other)
    collator = pair_collator(student, teacher)
    batch = collator([row_of(answer)])
    if sample is not None:
        ids = student(sample, add_special_tokens=False)["input_ids"]
        written = batch.examples[0].unanswered().with_completion(ids)
        batch = collator.with_student_completions(batch, [written])
    return batch, student, teacher


@pytest.mark.parametrize(
    ("own", "other", "sample"),
    [
        (SPACED, CHATML, "A red bar. <|im_end|>"),
        (CHATML, SPACED, "A red bar.<|im_end|>"),
        (INST, CHATML, " A red bar.<|base_end|>"),
        (CHATML, INST, "A red bar.<|im_end|>"),
        (LINES, CHATML, "A red bar.\n<|base_end|>"),
    ],
)
@pytest.mark.parametrize("is_sampled", [False, True])
def test_white_space_that_a_template_writes_is_no_text(own, other, sample, is_sampled):
    batch, *sides = batch_of(own, other, ANSWER, sample if is_sampled else None)
    (example,), (read,) = batch.examples, batch.teacher_examples
    assert seen(sides[0], example).endswith(sample)
    end = {CHATML: "\nA red bar.<|im_end|>", SPACED: "\nA red bar. <|im_end|>"}
    assert seen(sides[1], read).endswith(end.get(other, "[/INST] A red bar.<|base_end|>"))
    texts = grouped_texts(batch, *sides)
    expected = ["A red bar" if own == LINES else "A red bar."] * 2  # there ".\n" is one token
    assert [text.partition("<|")[0].strip() for text in texts] == expected
    assert all(text.endswith("_end|>") for text in texts), "the ends are compared"


def test_a_token_that_begins_with_a_mark_brings_no_distribution():
    batch, student, _ = batch_of(INST, CHATML, ANSWER)
    groups, ids = batch.alignment.groups, batch.examples[0].written_ids
    assert student.decode(ids[:1]) == " A", "the precondition: a token of mark and text"
    assert 0 not in groups.student_base_rows and 0 in groups.student_scalar_rows
    assert groups.scored_bytes == groups.completion_bytes == len("A red bar.")


@pytest.mark.parametrize("other", [OPENS, CHATML])
def test_a_prompt_that_a_sampled_answer_changes_has_its_own_length(other):
    """Where the template opens thoughts, and the sample has none."""
    student, teacher = chat_tokenizer("qwen", CHATML), chat_tokenizer("gpt2", other)
    collator = pair_collator(student, teacher)
    batch = collator([row_of(ANSWER)])
    ids = student("A red bar.<|im_end|>", add_special_tokens=False)["input_ids"]
    (written,), (read,) = (
        [example.unanswered() for example in side]
        for side in (batch.examples, batch.teacher_examples)
    )
    batch = replace(batch, teacher_examples=[read])
    batch = collator.with_student_completions(batch, [written.with_completion(ids)])
    (example,) = batch.teacher_examples
    assert (example.prompt_text == read.prompt_text) == (other == CHATML), "the precondition"
    ids = teacher(example.prompt_text, add_special_tokens=False)["input_ids"]
    assert example.prompt_length == len(ids)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(("own", "other"), [(THINKS, THOUGHT_TAG), (THOUGHT_TAG, THINKS)])
def test_thoughts_are_thoughts_whatever_their_key(key, own, other):
    batch, *sides = batch_of(own, other, {**ANSWER, key: "Long and red"})
    assert grouped_texts(batch, *sides) == ["Long and redA red bar.<|im_end|>"] * 2
    for side, (example,) in zip(sides, (batch.examples, batch.teacher_examples), strict=True):
        assert "Long and red</thought>" in seen(side, example) or "Long and red\n</think>" in seen(
            side, example
        )


@pytest.mark.parametrize(("own", "other"), [(CHATML, CHATML), (CHATML, OPENS), (OPENS, CHATML)])
def test_thoughts_that_an_author_writes_into_the_content_are_thoughts(own, other):
    answer = {**ANSWER, "content": "<think>\nLong and red\n</think>\n\nA red bar."}
    batch, *sides = batch_of(own, other, answer)
    assert grouped_texts(batch, *sides) == ["Long and redA red bar.<|im_end|>"] * 2
    assert seen(sides[0], batch.examples[0]).endswith(answer["content"] + "<|im_end|>")


@pytest.mark.parametrize(
    ("own", "other", "sample", "told"),
    [
        (
            THINKS,
            THOUGHT_TAG,
            "hm\n</think>\n\nA bar.<|im_end|>",
            "<thought>hm</thought>\nA bar.<|im_end|>",
        ),
        (
            THOUGHT_TAG,
            THINKS,
            "<thought>hm</thought>\nA bar.<|im_end|>",
            "hm\n</think>\n\nA bar.<|im_end|>",
        ),
        (
            CHATML,
            THOUGHT_TAG,
            "<think>hm</think>A bar.<|im_end|>",
            "<thought>hm</thought>\nA bar.<|im_end|>",
        ),
        (OPENS, THINKS, "hm\n</think>\n\nA bar.<|im_end|>", "hm\n</think>\n\nA bar.<|im_end|>"),
        (THINKS, OPENS, "hm\n</think>\n\nA bar.<|im_end|>", "hm\n</think>\n\nA bar.<|im_end|>"),
        (THINKS, THOUGHT_TAG, "hm and hm", "<thought>hm and hm"),
    ],
)
def test_thoughts_that_a_student_writes_stand_between_the_teachers_marks(own, other, sample, told):
    batch, *sides = batch_of(own, other, ANSWER, sample)
    assert sides[1].decode(batch.teacher_examples[0].written_ids) == told
    expected = "hm and hm" if sample == "hm and hm" else "hmA bar.<|im_end|>"
    assert grouped_texts(batch, *sides) == [expected] * 2


def test_thoughts_without_an_answer_are_skipped_where_the_teacher_has_no_place(caplog):
    batch, *_ = batch_of(THINKS, CHATML, ANSWER, "hm and hm")
    assert batch.alignment.skip_reasons == ["unspelled"]
    assert batch.teacher_examples[0].written_ids == []
    assert "row 0 is not distilled" in caplog.text and "no place for thoughts" in caplog.text


@pytest.mark.parametrize(
    ("other", "content", "expected"),
    [
        (CALLS, "Let me look", "Let me look<|im_end|>"),
        (SHOUTED, "Let me look", "Let me look<|im_end|>"),
        (SHOUTED, None, "<|im_end|>"),
    ],
)
def test_contents_are_compared_beside_calls_of_tools(other, content, expected):
    own = CALLS.replace("{{ m.content +", "{{ (m.content or '') +")
    other = other.replace("{{ m.content +", "{{ (m.content or '') +")
    answer = {"role": "assistant", "content": content, "tool_calls": CALL}
    batch, *sides = batch_of(own, other, answer)
    assert "weather" in seen(sides[0], batch.examples[0])
    assert "weather" in seen(sides[1], batch.teacher_examples[0]).lower()
    assert grouped_texts(batch, *sides) == [expected] * 2
    assert batch.alignment.skip_reasons == [None]


def test_a_sample_has_no_calls_of_the_known_answer():
    answer = {**ANSWER, "tool_calls": CALL}
    batch, _, teacher = batch_of(CALLS, CALLS, answer, "A bar.<|im_end|>")
    assert teacher.decode(batch.teacher_examples[0].written_ids) == "A bar.<|im_end|>"


def test_a_turn_that_calls_a_tool_ends_with_its_own_token():
    tokenizer = chat_tokenizer("qwen", TWO_ENDS)
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    for answer, end in ((ANSWER, "<|im_end|>"), ({**ANSWER, "tool_calls": CALL}, "<|eom_id|>")):
        example = collator.example(row_of(answer))
        assert tokenizer.decode(example.written_ids) == "A red bar." + end
        assert tokenizer.convert_tokens_to_ids(end) in collator.end_ids, "rollouts stop there too"


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|base_end|>"])
def test_of_several_end_tokens_the_one_that_ends_every_turn_counts(eos):
    template = CHATML.replace(
        "'<|im_end|>", "('<|eom_id|>' if m.role == 'assistant' else '') + '<|im_end|>"
    )
    tokenizer = chat_tokenizer("qwen", template)
    tokenizer.eos_token = eos
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    example = collator.example(row_of(ANSWER))
    assert tokenizer.decode(example.written_ids) == "A red bar.<|eom_id|><|im_end|>"


@pytest.mark.parametrize(
    ("answer", "key"),
    [(THINKING, "reasoning_content"), ({**ANSWER, "tool_calls": CALL}, "tool_calls")],
)
def test_what_a_template_leaves_out_of_an_answer_is_told_once(answer, key, caplog):
    seldom = "{{ m.content + (m." + key + " | string if never else '') +"
    tokenizer = chat_tokenizer("qwen", CHATML.replace("{{ m.content +", seldom))
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    for _ in range(2):
        example = collator.example(row_of(answer))
        assert tokenizer.decode(example.written_ids) == "A red bar.<|im_end|>"
    (told,) = caplog.messages
    assert told.startswith(f"row 0: the chat template does not write the answer's {key}")
