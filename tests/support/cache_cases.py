"""A saved pair of tiny models, its rows as a file, caches of its teacher, and runs with either."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.__main__ import main
from support.cross_cases import TEACHER_MERGES
from support.tiny_models import TEXT_FAMILIES, save_tiny, tiny_rows
from support.trainer_cases import FIELDS, GradientRecorder, assert_equal_gradients, losses_of

CACHE_FIELDS = FIELDS | {"per_device_train_batch_size": 2, "max_completion_length": 64}


Run = tuple[list[float], GradientRecorder, GOLDTrainer]


class Pair(NamedTuple):
    folder: Path  # with student, teacher and rows.jsonl
    rows: list[dict[str, Any]]
    fields: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Pair":
        """One of a single family that save_pair has saved, in another process."""
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        return cls(folder, rows, CACHE_FIELDS)

    @property
    def weights(self) -> Path:
        return self.folder / "teacher" / "model.safetensors"

    def command(self, *flags: str, **fields: Any) -> list[str]:
        """Arguments of a command with this pair."""
        fields = {
            "model_name_or_path": self.folder / "student",
            "teacher_model_name_or_path": self.folder / "teacher",
            "dataset_name": self.folder / "rows.jsonl",
            "output_dir": self.folder / "run",
            **self.fields,
            **fields,
        }
        words = [f"--{name}={value}" for name, value in fields.items() if value is not None]
        return [*words, *flags]

    def cache(self, name: str = "cache", *flags: str, **fields: Any) -> Path:
        folder = self.folder / name
        argv = self.command("--cache_dtype=float32", *flags, teacher_cache=folder, **fields)
        assert main(["cache-teacher", *argv]) == 0
        return folder


def save_pair(
    folder: Path,
    student: str = "qwen3_vl",  # family
    teacher: str | None = None,  # another family
    count: int = 6,
    models: Any = None,  # student and teacher in the place of the family's own
) -> Pair:
    is_across = teacher is not None
    save_tiny(folder / "student", student)
    merges = {"num_merges": TEACHER_MERGES} if is_across else {}
    save_tiny(folder / "teacher", teacher or student, "teacher", **merges)
    for name, model in zip(("student", "teacher"), models or (), strict=False):
        model.save_pretrained(folder / name)
    rows = tiny_rows(count, images=0 if student in TEXT_FAMILIES else "mixed")
    save_rows(folder / "rows.jsonl", rows)
    return Pair(folder, rows, CACHE_FIELDS | {"use_uld_loss": is_across})


def save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Save the rows, with the pictures of both sides as files beside them."""
    lines = []
    for number, row in enumerate(rows):
        named = dict(row)
        for column in {"images", "teacher_images"} & row.keys():
            named[column] = [f"{column}-{number}-{i}.png" for i in range(len(row[column]))]
            for name, image in zip(named[column], row[column], strict=True):
                image.save(path.parent / name)
        lines.append(json.dumps(named))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_in_hub(pair: Pair, cache_dir: Path, commit: str) -> str:
    """The pair's teacher as the hub's cache of files has it; its id."""
    folder = cache_dir / "models--tiny--teacher"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(pair.folder / "teacher", folder / "snapshots" / commit)
    return "tiny/teacher"


def run_of(
    pair: Pair, output_dir: Path, *, rows: Any = None, resume: Any = None, **options: Any
) -> Run:
    """Losses, gradients of every step, and the trainer of a run; options: peft_config, eval_rows,
    and fields of GOLDConfig.
    """
    recorder = GradientRecorder()
    trainer = GOLDTrainer(
        model=str(pair.folder / "student"),
        peft_config=options.pop("peft_config", None),
        eval_dataset=options.pop("eval_rows", None),
        train_dataset=pair.rows if rows is None else rows,
        args=GOLDConfig(
            **{
                "output_dir": str(output_dir),
                "teacher_model_name_or_path": str(pair.folder / "teacher"),
                **pair.fields,
                **options,
            }
        ),
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses_of(trainer), recorder, trainer


def assert_same_runs(actual: Run, expected: Run, relative: float = 1e-5) -> None:
    """Losses, and within `relative` the gradients of every step."""
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(actual[1].steps) == len(expected[1].steps) > 0
    for one, other in zip(actual[1].steps, expected[1].steps, strict=True):
        assert_equal_gradients(one, other, relative)
