"""On-policy steps of Qwen3-VL-8B -> Qwen3-VL-2B shapes: tokens a second, seconds, memory; one GPU.

    python benchmarks/bench_rollout.py --seconds 530

Stock Qwen3-VL classes with random bf16 weights, one 448 x 448 picture a sample, 256 new tokens,
temperature 0.9 and top_p 0.95, which are both trainers' defaults. No token that ends a completion
is written, so that every row has all of them. Each case is a process of its own that takes a few
training steps with lmbda=1. The first writes with everything cold; of the others the fastest is
reported. With --one-process all cases share one, which saves half a minute each: only the first has
a cold call. An implementation is

    local      the trainer's writer: a cache of fixed size, its step recorded as a CUDA graph
    generate   the trainer's writer with generate(), what models without such a cache get
    trl        TRL's GOLDTrainer with its local generate
    vllm       the trainer's engine of vLLM in this process, asleep while the student learns; cases
               of it are left out where the package is not installed

First the local writer's greedy tokens are compared in float32 with those of generate() on the same
shape; where they differ, no row of ours has numbers. Each row is written as soon as it is measured.
`--tiny` runs the same code on small models anywhere, with a record only where --output says.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from qwen3_vl_shapes import (
    STUDENT_2B,
    TINY_STUDENT,
    build_model,
    processor_of_448_pixels,
    rows,
)
from record import RESULTS, RowLog, say
from rollout_case import Case, measure
from timing import release

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.rendering.prompts import process_prompts

IMPLEMENTATIONS = ("local", "generate", "trl", "vllm")
TRAININGS = ("full", "float32", "lora")
# In the order of importance: the first ones are what a limit of time leaves.
CASES = (
    *("local-full-16", "local-full-4", "local-full-64", "generate-full-16", "trl-full-4"),
    *("generate-full-64", "generate-full-4", "trl-full-16", "local-lora-16", "trl-lora-16"),
    *("vllm-full-16", "vllm-full-4", "vllm-full-64"),
)
GREEDY_TOKENS, GREEDY_ROWS = 32, 4
FIELDS = (
    *("implementation", "training", "batch_size", "new_tokens", "status"),
    *("tokens_per_second", "ms_per_token", "write_seconds", "first_write_seconds"),
    *("compile_seconds", "record_seconds", "step_seconds", "write_peak_gib", "resident_gib"),
    *("after_gib", "reserved_after_gib", "step_peak_gib", "logp_difference", "greedy"),
    *("device", "torch", "triton", "transformers", "git_sha"),
)


def greedy_tokens_agree(is_tiny: bool) -> str:
    """Local writer against generate(do_sample=False), float32: "same", or what differs."""
    processor = processor_of_448_pixels()
    model = build_model(TINY_STUDENT if is_tiny else STUDENT_2B, processor, is_tiny).float()
    data = rows(processor, 9, GREEDY_ROWS)
    texts = ["Describe the picture.", "What is it?", "Name three colours, please.", "Why?"]
    data = [
        {**row, "prompt": [{"role": "user", "content": t}]}
        for row, t in zip(data, texts, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = GOLDConfig(
            output_dir=folder,
            lmbda=1.0,
            top_k=1,
            max_completion_length=GREEDY_TOKENS,
            bf16=False,
            report_to="none",
        )
        trainer = GOLDTrainer(
            model=model,
            teacher_model=copy.deepcopy(model),
            args=args,
            train_dataset=data,
            processing_class=processor,
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(GREEDY_ROWS)])
        batch = replace(batch, source="student")
        (written,) = trainer.rollouts.write("student", [batch], 0)
    examples = [example.unanswered() for example in batch.examples]
    inputs = process_prompts(
        processor, [e.prompt_text for e in examples], [e.images for e in examples]
    )
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    banned = trainer.rollouts.sampling["student"].banned_ids(model.lm_head.out_features)
    output = (
        model.eval()
        .generate(**inputs, do_sample=False, max_new_tokens=GREEDY_TOKENS, suppress_tokens=banned)[
            :, inputs["input_ids"].shape[1] :
        ]
        .tolist()
    )
    for number, (example, ids) in enumerate(zip(written.examples, output, strict=True)):
        own = example.written_ids
        if own != ids[: len(own)]:
            place = next(
                i for i, pair in enumerate(zip(own, ids, strict=False)) if len(set(pair)) > 1
            )
            return f"row {number} differs from token {place} on"
    return "same"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = "IMPLEMENTATION-TRAINING-ROWS: " + "; ".join(
        map(", ".join, (IMPLEMENTATIONS, TRAININGS))
    )
    parser.add_argument("--cases", nargs="+", default=CASES, help=named)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of all cases together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="default: the record, none with --tiny")
    parser.add_argument("--appends", action="store_true", help="to the rows that are there")
    parser.add_argument("--one-process", action="store_true", help="for all cases")
    parser.add_argument("--one-case", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--greedy-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("bench_rollout: a CUDA GPU is expected, got none; --tiny runs anywhere")
    if options.output is None and not options.tiny:
        options.output = RESULTS / "rollout.csv"
    return options


def in_this_process(case: Case, options: argparse.Namespace, is_first: bool) -> dict[str, Any]:
    row = measure(case, options.tiny)
    release()
    cold = () if is_first else ("first_write_seconds", "compile_seconds")
    return {name: value for name, value in row.items() if name not in cold}


def in_own_process(flags: list[str], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a process of this file says last; one that failed or took too long says so."""
    if seconds <= 0:
        return {"status": f"not run: {options.seconds:g} s were over"}
    command = [sys.executable, __file__, *flags] + ["--tiny"] * options.tiny
    timeout = None if math.isinf(seconds) else seconds
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"status": f"stopped: {options.seconds:g} s were over"}
    if done.returncode != 0:
        return {"status": f"failed with {done.returncode}"}
    lines = done.stdout.splitlines()
    for line in lines:
        if "rollouts" in line:
            say(f"  {line}")
    return json.loads(lines[-1])


