"""One training step of Qwen3-VL-8B -> Qwen3-VL-2B shapes: seconds and peak memory on one GPU.

    python benchmarks/bench_train_step.py --completion-tokens 518 1037 2060

Stock Qwen3-VL classes with random bf16 weights, LoRA r=16 on q, k, v, gradient checkpointing, batch
4, one 448 x 448 picture a sample, off-policy JSD. The median of steps 3 to 6 is reported; the peak
is torch.cuda.max_memory_allocated. First the loss of a batch is compared with the eager loss of
full logits in float64 softmax, and a failed comparison prints no number. `--tiny` runs the same
code on a model of a few hundred thousand parameters anywhere, without a record.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image
from record import RESULTS, environment, write_rows
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    TrainerCallback,
)

from gold_kernels import reference
from trainer import GOLDConfig, GOLDTrainer
from trainer.demo.tiny_vlm import build_processor

WARM_UP_STEPS, TIMED_STEPS = 2, 4
BATCH_SIZE = 4
MAX_LOSS_ERROR = 2e-3  # bf16 hidden states on both sides, float32 logits here, float64 there


@dataclass(frozen=True)
class Shape:
    """Published sizes of a Qwen3-VL model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    is_tied: bool


STUDENT_2B = Shape(2048, 6144, 28, 16, 24, 1024, 4096, True)
TEACHER_8B = Shape(4096, 12288, 36, 32, 27, 1152, 4304, False)
TINY_STUDENT = Shape(256, 256, 2, 2, 2, 64, 64, True)
TINY_TEACHER = Shape(512, 512, 2, 4, 2, 64, 64, False)


def build_model(shape: Shape, processor: Qwen3VLProcessor, is_tiny: bool) -> Any:
    """Random weights made on the device, in bf16 (tiny: float32)."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 1024 if is_tiny else 151936,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": 2 if is_tiny else 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": 2 if is_tiny else 16,
            "out_hidden_size": shape.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0] if is_tiny else [5, 11, 17],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=shape.is_tied,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if is_tiny else torch.bfloat16
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default_dtype)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.model.visual.requires_grad_(False)
    return model


def rows(processor: Qwen3VLProcessor, completion_tokens: int) -> list[dict[str, Any]]:
    """Answers of exactly completion_tokens tokens, end of turn included, and one picture each."""
    word = " a"
    per_word = len(processor.tokenizer(word, add_special_tokens=False)["input_ids"])
    answer = word * ((completion_tokens - 1) // per_word)
    picture = Image.effect_noise((448, 448), 64).convert("RGB")
    question = {"role": "user", "content": "Describe the picture."}
    row = {
        "messages": [question, {"role": "assistant", "content": answer}],
        "images": [picture],
    }
    return [row] * (BATCH_SIZE * (WARM_UP_STEPS + TIMED_STEPS))


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.start)


def build_trainer(completion_tokens: int, folder: str, timer: StepTimer, is_tiny: bool) -> Any:
    """The trainer and the bytes resident before its first step."""
    torch.manual_seed(0)
    processor = build_processor()
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 448 * 448}
    processor.image_processor.patch_size, processor.image_processor.size = 16, pixels
    shapes = (TINY_STUDENT, TINY_TEACHER) if is_tiny else (STUDENT_2B, TEACHER_8B)
    student, teacher = (build_model(shape, processor, is_tiny) for shape in shapes)
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=GOLDConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=WARM_UP_STEPS + TIMED_STEPS,
            lmbda=0.0,
            max_length=512 + completion_tokens,
            gradient_checkpointing=True,
            bf16=False,  # the weights are bf16, LoRA adapters follow them
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=rows(processor, completion_tokens),
        processing_class=processor,
        callbacks=[timer],
        peft_config=LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]),
    )
    return trainer


@torch.no_grad()
def loss_error(trainer: GOLDTrainer) -> float:
    """Relative error of one sample's loss against full logits with softmax in float64."""
    batch = trainer.data_collator([trainer.train_dataset[0]])
    inputs = trainer._prepare_inputs(batch)
    model = trainer.model.eval()
    fused = trainer.compute_loss(model, inputs)
    positions = inputs["scored_rows"]

    def logits(side: Any, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        hidden = side(**tensors, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        return hidden.flatten(0, 1)[positions].double() @ weight.double().T

    student = logits(model, inputs["student"], trainer.student_head.weight)
    teacher = logits(trainer.teacher_model, inputs["teacher"], trainer.teacher_head.weight)
    oracle = torch.cat(
        [
            reference.jsd_rows(s, t)
            for s, t in zip(student.split(64), teacher.split(64), strict=True)
        ]
    ).mean()
    model.train()
    return abs(float(fused) - float(oracle)) / float(oracle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completion-tokens", type=int, nargs="+", default=[518, 1037, 2060])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "train_step.csv")
    options = parser.parse_args()
    has_cuda = torch.cuda.is_available()
    if not (options.tiny or has_cuda):
        sys.exit("bench_train_step: a CUDA GPU is expected, got none; --tiny runs anywhere")
    results = []
    for completion_tokens in options.completion_tokens:
        with tempfile.TemporaryDirectory() as folder:
            timer = StepTimer()
            trainer = build_trainer(completion_tokens, folder, timer, options.tiny)
            error = loss_error(trainer)
            if error > MAX_LOSS_ERROR:
                sys.exit(f"loss error {error:.1e} exceeds {MAX_LOSS_ERROR}; no numbers")
            resident = torch.cuda.memory_allocated() if has_cuda else 0
            if has_cuda:
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
            peak = torch.cuda.max_memory_allocated() if has_cuda else 0
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            del trainer
        timed = timer.seconds[WARM_UP_STEPS:]
        results.append(
            {
                "implementation": "gold_kernels",
                "loss": "jsd",
                "completion_tokens": completion_tokens,
                "batch_size": BATCH_SIZE,
                "seconds_median": round(statistics.median(timed), 3),
                "peak_gib": round(peak / 2**30, 2),
                "resident_gib": round(resident / 2**30, 2),
                "loss_error": f"{error:.1e}",
                "final_loss": f"{losses[-1]:.5f}",
                **environment(),
            }
        )
        sys.stdout.write(f"{results[-1]}\n")
    if not options.tiny:
        write_rows(options.output, results)


if __name__ == "__main__":
    main()
