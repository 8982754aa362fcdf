"""The plan of a run is its measured peak, for every row of the benchmark of the training step."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from support.csv_rows import csv_rows

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peft
import qwen3_vl_shapes as shapes
from record import RESULTS
from teacher_kinds import KINDS

from gold_trainer import GOLDConfig, loading
from gold_trainer.batches import MicroBatch
from gold_trainer.data.streams import read_rows
from gold_trainer.planning.memory import Planner, Setup, Subject
from gold_trainer.planning.remedies import with_fields
from gold_trainer.planning.subject import repeated
from gold_trainer.preparing import prepare
from gold_trainer.sides import Side

ERROR = 0.15
RECORDS = ("train_step.csv", "train_step_h100.csv", "train_step_engines.csv")


def measured() -> list[dict[str, str]]:
    rows = []
    for name in RECORDS:
        path = RESULTS / name
        if path.exists():
            rows += [row | {"record": name} for row in csv_rows(path)]
    return [r for r in rows if r["status"] == "ok" and r.get("implementation", "") != "trl"]


@cache
def processor() -> Any:
    return shapes.processor_of_448_pixels()


@cache
def teacher() -> Any:
    model = shapes.build_model(shapes.TEACHER_8B, processor(), False, device="meta")
    return model.requires_grad_(False)


@cache
def planner_of(
    loss: str,
    length: int,
    size: int,
    training: str,
    checkpointing: str,
    options: str,
    setup: Setup,
) -> Planner:
    """With a resident teacher: passes are the same for all kinds."""
    fields = dict(option.split("=", 1) for option in options.split())
    args = GOLDConfig(
        output_dir="unused",
        per_device_train_batch_size=size,
        lmbda=0.0,
        max_length=512 + length,
        use_uld_loss=loss == "uld",
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=checkpointing == "on",
        loss_budget_mib=float(fields.pop("loss_budget_mib", 1024)),
        **fields,
    )
    dtype = torch.float32 if training == "full" else torch.bfloat16
    student = shapes.build_model(shapes.STUDENT_2B, processor(), False, dtype, "meta")
    if training == "lora":
        lora = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"])
        student = loading.add_adapter(student, lora)
    other = processor() if loss == "uld" else None
    prepared = prepare(student, teacher(), args, processor(), other)
    models = {"student": student, "teacher": teacher()}
    sides = tuple(Side.of(model, name, processor(), args) for name, model in models.items())
    objective = prepared.objective(args, *sides)
    data = read_rows(shapes.rows(processor(), length, 1), args, **prepared.row_options)
    window = objective.collator([data[0]])

    def batch_of(size: int) -> MicroBatch:
        return objective.prepare(repeated(window, objective, size), lambda tensor: tensor)

    batch = batch_of(size)
    return Planner(Subject(args, student, teacher(), sides, objective, batch, batch_of), setup)


def planned(row: dict[str, str]) -> int:
    setup = Setup(row.get("engine") or "single", int(row.get("num_gpus") or 1))
    planner = planner_of(
        row.get("loss") or "jsd",
        int(row["completion_tokens"]),
        int(row["batch_size"]),
        row.get("training") or "lora",
        row.get("checkpointing") or "on",
        row.get("options") or "",
        Setup() if setup.engine == "ddp" else setup,  # the same passes
    )
    planner = with_fields(planner, setup, **KINDS[row.get("teacher") or "resident"])
    if row.get("teacher") == "cache":
        planner = with_fields(planner, setup, teacher_cache="unused")
    return planner.plan().total


def name_of(row: dict[str, str]) -> str:
    names = ("record", "loss", "engine", "teacher", "training", "checkpointing", "options")
    parts = [*(row.get(name, "") for name in names), row["completion_tokens"]]
    return " ".join(part for part in parts if part)


def test_there_are_rows_of_every_record():
    assert {row["record"] for row in measured()} == set(RECORDS)


@pytest.mark.parametrize("row", [pytest.param(row, id=name_of(row)) for row in measured()])
def test_the_plan_of_a_measured_step_is_its_peak(row):
    found = planned(row) / 2**30
    assert found == pytest.approx(float(row["peak_gib"]), rel=ERROR)


if __name__ == "__main__":
    for row in measured():
        p = planned(row) / 2**30
        m = float(row["peak_gib"])
        sys.stdout.write(f"{name_of(row):60} {m:7.2f} {p:7.2f} {p / m - 1:+.1%}\n")
