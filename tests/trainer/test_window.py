"""The window of an optimizer step: num_generations completions a prompt from one generate call, the
pictures and pixels it holds, what it does with bytes that are no text, and two processes.
"""

import weakref
from collections import Counter
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from gold_kernels.tokens.token_bytes import TokenBytes
from gold_trainer import GOLDConfig, GOLDTrainer, ahead, window
from gold_trainer.batches import WindowBatch
from gold_trainer.rendering import collator
from gold_trainer.window import RepeatSampler
from gold_trainer.writers import LocalWriter, local
from support import window_step
from support.cross_cases import (
    aligner_of,
    assert_equals,
    cross_trainer,
    eager_cross_step,
    make_sides,
)
from support.processes import run_step
from support.resumed_runs import FIELDS as RESUME_FIELDS
from support.resumed_runs import assert_same_run
from support.scripted_generate import Script, ids_of
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import assert_equal_gradients, losses_of, make_trainer, one_step

ROWS = tiny_rows(4, images="mixed")
PROMPTS = [{**row, "messages": row["messages"][:1]} for row in ROWS]
TWICE = {"num_generations": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.fixture
def generated(monkeypatch):
    """For every call of a writer: rows and completions."""
    calls = []
    complete = LocalWriter.complete

    def record(self, prompts, sampling):
        written = complete(self, prompts, sampling)
        calls.append(
            [
                (prompt.example.index, tuple(completion.token_ids))
                for prompt, completions in zip(prompts, written, strict=True)
                for completion in completions
            ]
        )
        return written

    monkeypatch.setattr(LocalWriter, "complete", record)
    return calls


@pytest.fixture
def scored(monkeypatch):
    """For every micro-batch that meets the loss: rows and completions."""
    batches = []
    build_inputs = collator.build_inputs

    def record(processor, examples):
        batches.append([(e.index, tuple(e.completion_ids)) for e in examples])
        return build_inputs(processor, examples)

    monkeypatch.setattr(collator, "build_inputs", record)
    return batches


def sampler_of(tmp_path, num_rows, num_windows, epoch=0, **fields):
    strategy = {"train_sampling_strategy": "sequential"}
    args = GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **(strategy | fields))
    return RepeatSampler(num_rows, args, num_windows=num_windows, epoch=lambda: epoch)


@pytest.mark.parametrize("num_windows", [1, 2, 3])
@pytest.mark.parametrize(
    ("batch_size", "accumulation", "num_generations"), [(1, 4, 2), (2, 3, 3), (4, 1, 2), (3, 4, 4)]
)
def test_a_prompts_repetitions_are_side_by_side_in_one_processs_window(
    num_windows, batch_size, accumulation, num_generations, tmp_path
):
    """Batches dealt to processes in turn, as the data loader does; two windows and a rest."""
    size = batch_size * accumulation
    prompts = size // num_generations
    num_rows = 2 * num_windows * prompts + 1
    sampler = sampler_of(
        tmp_path,
        num_rows,
        num_windows,
        num_generations=num_generations,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    rows = list(sampler)
    assert len(sampler) == len(rows) and set(rows) == set(range(num_rows))
    assert set(Counter(rows).values()) == {num_generations}
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    seen = []
    for process in range(num_windows):
        own = [row for batch in batches[process::num_windows] for row in batch]
        for start in (0, size):
            runs = own[start : start + size]
            first = runs[::num_generations]
            assert runs == [row for row in first for _ in range(num_generations)]
            assert len(set(first)) == prompts
            seen += first
    assert sorted(seen) == list(range(num_rows - 1))


def test_order_of_an_epoch_follows_from_seed_and_epoch_alone(tmp_path):
    def order(seed, epoch, data_seed=None, drawn_before=0):
        torch.manual_seed(drawn_before)
        fields = {"num_generations": 2, "seed": seed, "data_seed": data_seed}
        options = fields | {"train_sampling_strategy": "random"}
        return list(sampler_of(tmp_path, 20, 1, epoch, **options))

    assert order(1, 0) == order(1, 0, drawn_before=5) == order(2, 0, data_seed=1)
    assert len({tuple(order(*place)) for place in ((1, 0), (1, 1), (5, 0))}) == 3
    assert sorted(order(1, 0)) == sorted(2 * list(range(20)))


@pytest.mark.parametrize("process", [0, 1])
def test_process_that_skips_the_batches_before_a_checkpoint_gets_the_rest(process, tmp_path):
    """As the Trainer resumes in the second epoch, where accelerate hides the sampler two deep."""

    def batches(num_skipped):
        fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        fields |= {"num_generations": 2, "train_sampling_strategy": "random"}
        sampler = sampler_of(tmp_path, 9, 2, epoch=1, **fields)
        loader = DataLoader(range(9), batch_size=2, sampler=sampler)
        loader = prepare_data_loader(loader, num_processes=2, process_index=process)
        loader = skip_first_batches(loader, num_skipped)
        loader.set_epoch(1)
        return [batch.tolist() for batch in loader]

    assert len(batches(0)) == 5
    assert batches(2) == batches(0)[2:]


def test_each_prompt_of_a_window_gets_several_completions_from_one_call(
    generated, scored, tmp_path
):
    options = {"lmbda": 1.0, "max_steps": 2, "temperature": 2.0, "top_p": 1.0, **TWICE}
    run = make_trainer(tmp_path, PROMPTS, **options)
    run.train()
    assert run.args.generation_batch_size == 2
    assert [[index for index, _ in call] for call in generated] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    for call in generated:
        assert len(set(call)) == 4, "the completions of a prompt must differ"
    assert scored == [[completion] for call in generated for completion in call]


def test_epoch_has_every_row_num_generations_times(scored, tmp_path):
    """3 rows, 6 micro-batches: the second window of the epoch has two."""
    epochs = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.0}
    run = make_trainer(tmp_path, ROWS[:3], **epochs, **TWICE)
    run.train()
    assert [batch[0][0] for batch in scored] == [0, 0, 1, 1, 2, 2] * 2
    assert run.state.global_step == 4


