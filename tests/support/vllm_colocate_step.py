"""Runs whose rollouts an engine in this process writes, in the environment of vLLM.

python -m support.vllm_colocate_step OUT_DIR
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from support.tiny_models import tiny
from support.trainer_cases import make_trainer
from support.vllm_cases import PROMPTS, make_run, prompts_of

FIELDS = {"use_vllm": True, "vllm_mode": "colocate"}


def main(output_dir: str) -> None:
    student = tiny("qwen3_vl", "teacher", seed=1)[0]
    options = {"num_generations": 2, "max_steps": 3, "learning_rate": 0.5}
    run = make_run(output_dir, FIELDS, student, **options)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    # of weights A, B, A with the same pictures: what generate() writes
    writer, greedy = run.rollouts.writers["student"], []
    sampling = replace(run.rollouts.sampling["student"], top_k=1)
    for step, seed in enumerate((1, 2, 1), start=3):
        model = tiny("qwen3_vl", "teacher", seed=seed)[0]
        local = make_trainer(output_dir, PROMPTS, student=model, lmbda=1.0)
        prompts = prompts_of(run)
        writer.sync_weights(model, step)
        pair = (w.complete(prompts, sampling) for w in (writer, local.rollouts.writers["student"]))
        greedy.append([[[c.token_ids for c in of_one] for of_one in each] for each in pair])
    Path(output_dir, "result.json").write_text(json.dumps({"log": entries, "greedy": greedy}))


if __name__ == "__main__":
    main(sys.argv[1])
