"""on_long_prompt: a prompt that leaves no room is refused, left out, or cut at its left."""

from dataclasses import replace

import pytest

from gold_trainer import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator, build_inputs
from support.bad_rows import ANSWER, BAD, skips_of, text_rows, with_bad
from support.cross_cases import cross_trainer, make_sides
from support.tiny_models import tiny
from support.trainer_cases import losses_of, make_trainer

ROWS = with_bad(text_rows(4), {1: BAD["long_prompt"]})
CUT = {"on_long_prompt": "truncate_left", "max_length": 100, "max_completion_length": 30}


def collators(family="qwen3"):
    """With all of the prompt, and with its last 70 tokens where it has 100 or more."""
    processor = tiny(family)[1]
    ends = [processor.eos_token_id]
    return GOLDCollator(processor, ends, None), GOLDCollator(processor, ends, 100, cut_to=70)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_tokens_of_a_long_prompt_are_kept_before_the_whole_answer(
    family, side, monkeypatch
):
    rows = list(RowDataset(ROWS, needs_completion=True, is_text=True))
    whole, cut = collators(family)
    monkeypatch.setattr(whole.tokenizer, "padding_side", side)
    expected = build_inputs(whole.processor, [whole.example(row) for row in rows])
    actual = build_inputs(cut.processor, [cut.example(row) for row in rows])
    assert actual.tensors["input_ids"].shape[1] < 130 < expected.tensors["input_ids"].shape[1]
    for b, row in enumerate(rows):
        ids, all_ids = (
            inputs.tensors["input_ids"][b][inputs.tensors["attention_mask"][b].bool()].tolist()
            for inputs in (actual, expected)
        )
        answer = whole.example(row).written_ids
        assert ids[-len(answer) :] == answer
        assert ids == (all_ids[-70 - len(answer) :] if row.index == 1 else all_ids)
    assert len(actual.scored_rows) == len(expected.scored_rows)


def test_a_cut_prompt_stays_cut_where_the_template_writes_more_before_an_answer():
    _, cut = collators()
    row = replace(RowDataset(ROWS, needs_completion=True, is_text=True)[1], completion=None)
    example = cut.with_frames(row, cut.example(row))
    assert example.is_cut
    plain = example.frames.plain._replace(prompt=example.frames.plain.prompt + "<think>\n" * 5)
    example = replace(example, frames=example.frames._replace(plain=plain))
    answered = cut.answered(example, {"content": "A bar. " * 40}, is_ended=True)
    assert answered.prompt_text == plain.prompt
    assert (answered.prompt_length, len(answered.written_ids)) == (70, 30)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_run_learns_from_a_prompt_that_is_cut(lmbda, tmp_path):
    options = CUT | {"lmbda": lmbda, "per_device_train_batch_size": 5}
    trainer = make_trainer(tmp_path, ROWS, "qwen3", **options)
    generate, widths = trainer.model.generate, []

    def recorded(**inputs):
        widths.append(inputs["attention_mask"].sum(1).tolist())
        return generate(**inputs)

    trainer.model.generate = recorded
    trainer.train()
    # the first call looks at the shortest and the longest prompt, whether a fixed cache may be used
    assert [width[1] for width in widths] == ([70, 70] if lmbda else [])
    assert losses_of(trainer)[0] > 0 and not skips_of(trainer)


def cross(output_dir, rows, families=("qwen3", "llama"), **options):
    return cross_trainer(output_dir, rows, *make_sides(*families), **options)[0]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_each_side_of_two_families_is_cut_by_its_own_tokens(lmbda, tmp_path):
    trainer = cross(tmp_path, ROWS, **CUT, lmbda=lmbda, max_steps=1)
    batches = []
    prepare = trainer.objective.prepare
    trainer.objective.prepare = lambda *args: batches.append(prepare(*args)) or batches[-1]
    trainer.train()
    (batch,) = batches
    for side in (batch.student, batch.teacher):
        example = side.examples[1]
        assert example.is_cut and example.prompt_length == 70
        width = int(side.tensors["attention_mask"][1].sum())
        assert width == 70 + len(example.written_ids) <= 100
    assert losses_of(trainer)[0] > 0


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_prompt_that_is_long_for_the_teacher_alone_is_left_out_on_both_sides(lmbda, tmp_path):
    rows = [*text_rows(1), {"messages": [{"role": "user", "content": "red bar " * 20}, ANSWER]}]
    families = ("qwen3", "llama")
    row = RowDataset(rows, needs_completion=True, is_text=True)[1]
    pair = cross(tmp_path, rows, families, max_length=1000).objective.collator
    student, teacher = (side.example(row).prompt_length for side in (pair.student, pair.teacher))
    assert student < teacher
    options = {"on_long_prompt": "skip", "max_length": teacher, "max_completion_length": 8}
    trainer = cross(tmp_path, rows, families, **options, lmbda=lmbda, max_steps=1)
    trainer.train()
    assert skips_of(trainer)[0] == {"": 1.0, "/long_prompt": 1.0}
    assert losses_of(trainer)[0] > 0
    # and where it is all of a micro-batch, nothing of it is in any count
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = cross(tmp_path, rows, families, **options, lmbda=lmbda, max_steps=1)
    trainer.train()
    assert skips_of(trainer)[0] == {"": 1.0, "/long_prompt": 1.0}
    assert losses_of(trainer)[0] > 0
    assert trainer.state.log_history[0]["skipped_no_common_end"] <= 1


def test_a_vision_language_prompt_is_not_cut(tmp_path):
    with pytest.raises(ValueError, match="'skip' for a vision-language student, got 'truncate_le"):
        make_trainer(tmp_path, ROWS, "qwen3_vl", on_long_prompt="truncate_left")


@pytest.mark.parametrize("field", ["on_long_prompt", "on_bad_row"])
def test_other_values_are_refused(field, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{field} must be .*'error'.*got 'drop'; the default is 'error'"
    ):
        GOLDConfig(output_dir=str(tmp_path), **{field: "drop"})
