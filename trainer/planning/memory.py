"""Peak memory of a GPU by part, from the passes of a micro-batch and from sizes of weights.

What is counted beside the passes (planning/passes.py), for P numbers of the student, P' of them
trained, N processes, b bytes of a weight as it is held, S bytes of state a trained number:

    engine   weights                     gradients                  optimizer
    single   b P                         b P'                       S P'
    ddp      b P                         2 b P' (buckets)           S P'
    fsdp2    (b P)/N + gathered          (b P')/N + a layer's       S P'/N
    zero2    2 P                         2 P'/N + buckets           (S + 4) P'/N
    zero3    2 P/N + gathered            2 P'/N + buckets           (S + 4) P'/N

A step has moments: rollouts are written, the teacher runs, the student runs forward, up to the
loss, and backward, the optimizer steps. Parts are those of the moment with the most memory.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from gold_trainer import models
from gold_trainer.batches import MicroBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives import Objective
from gold_trainer.planning.passes import Passes, Precision, Stored, run_passes
from gold_trainer.sides import Side
from gold_trainer.teachers.layer_stream import AHEAD, outermost_lists

ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")
DEEPSPEED = ("zero2", "zero3")
PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "teacher", "rollouts")
# Bytes of an optimizer's state for a number that is trained.
STATE_BYTES = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "rmsprop": 4,
    "rmsprop_bnb": 4,
    "rmsprop_bnb_8bit": 1,
    "sgd": 0,
    "adafactor": 0,
    "lomo": 0,
    "adalomo": 0,
    "paged_adamw_32bit": 0,  # in host memory where it does not fit
    "paged_adamw_8bit": 0,
    "paged_lion_32bit": 0,
    "paged_lion_8bit": 0,
}
ADAM_BYTES = 8
BUCKET_NUMBERS = 500_000_000  # reduce_bucket_size of DeepSpeed
LIVE_NUMBERS = 1_000_000_000  # stage3_max_live_parameters
NF4_BYTES = 0.5 + 4 / 64  # of a weight, and a float32 for each block of 64
WRITTEN_LOGITS = 3  # float32 copies of a row of logits that sampling makes


@dataclass(frozen=True)
class Setup:
    engine: str = "single"
    num_gpus: int = 1
    gpu_bytes: int | None = None  # of which vLLM takes a share


@dataclass
class Subject:
    """A run whose models are on the meta device."""

    args: GOLDConfig
    student: nn.Module
    teacher: nn.Module | None  # None: a cache
    sides: tuple[Side, Side]
    objective: Objective
    batch: MicroBatch
    batch_of: Callable[[int], MicroBatch]  # of so many rows
    stored: Stored | None = None  # of a cache

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]


class Plan(NamedTuple):
    moment: str  # when the peak is
    parts: Counter[str]  # bytes

    @property
    def total(self) -> int:
        return self.parts.total()


class Planner:
    """Passes are counted once; what follows from fields alone is added anew for each plan."""

    def __init__(self, subject: Subject, setup: Setup) -> None:
        self.subject, self.setup = subject, setup
        args = subject.args
        mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.mixed = mixed
        is_recast = setup.engine in ("fsdp2", *DEEPSPEED) and mixed is not None
        self.precision = Precision(
            None if setup.engine in DEEPSPEED else mixed, mixed if is_recast else None
        )
        self.sizes = self.sizes_now()
        self.passes = self._run()

    def sizes_now(self) -> "Sizes":
        return Sizes.of(self.subject, self.setup, self.mixed)

    def _run(self) -> Passes:
        subject = self.subject
        share = self.sizes.kept_gradients
        if subject.args.gradient_accumulation_steps > 1:
            share = 0.0  # they are there from the micro-batches before
        with _in_dtype(subject.student, self.precision.params):
            return run_passes(
                subject.student,
                subject.teacher,
                subject.sides,
                subject.objective,
                subject.batch,
                self.precision,
                subject.stored,
                is_checkpointed=bool(subject.args.gradient_checkpointing),
                kept_gradients=share,
            )

    def plan(self) -> Plan:
        moments = dict(self._moments())
        name = max(moments, key=lambda name: moments[name].total())
        return Plan(name, moments[name])

    def _moments(self) -> Iterator[tuple[str, Counter[str]]]:
        args, sizes, passes = self.subject.args, self.sizes, self.passes
        state = Counter(weights=sizes.weights, optimizer=sizes.optimizer, gradients=sizes.buckets)
        teacher = teacher_sizes(self.subject, self.setup, args)
        state["teacher"] = teacher.held
        rollouts, engine = self._rollouts(), self._vllm()
        if rollouts or engine:
            yield "writing of rollouts", state + Counter(rollouts=rollouts + engine)
        if not args.vllm_enable_sleep_mode:
            state["rollouts"] = engine
        if args.gradient_accumulation_steps > 1:
            state["gradients"] += sizes.gradients
        run = passes.teacher + teacher.running if teacher.runs else passes.teacher_hidden
        yield "forward pass of the teacher", state + Counter(teacher=run)
        learning = state + Counter(teacher=passes.teacher_hidden, weights=sizes.gathered)
        yield (
            "forward pass of the student",
            learning + passes.forward + Counter(teacher=teacher.in_loss),
        )
        yield "backward pass", learning + passes.backward + Counter(gradients=sizes.reduced)
        step = Counter(gradients=sizes.gradients, optimizer=sizes.stepping)
        if args.gradient_accumulation_steps > 1:
            del step["gradients"]
        yield "step of the optimizer", state + step

    def _rollouts(self) -> int:
        """Keys, values and logits of rows that are written together, in this process: as many
        as rollout_cache_gib holds. Without it the writer takes half of what is free, whatever that
        is: one row is what it needs.
        """
        args, batch = self.subject.args, self.subject.batch
        writers: list[tuple[nn.Module, Any]] = []
        if args.lmbda > 0 and not args.use_vllm:
            writers.append((self.subject.student, batch.student))
        if args.seq_kd and args.lmbda < 1 and self.subject.teacher is not None:
            writers.append((self.subject.teacher, batch.teacher))
        sizes = [0]
        for model, inputs in writers:
            length = inputs.tensors["input_ids"].shape[1]
            config = models.base_model(model).config.get_text_config()
            row = length * _cache_bytes(config)
            num_rows = 1
            if args.rollout_cache_gib is not None:
                most = args.per_device_train_batch_size * args.gradient_accumulation_steps
                num_rows = max(1, min(most, int(args.rollout_cache_gib * 2**30 // row)))
            row += WRITTEN_LOGITS * 4 * config.vocab_size
            sizes.append(num_rows * row + self._cast_bytes(model))
        return max(sizes)

    def _vllm(self) -> int:
        """An engine in this process: its share of the GPU, or at least weights in 16 bits."""
        args, size = self.subject.args, self.setup.gpu_bytes
        if not is_vllm_here(args):
            return 0
        if size is not None:
            return int(args.vllm_memory_share * size)
        return 2 * sum(p.numel() for p in models.base_model(self.subject.student).parameters())

    def _cast_bytes(self, model: nn.Module) -> int:
        """Within autocast a writer has copies of linear layers' weights."""
        if self.precision.autocast is None or self.precision.params is not None:
            return 0
        linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        wide = [w for w in linear if w.dtype == torch.float32]
        return sum(self.precision.autocast.itemsize * w.numel() for w in wide)


