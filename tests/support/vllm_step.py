"""One process of test_vllm: runs on a server under an engine, one after the other; what all ranks
wrote, from rank 0.

torchrun --nproc_per_node 2 -m support.vllm_step OUT_DIR ENGINE PORT CASE [CASE ...]
"""

import sys
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.utils import gather_object
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support.engines import (
    ENGINES,
    leave_shared_memory_alone,
    needs_gpus,
    num_processes,
    take_processes_for_gpus,
)
from support.rank import leave_together
from support.tiny_models import tiny
from support.vllm_cases import make_run, recorded_completions

BATCH = 4
CASES: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 2.0},
    "adapter": {"is_adapter": True, "learning_rate": 1.0},
    "merged": {"is_adapter": True, "learning_rate": 1.0, "vllm_merge_adapter": True},
    "ahead": {"learning_rate": 2.0, "async_rollouts": 1},
    "failing": {"is_failing": True},
}


def written(output_dir: Any, port: int, case: str, engine: str = "ddp") -> dict[str, Any]:
    """Completions by step and row, of this process; and its error."""
    fields = {"use_vllm": True, "vllm_server_port": port, "learning_rate": 20.0} | CASES[case]
    is_failing = fields.pop("is_failing", False)
    unset_hf_deepspeed_config()  # of the case before: models would be built in parts
    student = tiny("qwen3_vl", "teacher", seed=3)[0]
    if fields.pop("is_adapter", False):
        targets = ["q_proj", "v_proj", "down_proj"]
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        student = peft.get_peft_model(student, config)
    run = make_run(
        output_dir,
        fields,
        student,
        num_generations=2,
        max_steps=2,
        bf16=False,
        per_device_train_batch_size=BATCH // num_processes(),
        **({"use_cpu": False} if needs_gpus(engine) else {}),
        **ENGINES[engine],
    )
    recorded = recorded_completions(run)
    if is_failing and run.args.process_index == 1:
        run.rollouts.writers["student"]._complete = _fail
    error = ""
    try:
        run.train()
    except ValueError as raised:
        error = str(raised)
    return {"steps": recorded.rows, "error": error}


def _fail(prompt: Any, params: Any) -> Any:
    raise ValueError(f"{prompt.example.where}: refused here alone")


def main(output_dir: str, engine: str, port: str, *cases: str) -> None:
    if needs_gpus(engine):
        take_processes_for_gpus()
    if engine.startswith("zero"):
        leave_shared_memory_alone()
    results = {}
    for case in cases:
        mine = written(f"{output_dir}/{case}", int(port), case, engine)
        results[case] = gather_object([mine])
    if int(torch.distributed.get_rank()) == 0:
        torch.save(results, Path(output_dir) / "state.pt")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