def test_student_and_teacher_are_called_once_a_window(tmp_path, monkeypatch):
    """seq_kd, lmbda = 0.5: of 4 micro-batches some are the student's, the others the teacher's."""
    student, processor = tiny("qwen3_vl")
    teacher, _ = tiny("qwen3_vl", "teacher")
    end, pad = ids_of(processor)
    place = next(s for s in range(99) if len(set(decisions(tmp_path, s))) == 2)
    by_student = sum(source == "student" for source in decisions(tmp_path, place))
    scripts = [
        Script(monkeypatch, student, [[5 + i, end] for i in range(by_student)], pad),
        Script(monkeypatch, teacher, [[15 + i, end] for i in range(4 - by_student)], pad),
    ]
    seen = []
    build = collator.build_inputs

    def record(processor, examples):
        seen.extend(e.completion_ids[0] for e in examples)
        return build(processor, examples)

    monkeypatch.setattr(collator, "build_inputs", record)
    options = {"seed": place, "lmbda": 0.5, "seq_kd": True, **TWICE}
    make_trainer(tmp_path, PROMPTS, student=student, teacher=teacher, **options).train()
    assert [len(script.calls) for script in scripts] == [1, 1]
    firsts = {"student": iter(range(5, 9)), "teacher": iter(range(15, 19))}
    assert seen == [next(firsts[source]) for source in decisions(tmp_path, place)]


