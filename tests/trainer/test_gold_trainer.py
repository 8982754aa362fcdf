"""The step of GOLDTrainer: one loss and one gradient for any split of the global batch, only
completion rows in it, and what is logged about it.

That they equal the eager float64 step of full logits is held for every family in test_families.py.
"""

import gc
import math
import multiprocessing
import weakref

import datasets
import pytest
import torch

from gold_kernels import fused_linear_loss
from gold_kernels.engine import linear
from gold_trainer.objectives import same_vocabulary
from support.eager_step import completion_of
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import assert_equal_gradients, losses_of, make_trainer, one_step

ROWS = tiny_rows(8, images="mixed")


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    return one_step(tmp_path_factory.mktemp("run"), ROWS, per_device_train_batch_size=8)


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call of the loss."""
    seen = []

    def record(*args, **options):
        seen.append((*args, options))
        return fused_linear_loss(*args, **options)

    monkeypatch.setattr(same_vocabulary, "fused_linear_loss", record)
    return seen


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_changes_neither_loss_nor_gradient(accumulation, whole_batch, tmp_path):
    lengths = [len(completion_of("qwen3_vl", tiny("qwen3_vl")[1], row)) for row in ROWS]
    assert len(set(lengths)) > 1, "a mean of means would differ"
    loss, gradients = one_step(
        tmp_path,
        ROWS,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    assert loss == pytest.approx(whole_batch[0], rel=1e-5)
    assert_equal_gradients(gradients, whole_batch[1])


def test_padding_side_changes_neither_loss_nor_gradient(whole_batch, tmp_path):
    _, processor = tiny("qwen3_vl")
    assert processor.tokenizer.padding_side == "left"
    processor.tokenizer.padding_side = "right"
    options = {"processor": processor, "per_device_train_batch_size": 8}
    loss, gradients = one_step(tmp_path, ROWS, **options)
    assert loss == pytest.approx(whole_batch[0], rel=1e-5)
    assert_equal_gradients(gradients, whole_batch[1])


@pytest.mark.parametrize("chunk_size", [1, 7, 10**6])
def test_chunk_size_changes_neither_loss_nor_gradient(chunk_size, whole_batch, tmp_path):
    options = {"chunk_size": chunk_size, "per_device_train_batch_size": 8}
    loss, gradients = one_step(tmp_path, ROWS, **options)
    assert loss == pytest.approx(whole_batch[0], rel=1e-5)
    assert_equal_gradients(gradients, whole_batch[1])


def test_activation_checkpointing_changes_neither_loss_nor_gradient(whole_batch, tmp_path):
    options = {"gradient_checkpointing": True, "per_device_train_batch_size": 8}
    loss, gradients = one_step(tmp_path, ROWS, **options)
    assert loss == pytest.approx(whole_batch[0], rel=1e-5)
    assert_equal_gradients(gradients, whole_batch[1])


def test_last_window_of_an_epoch_may_be_shorter(tmp_path):
    """7 rows in micro-batches of 2, 3 of them a window: the second window has one row."""
    options = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make_trainer(tmp_path, ROWS[:7], **options, **split)
    trainer.train()
    whole = make_trainer(tmp_path, ROWS[:7], **options, per_device_train_batch_size=6)
    whole.train()
    assert losses_of(trainer) == pytest.approx(losses_of(whole), rel=1e-5)
    assert len(losses_of(trainer)) == 2


def test_only_completion_rows_reach_the_loss(calls, tmp_path):
    trainer = make_trainer(tmp_path, ROWS, per_device_train_batch_size=8, disable_dropout=True)
    trainer.train()
    _, processor = tiny("qwen3_vl")
    num_scored = sum(len(completion_of("qwen3_vl", processor, row)) for row in ROWS)
    ((_, student_hidden, _, teacher_hidden, _, row_weights, _),) = calls
    assert student_hidden.shape == (num_scored, 64)
    assert teacher_hidden.shape == (num_scored, 128)
    assert not teacher_hidden.requires_grad
    assert torch.equal(row_weights, torch.full((num_scored,), 1 / num_scored))


def test_loss_has_its_own_temperature(calls, tmp_path):
    make_trainer(tmp_path, ROWS, temperature=0.5, loss_temperature=2.0, beta=0.25).train()
    row_loss = calls[0][0]
    assert (row_loss.temperature, row_loss.beta) == (2.0, 0.25)


def test_head_is_itself_again_after_a_step_and_after_an_error(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, ROWS)
    trainer.train()
    ids = torch.tensor([[1, 2, 3]])
    assert trainer.model(input_ids=ids).logits.shape == (1, 3, trainer.student.head.out_features)
    assert trainer.teacher_model(input_ids=ids).logits.ndim == 3

    def fail(*args, **options):
        raise RuntimeError("no loss today")

    monkeypatch.setattr(same_vocabulary, "fused_linear_loss", fail)
    with pytest.raises(RuntimeError, match="no loss today"):
        make_trainer(tmp_path, ROWS, student=trainer.model).train()
    assert trainer.model(input_ids=ids).logits.ndim == 3


def test_trainer_and_models_are_freed_when_they_are_let_go_of(tmp_path):
    """Without the cycle collector: what lives until the process exits holds its process group."""
    gc.collect()
    gc.disable()
    try:
        trainer = make_trainer(tmp_path, ROWS, lmbda=1.0)
        trainer.train()
        references = [weakref.ref(part) for part in (trainer, trainer.model, trainer.teacher_model)]
        del trainer
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


def test_teacher_stays_as_it_was(tmp_path):
    teacher, _ = tiny("qwen3_vl", "teacher")
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    trainer = make_trainer(tmp_path, ROWS, teacher=teacher, max_steps=2)
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training and trainer.model.training


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_and_untied_heads_learn(family, is_tied, tmp_path):
    student, _ = tiny(family)
    embeddings, head = student.get_input_embeddings(), student.get_output_embeddings()
    head.weight = embeddings.weight if is_tied else torch.nn.Parameter(embeddings.weight.clone())
    student.config.tie_word_embeddings = is_tied
    rows = tiny_rows(4, images=0 if family == "llama" else 1)
    options = {"student": student, "max_steps": 20, "learning_rate": 1.0}
    trainer = make_trainer(tmp_path, rows, family, **options)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    assert (head.weight is embeddings.weight) == is_tied


def test_lora_trains_only_the_adapter_and_equals_the_whole_gradient(tmp_path):
    """At its start an adapter changes nothing: the loss is the student's, and only B has a
    gradient.
    """
    peft = pytest.importorskip("peft")
    options = {"per_device_train_batch_size": 8}
    for checkpointing in (False, True):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
        loss, gradients = one_step(
            tmp_path,
            ROWS,
            peft_config=config,
            gradient_checkpointing=checkpointing,
            **options,
        )
        expected, _ = one_step(tmp_path, ROWS, **options)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert all("lora_" in name for name in gradients)
        moving = [name for name, gradient in gradients.items() if gradient.any()]
        assert moving and all("lora_B" in name for name in moving)
        assert any("language_model" in name for name in moving)


def test_bf16_autocast_is_close_to_float32(whole_batch, tmp_path, monkeypatch):
    """Norms give float32 hidden states under autocast: the loss casts them, as an lm_head does."""
    dtypes = []
    run_chunks = linear.run_chunks

    def record(student, teacher, *args, **options):
        tensors = (student.hidden, student.weight, teacher.hidden, teacher.weight)
        dtypes.extend(tensor.dtype for tensor in tensors)
        return run_chunks(student, teacher, *args, **options)

    monkeypatch.setattr(linear, "run_chunks", record)
    loss, gradients = one_step(tmp_path, ROWS, per_device_train_batch_size=8, bf16=True)
    assert dtypes == [torch.bfloat16] * 4
    assert loss == pytest.approx(whole_batch[0], rel=2e-2)
    assert gradients.keys() == whole_batch[1].keys()
    flat, expected = (
        torch.cat([part[name].flatten() for name in whole_batch[1]])
        for part in (gradients, whole_batch[1])
    )
    assert torch.nn.functional.cosine_similarity(flat, expected, dim=0) > 0.99


def test_log_has_every_metric_of_the_window(tmp_path):
    options = {"gradient_accumulation_steps": 2, "lmbda": 0.5}
    trainer = make_trainer(tmp_path, ROWS, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    on, off = entry["on_policy_loss"], entry["off_policy_loss"]
    assert min(on, off) <= entry["loss"] <= max(on, off)
    vocabulary = trainer.student.head.out_features
    for name in ("student_entropy", "teacher_entropy"):
        assert 0 < entry[name] < math.log(vocabulary)
    assert 0 <= entry["top1_agreement"] <= 1
    assert entry["forward_kl"] > 0 and entry["reverse_kl"] > 0
    assert entry["tokens_per_second"] > 0
    assert (
        1
        <= entry["completion_length"]
        <= max(len(completion_of("qwen3_vl", tiny("qwen3_vl")[1], row)) for row in ROWS)
    )


@pytest.mark.parametrize(("lmbda", "absent"), [(0.0, "on_policy_loss"), (1.0, "off_policy_loss")])
def test_log_has_no_loss_of_a_policy_that_did_not_run(lmbda, absent, tmp_path):
    trainer = make_trainer(tmp_path, ROWS, lmbda=lmbda)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert absent not in entry
    present = ({"on_policy_loss", "off_policy_loss"} - {absent}).pop()
    assert entry[present] == pytest.approx(entry["loss"], rel=1e-5)
    if lmbda == 0:
        _, processor = tiny("qwen3_vl")
        lengths = [len(completion_of("qwen3_vl", processor, row)) for row in ROWS[:4]]
        assert entry["completion_length"] == pytest.approx(sum(lengths) / 4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_is_a_mean_over_tokens_for_any_batch_size(batch_size, whole_batch, tmp_path):
    options = {"eval_rows": ROWS, "per_device_eval_batch_size": batch_size}
    trainer = make_trainer(tmp_path, ROWS, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(whole_batch[0], rel=1e-5)
    assert {"eval_student_entropy", "eval_teacher_entropy", "eval_top1_agreement"} <= set(metrics)
    assert "eval_on_policy_loss" not in metrics


def test_evaluation_during_training_keeps_the_training_window(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "logging_steps": 2}
    quiet = make_trainer(tmp_path, ROWS, max_steps=2, logging_steps=2)
    quiet.train()
    trainer = make_trainer(
        tmp_path, ROWS, eval_rows={"seen": ROWS[:3], "other": ROWS[3:]}, **options
    )
    trainer.train()
    evaluations = [e for e in trainer.state.log_history if "eval_seen_loss" in e]
    assert (
        len(evaluations) == 2
        and evaluations[1]["eval_seen_loss"] < evaluations[0]["eval_seen_loss"]
    )
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert "eval_loss" not in entry
    for name in ("loss", "off_policy_loss", "student_entropy", "completion_length"):
        assert entry[name] == pytest.approx(quiet.state.log_history[0][name], rel=1e-5)
    assert "on_policy_loss" not in entry


def test_evaluation_of_other_rows_reads_them_like_its_own(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, eval_rows=ROWS)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(eval_dataset=ROWS)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(ROWS).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_data_loader_workers_change_nothing_and_end_with_the_run(whole_batch, tmp_path):
    options = {"dataloader_num_workers": 1, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, ROWS, gradient_accumulation_steps=2, **options)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(whole_batch[0], rel=1e-6)
    trainer = make_trainer(tmp_path, ROWS, **options)  # ends within an epoch
    trainer.train()
    assert not multiprocessing.active_children()


def test_a_second_run_logs_nothing_of_the_first_ones_last_steps(tmp_path):
    fields = {"max_steps": 3, "logging_steps": 2, "lmbda": 0.5, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, ROWS, on_nonfinite="skip", **fields)
    trainer.guard.skipped, names = 7, ("train_runtime", "tokens_per_second")
    logs = []
    for _ in range(2):
        trainer.train()
        first = trainer.state.log_history[0]
        logs.append({n: value for n, value in first.items() if n not in names})
        trainer.windows["train"].started -= 1e6  # seconds between both
    assert first["tokens_per_second"] > 1 and first["nonfinite_steps"] == 0
    assert logs[0] == logs[1]


def test_completions_are_shown_with_row_and_end_token(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # no cell is folded
    options = {"log_completions": True, "log_completions_steps": 2, "num_completions_to_print": 2}
    make_trainer(tmp_path, ROWS, max_steps=3, lmbda=0.0, **options).train()
    shown = capsys.readouterr().out
    assert "Step 0: completions of the dataset" in shown and "Step 2:" in shown
    assert "Step 1:" not in shown
    answers = [row["messages"][-1]["content"] for row in ROWS]
    for row, answer in enumerate(answers):  # steps 0 and 2 both see the first batch of 4
        assert shown.count(f"{answer}<|im_end|>") == (2 if row < 2 else 0)


def test_splits_in_place_of_a_dataset_are_refused(tmp_path):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(tiny_rows(2)))
    message = "^GOLDTrainer: train_dataset must be one dataset, got a dict of train; pass one of"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, splits)
