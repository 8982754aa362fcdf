"""Where a decoding step's time goes: kernels of the local writer's recorded step, by name.

    python benchmarks/profile_rollout.py --batch-sizes 4 64

The 2B shape of bench_rollout.py with random weights and text prompts of 256 tokens. Printed: ms a
step of the recorded graph and of the eager step, with layers that are compiled and such that are
kernels of ours; seconds of recording, the kernels that take most.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch
from qwen3_vl_shapes import STUDENT_2B, build_model, processor_of_448_pixels
from record import say
from timing import now
from torch.profiler import ProfilerActivity, profile

from gold_trainer.writers.compiled_layers import CompiledLayers, decoder_layers
from gold_trainer.writers.decoding import Decoder
from gold_trainer.writers.fixed_cache import Batch
from gold_trainer.writers.prefill import Prefilled
from gold_trainer.writers.sampling import Sampler
from gold_trainer.writers.writer import Sampling

NEW_TOKENS, PROMPT_TOKENS, TIMED = 256, 256, 64
PROFILED, SHOWN = 4, 40  # steps, names of kernels


def decoder_of(model: Any, num_rows: int, sampling: Sampling, compiled: Any) -> Decoder:
    """A decoder as after prompts of random numbers; what is in the cache costs the same."""
    config = model.config.text_config
    shape = num_rows, config.num_key_value_heads, PROMPT_TOKENS, config.head_dim
    options = {"device": "cuda", "dtype": torch.bfloat16}
    part = Prefilled(
        torch.ones(num_rows, PROMPT_TOKENS, dtype=torch.int64, device="cuda"),
        torch.randn(num_rows, config.vocab_size, **options),
        [(torch.randn(shape, **options),) * 2 for _ in range(config.num_hidden_layers)],
        torch.ones(num_rows, PROMPT_TOKENS, dtype=torch.int64, device="cuda"),
        torch.full((4, num_rows, 1), PROMPT_TOKENS, device="cuda"),
        "cache",
        {"use_cache": True, "logits_to_keep": 1},
    )
    batch = Batch.empty(part, [NEW_TOKENS] * num_rows, PROMPT_TOKENS)
    batch.fill(0, part, torch.arange(num_rows, device="cuda"))
    sampler = Sampler(
        sampling, list(range(num_rows)), NEW_TOKENS, config.vocab_size, torch.device("cuda")
    )
    decoder = Decoder(
        *(model, batch, sampler),
        has_ended=lambda ids: False,
        is_recorded=True,
        within=compiled,
    )
    decoder._take(part.logits)
    return decoder


def milliseconds(function: Any, count: int) -> float:
    started = now()
    for _ in range(count):
        function()
    return 1000 * (now() - started) / count


def say_kernels(events: Any, num_steps: int) -> None:
    """Print kernels of one step: how many of a name, microseconds of each, microseconds of all."""
    kernels = sorted(events, key=lambda event: -event.self_device_time_total)
    kernels = [event for event in kernels if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in kernels) / num_steps
    count = sum(event.count for event in kernels) / num_steps
    say(f"  {count:.0f} kernels of {total:.0f} us")
    for event in kernels[:SHOWN]:
        one = event.self_device_time_total / event.count
        times = event.count / num_steps
        say(f"  {times:5.0f} x {one:7.2f} = {times * one:7.1f} us  {event.key[:110]}")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 64])
    options = parser.parse_args()
    processor = processor_of_448_pixels()
    model = build_model(STUDENT_2B, processor, False).eval()
    num_entries = model.lm_head.out_features
    sampling = Sampling((2,), frozenset(range(num_entries)), 0.9, 0.95)
    layers = decoder_layers(model, model.config.text_config.num_hidden_layers)
    compiled, kernels = CompiledLayers(layers, "inductor"), CompiledLayers(layers, "inductor")
    compiled.has_compiled = kernels.has_kernels = True
    greedy = replace(sampling, top_k=1)
    cases = [
        ("greedy, compiled", greedy, compiled),
        ("greedy, kernels", greedy, kernels),
        ("top_p, kernels", sampling, kernels),
    ]
    for num_rows in options.batch_sizes:
        for name, used, layers in cases:
            decoder = decoder_of(model, num_rows, used, layers)
            decoder.is_recorded = False
            decoder._advance()
            eager = milliseconds(decoder._advance, 4)
            decoder.is_recorded = True
            decoder._advance()
            replayed = milliseconds(decoder._advance, TIMED)
            say(
                f"batch {num_rows} {name}: {replayed:.2f} ms a step, eager {eager:.1f} ms, "
                f"recorded in {decoder.record_seconds:.2f} s"
            )
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED):
                decoder._advance()
            torch.cuda.synchronize()
        say_kernels(profiler.key_averages(), PROFILED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
