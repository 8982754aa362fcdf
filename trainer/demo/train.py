"""The demo's two trainings: a teacher on labelled pictures, a student on the teacher alone."""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Trainer,
    TrainingArguments,
)

from gold_trainer.config import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.demo.digits import Digits, make_rows
from gold_trainer.demo.tiny_vlm import TEACHER_SIZE, build_model
from gold_trainer.rendering.collator import Example, GOLDCollator, build_inputs
from gold_trainer.trainer import GOLDTrainer

logger = logging.getLogger(__name__)

MAX_LENGTH = 96  # a prompt with its 4 image tokens has 25 to 45
CACHE_FILE = "demo.json"
CHUNK_SIZE = 64  # rows of logits at a time: a batch has about 320


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the two trainings; the defaults take three to four minutes on two CPU cores."""

    num_train: int | None = None  # training pictures; None: all 1437
    num_held_out: int | None = None  # held-out pictures; None: all 360
    teacher_steps: int = 240
    student_steps: int = 320
    teacher_batch_size: int = 64
    student_batch_size: int = 32
    teacher_learning_rate: float = 1e-3
    student_learning_rate: float = 1.5e-3
    lmbda: float = 0.25  # share of on-policy steps
    seed: int = 0


def make_examples(processor: ProcessorMixin, digits: Digits, is_labelled: bool) -> list[Example]:
    """Rendered rows; without labels, without completions."""
    rows = RowDataset(make_rows(digits, is_labelled), needs_completion=is_labelled, is_text=False)
    collator = GOLDCollator(processor, [processor.tokenizer.eos_token_id], MAX_LENGTH)
    return [collator.example(rows[i]) for i in range(len(rows))]


def common_arguments(output_dir: Path, batch_size: int, settings: DemoSettings) -> dict[str, Any]:
    """What both trainings share."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "seed": settings.seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def load_or_train_teacher(
    folder: Path, processor: Qwen3VLProcessor, digits: Digits, settings: DemoSettings
) -> tuple[PreTrainedModel, float]:
    """The teacher and the seconds its training took, now or when it was cached.

    The cache counts only if it was made with the same settings: otherwise it is trained again.
    """
    key = {
        "size": asdict(TEACHER_SIZE),
        "num_train": len(digits),
        "steps": settings.teacher_steps,
        "batch_size": settings.teacher_batch_size,
        "learning_rate": settings.teacher_learning_rate,
        "seed": settings.seed,
    }
    cached = folder / CACHE_FILE
    if cached.exists():
        record = json.loads(cached.read_text(encoding="utf-8"))
        if record["key"] == key:
            model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
            return model, record["seconds"]
        logger.warning("the teacher in %s has other settings: training a new one", folder)
        cached.unlink()
    model = build_model(TEACHER_SIZE, processor, settings.seed)
    start = time.perf_counter()
    _train_teacher(model, processor, digits, settings, folder)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    cached.write_text(json.dumps({"key": key, "seconds": seconds}, indent=2), encoding="utf-8")
    return model, seconds


def _train_teacher(
    model: PreTrainedModel,
    processor: Qwen3VLProcessor,
    digits: Digits,
    settings: DemoSettings,
    folder: Path,
) -> None:
    """Cross-entropy on the labels' sentences with the stock Trainer."""

    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        side = build_inputs(processor, examples)
        return {**side.tensors, "labels": side.labels}

    args = TrainingArguments(
        **common_arguments(folder, settings.teacher_batch_size, settings),
        max_steps=settings.teacher_steps,
        learning_rate=settings.teacher_learning_rate,
    )
    examples = make_examples(processor, digits, is_labelled=True)
    Trainer(model=model, args=args, data_collator=collate, train_dataset=examples).train()


def train_student(
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processors: tuple[ProcessorMixin, ProcessorMixin],  # of student and teacher
    digits: Digits,
    settings: DemoSettings,
) -> tuple[list[dict[str, float]], float]:
    """Distil a fresh student in place, without a label; return the log and the seconds.

    Off-policy steps learn from what the teacher says about a picture, on-policy steps from what the
    student itself says, both scored by the teacher at every token. With two processors, the hybrid
    loss across tokenizers, with forward KL: see ULDFields.
    """
    is_cross = processors[0] is not processors[1]
    args = GOLDConfig(
        **common_arguments(folder, settings.student_batch_size, settings),
        max_steps=settings.student_steps,
        learning_rate=settings.student_learning_rate,
        lmbda=settings.lmbda,
        beta=0.0 if is_cross else 0.5,
        seq_kd=True,
        temperature=1.0,
        max_completion_length=32 if is_cross else 16,
        max_length=MAX_LENGTH,
        bf16=False,
        gradient_checkpointing=False,  # models this small have the memory
        chunk_size=CHUNK_SIZE,
        use_uld_loss=is_cross,
        uld_use_hybrid_loss=is_cross,
        log_completions=True,
        log_completions_steps=max(1, settings.student_steps // 2),
        num_completions_to_print=4,
    )
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=make_rows(digits, is_labelled=False),
        processing_class=processors[0],
        teacher_processing_class=processors[1],
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder))
    return [entry for entry in trainer.state.log_history if "loss" in entry], seconds
