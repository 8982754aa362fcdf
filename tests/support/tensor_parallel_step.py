"""Models that transformers has spread over two processes (tp_plan), trained beside whole ones.

torchrun --nproc_per_node 2 -m support.rank SECONDS support.tensor_parallel_step FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gold_trainer import GOLDConfig, GOLDTrainer
from support.cross_cases import TEACHER_MERGES
from support.engines import num_processes, take_processes_for_gpus
from support.rank import leave_together
from support.tiny_models import tiny, tiny_rows

CASES: dict[str, dict[str, Any]] = {
    "rollouts": {
        **{"lmbda": 1.0, "max_completion_length": 6, "temperature": 1.3},
        "token_weighting": "support.weightings:by_gap",
    },
    "top_k": {"loss_top_k": 8, "crossentropy_weight": 0.5, "lmbda": 0.0},
    "hybrid": {
        "use_uld_loss": True,
        "uld_use_hybrid_loss": True,
        "uld_crossentropy_weight": 0.5,
        "lmbda": 0.0,
    },
}


def save_models(folder: Path) -> None:
    """Save models of two attention heads, one for each process."""
    for name in ("student", "teacher", "other"):
        merges = {"num_merges": TEACHER_MERGES} if name == "other" else {}
        model, tokenizer = tiny("qwen3", "student" if name == "student" else "teacher", **merges)
        model.config.num_key_value_heads = 2
        torch.manual_seed(len(name))
        type(model)(model.config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_trainer(
    folder: Path,
    case: str = "rollouts",
    tp: tuple[bool, bool] = (True, True),  # of student and teacher
    peft_config: Any = None,
    **fields: Any,
) -> GOLDTrainer:
    names = "student", "other" if CASES[case].get("use_uld_loss") else "teacher"
    models = [
        AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, **({"tp_plan": "auto"} if has_tp else {})
        )
        for name, has_tp in zip(names, tp, strict=True)
    ]
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in names]
    options: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "learning_rate": 0.01,
        "max_length": 256,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": num_processes() == 1,
        "disable_tqdm": True,
    }
    return GOLDTrainer(
        model=models[0],
        teacher_model=models[1],
        args=GOLDConfig(bf16=False, **(options | CASES[case] | fields)),
        train_dataset=tiny_rows(4, images=0),
        eval_dataset=tiny_rows(2, images=0, seed=3),
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
        peft_config=peft_config,
    )


def run(folder: Path, case: str, tp: bool) -> dict[str, Any]:
    trainer = make_trainer(folder, case, (tp, tp))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    numbers = [number for entry in logs for number in (entry["loss"], entry["grad_norm"])]
    numbers.append(trainer.evaluate()["eval_loss"])
    saved = folder / ("sliced" if tp else "whole")
    trainer.save_model(str(saved))
    return {"numbers": numbers, "saved": saved}


def refusals(folder: Path) -> list[str]:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    calls: list[dict[str, Any]] = [
        {"tp": (True, False)},
        {"tp": (False, True)},
        {"gradient_accumulation_steps": 2},
        {"peft_config": lora},
    ]
    messages = []
    for call in calls:
        try:
            make_trainer(folder, **call)
        except ValueError as error:
            messages.append(str(error))
    return messages


def main(folder: Path) -> None:
    take_processes_for_gpus()
    dist.init_process_group("gloo")
    state = {case: run(folder, case, True) for case in CASES}
    state["refusals"] = refusals(folder)
    if dist.get_rank() == 0:
        torch.save(state, folder / "state.pt")
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
