"""One process of the tests of engines: short runs under an engine, one after the other.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.engine_step OUT_DIR ENGINE CASE ...
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gold_trainer import GOLDConfig, GOLDTrainer, models
from gold_trainer.__main__ import main as main_of_gold_trainer
from gold_trainer.speed import compiling
from support import engine_matrix
from support.cache_cases import save_rows
from support.cross_cases import TEACHER_MERGES
from support.engine_cases import CASES
from support.engines import (
    ENGINES,
    leave_shared_memory_alone,
    needs_gpus,
    num_processes,
    take_processes_for_gpus,
)
from support.rank import leave_together, limit
from support.tiny_models import VLM_FAMILIES, save_tiny_pair, tiny, tiny_rows
from support.trainer_cases import FIELDS, losses_of

MOVED_BY_PADDING = models.MOVED_BY_PADDING
SECONDS = 120  # of a case
NUM_ROWS, BATCH = 8, 4
RUN = {
    "bf16": False,
    "max_steps": 2,
    "learning_rate": 0.1,
    "max_grad_norm": 1.0,
    "max_completion_length": 16,
}


def save_models(folder: Path, names: Sequence[str]) -> None:
    """Save models for the cases by name, and caches; of a group of processes one alone would
    save.
    """
    for name in names:
        case = CASES.get(name, {})
        if case.get("is_by_name"):
            save_tiny_pair(folder, case["family"])
        if "teacher_cache" in case:
            _save_cache(folder, case)


def _save_cache(folder: Path, case: dict[str, Any]) -> None:
    """Make a cache in one process, of the rows that make() trains and evaluates with."""
    save_rows(folder / "rows.jsonl", tiny_rows(NUM_ROWS, images=case["images"]))
    form = case["teacher_cache"]
    lengths = {name: FIELDS[name] for name in ("max_length", "use_cpu", "report_to")}
    fields = lengths | {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "caching",
        "teacher_cache": folder / form,
        "teacher_cache_form": form,
        "cache_dtype": "float32",
        "beta": case.get("beta", 0.5),
        "lmbda": 0.0,
        "use_peft": "peft_config" in case,
    }
    assert main_of_gold_trainer(["cache-teacher", *[f"--{k}={v}" for k, v in fields.items()]]) == 0


def untie(model: Any) -> None:
    model.config.get_text_config().tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.1)


def make(folder: Path, engine: str, case: dict[str, Any]) -> GOLDTrainer:
    unset_hf_deepspeed_config()  # of the case before: models would be built in parts
    is_compiled = case.get("is_compiled", True)
    torch.compiler.set_stance("default" if is_compiled else "force_eager")
    case = {"family": "qwen3", "images": 0, "is_tied": True} | case
    family, teacher_family = case.pop("family"), case.pop("teacher_family", None)
    options: dict[str, Any] = {"teacher_model": None, "peft_config": case.pop("peft_config", None)}
    if case.pop("is_by_name", False):
        student, options["teacher_model"] = (str(folder.parent / n) for n in ("student", "teacher"))
        processor = None
        if "teacher_cache" in case:
            case["teacher_cache"] = str(folder.parent / case["teacher_cache"])
    else:
        student, processor = tiny(family)
        if not case.pop("is_tied"):
            untie(student)
        if case.pop("is_head_frozen", False):
            student.get_output_embeddings().requires_grad_(False)
        if teacher_family:
            teacher = tiny(teacher_family, "teacher", num_merges=TEACHER_MERGES)
            options["teacher_model"], options["teacher_processing_class"] = teacher
        elif case.pop("has_teacher", True):
            options["teacher_model"] = tiny(family, "teacher")[0]
    for name in ("is_tied", "is_compiled"):
        case.pop(name, None)
    rows = tiny_rows(case.pop("num_rows", NUM_ROWS), images=case.pop("images"))
    num_eval_rows = case.pop("num_eval_rows", BATCH)
    if case.pop("saves_parts", False) and engine == "fsdp2":
        engine = "fsdp2_sharded"
    if case.pop("has_videos", False):
        for index, row in enumerate(rows):
            row["videos"] = [np.full((4, 32, 32, 3), 9 * index, np.uint8)] * (index in (0, 3, 5))
    if case.pop("is_partly_answered", False):
        for row in rows[1:]:
            del row["messages"][1]
    models.MOVED_BY_PADDING = MOVED_BY_PADDING
    compiling.BACKEND = "eager"  # what is compiled is traced, and runs as it is
    if case.pop("writes_by_length", False):
        models.MOVED_BY_PADDING = (student.config.model_type,)
        rows[0]["messages"][0]["content"] += " What is it?"
    sizes = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": BATCH // num_processes(),
        "use_cpu": not (needs_gpus(engine) or torch.cuda.is_available()),
    }
    return GOLDTrainer(
        model=student,
        args=GOLDConfig(output_dir=str(folder), **(FIELDS | RUN | sizes | ENGINES[engine] | case)),
        train_dataset=rows,
        eval_dataset=rows[:num_eval_rows],
        processing_class=processor,
        **options,
    )


def run(folder: Path, engine: str, case: dict[str, Any]) -> dict[str, Any]:
    case = dict(case)
    is_resumed, is_early = case.pop("is_resumed", False), case.pop("evaluates_early", False)
    trainer = make(folder, engine, case)
    if is_early:
        trainer.evaluate()
    trainer.train()
    if is_resumed:
        trainer = make(folder, engine, case)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    result = {
        "eval_loss": trainer.evaluate()["eval_loss"],
        "losses": losses_of(trainer),
        "compiled": [kind.name for kind in trainer.fast.compiled.kinds if kind.is_compiled],
        "norms": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
    }
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()
    result["weights"] = load(folder, trainer, case)
    return result


def load(folder: Path, trainer: GOLDTrainer, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The saved student, as anybody loads it."""
    if case.get("peft_config") is not None:
        return peft.utils.load_peft_weights(str(folder), device="cpu")
    is_vlm = case.get("family") in VLM_FAMILIES
    auto_class = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    return auto_class.from_pretrained(folder).float().state_dict()


def main(output_dir: str, engine: str, *names: str) -> None:
    if needs_gpus(engine):
        take_processes_for_gpus()
    if engine.startswith("zero") or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        leave_shared_memory_alone()
    for name in names:
        limit(SECONDS)
        try:
            result = run(Path(output_dir) / name, engine, engine_matrix.case_of(name))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
            if not isinstance(error, ValueError):
                sys.stderr.flush()
                os._exit(1)  # the other rank waits somewhere, and is ended
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(result, Path(output_dir) / f"{name}.pt")
    if torch.distributed.is_initialized():
        leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
