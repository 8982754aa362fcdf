"""Rows that cannot be used are left out exactly, and counted, wherever they come from."""

import math

import datasets
import pytest
import torch

from gold_trainer.rendering.collator import GOLDCollator, build_inputs
from support import bad_rows_step
from support.bad_rows import BAD, BAD_TEXT, REFUSING, skips_of, text_rows, with_bad
from support.processes import run_step
from support.resumed_runs import FIELDS, assert_same_run
from support.streams import Stream
from support.tiny_models import FAMILIES, tiny, tiny_processor, tiny_rows
from support.trainer_cases import assert_equal_gradients, losses_of, make_trainer, one_step

SKIP = {"on_bad_row": "skip"}
RUN = FIELDS | SKIP | {"lmbda": 0.5}
TEXT = text_rows(10)
# 13 rows; those at 4 and 5 are a micro-batch of two, in order
BAD_ROWS = with_bad(TEXT, dict(zip((1, 4, 5), BAD_TEXT.values(), strict=True)))


@pytest.mark.parametrize("reason", BAD)
def test_a_batch_without_its_bad_row_is_a_batch_of_the_others(reason, tmp_path):
    processor = tiny("qwen3_vl")[1]
    processor.chat_template = REFUSING + processor.chat_template
    good = tiny_rows(3, images="mixed")
    options = {"processor": processor, "max_length": 128}
    loss, gradients = one_step(tmp_path / "good", good, per_device_train_batch_size=3, **options)
    trainer_options = options | SKIP | {"per_device_train_batch_size": 4}
    actual, actual_gradients = one_step(
        tmp_path / "bad", with_bad(good, {1: BAD[reason]}), **trainer_options
    )
    assert actual == pytest.approx(loss, rel=1e-6)
    assert_equal_gradients(actual_gradients, gradients)
    trainer = make_trainer(tmp_path / "log", with_bad(good, {1: BAD[reason]}), **trainer_options)
    trainer.train()
    assert skips_of(trainer)[0] == {"": 1.0, f"/{reason}": 1.0}


def test_without_the_option_the_row_ends_the_run_with_its_message(tmp_path):
    trainer = make_trainer(tmp_path, with_bad(TEXT, {2: BAD["no_answer"]}), "qwen3")
    with pytest.raises(ValueError, match=r"row 2: an assistant's answer is expected"):
        trainer.train()
    assert not skips_of(trainer)


def test_on_long_prompt_skips_long_prompts_alone(tmp_path):
    rows = with_bad(TEXT, {1: BAD["long_prompt"]})
    trainer = make_trainer(tmp_path, rows, "qwen3", on_long_prompt="skip")
    trainer.train()
    assert skips_of(trainer)[0] == {"": 1.0, "/long_prompt": 1.0}
    tokenizer = tiny("qwen3")[1]
    tokenizer.chat_template = REFUSING + tokenizer.chat_template
    for reason, message in (("other", "lone surrogate"), ("template", "no such turns")):
        rows = with_bad(TEXT, {1: BAD[reason]})
        options = {"processor": tokenizer, "on_long_prompt": "skip"}
        with pytest.raises(ValueError, match=f"row 1: .*{message}"):
            make_trainer(tmp_path, rows, "qwen3", **options).train()


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_micro_batch_of_bad_rows_adds_nothing(lmbda, tmp_path):
    options = {"per_device_train_batch_size": 2, "lmbda": lmbda, "max_length": 128}
    loss, gradients = one_step(tmp_path / "good", TEXT[:2], "qwen3", **options)
    rows = [*TEXT[:2], BAD["other"], BAD["long_prompt"]]
    options |= SKIP | {"gradient_accumulation_steps": 2}
    actual, actual_gradients = one_step(tmp_path / "bad", rows, "qwen3", **options)
    if not lmbda:  # what is sampled depends on the rows that are written for together
        assert actual == pytest.approx(loss, rel=1e-6)
        assert_equal_gradients(actual_gradients, gradients)
    assert actual > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_micro_batch_is_an_input_of_every_family_without_a_scored_token(family):
    processor = tiny_processor(family)
    ends = [getattr(processor, "tokenizer", processor).eos_token_id]
    inputs = build_inputs(processor, GOLDCollator(processor, ends, 64).blank(0).examples)
    assert inputs.tensors["attention_mask"].sum() == 1
    assert len(inputs.scored_rows) == 0


