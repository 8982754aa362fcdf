"""What makes a run fit: fields to add, those that cost the least first.

First what changes no result and little time, then what needs other weights in memory, then what
changes what is trained.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from gold_trainer import loading
from gold_trainer.fields.checks import as_dict
from gold_trainer.planning.memory import (
    ADAM_BYTES,
    DEEPSPEED,
    STATE_BYTES,
    Planner,
    Setup,
    Subject,
    is_vllm_here,
    optimizer_of,
    quantised_bits,
)
from gold_trainer.planning.passes import Passes, Stored, kept_tokens
from gold_trainer.sides import Side

ENOUGH = 0.99  # of the peak before: what saves less is no remedy
SMALL_BUDGET = 256  # MiB of the loss; below, matrix products are slower
INT8 = {"quantization_config": {"load_in_8bit": True}}
NF4 = {
    "quantization_config": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
}


class Remedy(NamedTuple):
    lines: str  # of the config, or of the command line
    cost: str
    total: int  # bytes of the peak with it and those before it


class Candidate(NamedTuple):
    lines: str
    cost: str
    planner: Callable[[], Planner]  # with it
    exact: Callable[[], Planner] | None = None  # where that one is an estimate


def remedies(planner: Planner, room: int) -> list[Remedy]:
    """Remedies that help, one on top of the other, until the peak is within room."""
    found: list[Remedy] = []
    total = planner.plan().total
    for step in STEPS:
        if total <= room:
            break
        options = []
        for candidate in step(planner):
            changed = candidate.planner()
            peak = changed.plan().total
            if peak < total * ENOUGH:
                options.append((candidate, changed, peak))
                if peak <= room:
                    break
        if not options:
            continue
        # the first that is enough, else the one that saves the most
        candidate, planner, total = min(options, key=lambda option: max(option[2], room))
        if candidate.exact is not None:
            planner = candidate.exact()
            total = planner.plan().total
        found.append(Remedy(candidate.lines, candidate.cost, total))
    return found


def with_fields(planner: Planner, setup: Setup | None = None, **fields: Any) -> Planner:
    """The same passes under other fields, or an engine that leaves them as they are."""
    changed = copy.copy(planner)
    args = copy.copy(planner.subject.args)
    for name, value in fields.items():
        setattr(args, name, value)
    changed.subject = replace(planner.subject, args=args)
    changed.setup = setup or planner.setup
    changed.sizes = changed.sizes_now()
    return changed


def counted_anew(planner: Planner, setup: Setup | None = None, **fields: Any) -> Planner:
    changed = with_fields(planner, **fields)
    return Planner(changed.subject, setup or planner.setup)


def _checkpointing(planner: Planner) -> Iterator[Candidate]:
    if not planner.subject.args.gradient_checkpointing:
        yield Candidate(
            "gradient_checkpointing: true",
            "a third more time in the student",
            lambda: counted_anew(planner, gradient_checkpointing=True),
        )


def _budget(planner: Planner) -> Iterator[Candidate]:
    before = planner.subject.args.loss_budget_mib or 1024
    if before > SMALL_BUDGET and planner.passes.forward["loss"] > SMALL_BUDGET * 2**20:
        yield Candidate(
            f"loss_budget_mib: {SMALL_BUDGET}",
            "a slightly slower loss",
            lambda: _with_budget(planner),
        )


def _with_budget(planner: Planner) -> Planner:
    """objective.options were made of the fields."""
    changed = with_fields(planner, loss_budget_mib=SMALL_BUDGET)
    objective: Any = copy.copy(planner.subject.objective)
    objective.options = objective.options | {"budget_bytes": SMALL_BUDGET * 2**20}
    return Planner(replace(changed.subject, objective=objective), planner.setup)


def _batch(planner: Planner) -> Iterator[Candidate]:
    args = planner.subject.args
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    for factor in (f for f in range(2, size + 1) if size % f == 0):
        smaller, more = size // factor, accumulation * factor
        yield Candidate(
            f"per_device_train_batch_size: {smaller}, gradient_accumulation_steps: {more}",
            "the same step in more passes",
            partial(_scaled, planner, smaller, more, factor),
            partial(_with_batch, planner, smaller, more),
        )


def _sleep(planner: Planner) -> Iterator[Candidate]:
    args = planner.subject.args
    if is_vllm_here(args) and not args.vllm_enable_sleep_mode:
        yield Candidate(
            "vllm_enable_sleep_mode: true",
            "the engine's memory is free while the student learns",
            lambda: with_fields(planner, vllm_enable_sleep_mode=True),
        )


def _sizes(size: int, accumulation: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
    }


def _with_batch(planner: Planner, size: int, accumulation: int) -> Planner:
    changed = with_fields(planner, **_sizes(size, accumulation))
    batch = planner.subject.batch_of(size)
    return Planner(replace(changed.subject, batch=batch), planner.setup)


def _scaled(planner: Planner, size: int, accumulation: int, factor: int) -> Planner:
    """A planner as if all that a pass makes were a sum over rows."""
    changed = with_fields(planner, **_sizes(size, accumulation))
    passes = planner.passes
    forward, backward = (
        Counter({name: n // factor for name, n in part.items() if name != "gradients"})
        for part in (passes.forward, passes.backward)
    )  # gradients are there before the pass
    changed.passes = Passes(
        passes.teacher // factor, passes.teacher_hidden // factor, forward, backward
    )
    return changed


def _teacher_parts(planner: Planner) -> Iterator[Candidate]:
    if planner.setup.num_gpus > 1 and _is_whole(planner.subject):
        yield Candidate(
            "teacher_sharding: fsdp",
            "layers are gathered as they run",
            lambda: with_fields(planner, teacher_sharding="fsdp"),
        )


def _engine(planner: Planner) -> Iterator[Candidate]:
    if planner.setup.num_gpus > 1 and planner.setup.engine in ("ddp", "zero2"):
        yield Candidate(
            "accelerate launch --config_file fsdp2.yaml",
            "weights are gathered as they are used",
            lambda: counted_anew(planner, replace(planner.setup, engine="fsdp2")),
        )


def _optimizer(planner: Planner) -> Iterator[Candidate]:
    optimizer = optimizer_of(planner.subject.args)
    if STATE_BYTES.get(optimizer, ADAM_BYTES) > 2 and planner.setup.engine not in DEEPSPEED:
        yield Candidate(
            "optim: adamw_8bit",
            "moments are rounded; needs bitsandbytes",
            lambda: with_fields(planner, optim="adamw_8bit"),
        )


def _teacher_elsewhere(planner: Planner) -> Iterator[Candidate]:
    args = planner.subject.args
    if not _is_whole(planner.subject):
        return
    for options, cost in ((INT8, "rounded"), (NF4, "rounded more")):
        merged = as_dict(args.teacher_model_init_kwargs) | options
        yield Candidate(
            f"teacher_model_init_kwargs: {json.dumps(merged)}",
            f"the teacher's weights are {cost}; needs bitsandbytes",
            partial(with_fields, planner, teacher_model_init_kwargs=merged),
        )
    yield Candidate(
        "teacher_offload: cpu",
        "the same loss, layers come from host memory",
        lambda: with_fields(planner, teacher_offload="cpu"),
    )
    if args.lmbda == 0 and not args.seq_kd:
        stored = _to_store(planner.subject)
        yield Candidate(
            "teacher_cache: DIR",
            "the same loss; gold-trainer cache-teacher runs first, "
            f"{stored.num_bytes} bytes of disk a scored token",
            lambda: _with_cache(planner, stored),
        )


def _to_store(subject: Subject) -> Stored:
    """What gold-trainer cache-teacher would keep."""
    if subject.args.form_to_make == "top_k":
        return kept_tokens(subject.args)
    return Stored(subject.sides[1].head.weight.shape[1], torch.bfloat16, has_head=True)


def _with_cache(planner: Planner, stored: Stored) -> Planner:
    changed = with_fields(planner, teacher_cache="DIR")
    changed.subject = replace(changed.subject, stored=stored)
    return changed


def _is_whole(subject: Subject) -> bool:
    args = subject.args
    names = ("teacher_sharding", "teacher_offload", "teacher_device", "teacher_cache")
    is_moved = any(getattr(args, name) is not None for name in names)
    return (
        subject.teacher is not None
        and not is_moved
        and not quantised_bits(args.teacher_model_init_kwargs)
    )


def _adapter(planner: Planner) -> Iterator[Candidate]:
    trained = sum(p.numel() for p in planner.subject.trained)
    total = sum(p.numel() for p in planner.subject.student.parameters())
    if trained > total // 2:
        yield Candidate(
            "use_peft: true, dtype: bfloat16",
            "an adapter is trained instead of all weights; needs peft",
            lambda: _with_adapter(planner),
        )


def _with_adapter(planner: Planner) -> Planner:
    from peft import LoraConfig

    subject = planner.subject
    student: Any = copy.deepcopy(subject.student).bfloat16()
    targets = ["q_proj", "k_proj", "v_proj"]
    names = {name.rpartition(".")[2] for name, _ in student.named_modules()}
    modules: Any = targets if names & set(targets) else "all-linear"
    adapted: nn.Module = loading.add_adapter(
        student, LoraConfig(r=16, target_modules=modules, task_type="CAUSAL_LM")
    )
    processor = subject.sides[0].collator.processor
    side = Side.of(adapted, "student", processor, subject.args)
    sides = side, subject.sides[1]
    return Planner(replace(subject, student=adapted, sides=sides), planner.setup)


STEPS = (
    _checkpointing,
    _budget,
    _sleep,
    _batch,
    _teacher_parts,
    _engine,
    _optimizer,
    _teacher_elsewhere,
    _adapter,
)
