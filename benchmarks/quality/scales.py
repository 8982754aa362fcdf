"""Sizes of models, data and trainings: the record's, and small ones for two CPU cores."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from quality.texts import LICENCES


@dataclass(frozen=True)
class Size:
    """Sizes of a text model and a vision tower, with heads of 32 or 64."""

    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int
    head_dim: int = 64
    # about 0.65 / sqrt(width): with less a fresh layer hands next to nothing of a picture on
    initializer_range: float = 0.02


@dataclass(frozen=True)
class Schooling:
    steps: int
    batch_size: int
    learning_rate: float
    most_seconds: float = math.inf  # then fewer steps; the rate falls to 0 at the end of either


@dataclass(frozen=True)
class Scale:
    teacher: Size
    student: Size
    teacher_pictures: int
    prompts: int  # that students distil on
    labelled: int  # of them, the first ones: what the student has learnt before
    held_out: int
    teacher_schooling: Schooling
    student_schooling: Schooling  # before the run, on the labelled pictures
    steps: int
    batch_size: int
    learning_rate: float


# wide and shallow: a step of models this small takes the time of its launches
TEACHER = Size(768, 4, 512, 4, initializer_range=0.026)
STUDENT = Size(384, 3, 320, 3, initializer_range=0.034)
SMALL_TEACHER = Size(96, 2, 64, 2, head_dim=32, initializer_range=0.08)
SMALL_STUDENT = Size(64, 1, 32, 1, head_dim=32, initializer_range=0.08)

RECORD = Scale(
    teacher=TEACHER,
    student=STUDENT,
    teacher_pictures=120_000,
    prompts=8192,
    labelled=2048,
    held_out=2000,
    teacher_schooling=Schooling(steps=5000, batch_size=256, learning_rate=5e-4, most_seconds=150),
    student_schooling=Schooling(steps=700, batch_size=128, learning_rate=1e-3, most_seconds=45),
    steps=80,
    batch_size=128,
    learning_rate=7e-4,
)
# of the table of learning rates
RATES_RECORD = replace(
    RECORD,
    teacher_pictures=64_000,
    teacher_schooling=Schooling(steps=900, batch_size=256, learning_rate=5e-4),
    student_schooling=replace(RECORD.student_schooling, most_seconds=math.inf),
)
SMALL = Scale(
    teacher=SMALL_TEACHER,
    student=SMALL_STUDENT,
    teacher_pictures=3000,
    prompts=256,
    labelled=128,
    held_out=200,
    teacher_schooling=Schooling(steps=150, batch_size=32, learning_rate=1.5e-3),
    student_schooling=Schooling(steps=100, batch_size=32, learning_rate=1e-3),
    steps=20,
    batch_size=16,
    learning_rate=1e-3,
)
TINY = Scale(  # of the tests
    teacher=Size(hidden=32, layers=1, vision_hidden=32, vision_layers=2, head_dim=32),
    student=Size(hidden=32, layers=1, vision_hidden=32, vision_layers=2, head_dim=32),
    teacher_pictures=64,
    prompts=32,
    labelled=16,
    held_out=16,
    teacher_schooling=Schooling(steps=2, batch_size=8, learning_rate=1e-3),
    student_schooling=Schooling(steps=2, batch_size=8, learning_rate=1e-3),
    steps=2,
    batch_size=4,
    learning_rate=1e-3,
)


@dataclass(frozen=True)
class TextSize:
    hidden: int
    layers: int
    head_dim: int = 64


@dataclass(frozen=True)
class TextScale:
    packages: tuple[str, ...]
    most_files: int | None  # of each package
    vocabulary: int
    length: int  # tokens of a row
    held_out: int  # rows
    teacher: TextSize
    student: TextSize
    teacher_schooling: Schooling
    student_schooling: Schooling
    steps: int
    batch_size: int
    learning_rate: float
    int4_steps: int
    int4_learning_rate: float
    group_size: int  # weights that share a scale
    weights: str = ""  # a GGUF file: the teacher, and by one layer of three the student


def with_weights(scale: TextScale, file: Path) -> TextScale:
    """Larger models and their own vocabulary: fewer steps, on less text, fit into the time."""
    schooling = scale.student_schooling
    return replace(
        scale,
        weights=str(file),
        held_out=min(scale.held_out, 160),
        student=replace(scale.student, layers=10),
        student_schooling=replace(schooling, steps=min(schooling.steps, 200)),
        steps=min(scale.steps, 80),
        int4_steps=min(scale.int4_steps, 60),
        batch_size=min(scale.batch_size, 16),
    )


TEXT_RECORD = TextScale(
    packages=tuple(LICENCES),
    most_files=None,
    vocabulary=8192,
    length=256,
    held_out=512,
    teacher=TextSize(512, 8),
    student=TextSize(320, 4),
    teacher_schooling=Schooling(steps=3000, batch_size=64, learning_rate=8e-4, most_seconds=70),
    student_schooling=Schooling(steps=400, batch_size=32, learning_rate=1e-3, most_seconds=25),
    steps=200,
    batch_size=32,
    learning_rate=5e-4,
    int4_steps=200,
    int4_learning_rate=1e-4,
    group_size=32,
)
TEXT_SMALL = TextScale(
    packages=("python",),
    most_files=200,
    vocabulary=1024,
    length=64,
    held_out=64,
    teacher=TextSize(128, 3, 32),
    student=TextSize(64, 2, 32),
    teacher_schooling=Schooling(steps=150, batch_size=16, learning_rate=2e-3),
    student_schooling=Schooling(steps=50, batch_size=16, learning_rate=2e-3),
    steps=30,
    batch_size=8,
    learning_rate=1e-3,
    int4_steps=30,
    int4_learning_rate=2e-4,
    group_size=32,
)
TEXT_TINY = TextScale(
    packages=("python",),
    most_files=100,
    vocabulary=300,
    length=16,
    held_out=8,
    teacher=TextSize(32, 1, 32),
    student=TextSize(32, 1, 32),
    teacher_schooling=Schooling(steps=2, batch_size=4, learning_rate=1e-3),
    student_schooling=Schooling(steps=2, batch_size=4, learning_rate=1e-3),
    steps=2,
    batch_size=4,
    learning_rate=1e-3,
    int4_steps=2,
    int4_learning_rate=1e-3,
    group_size=32,
)