def test_nothing_is_written_for_a_micro_batch_of_bad_rows(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lmbda": 1.0}
    rows = [*TEXT[:2], BAD["other"], BAD["long_prompt"]]
    trainer = make_trainer(tmp_path, rows, "qwen3", **options, **SKIP)
    writer, written = trainer.rollouts.writers["student"], []
    complete = writer.complete
    writer.complete = lambda prompts, *rest: written.append(prompts) or complete(prompts, *rest)
    trainer.train()
    assert [[prompt.example.index for prompt in prompts] for prompts in written] == [[0, 1]]


def test_a_step_of_bad_rows_changes_nothing_and_is_in_no_mean(tmp_path):
    options = {"per_device_train_batch_size": 2, "optim": "adamw_torch", "weight_decay": 0.1}
    rows = [*TEXT[:2], BAD["other"], BAD["no_answer"]]
    one = make_trainer(tmp_path / "one", TEXT[:2], "qwen3", **options)
    one.train()
    two = make_trainer(tmp_path / "two", rows, "qwen3", **options, **SKIP, max_steps=2)
    two.args.logging_steps = two.state.logging_steps = 2
    two.train()
    assert losses_of(two)[0] == pytest.approx(losses_of(one)[0], rel=1e-4)
    for name, weight in two.model.state_dict().items():
        assert torch.equal(weight, one.model.state_dict()[name]), name


@pytest.mark.parametrize("fields", [{}, {"num_generations": 2}, {"seq_kd": True, "lmbda": 0.0}])
def test_workers_and_a_resume_change_nothing(fields, tmp_path):
    options = RUN | fields
    saving = {"save_strategy": "steps", "save_steps": 2}
    # with this seed each step has a good row: its loss can be compared
    rows = with_bad(TEXT, dict(zip((1, 4, 8), BAD_TEXT.values(), strict=True)))
    whole = make_trainer(tmp_path, rows, "qwen3", **options, **saving)
    whole.train()
    resumed = make_trainer(tmp_path, rows, "qwen3", **options, dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(resumed, whole)
    counts = skips_of(whole)
    assert skips_of(resumed) == counts
    assert counts[-1][""] > counts[0][""] and counts[-1]["/long_prompt"] > 0


def test_a_stream_leaves_out_what_a_dataset_does_and_goes_on_behind_it(tmp_path):
    options = RUN | {"train_sampling_strategy": "sequential"}
    saving = {"save_strategy": "steps", "save_steps": 2}
    rows = [BAD["no_answer"], *BAD_ROWS, *text_rows(8)]
    whole = make_trainer(tmp_path / "map", rows, "qwen3", **options)
    whole.train()
    streamed = make_trainer(tmp_path, Stream(rows), "qwen3", **options, **saving)
    streamed.train()
    assert_same_run(streamed, whole)
    resumed = make_trainer(tmp_path, Stream(rows), "qwen3", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(resumed, whole)
    assert skips_of(streamed) == skips_of(resumed) == skips_of(whole)


def test_evaluation_is_a_mean_over_the_other_rows(tmp_path):
    trainer = make_trainer(tmp_path, TEXT, "qwen3", eval_rows=TEXT[:5], **SKIP)
    expected = trainer.evaluate()
    assert expected["eval_skipped_rows"] == 0
    rows = with_bad(TEXT[:5], {0: BAD["no_answer"], 3: BAD["other"], 4: BAD["other"]})
    for evaluated in (rows, Stream(rows), rows[:1] + TEXT[:5] + [BAD["other"]] * 6):
        trainer = make_trainer(tmp_path, TEXT, "qwen3", eval_rows=evaluated, **SKIP)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert metrics["eval_completion_length"] == expected["eval_completion_length"]
        assert metrics["eval_skipped_rows/no_answer"] == 1
        assert metrics["eval_skipped_rows/other"] in (2, 6)


def test_a_dataset_whose_rows_are_all_bad_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no row can be used; the first: row 0: an assistant's"):
        make_trainer(tmp_path, [BAD["no_answer"]] * 3, "qwen3", **SKIP)
    with pytest.raises(ValueError, match="must have at least one row that can be used, got none"):
        make_trainer(tmp_path, Stream([BAD["no_answer"]] * 3), "qwen3", **SKIP)
    trainer = make_trainer(tmp_path, [BAD["long_prompt"]] * 8, "qwen3", **SKIP)
    with pytest.raises(ValueError, match="at least one row must be usable, got none: 4 long_prom"):
        trainer.train()
    trainer = make_trainer(tmp_path, TEXT, "qwen3", **SKIP)
    metrics = trainer.evaluate([BAD["long_prompt"]] * 3)
    assert metrics["eval_skipped_rows"] == 3
    means = {"loss", "student_entropy", "completion_length"}
    assert all(math.isnan(metrics[f"eval_{name}"]) for name in means)
    assert [name for name, value in metrics.items() if value == 0] == ["epoch"]


def test_a_step_without_rows_logs_their_number_and_no_loss(tmp_path):
    rows = with_bad(text_rows(4), {0: BAD["other"], 1: BAD["other"]})
    options = SKIP | {"per_device_train_batch_size": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, rows, "qwen3", **options)
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert "loss" not in first and second["loss"] > 0
    assert skips_of(trainer)[:2] == [{"": 2.0, "/other": 2.0}] * 2


def test_rows_left_out_after_the_last_log_are_counted_at_the_end(tmp_path):
    rows = with_bad(text_rows(6), {5: BAD["other"]})
    options = {"max_steps": 2, "logging_steps": 10, "logging_first_step": True}
    trainer = make_trainer(tmp_path, rows, "qwen3", **SKIP | options)
    trainer.train()
    assert skips_of(trainer) == [{"": 0.0}, {"": 1.0, "/other": 1.0}]


def test_the_first_rows_of_each_reason_are_warned_of(tmp_path, caplog):
    rows = [TEXT[0], BAD["no_answer"], *[BAD["other"]] * 6]
    make_trainer(tmp_path, rows, "qwen3", **SKIP, max_steps=2).train()
    warnings = [m for m in caplog.messages if "left out" in m]
    assert len(warnings) == 1 + 3
    assert warnings[0].startswith("GOLDTrainer: left out (skipped_rows/no_answer): row 1: an ")


def test_two_ranks_leave_out_what_one_does(tmp_path):
    """A rank without a row left runs as many micro-batches as the other."""
    (tmp_path / "one").mkdir()
    bad_rows_step.main(str(tmp_path / "one"), 4, 1)
    one = torch.load(tmp_path / "one" / "state.pt")
    two = run_step("bad_rows_step", tmp_path / "two", 2, 2, 1)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["skips"] == one["skips"]
    assert two["written"] == one["written"]  # such rows need no answer
    assert two["written"][-1] == {"": 2.0, "/long_prompt": 1.0, "/other": 1.0}
    assert two["streamed_losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["skips"][-1] == {"": 3.0, "/long_prompt": 1.0, "/no_answer": 1.0, "/other": 1.0}
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_a_table_with_a_broken_picture_is_trained_on(tmp_path):
    rows = with_bad(tiny_rows(5, images=1), {2: {**tiny_rows(1, images=1)[0]}})
    table = datasets.Dataset.from_list(rows).cast_column(
        "images", datasets.List(datasets.Image(decode=False))
    )
    broken = table.map(
        lambda row, i: {"images": [{"bytes": b"none", "path": None}]} if i == 2 else row,
        with_indices=True,
    ).cast_column("images", datasets.List(datasets.Image()))
    trainer = make_trainer(tmp_path, broken, **SKIP, dataloader_num_workers=2)
    trainer.train()
    assert skips_of(trainer)[0] == {"": 1.0, "/picture": 1.0}
