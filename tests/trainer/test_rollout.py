"""Completions that are generated: what is scored of them, how long they are, what samples them, and
that pictures become tensors no sooner than the micro-batch that needs them.

That an on-policy step equals the eager step on what was generated is held in test_families.py.
"""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from gold_kernels import fused_linear_loss
from gold_trainer import GOLDTrainer
from gold_trainer.models import placeholder_ids_of
from gold_trainer.objectives import same_vocabulary
from gold_trainer.objectives.one_family import shared_vocab_size
from gold_trainer.rendering import collator
from gold_trainer.rendering.prompts import process_prompts, tokenizer_of
from gold_trainer.writers import Prompt
from support.scripted_generate import Script, ids_of
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import losses_of, make_trainer

ROWS = tiny_rows(4, images="mixed")
PROMPTS = [{**row, "messages": row["messages"][:1]} for row in ROWS]
MAX_NEW = 6


@pytest.fixture
def scored(monkeypatch):
    """For every micro-batch: the labels of its scored rows, and its tokens of each sequence."""
    seen = []
    build_inputs = collator.build_inputs

    def record(processor, examples):
        inputs = build_inputs(processor, examples)
        ids = inputs.tensors["input_ids"].flatten()[inputs.scored_rows + 1].tolist()
        seen.append((ids, [example.completion_ids for example in examples]))
        return inputs

    monkeypatch.setattr(collator, "build_inputs", record)
    return seen


def rows_of_the_loss(monkeypatch):
    counts = []

    def record(loss, student_hidden, *args, **options):
        counts.append(student_hidden.shape[0])
        return fused_linear_loss(loss, student_hidden, *args, **options)

    monkeypatch.setattr(same_vocabulary, "fused_linear_loss", record)
    return counts


def padding_rows(model, processor):
    """Rows of the head that no token belongs to."""
    num_rows = model.get_output_embeddings().out_features
    return list(range(len(tokenizer_of(processor)), num_rows))


def rows_of(run):
    return [run.train_dataset[i] for i in range(len(run.train_dataset))]


def written_ids(run, examples, seed=0, **changes):
    """Completions of the trainer's student, with its own settings but for the changes."""
    rollouts = run.rollouts
    sampling = replace(rollouts.sampling["student"], **changes)
    prompts = [
        Prompt(e.unanswered(), rollouts._room(e), seed + 100 * i) for i, e in enumerate(examples)
    ]
    written = rollouts.writers["student"].complete(prompts, sampling)
    assert all(len(c.token_ids) == len(c.logprobs) for (c,) in written)
    return [completion.token_ids for (completion,) in written]


def test_end_token_is_scored_and_nothing_after_it(scored, tmp_path, monkeypatch):
    counts = rows_of_the_loss(monkeypatch)
    student, processor = tiny("qwen3_vl")
    end, pad = ids_of(processor)
    sampled = [[5, 6, end], [end], [7, 8, 9, 10, 11, 12], [5, end, end, 6, end]]
    Script(monkeypatch, student, sampled, pad)
    make_trainer(
        tmp_path, PROMPTS, student=student, lmbda=1.0, max_completion_length=MAX_NEW
    ).train()
    kept = [[5, 6, end], [end], [7, 8, 9, 10, 11, 12], [5, end]]
    assert scored == [([i for ids in kept for i in ids], kept)]
    assert counts == [sum(map(len, kept))]


def test_every_end_token_of_the_model_ends_a_completion(scored, tmp_path, monkeypatch):
    """Qwen's models end with <|im_end|> or <|endoftext|>; the second one is the padding too."""
    student, processor = tiny("qwen3_vl")
    end, pad = ids_of(processor)
    assert end != pad
    student.generation_config.eos_token_id = [end, pad]
    script = Script(
        monkeypatch, student, [[5, pad, pad, pad], [5, 6, end, pad], [5, 6, 7, 8], [pad, 5]], pad
    )
    make_trainer(tmp_path, PROMPTS, student=student, lmbda=1.0).train()
    assert [kept for _, kept in scored] == [[[5, pad], [5, 6, end], [5, 6, 7, 8], [pad]]]
    _, sampling = script.calls[0]
    assert sampling.end_ids == tuple(sorted([end, pad]))