class Sizes(NamedTuple):
    """Bytes of the student on a GPU under an engine."""

    weights: int
    gathered: int  # of sharded weights, while layers run
    gradients: int  # all of them
    buckets: int  # through which gradients are reduced, for the whole run
    reduced: int  # copies of gradients on their way, in backward
    optimizer: int
    stepping: int  # what a step of the optimizer needs for itself
    kept_gradients: float  # part of what backward makes that stays

    @classmethod
    def of(cls, subject: Subject, setup: Setup, mixed: torch.dtype | None) -> "Sizes":
        trained, engine, parts = subject.trained, setup.engine, setup.num_gpus
        count = sum(p.numel() for p in trained)
        bits = quantised_bits(subject.args.model_init_kwargs)
        held, running = weight_bytes(subject.student, subject.sides[0].head.weight, bits)
        optimizer = optimizer_of(subject.args)
        state = STATE_BYTES.get(optimizer, ADAM_BYTES) * count
        own = sum(map(_bytes, trained))
        stepping = own if optimizer == "adamw_torch" else 0
        if engine in ("single", "ddp"):
            buckets = own if engine == "ddp" else 0
            return cls(held, running, own, buckets, 0, state, stepping, 1.0)
        wide = 4 if mixed is not None else trained[0].element_size()
        narrow = 2 if mixed is not None else trained[0].element_size()
        if engine == "fsdp2":  # what is trained is kept in float32
            weights = held - own + wide * count
            gathered, reduced = _gathered(subject.student, narrow)
            share = wide / narrow / parts
            return cls(
                weights // parts,
                gathered,
                wide * count // parts,
                0,
                reduced,
                state // parts,
                stepping // parts,
                share,
            )
        total = sum(p.numel() for p in subject.student.parameters())
        bucket = narrow * min(BUCKET_NUMBERS, count)
        masters = (state + 4 * count) // parts
        weights, gathered = narrow * total, 0
        if engine == "zero3":
            gathered = narrow * min(LIVE_NUMBERS, total)
            weights //= parts
        stepping = 4 * count // parts
        gradients = narrow * count // parts
        return cls(weights, gathered, gradients, 0, bucket, masters, stepping, 1 / parts)