def cases_of(options: argparse.Namespace) -> list[Case]:
    cases = []
    for text in options.cases:
        name, training, size = text.split("-")
        if name not in IMPLEMENTATIONS or training not in TRAININGS:
            sys.exit(f"bench_rollout: a case is expected, for instance {CASES[0]}, got {text}")
        cases.append(Case(name, training, int(size), options.new_tokens))
    return cases


def installed(cases: list[Case]) -> list[Case]:
    """The cases, without those of vLLM where it is not installed."""
    if find_spec("vllm"):
        return cases
    kept = [case for case in cases if case.implementation != "vllm"]
    if kept != cases:
        say("vllm is not installed here: its cases are left out")
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.greedy_only:
        say("\n" + json.dumps({"status": greedy_tokens_agree(options.tiny)}))
        return 0
    cases = installed(cases_of(options))
    if options.one_case:
        say("\n" + json.dumps(measure(cases[0], options.tiny)))
        return 0
    log, started = RowLog(options.output, FIELDS, appends=options.appends), time.monotonic()
    if options.one_process:
        greedy = greedy_tokens_agree(options.tiny)
    else:
        greedy = in_own_process(["--greedy-only"], options, options.seconds)["status"]
    say(f"{time.monotonic() - started:.0f} s: greedy tokens {greedy}")
    for case in cases:
        seconds = time.monotonic() - started
        say(f"{seconds:.0f} s: {' '.join(map(str, case))}")
        name = f"{case.implementation}-{case.training}-{case.batch_size}"
        flags = ["--one-case", "--cases", name, "--new-tokens", str(case.new_tokens)]
        row = {**case._asdict(), "status": f"refused: greedy tokens: {greedy}", "greedy": greedy}
        if greedy == "same" or case.implementation == "trl":
            if options.one_process:
                row |= in_this_process(case, options, case is cases[0])
            else:
                row |= in_own_process(flags, options, options.seconds - seconds)
        log.add(row)
        say(str(log.rows[-1]))
    return int(not all(row["status"] in ("ok", "out of memory") for row in log.rows))


if __name__ == "__main__":
    sys.exit(main())
