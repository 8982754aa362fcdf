"""Across tokenizers each side sees around an answer what its own template writes; marks of
one side are not text of the other.
"""

import pytest

from gold_trainer.rendering.collator import GOLDCollator
from support.template_pairs import (
    ANSWER,
    CHATML,
    OPENS,
    THINKS,
    USER,
    chat_tokenizer,
    grouped_texts,
    pair_collator,
    row_of,
    seen,
)

PAIRS = [(CHATML, THINKS), (THINKS, CHATML), (CHATML, OPENS), (OPENS, THINKS), (THINKS, OPENS)]


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_each_side_sees_an_answer_in_its_own_template(own, other):
    student, teacher = chat_tokenizer("qwen", own), chat_tokenizer("gpt2", other)
    batch = pair_collator(student, teacher)([row_of(ANSWER)])
    for tokenizer, (example,) in ((student, batch.examples), (teacher, batch.teacher_examples)):
        expected = tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)
        assert seen(tokenizer, example) == expected.removesuffix("\n")
    assert grouped_texts(batch, student, teacher) == ["A red bar.<|im_end|>"] * 2


def test_thoughts_are_compared_with_thoughts():
    student, teacher = chat_tokenizer("qwen", THINKS), chat_tokenizer("gpt2", THINKS)
    answer = {**ANSWER, "reasoning_content": "Long and red"}
    batch = pair_collator(student, teacher)([row_of(answer)])
    assert grouped_texts(batch, student, teacher) == ["Long and redA red bar.<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("own", "other", "sample", "expected"),
    [
        (CHATML, THINKS, "A red bar.<|im_end|>", "A red bar.<|im_end|>"),
        (THINKS, CHATML, "hm\n</think>\n\nA red bar.<|im_end|>", "A red bar.<|im_end|>"),
        (THINKS, CHATML, "\n</think>\n\nA red bar.<|im_end|>", "A red bar.<|im_end|>"),
        (THINKS, THINKS, "hm\n</think>\n\nA red bar.<|im_end|>", "hmA red bar.<|im_end|>"),
        (CHATML, THINKS, "A red", "A red"),
    ],
)
def test_what_a_student_samples_meets_the_teachers_template(own, other, sample, expected):
    student, teacher = chat_tokenizer("qwen", own), chat_tokenizer("gpt2", other)
    collator = pair_collator(student, teacher)
    batch = collator([row_of(ANSWER)])
    ids = student(sample, add_special_tokens=False)["input_ids"]
    written = batch.examples[0].unanswered().with_completion(ids)
    batch = collator.with_student_completions(batch, [written])
    assert batch.examples[0].written_ids == ids
    assert grouped_texts(batch, student, teacher) == [expected] * 2
    message = {**ANSWER, "content": "A red"} if sample == "A red" else dict(ANSWER)
    if expected.startswith("hm"):
        message["reasoning_content"] = "hm"
    rendered = teacher.apply_chat_template([USER, message], tokenize=False)
    ended = rendered.removesuffix("\n")
    is_ended = sample.endswith("<|im_end|>")
    teacher_text = seen(teacher, batch.teacher_examples[0])
    assert teacher_text == (ended if is_ended else ended.removesuffix("<|im_end|>"))


def test_what_a_teacher_writes_meets_the_students_template():
    student, teacher = chat_tokenizer("qwen", CHATML), chat_tokenizer("gpt2", THINKS)
    collator = pair_collator(student, teacher)
    batch = collator([row_of(ANSWER)])
    ids = teacher("hm\n</think>\n\nA bar.<|im_end|>", add_special_tokens=False)["input_ids"]
    written = batch.teacher_examples[0].unanswered().with_completion(ids)
    batch = collator.with_teacher_completions(batch, [written])
    assert batch.teacher_examples[0].written_ids == ids
    assert student.decode(batch.examples[0].written_ids) == "A bar.<|im_end|>"
    assert grouped_texts(batch, student, teacher) == ["A bar.<|im_end|>"] * 2


def test_a_model_writes_behind_the_generation_prompt_whatever_a_known_answer_follows():
    student = chat_tokenizer("qwen", OPENS)
    collator = GOLDCollator(student, [student.eos_token_id], None)
    example = collator.example(row_of(ANSWER))
    prompt = student.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<think>\n") and "<think>" not in example.prompt_text
    again = example.unanswered()
    assert (again.prompt_text, again.completion_ids) == (prompt, None)
    assert again.prompt_length == len(student(prompt)["input_ids"])


def test_a_call_of_tools_alone_is_compared_where_both_templates_write_it_alike():
    calls = CHATML.replace("m.content +", "(m.content or m.tool_calls[0]) +")
    student, teacher = chat_tokenizer("qwen", calls), chat_tokenizer("gpt2", calls)
    answer = {"role": "assistant", "content": None, "tool_calls": ["weather(Ulm)"]}
    batch = pair_collator(student, teacher)([row_of(answer)])
    assert grouped_texts(batch, student, teacher) == ["weather(Ulm)<|im_end|>"] * 2
