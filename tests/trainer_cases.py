"""Trainers on tiny models for the tests of trainer/: plain SGD, no clipping, rows in order."""

from typing import Any

import torch
from tiny_models import tiny
from transformers import TrainerCallback

from trainer import GOLDConfig, GOLDTrainer

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
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


class GradientRecorder(TrainerCallback):
    """Copies the gradients of the first step just before the optimizer uses them."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


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
    )


def losses_of(trainer: GOLDTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def one_step(output_dir: Any, rows: list[dict[str, Any]], *args: Any, **options: Any):
    """Loss and gradients of the first optimizer step."""
    recorder = GradientRecorder()
    trainer = make_trainer(output_dir, rows, *args, callbacks=[recorder], **options)
    trainer.train()
    return losses_of(trainer)[0], recorder.gradients


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