@pytest.mark.parametrize("max_length", [None, 64])
def test_completions_keep_to_their_length(max_length, scored, tmp_path):
    """Room is what max_length leaves a row after its prompt, and never above
    max_completion_length.
    """
    fields = {"max_length": max_length, "max_completion_length": 40, "lmbda": 1.0}
    run = make_trainer(tmp_path, PROMPTS, **fields)
    examples = run.data_collator(rows_of(run)).examples
    rooms = [40 if max_length is None else min(40, 64 - e.prompt_length) for e in examples]
    assert max_length is None or len(set(rooms)) > 1, "rows must differ in room"
    end, _ = ids_of(run.processing_class)
    lengths = []
    for ids, room in zip(written_ids(run, examples), rooms, strict=True):
        lengths.append(len(ids))
        assert lengths[-1] == room or ids[-1] == end
        assert lengths[-1] <= room
    assert any(length == room for length, room in zip(lengths, rooms, strict=True))


def test_sampling_settings_are_the_runs_and_not_the_models_own(tmp_path, monkeypatch):
    student, processor = tiny("qwen3_vl")
    end, pad = ids_of(processor)
    student.generation_config.repetition_penalty = 5.0
    script = Script(monkeypatch, student, [[5]] * 4, pad)
    fields = {"temperature": 0.7, "top_p": 0.8, "top_k": 11, "min_p": 0.1, "max_steps": 2}
    fields |= {"repetition_penalty": 1.2, "stop_strings": ["."], "lmbda": 1.0}
    fields |= {"generation_kwargs": '{"no_repeat_ngram_size": 2}', "max_completion_length": 9}
    make_trainer(tmp_path, PROMPTS, student=student, **fields).train()
    rows, sampling = script.calls[0]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 11)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert sampling.stop_strings == (".",) and sampling.end_ids == (end,)
    assert sampling.generation_kwargs == {"no_repeat_ngram_size": 2}
    assert {row.room for row in rows} == {9}
    vision = [student.config.image_token_id, student.config.vision_start_token_id]
    padding = padding_rows(student, processor)
    num_entries = student.get_output_embeddings().out_features
    assert padding and set(vision) | set(padding) <= set(sampling.banned_ids(num_entries))


def test_a_model_writes_in_eval_mode_and_its_own_settings_are_hidden(tmp_path):
    """Sampled from two tokens, a penalty of the model's own would show."""
    student, _ = tiny("qwen3_vl")
    fields = {"lmbda": 1.0, "top_k": 1, "gradient_checkpointing": True}
    run = make_trainer(tmp_path, PROMPTS, student=student, **fields)
    examples = run.data_collator(rows_of(run)).examples
    expected = written_ids(run, examples)
    student.generation_config.repetition_penalty = 5.0
    student.generation_config.max_length = 3
    modes = []
    student.register_forward_hook(lambda module, *_: modes.append(module.training))
    student.train()
    assert written_ids(run, examples) == expected
    assert modes and not any(modes) and student.training
    assert student.generation_config.repetition_penalty == 5.0


def test_end_token_beyond_a_hole_in_the_ids_can_be_sampled(tmp_path, monkeypatch):
    student, processor = tiny("llama")
    definition = json.loads(processor.backend_tokenizer.to_str())
    end = processor.eos_token_id + 10
    definition["model"]["vocab"][processor.eos_token] = end
    for token in definition["added_tokens"]:
        token["id"] = end if token["content"] == processor.eos_token else token["id"]
    processor._tokenizer = Tokenizer.from_str(json.dumps(definition))
    assert processor.eos_token_id == end >= len(processor)
    script = Script(monkeypatch, student, [[5, end]] * 4, processor.pad_token_id)
    run = make_trainer(
        tmp_path, tiny_rows(4), "llama", student=student, processor=processor, lmbda=1.0
    )
    run.train()
    num_rows = student.lm_head.out_features
    unknown = sorted(set(range(num_rows)) - set(processor.get_vocab().values()))
    assert script.calls[0][1].banned_ids(num_rows) == unknown
    assert end not in unknown and min(unknown) < end < max(unknown)
    head = torch.nn.Linear(1, num_rows + 64)
    assert shared_vocab_size(student.lm_head, head, processor) == end + 1