class TeacherSizes(NamedTuple):
    held: int
    running: int  # more, while it runs
    in_loss: int  # more, while the loss has its head
    runs: bool


def teacher_sizes(subject: Subject, setup: Setup, args: GOLDConfig) -> TeacherSizes:
    head = subject.sides[1].head.weight
    head_bytes = _bytes(head)
    if args.has_absent_teacher:
        held = head_bytes if subject.stored is None or subject.stored.has_head else 0
        return TeacherSizes(held, 0, 0, runs=False)
    model = subject.teacher
    if model is None or model is subject.student:
        return TeacherSizes(0, 0, 0, runs=model is not None)
    if args.teacher_device is not None:
        return TeacherSizes(head_bytes, 0, 0, runs=False)
    total = sum(map(_bytes, model.parameters()))
    layers = [sum(map(_bytes, layer.parameters())) for layer in _layers(model)]
    if args.teacher_offload is not None:
        return TeacherSizes(total - sum(layers), (1 + AHEAD) * max(layers), 0, runs=True)
    if args.teacher_sharding is not None and setup.num_gpus > 1:
        own = total // setup.num_gpus
        return TeacherSizes(own, max(2 * max(layers), head_bytes), head_bytes, runs=True)
    held, running = weight_bytes(model, head, quantised_bits(args.teacher_model_init_kwargs))
    return TeacherSizes(held, running, 0, runs=True)


def weight_bytes(model: nn.Module, head: torch.Tensor, bits: int | None) -> tuple[int, int]:
    """Bytes of all weights, where those of linear layers but the head may be in 8 or 4 bits; and
    what the largest of them takes in 16 bits, in which it is used.
    """
    total = sum(map(_bytes, model.parameters()))
    if not bits:
        return total, 0
    linear = [
        module.weight
        for module in models.base_model(model).modules()
        if isinstance(module, nn.Linear)
        and module.weight is not head
        and not module.weight.requires_grad
    ]
    count, largest = sum(w.numel() for w in linear), max(w.numel() for w in linear)
    small = int(count * (1 if bits == 8 else NF4_BYTES))
    return total - sum(map(_bytes, linear)) + small, 2 * largest


def is_vllm_here(args: GOLDConfig) -> bool:
    return args.use_vllm and args.vllm_mode == "colocate"


def optimizer_of(args: GOLDConfig) -> str:
    return str(OptimizerNames(args.optim).value)


def quantised_bits(init_kwargs: Any) -> int | None:
    """8 or 4 where arguments of from_pretrained ask for it."""
    config = (init_kwargs or {}).get("quantization_config") or {}
    get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    return 4 if get("load_in_4bit") else 8 if get("load_in_8bit") else None


def _gathered(model: nn.Module, itemsize: int) -> tuple[int, int]:
    """Weights that FSDP2 has whole while the student runs: embeddings, norm and head for all of it,
    the layer that runs and the next one; and gradients that are being reduced.
    """
    layers = list(_layers(model))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in layers]
    outside = sum(p.numel() for p in rest)
    return itemsize * (outside + 2 * largest), itemsize * 2 * max(trained)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for _, layers in outermost_lists(models.base_model(model)):
        yield from layers


def _cache_bytes(config: Any) -> int:
    """Bytes of the keys and values of a token, in 16 bits."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value = getattr(config, "num_key_value_heads", None) or heads
    return int(config.num_hidden_layers * 2 * key_value * size * 2)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _in_dtype(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Parameters of a model on the meta device in another dtype."""
    before = [(p, p.data) for p in model.parameters()]
    try:
        for parameter, data in before if dtype is not None else ():
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