def decisions(tmp_path, seed, step=0):
    args = GOLDConfig(output_dir=str(tmp_path), use_cpu=True, seed=seed, lmbda=0.5, seq_kd=True)
    rollouts = window.Rollouts(args, None, {}, {}, None)
    return [rollouts.source(step, micro_step) for micro_step in range(4)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_off_policy_window_is_the_same_however_it_is_split(batch_size, tmp_path):
    whole = one_step(tmp_path, ROWS[:2], num_generations=2)
    split = {"per_device_train_batch_size": batch_size}
    split |= {"gradient_accumulation_steps": 4 // batch_size, "num_generations": 2}
    loss, gradients = one_step(tmp_path, ROWS[:2], **split)
    assert loss == pytest.approx(whole[0], rel=1e-5)
    assert_equal_gradients(gradients, whole[1])
    once = one_step(tmp_path, ROWS[:2], per_device_train_batch_size=2)
    assert loss == pytest.approx(once[0], rel=1e-5), "each row twice: the same mean"


class DecodedRows(list):
    """Rows whose pictures are new objects at each access, as a dataset decodes them."""

    def __init__(self, rows):
        super().__init__(rows)
        self.references = []  # weak: pictures compare by value and have no hash

    def __getitem__(self, index):
        row = super().__getitem__(index)
        images = [image.copy() for image in row["images"]]
        self.references += map(weakref.ref, images)
        return {**row, "images": images}

    def num_alive(self):
        return sum(reference() is not None for reference in self.references)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_window_holds_each_picture_once_and_the_pixels_of_one_micro_batch(
    lmbda, tmp_path, monkeypatch
):
    """2 prompts in 8 micro-batches; the data loader holds the one it gave last and the next. Pixels
    of all rows live within the generate call alone.
    """
    rows = DecodedRows(tiny_rows(6, images=1))
    pixels, events = weakref.WeakSet(), []
    makers = [(local, "process_examples"), (collator, "build_inputs")]
    for module, name in makers:
        monkeypatch.setattr(module, name, counted(getattr(module, name), name, pixels, events))
    compute_loss = GOLDTrainer.compute_loss

    def loss(self, *args, **options):
        events.append(("pictures", rows.num_alive(), "pixels", len(pixels)))
        return compute_loss(self, *args, **options)

    monkeypatch.setattr(GOLDTrainer, "compute_loss", loss)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    run = make_trainer(tmp_path, rows, num_generations=4, lmbda=lmbda, **options)
    run.train()
    micro_batch = [("build_inputs", 0), ("pictures", 2 + 2, "pixels", 1)]
    # twice: the first call tries its cache on two prompts, and gives the pixels back
    rollouts = [("process_examples", 0)] * 2 if lmbda else []
    assert events == rollouts + micro_batch * 8


def counted(make, name, pixels, events):
    """Tensors of pixels that live when others are made."""

    def made(*args):
        events.append((name, len(pixels)))
        inputs = make(*args)
        pixels.add(getattr(inputs, "tensors", inputs)["pixel_values"])
        return inputs

    return made


@pytest.mark.parametrize("workers", [0, 1])
def test_repeated_rows_share_their_pictures(workers, tmp_path, monkeypatch):
    windows = []
    fetch_window = ahead.fetch_window

    def record(*args):
        windows.append(fetch_window(*args))
        return windows[-1]

    monkeypatch.setattr(ahead, "fetch_window", record)
    rows = DecodedRows(tiny_rows(4, images="mixed"))
    make_trainer(tmp_path, rows, dataloader_num_workers=workers, **TWICE).train()
    examples = [e for batch in windows[0] for e in batch.examples]
    assert [e.index for e in examples] == [0, 0, 1, 1]
    assert len({id(image) for e in examples for image in e.images}) == 1 + 2


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_resumed_run_with_two_completions_a_prompt_is_the_uninterrupted_one(checkpoint, tmp_path):
    """5 rows twice are 3 steps: checkpoint-4 is within the second epoch."""
    rows = tiny_rows(5, images="mixed")
    options = RESUME_FIELDS | {"num_generations": 2, "lmbda": 0.5}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, rows, **options, **saving)
    whole.train()
    entries = [e for e in whole.state.log_history if "loss" in e]
    assert any("on_policy_loss" in e for e in entries[4:]) or checkpoint == 2
    assert any("off_policy_loss" in e for e in entries)
    assert len(set(losses_of(whole))) == 5, "a step done twice or left out would not show"
    resumed = make_trainer(tmp_path, rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert_same_run(resumed, whole)


def test_two_processes_decide_alike_and_keep_a_prompts_completions_together(tmp_path):
    """Four steps of two micro-batches with lmbda = 0.5 and num_generations = 2. One process with
    the rows of both writes the same.
    """
    state = run_step("window_step", tmp_path / "run", 2, 1, 2)
    first, second = state["ranks"]
    policies = [[step["is_on_policy"] for step in rank] for rank in (first, second)]
    assert policies[0] == policies[1]
    assert {policy for step in policies[0] for policy in step} == {True, False}
    for step in range(4):
        rows = [rank[step]["rows"] for rank in (first, second)]
        start = 2 * step % 8
        assert rows == [[start, start], [start + 1, start + 1]]
        for rank in (first, second):
            if all(rank[step]["is_on_policy"]):
                one, other = rank[step]["completions"]
                assert one != other
    _, alone = window_step.run(str(tmp_path / "alone"), 2, 2)
    on_policy = [i for i, step in enumerate(alone) if all(step["is_on_policy"])]
    assert on_policy
    for i in on_policy:
        assert alone[i]["completions"] == first[i]["completions"] + second[i]["completions"]


def test_a_row_on_two_ranks_is_sampled_as_on_one(tmp_path, monkeypatch):
    """Where an epoch ends, repetitions of a row may be on several ranks: none writes the same."""
    run = make_trainer(tmp_path, PROMPTS, lmbda=1.0, **TWICE)
    rollouts = run.rollouts
    row, other = run.data_collator([run.train_dataset[i] for i in (0, 1)]).examples
    (whole, _) = rollouts._prompts_of([row] * 4 + [other], "student", 3, {})
    assert (whole.num_completions, len(set(whole.seeds))) == (4, 4)
    args = SimpleNamespace(**vars(run.args), world_size=2, process_index=1)
    monkeypatch.setattr(rollouts, "args", args)
    keys = [[(0, None), (1, None), (0, None)], [(0, None)]]
    monkeypatch.setattr(window, "gather_object", lambda own: keys)
    before = rollouts._before([WindowBatch([row], [row])])
    assert before == {(0, None): 2, (1, None): 1}
    (part,) = rollouts._prompts_of([row] * 2, "student", 3, before)
    assert part.seeds == whole.seeds[2:]
    assert rollouts._prompts_of([row], "student", 4, {})[0].seed not in whole.seeds
    assert rollouts._prompts_of([row], "teacher", 3, {})[0].seed not in whole.seeds


HALF = b"\xc3"  # the first byte of many accented letters


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_bytes_that_are_no_text_are_left_out_and_counted_across_families(
    writer, tmp_path, caplog, monkeypatch
):
    """Of a completion the text before them is scored; one that begins with them is skipped, with a
    warning. The third is whole.
    """
    student, teacher = make_sides("qwen3", "llama")
    before = student._replace(model=deepcopy(student.model))
    aligner, reverse = aligner_of(student, teacher), aligner_of(teacher, student)
    side = student if writer == "student" else teacher
    table = aligner.student if writer == "student" else aligner.teacher
    half, (end, pad) = table.pieces.index(HALF), ids_of(side.processor)
    sampled = [
        [*table.encode("A red"), half, *table.encode(" bar"), end],
        [half, *table.encode("red"), end],
        [*table.encode("blue"), end],
    ]
    Script(monkeypatch, side.model, sampled, pad)
    if writer == "student":
        completions = [(ids, aligner.teacher_ids(ids)) for ids in sampled]
    else:
        completions = [(reverse.teacher_ids(ids), ids) for ids in sampled]
    alignments = [aligner.align(*pair) for pair in completions]
    assert [alignment.scored_bytes for alignment in alignments] == [5, 0, 4]
    policy = {"lmbda": 1.0} if writer == "student" else {"seq_kd": True}
    rows = tiny_rows(3)
    run, recorder = cross_trainer(tmp_path, rows, student, teacher, max_steps=1, **policy)
    run.train()
    assert_equals(run, recorder, eager_cross_step(before, teacher, rows, completions, alignments))
    entry = run.state.log_history[0]
    assert (entry["skipped_no_common_end"], entry["skipped_unspelled"]) == (1, 0)
    num_bytes = sum(alignment.completion_bytes for alignment in alignments)
    assert entry["scored_bytes"] == pytest.approx(9 / num_bytes)
    (warned,) = [r.getMessage() for r in caplog.records if "is not distilled" in r.getMessage()]
    assert warned.startswith("row 1 is not distilled (skipped_no_common_end)")


def test_bytes_that_are_no_text_are_scored_as_sampled_in_one_family(scored, tmp_path, monkeypatch):
    student, processor = tiny("qwen3_vl")
    half = TokenBytes(processor.tokenizer).pieces.index(HALF)
    end, pad = ids_of(processor)
    sampled = [(5, half, 6, end), (half, end), (half, half, half, half), (7, end)]
    Script(monkeypatch, student, [list(ids) for ids in sampled], pad)
    make_trainer(tmp_path, PROMPTS, student=student, lmbda=1.0).train()
    assert [ids for batch in scored for _, ids in batch] == sampled