def test_peaked_sampling_is_greedy_decoding(scored, tmp_path):
    """top_k = 1: the completions are those of do_sample=False."""
    student, processor = tiny("qwen3_vl")
    run = make_trainer(tmp_path, PROMPTS, student=student, lmbda=1.0, top_k=1)
    inputs = process_prompts(
        processor,
        [e.prompt_text for e in run.data_collator(rows_of(run)).examples],
        [row.images for row in rows_of(run)],
    )
    greedy = student.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=[*placeholder_ids_of(student.config), *padding_rows(student, processor)],
    )[:, inputs["input_ids"].shape[1] :].tolist()
    end = tokenizer_of(processor).eos_token_id
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in greedy]
    run.train()
    assert scored[0][1] == expected


def test_rollouts_repeat_with_the_seed_and_differ_between_steps_and_micro_batches(scored, tmp_path):
    """One row again and again, weights held still: only the seed of the place differs."""
    fields = {
        "lmbda": 1.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 0.0,
        "temperature": 2.0,
        "top_p": 1.0,
    }

    def completions(seed, drawn_before=0):
        scored.clear()
        torch.manual_seed(drawn_before)
        run = make_trainer(tmp_path, PROMPTS[:1] * 2, seed=seed, **fields)
        torch.manual_seed(drawn_before)  # whatever state the process is in
        run.train()
        return [tuple(kept[0]) for _, kept in scored]

    first = completions(1)
    assert len(first) == 4 and len(set(first)) == 4
    assert completions(1, drawn_before=9) == first
    assert not set(completions(2)) & set(first)


