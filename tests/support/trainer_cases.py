"""Trainers on tiny models for the tests of trainer/: plain SGD, no clipping, rows in order."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from gold_trainer import GOLDConfig, GOLDTrainer
from support.tiny_models import tiny

FIELDS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 1,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "lmbda": 0.0,
    "max_length": 256,
    "max_completion_length": 8,
    "logging_steps": 1,
    "logging_first_step": False,  # tests of longer logging windows count one log
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "gradient_checkpointing": False,  # costs time, changes nothing
    "disable_tqdm": True,
}


class GradientRecorder(TrainerCallback):
    """Copies the gradients of every step just before the optimizer uses them."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of the first step."""
        return self.steps[0]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of vision tower, language model and head; a tied head is listed by
    the name of the embeddings. Projectors and an untied model's embeddings are in none of them.
    """
    head = model.get_output_embeddings().weight
    names = [name for name, _ in model.named_parameters()]
    # visual, vision_tower, vision_model: the layers of a tower are not those of the language model
    vision = [name for name in names if ".vis" in name]
    return {
        "vision": vision,
        "language": [name for name in names if ".layers." in name and name not in vision],
        "head": [name for name, parameter in model.named_parameters() if parameter is head],
    }


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Python's warnings, and those that transformers logs: some of them once a process, and not to
    the root logger, where caplog listens. Left out: that a faster kernel could be installed.
    """
    messages: list[str] = []

    def add(record: logging.LogRecord) -> None:
        if "install" not in record.getMessage():
            messages.append(f"{record.name}: {record.getMessage()}")

    handler = logging.Handler(logging.WARNING)
    handler.emit = add
    transformers_logging.warning_once.cache_clear()
    transformers_logging.add_handler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
        messages.extend(f"{w.category.__name__}: {w.message}" for w in caught)
    finally:
        transformers_logging.remove_handler(handler)


def make_trainer(
    output_dir: Any,
    rows: list[dict[str, Any]] | None,
    family: str = "qwen3_vl",
    *,
    student: Any = None,
    teacher: Any = None,
    processor: Any = None,
    eval_rows: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    peft_config: Any = None,
    token_weighting: Any = None,
    **fields: Any,
) -> GOLDTrainer:
    return GOLDTrainer(
        model=tiny(family)[0] if student is None else student,
        teacher_model=tiny(family, "teacher")[0] if teacher is None else teacher,
        args=GOLDConfig(output_dir=str(output_dir), **(FIELDS | fields)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tiny(family)[1] if processor is None else processor,
        callbacks=callbacks,
        peft_config=peft_config,
        token_weighting=token_weighting,
    )


def record_completions(trainer: GOLDTrainer, name: str) -> list[list[int]]:
    """Token ids of what the writer of "student" or "teacher" writes, in order, as it comes."""
    writer, written = trainer.rollouts.writers[name], []
    complete = writer.complete

    def record(prompts: Any, sampling: Any) -> Any:
        answer = complete(prompts, sampling)
        written.extend(completion.token_ids for part in answer for completion in part)
        return answer

    writer.complete = record
    return written


def record_widths(trainer: GOLDTrainer) -> list[int]:
    """Positions of the student's side of each micro-batch, as it is made."""
    prepare, widths = trainer.objective.prepare, []

    def record(*args: Any) -> Any:
        batch = prepare(*args)
        widths.append(batch.student.tensors["input_ids"].shape[1])
        return batch

    trainer.objective.prepare = record
    return widths


def losses_of(trainer: GOLDTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def one_step(output_dir: Any, rows: list[dict[str, Any]], *args: Any, **options: Any):
    """Loss and gradients of the first optimizer step."""
    recorder = GradientRecorder()
    trainer = make_trainer(output_dir, rows, *args, callbacks=[recorder], **options)
    trainer.train()
    return losses_of(trainer)[0], recorder.gradients


def assert_equal_steps(
    actual: GradientRecorder, expected: GradientRecorder, tolerance: float = 1e-5
) -> None:
    """Each entry of a gradient of every step is within `tolerance` of its largest one."""
    for step, step_2 in zip(expected.steps, actual.steps, strict=True):
        assert step.keys() == step_2.keys() and step
        for name, gradient in step.items():
            bound = tolerance * float(gradient.abs().max()) + 1e-9
            torch.testing.assert_close(step_2[name], gradient, rtol=0, atol=bound)


def assert_equal_gradients(actual: dict, expected: dict, relative: float = 1e-5) -> None:
    """Every gradient within `relative` of the norm of all gradients together.

    A bias in front of a softmax has a gradient of zero but for rounding: its own norm is no scale.
    """
    assert actual.keys() == expected.keys()
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert scale > 0
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        bound = relative * max(gradient.norm(), 1e-2 * scale)
        assert error <= bound, f"{name}: {error:.1e} of {gradient.norm():.1e}"
