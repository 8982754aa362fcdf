"""A teacher VLM learns handwritten digits, a smaller one learns from it: all on the spot.

No download: pictures from scikit-learn, stock Qwen3-VL classes with small configs (with
pair="cross" an Idefics3 student), tokenizers trained on the demo's sentences. The real GOLDTrainer,
the real fused losses.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gold_trainer.demo.digits import Digits, load_pictures
from gold_trainer.demo.evaluate import accuracy_of, generate_answers
from gold_trainer.demo.loss_memory import loss_peak_bytes
from gold_trainer.demo.other_family import build_other_model, build_other_processor
from gold_trainer.demo.report import (
    DemoResult,
    draw_contact_sheet,
    draw_loss_curve,
    print_table,
    write_metrics,
)
from gold_trainer.demo.tiny_vlm import STUDENT_SIZE, build_model, build_processor
from gold_trainer.demo.train import (
    CHUNK_SIZE,
    DemoSettings,
    load_or_train_teacher,
    make_examples,
    train_student,
)

TOKENS_PER_ANSWER = 10


def run_demo(
    output_dir: str | Path = "runs/demo",
    settings: DemoSettings | None = None,
    pair: str = "same",  # or "cross": a student of another family with another tokenizer
) -> DemoResult:
    """Train or load the teacher, distil the student, write everything under output_dir."""
    is_cross = pair == "cross"
    settings, console = settings or DemoSettings(), Console()
    output_dir = Path(output_dir)
    train, held_out = load_pictures(settings.num_train, settings.num_held_out)
    teacher_processor = build_processor()
    processor: Any = build_other_processor() if is_cross else teacher_processor

    console.print(_plan(settings, output_dir), soft_wrap=True)
    console.rule("Teacher: learns from labelled pictures")
    # models are Any: the annotation of their .to() lacks its self
    teacher: Any
    student: Any
    teacher, teacher_seconds = load_or_train_teacher(
        output_dir / "teacher", teacher_processor, train, settings
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.to(device)
    _, teacher_accuracy = _examine(teacher, teacher_processor, held_out)
    console.print(f"The teacher reads {teacher_accuracy:.1%} of the held-out pictures.")

    console.rule("Student: learns from the teacher, never sees a label")
    if is_cross:
        student = build_other_model(processor, settings.seed + 1)
    else:
        student = build_model(STUDENT_SIZE, processor, settings.seed + 1)
    student.to(device)
    _, before = _examine(student, processor, held_out)
    processors = processor, teacher_processor
    log, student_seconds = train_student(
        output_dir / "student", student, teacher, processors, train, settings
    )
    answers, after = _examine(student, processor, held_out)
    num_rows = settings.student_batch_size * TOKENS_PER_ANSWER
    eager_peak, fused_peak = loss_peak_bytes(student, teacher, num_rows, CHUNK_SIZE, is_cross)
    result = DemoResult(
        teacher_accuracy=teacher_accuracy,
        student_accuracy_before=before,
        student_accuracy_after=after,
        teacher_parameters=teacher.num_parameters(),
        student_parameters=student.num_parameters(),
        teacher_seconds=teacher_seconds,
        student_seconds=student_seconds,
        loss_rows=num_rows,
        eager_loss_peak_bytes=eager_peak,
        fused_loss_peak_bytes=fused_peak,
        held_out_pictures=len(held_out),
        device=str(device),
    )
    write_metrics(result, output_dir / "metrics.json")
    draw_loss_curve(log, output_dir / "loss.png")
    draw_contact_sheet(held_out, answers, output_dir / "answers.png")
    print_table(result, console)
    console.print(f"Everything is in {output_dir}: metrics.json, loss.png, answers.png, student/")
    return result


def _plan(settings: DemoSettings, output_dir: Path) -> str:
    return (
        f"{settings.teacher_steps} steps of a teacher, then {settings.student_steps} of a student; "
        "by default that takes three to four minutes on two CPU cores. "
        f"Everything is written to {output_dir}."
    )


def _examine(model: Any, processor: Any, held_out: Digits) -> tuple[list[str], float]:
    """Its answers to the held-out pictures, and the share of right ones."""
    questions = make_examples(processor, held_out, is_labelled=False)
    answers = generate_answers(model, processor, questions)
    return answers, accuracy_of(answers, held_out)
