"""One case of bench_rollout.py: a trainer that writes and learns, and what is measured of it."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from qwen3_vl_shapes import LORA, QUIET, build_pair, processor_of_448_pixels, rows
from record import environment
from timing import now
from transformers import TrainerCallback

from gold_trainer import GOLDConfig, GOLDTrainer

# those of generate() take half a minute each
STEPS = {"local": 4, "generate": 2, "trl": 2, "vllm": 4}
GIB = 2**30


class Case(NamedTuple):
    implementation: str
    training: str  # lora, full, or float32: full with weights of the student in 32 bits
    batch_size: int
    new_tokens: int


class StepEnds(TrainerCallback):
    """When every optimizer step ended: between two ends lie writing and learning, in any order."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now())


def gib(num_bytes: int) -> float:
    return round(num_bytes / GIB, 2)


class Watch:
    """Seconds and memory of every call of a function that writes completions."""

    def __init__(self, function: Callable, count: Callable[[Any], int]) -> None:
        self.function, self.count = function, count
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.memory: dict[str, float] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        has_cuda = torch.cuda.is_available()
        if has_cuda:
            step_peak = torch.cuda.max_memory_allocated()
            self.memory["step_peak_gib"] = max(
                gib(step_peak) if self.seconds else 0.0, self.memory.get("step_peak_gib", 0.0)
            )
            self.memory["resident_gib"] = gib(torch.cuda.memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        started = now()
        result = self.function(*args, **kwargs)
        self.seconds.append(now() - started)
        self.tokens.append(self.count(result))
        if has_cuda:
            self.memory["write_peak_gib"] = gib(torch.cuda.max_memory_allocated())
            self.memory["after_gib"] = gib(torch.cuda.memory_allocated())
            self.memory["reserved_after_gib"] = gib(torch.cuda.memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        return result

    def numbers(self, num_rows: int) -> dict[str, Any]:
        rates = [n / s for n, s in zip(self.tokens[1:], self.seconds[1:], strict=True)] or [
            math.nan
        ]
        best = max(rates)
        return {
            "tokens_per_second": round(best, 1),
            "ms_per_token": round(1000 * num_rows / best, 2),
            "write_seconds": round(min(self.seconds[1:], default=math.nan), 3),
            "first_write_seconds": round(self.seconds[0], 3),
            **self.memory,
        }


def build_trainer(case: Case, folder: str, is_tiny: bool) -> tuple[Any, Watch]:
    processor = processor_of_448_pixels()
    student, teacher = build_pair(processor, is_tiny)
    if case.training == "float32":
        student = student.float()
    steps = STEPS[case.implementation]
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": case.batch_size,
        "max_steps": steps,
        "lmbda": 1.0,
        "max_length": 512 + case.new_tokens,
        "max_completion_length": case.new_tokens,
        "gradient_checkpointing": True,
        "bf16": torch.cuda.is_available(),
        **QUIET,
    }
    if case.implementation == "vllm":
        options |= {"use_vllm": True, "vllm_mode": "colocate"}
        # it tries the longest video too
        processor.video_processor.size = {"shortest_edge": 2 * 64**2, "longest_edge": 2 * 448**2}
        processor.video_processor.patch_size = processor.image_processor.patch_size
        options["vllm_enable_sleep_mode"] = torch.cuda.is_available()
        options["use_cpu"] = not torch.cuda.is_available()
    common = {"model": student, "teacher_model": teacher, "processing_class": processor}
    if case.training == "lora":
        from peft import LoraConfig

        common["peft_config"] = LoraConfig(**LORA)
    data = rows(processor, 9, case.batch_size * steps)
    if case.implementation == "trl":
        return build_peer(options, common, data)
    args = GOLDConfig(**options, share_prompts=False)  # usual rows have prompts of their own
    trainer = GOLDTrainer(args=args, train_dataset=data, **common)
    writer, sampling = trainer.rollouts.writers["student"], trainer.rollouts.sampling
    ids = sampling["student"].token_ids.difference(sampling["student"].end_ids)
    sampling["student"] = replace(sampling["student"], token_ids=ids)
    if case.implementation == "generate":
        writer.refusal = "measured"
    watch = Watch(
        writer.complete, lambda made: sum(len(c.token_ids) for part in made for c in part)
    )
    writer.complete = watch
    return trainer, watch


def build_peer(
    options: dict[str, Any], common: dict[str, Any], data: list[dict[str, Any]]
) -> tuple[Any, Watch]:
    from trl.experimental.gold import GOLDConfig as PeerConfig
    from trl.experimental.gold import GOLDTrainer as PeerTrainer

    peer = PeerTrainer(args=PeerConfig(**options), train_dataset=Dataset.from_list(data), **common)
    # random weights may write a picture's placeholder, which ends TRL's run
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    banned = [getattr(common["model"].config, name) for name in names]
    end = common["processing_class"].tokenizer.eos_token_id
    peer.generation_config.suppress_tokens = [*banned, end]
    watch = Watch(peer.generate_on_policy_outputs, lambda made: int((made[2] != -100).sum()))
    peer.generate_on_policy_outputs = watch
    return peer, watch


def measure(case: Case, is_tiny: bool) -> dict[str, Any]:
    row: dict[str, Any] = {**case._asdict(), **environment()}
    status, timer, watch, trainer = "ok", StepEnds(), None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer, watch = build_trainer(case, folder, is_tiny)
            trainer.add_callback(timer)
            trainer.train()
        except torch.OutOfMemoryError:
            status = "out of memory"
    if watch is not None and watch.seconds:
        row |= watch.numbers(case.batch_size)
    if status == "ok":
        # the last step has no next one, whose prompts ours prepares within it
        ends = timer.ends[:-1] if case.implementation == "local" else timer.ends
        row["step_seconds"] = round(min(b - a for a, b in pairwise(ends)), 3)
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        row["logp_difference"] = logs[-1].get("sampling/sampling_logp_difference/mean", "")
    if case.implementation == "local" and trainer is not None:
        writer = trainer.rollouts.writers["student"]
        row["compile_seconds"] = round(writer.compile_seconds, 2)
        row["record_seconds"] = round(writer.record_seconds, 2)
    return row | {"status": status}
