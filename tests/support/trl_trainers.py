"""trl's own trainers on tiny models, patched and not."""

import json
import random
from contextlib import contextmanager, nullcontext

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from gold_kernels.integrations.trl import patch_trl
from support.tiny_models import tiny, tiny_rows

MERGES = [["w", "a"], ["U", "n"]]  # of the teacher alone, before its own
TEXT = " Unaware parents compare rare areas."  # both sides cut it, each elsewhere
CLASSES = {
    "distillation": (DistillationTrainer, DistillationConfig),
    "gkd": (GKDTrainer, GKDConfig),
    "gold": (GOLDTrainer, GOLDConfig),
    "uld": (GOLDTrainer, GOLDConfig),
}
TIMES = ("time", "per_second", "runtime")


def build(
    kind,
    folder,
    models=None,
    family="qwen3",
    teacher_family=None,
    rows=None,
    dtype=torch.float64,
    **options,
):
    """A trainer of CLASSES; options are its config's, and arguments of the trainer. Models are
    float64, where two ways to one loss differ by nothing, but for the chunked divergence, which trl
    computes in float32.
    """
    trainer_class, config_class = CLASSES[kind]
    teacher_family = teacher_family or ("llama" if kind == "uld" else family)
    student, processor = tiny(family)
    teacher, teacher_processor = tiny(teacher_family, "teacher")
    if models is not None:
        student, teacher = models
    fields = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if kind == "distillation":
        dtype = torch.float32
        fields["max_completion_length"] = 8
        rows = rows or [{"prompt": row["messages"][:1]} for row in tiny_rows(8)]
    else:
        fields |= {"lmbda": 0.0, "max_length": 256}
        rows = rows or tiny_rows(8)
    if kind == "uld":
        if teacher_family == "llama":
            teacher_processor = with_merges(teacher_processor)
            rows = [with_text(row) for row in rows]
        teacher_processor.save_pretrained(folder / "teacher")
        teacher.config.save_pretrained(folder / "teacher")
        teacher.config._name_or_path = str(folder / "teacher")
        fields |= {"use_uld_loss": True, "teacher_tokenizer_name_or_path": str(folder / "teacher")}
    arguments = {
        name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options
    }
    return trainer_class(
        model=student.to(dtype),
        teacher_model=teacher.to(dtype),
        args=config_class(output_dir=str(folder / "run"), **fields | options),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        **arguments,
    )


def with_merges(tokenizer):
    """Which has MERGES too."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for pair in MERGES:
        state["model"]["vocab"]["".join(pair)] = len(tokenizer) + MERGES.index(pair)
    state["model"]["merges"] = MERGES + state["model"]["merges"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def with_text(row):
    question, answer = row["messages"]
    return {"messages": [question, {**answer, "content": answer["content"] + TEXT}]}


@contextmanager
def without_floor():
    """trl raises probabilities to 1e-8: here it leaves them."""
    clamp_min = torch.Tensor.clamp_min

    def clamp(tensor, least):
        return clamp_min(tensor, 1e-300 if least == 1e-8 else least)

    torch.Tensor.clamp_min = clamp
    try:
        yield
    finally:
        torch.Tensor.clamp_min = clamp_min


def patched(is_patched, **options):
    return patch_trl(**options) if is_patched else nullcontext()


def losses(trainer, batch=None, num_items=None, **options):
    """{"loss" and each parameter's gradient} of trl, and of the same trainer patched."""
    if batch is None:
        batch = batch_of(trainer)
    results = []
    for is_patched in (False, True):
        trainer.model.zero_grad()
        with patched(is_patched, **options):
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
        loss.backward()
        named = trainer.model.named_parameters()
        gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        results.append({"loss": loss.detach().reshape(()), **gradients})
    return results


def batch_of(trainer):
    """The first micro-batch of a trainer's own loader."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def assert_equal(ours, theirs, tolerance=1e-9):
    """Each tensor, by its largest entry."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        limit = tolerance * max(float(expected.abs().max()), 1e-3)
        assert float((ours[name] - expected).abs().max()) <= limit, name


def assert_same_losses(trainer, batch=None, tolerance=1e-9, **options):
    theirs, ours = losses(trainer, batch, **options)
    assert float(theirs["loss"].abs()) > 1e-3, "a loss of 0 would show nothing"
    assert_equal(ours, theirs, tolerance)


def logs(make, **options):
    """What a run logs, of trl and patched; times are left out."""
    results = []
    for is_patched in (False, True):
        random.seed(0)
        torch.manual_seed(0)
        trainer = make(str(is_patched))
        with patched(is_patched, **options):
            trainer.train()
        results.append(
            [
                {name: log[name] for name in log if not any(time in name for time in TIMES)}
                for log in trainer.state.log_history
            ]
        )
    return results


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def assert_no_logits_are_made(trainer, chunk_size):
    """TRL's step has a tensor of all logits, the patched one none larger than the head."""
    batch = batch_of(trainer)
    weight = trainer.model.lm_head.weight
    num_scored = int((batch["labels"] != -100).sum())
    assert num_scored > 1.5 * weight.shape[1], "scored logits must be larger than a gradient"
    found = []
    for is_patched in (False, True):
        with patched(is_patched, chunk_size=chunk_size), LargestTensor() as largest:
            trainer.compute_loss(trainer.model, dict(batch)).backward()
        found.append(largest.numel)
    assert found[0] >= batch["labels"].numel() * weight.shape[0]
    assert found[1] <= weight.numel()
