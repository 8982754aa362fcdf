"""Across tokenizers each side sees around an answer what its own template writes; marks of
one side are not text of the other.
"""

from copy import deepcopy

import pytest

from gold_trainer.collator import GOLDCollator
from gold_trainer.config import GOLDConfig
from gold_trainer.dataset import RowDataset
from gold_trainer.pairing import CompletionPairs, PairCollator
from support.tokenizers_cases import table

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A red bar."}
TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
CHATML = (
    "{% for m in messages %}" + TURN + "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)
# Opens thoughts in the generation prompt and writes them around every answer, as Qwen3.5 does.
THINKS = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' if add_generation_prompt else '' }}"
)
# Opens thoughts in the generation prompt and writes none in a conversation, as R1-Distill does.
OPENS = CHATML.replace("assistant\\n", "assistant\\n<think>\\n")


def chat_tokenizer(name, template):
    tokenizer = deepcopy(table(name).tokenizer)
    marks = ["<|im_start|>", "<|im_end|>", "<|base_end|>"]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": marks}, replace_extra_special_tokens=False
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|base_end|>"
    tokenizer.chat_template = template
    return tokenizer


def pair_collator(student, teacher, tmp_path):
    args = GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True)
    sides = [GOLDCollator(side, [side.eos_token_id], None) for side in (student, teacher)]
    return PairCollator(*sides, CompletionPairs(args, *sides))


def row_of(answer):
    rows = [{"messages": [USER, answer]}]
    return RowDataset(rows, needs_completion=True, is_text=True)[0]


def grouped_text(tokenizer, example, base_rows, scalar_rows):
    rows = sorted({*base_rows.tolist(), *scalar_rows.tolist()})
    return tokenizer.decode([example.written_ids[row] for row in rows])


def seen(tokenizer, example):
    return example.prompt_text + tokenizer.decode(example.written_ids)


def grouped_texts(batch, student, teacher):
    groups = batch.alignment.groups
    return [
        grouped_text(student, batch.examples[0], *groups.sides[0][0:3:2]),
        grouped_text(teacher, batch.teacher_examples[0], *groups.sides[1][0:3:2]),
    ]


PAIRS = [(CHATML, THINKS), (THINKS, CHATML), (CHATML, OPENS), (OPENS, THINKS), (THINKS, OPENS)]


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_each_side_sees_an_answer_in_its_own_template(own, other, tmp_path):
    student, teacher = chat_tokenizer("qwen", own), chat_tokenizer("gpt2", other)
    batch = pair_collator(student, teacher, tmp_path)([row_of(ANSWER)])
    for tokenizer, (example,) in ((student, batch.examples), (teacher, batch.teacher_examples)):
        expected = tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)
        assert seen(tokenizer, example) == expected.removesuffix("\n")
    assert grouped_texts(batch, student, teacher) == ["A red bar.<|im_end|>"] * 2


def test_thoughts_are_compared_with_thoughts(tmp_path):
    student, teacher = chat_tokenizer("qwen", THINKS), chat_tokenizer("gpt2", THINKS)
    answer = {**ANSWER, "reasoning_content": "Long and red"}
    batch = pair_collator(student, teacher, tmp_path)([row_of(answer)])
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
def test_what_a_student_samples_meets_the_teachers_template(own, other, sample, expected, tmp_path):
    student, teacher = chat_tokenizer("qwen", own), chat_tokenizer("gpt2", other)
    collator = pair_collator(student, teacher, tmp_path)
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


def test_what_a_teacher_writes_meets_the_students_template(tmp_path):
    student, teacher = chat_tokenizer("qwen", CHATML), chat_tokenizer("gpt2", THINKS)
    collator = pair_collator(student, teacher, tmp_path)
    batch = collator([row_of(ANSWER)])
    ids = teacher("hm\n</think>\n\nA bar.<|im_end|>", add_special_tokens=False)["input_ids"]
    written = batch.teacher_examples[0].unanswered().with_completion(ids)
    batch = collator.with_teacher_completions(batch, [written])
    assert batch.teacher_examples[0].written_ids == ids
    assert student.decode(batch.examples[0].written_ids) == "A bar.<|im_end|>"
    assert grouped_texts(batch, student, teacher) == ["A bar.<|im_end|>"] * 2


def test_a_model_writes_behind_the_generation_prompt_whatever_a_known_answer_follows(tmp_path):
    student = chat_tokenizer("qwen", OPENS)
    collator = GOLDCollator(student, [student.eos_token_id], None)
    example = collator.example(row_of(ANSWER))
    prompt = student.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<think>\n") and "<think>" not in example.prompt_text
    again = example.unanswered()
    assert (again.prompt_text, again.completion_ids) == (prompt, None)
    assert again.prompt_length == len(student(prompt)["input_ids"])


def test_a_call_of_tools_alone_is_compared_where_both_templates_write_it_alike(tmp_path):
    calls = CHATML.replace("m.content +", "(m.content or m.tool_calls[0]) +")
    student, teacher = chat_tokenizer("qwen", calls), chat_tokenizer("gpt2", calls)
    answer = {"role": "assistant", "content": None, "tool_calls": ["weather(Ulm)"]}
    batch = pair_collator(student, teacher, tmp_path)([row_of(answer)])
    assert grouped_texts(batch, student, teacher) == ["weather(Ulm)<|im_end|>"] * 2