def test_generating_leaves_the_random_state_alone(tmp_path):
    run = make_trainer(tmp_path, PROMPTS, lmbda=1.0)
    examples = run.data_collator(rows_of(run)).examples
    state = torch.get_rng_state()
    first, again, other = (written_ids(run, examples, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other


@pytest.mark.parametrize(("lmbda", "expected"), [(0.0, "dataset"), (1.0, "student"), (0.5, "both")])
def test_share_of_on_policy_micro_batches_is_lmbda(lmbda, expected, tmp_path, monkeypatch):
    """400 draws of the decision alone; standard deviation 0.025 at lmbda = 0.5."""
    run = make_trainer(tmp_path, ROWS, lmbda=lmbda)
    monkeypatch.setattr(run.rollouts, "write", lambda source, batches, *rest: batches)
    batch = run.data_collator(rows_of(run)[:1])
    taken = []
    for step in range(100):
        window = run.rollouts.complete([batch] * 4, step)
        taken += [completed.is_on_policy for completed in window]
    share = sum(taken) / len(taken)
    assert share == lmbda if expected != "both" else abs(share - 0.5) < 0.1


def test_table_of_on_policy_completions_shows_what_the_student_said(
    scored, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "250")  # no cell is folded
    student, processor = tiny("qwen3_vl")
    end, pad = ids_of(processor)
    tokenizer = tokenizer_of(processor)
    said = ["red bar", "a circle", "blue", "[bold]cross"]
    Script(monkeypatch, student, [[*tokenizer(text)["input_ids"], end] for text in said], pad)
    options = {"log_completions": True, "log_completions_steps": 2, "num_completions_to_print": 3}
    fields = {"lmbda": 1.0, "max_completion_length": 32, "max_steps": 2}
    make_trainer(tmp_path, PROMPTS, student=student, **fields, **options).train()
    shown = capsys.readouterr().out
    assert shown.count("completions of the student") == 1 and "Step 0" in shown
    for row, text in enumerate(said):
        lines = [line for line in shown.splitlines() if f"{text}<|im_end|>" in line]
        assert len(lines) == (row < 3)
        if lines:
            cells = [cell.strip() for cell in lines[0].split("│")[1:3]]
            assert cells == [str(row), str(len(PROMPTS[row]["images"]))]


def test_seq_kd_learns_from_what_the_teacher_says(scored, tmp_path, monkeypatch):
    """Rows without an answer; the log calls them off-policy."""
    teacher, processor = tiny("qwen3_vl", "teacher")
    end, pad = ids_of(processor)
    said = [[20, 21, end], [22, end], [23, 24, 25, 26], [24, 25, 26, end]]
    script = Script(monkeypatch, teacher, said, pad)
    student, _ = tiny("qwen3_vl")
    run = make_trainer(
        tmp_path, PROMPTS, student=student, teacher=teacher, seq_kd=True, lmbda=0.0, max_steps=2
    )
    run.train()
    assert len(script.calls) == 2
    assert [kept for _, kept in scored] == [said, said]
    entry = run.state.log_history[0]
    assert entry["off_policy_loss"] == pytest.approx(entry["loss"], rel=1e-6)
    assert "on_policy_loss" not in entry
    assert entry["completion_length"] == sum(map(len, said)) / 4


def test_seq_kd_ignores_answers_that_are_there(scored, tmp_path, monkeypatch):
    teacher, processor = tiny("qwen3_vl", "teacher")
    end, pad = ids_of(processor)
    said = [[20, 21, end]] * 4
    Script(monkeypatch, teacher, said, pad)
    make_trainer(tmp_path, ROWS, teacher=teacher, seq_kd=True, lmbda=0.0).train()
    assert scored[0][1] == said


def test_on_policy_rows_need_no_answer_and_never_show_it(tmp_path):
    """Whatever the dataset answers, and if it answers nothing: the same losses."""
    losses = []
    for rows in (ROWS, PROMPTS):
        run = make_trainer(tmp_path, rows, lmbda=1.0, max_steps=2)
        run.train()
        losses.append(losses_of(run))
    assert losses[0] == losses[1]


def test_error_of_evaluation_rows_without_an_answer_names_fields_that_help(tmp_path):
    """GOLDConfig refuses seq_kd with the lmbda=1.0 that training has here."""
    options = {"eval_rows": PROMPTS, "max_completion_length": 2}
    make_trainer(tmp_path, PROMPTS, lmbda=1.0)
    message = r"^row 0: .* got none; add it, or set seq_kd=True with lmbda below 1, so that the te"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, PROMPTS, lmbda=1.0, **options)
    assert make_trainer(tmp_path, ROWS, lmbda=1.0, eval_rows=ROWS).evaluate()
    assert make_trainer(tmp_path, PROMPTS, lmbda=0.99, seq_kd=True, **options).evaluate()


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_stay_raw_until_their_micro_batch(lmbda, workers, tmp_path, monkeypatch):
    """Four micro-batches of a window: pixels are made for each when its turn comes, once for the
    step and once for generation.
    """
    events = []
    compute_loss = GOLDTrainer.compute_loss
    build_inputs = collator.build_inputs

    def build(processor, examples):
        kinds = {type(image).__module__ for example in examples for image in example.images}
        assert kinds == {"PIL.Image"}
        events.append("pixels")
        return build_inputs(processor, examples)

    def loss(self, *args, **options):
        events.append("loss")
        return compute_loss(self, *args, **options)

    monkeypatch.setattr(collator, "build_inputs", build)
    monkeypatch.setattr(GOLDTrainer, "compute_loss", loss)
    make_trainer(
        tmp_path,
        tiny_rows(4, images=1),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        dataloader_num_workers=workers,
        lmbda=lmbda,
    ).train()
    assert events == ["pixels", "loss"] * 4
