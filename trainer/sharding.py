"""Weights in parts: what FSDP and DeepSpeed need of a run beyond DDP.

All ranks gather a layer's weights and reduce its gradients together, so all must run the same
layers.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    register_fsdp_forward_method,
)

from gold_trainer.batches import Example, WindowBatch
from gold_trainer.data.rows import Row
from gold_trainer.data.videos import Video
from gold_trainer.fields.optimizers import refuse_in_parts
from gold_trainer.models import base_model, has_adapter, is_quantised, is_vocabulary_slice
from gold_trainer.rendering.collator import GOLDCollator

if TYPE_CHECKING:
    from gold_trainer.config import GOLDConfig
    from gold_trainer.teachers.teacher import Teacher
    from gold_trainer.trainer import GOLDTrainer

SUMMED = "replicated_with_grad_allreduce"  # of transformers' plans
MEDIA = {"images": "image", "videos": "video"}  # of an Example, and their parts of a message
PICTURE_SIZE = 64  # pixels of either side of the picture that nothing is learnt from


def runs_layers_together(accelerator: Accelerator) -> bool:
    """Whether a layer's weights are gathered from all ranks when it runs (FSDP, ZeRO-3), or its
    gradient is reduced as soon as it is known (ZeRO-2).
    """
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_sharded(model: nn.Module | None) -> bool:
    """Whether the ranks of a group must run its forward passes together: each holds a part of the
    weights.
    """
    if model is None or not torch.distributed.is_initialized():
        return False
    return (
        any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())
        or any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # of ZeRO-3
    )


def gathered(tensors: Sequence[torch.Tensor]) -> AbstractContextManager[Any]:
    """What ZeRO-3 has left in parts is whole within the context, which all ranks enter together."""
    if not any(hasattr(tensor, "ds_id") for tensor in tensors):
        return nullcontext()
    from deepspeed import zero

    context: AbstractContextManager[Any] = zero.GatheredParameters(list(tensors))
    return context


def num_calls(model: nn.Module | None, own: int, device: torch.device) -> int:
    """How often this rank must call a model that it would call `own` times: where the ranks run
    together, as often as the one with most to do.
    """
    if not is_sharded(model):
        return own
    most = torch.tensor(own, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def generate(model: nn.Module, base: Any, **options: Any) -> Any:
    """base.generate(); base is the transformers model below an adapter.

    FSDP2 prepares its weights when the outermost module runs, which is the adapter: there its
    generate() counts as a forward pass. transformers does not see FSDP2, and takes every model for
    sharded under ZeRO-3, so it is told whether ranks that have written all go on with the others.
    """
    if torch.distributed.is_initialized():
        options["synced_gpus"] = is_sharded(base)
    if not isinstance(model, FSDPModule) or model is base:
        return base.generate(**options)
    outer: Any = model
    if "generate" not in vars(outer):
        register_fsdp_forward_method(outer, "generate")
    return outer.generate(**options)


def prepare(accelerator: Accelerator, model: nn.Module, optim: str = "adamw_torch") -> None:
    """Before weights are sharded: what cannot be is refused, and FSDP is told the layers there are.

    The names of layers that come with a model may be those of its whole family, some of which this
    one does not have (LFM2-VL); accelerate stops at the first of them.
    """
    state = accelerator.state
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "GOLDTrainer: sequences must be whole on each process, got a parallelism_config with "
            f"cp_size={parallel.cp_size} and sp_size={parallel.sp_size}; set both to 1: the loss "
            "needs no memory for long sequences, gradient_checkpointing little."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        refuse_in_parts(optim, accelerator)
        _refuse_quantised(model)
        _refuse_tied_copy(model)
        plugin = state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            there = {type(module).__name__ for module in model.modules()}
            names = getattr(model, "_no_split_modules", None) or ()
            plugin.transformer_cls_names_to_wrap = [name for name in names if name in there] or None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        options = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if options.get("stage") == 3:
            _refuse_quantised(model)
        is_whole = options.get("stage3_gather_16bit_weights_on_model_save")
        if options.get("stage") == 3 and not is_whole:
            raise ValueError(
                "GOLDTrainer: under ZeRO-3 the student must be saved whole, got "
                "stage3_gather_16bit_weights_on_model_save=false; set it to true in the config of "
                "DeepSpeed, or zero3_save_16bit_model in accelerate's."
            )


def check_tensor_parallel(student: nn.Module, teacher: "Teacher", args: "GOLDConfig") -> None:
    """What transformers spreads over processes (tp_plan) is one model on the same rows, on both
    sides alike; ValueError for the rest.
    """
    student_size, teacher_size = (tp_size(model) for model in (student, teacher.model))
    if teacher_size > 1 and teacher_size != student_size:
        raise ValueError(
            "GOLDTrainer: a teacher in slices needs a student in as many, whose processes see the "
            f"same rows, got tp_size={teacher_size} and {student_size}; load the student with the "
            "same tp_plan, or set teacher_sharding='fsdp'."
        )
    if student_size == 1:
        return
    heads = base_model(student).get_output_embeddings(), teacher.side.head
    is_cut = [is_vocabulary_slice(head.weight) for head in heads]
    if is_cut[0] != is_cut[1]:
        raise ValueError(
            "GOLDTrainer: student and teacher must have their lm_head in slices of the same "
            f"processes, or both whole, got {'a whole teacher' if is_cut[0] else 'a whole student'}"
            "; load both with tp_plan='auto', or leave lm_head out of the plan."
        )
    if has_adapter(student):  # transformers 5.24, peft 0.21
        raise ValueError(
            "GOLDTrainer: an adapter's layers must be whole, got a student with "
            f"tp_size={student_size}, where its gradients would be wrong; train it with FSDP or "
            "ZeRO-3, or without an adapter."
        )
    plan: dict[str, str] = base_model(student).tp_plan or {}
    names = {name.rpartition(".")[2] for name, kind in plan.items() if kind == SUMMED}
    trained = {n.rpartition(".")[0] for n, p in student.named_parameters() if p.requires_grad}
    trained = {name.rpartition(".")[2] for name in trained}
    summed = sorted(names & trained)
    if summed and args.gradient_accumulation_steps > 1:
        raise ValueError(
            "GOLDTrainer: gradient_accumulation_steps must be 1 for a student whose plan sums "
            f"gradients after each backward pass ({', '.join(summed)}), got "
            f"{args.gradient_accumulation_steps}: transformers would sum those of earlier passes "
            "again; raise per_device_train_batch_size."
        )


def tp_size(model: nn.Module | None) -> int:
    """Over how many processes transformers has spread a model, which all of them run together."""
    base: Any = None if model is None else base_model(model)
    return getattr(base, "tp_size", None) or 1


def _refuse_quantised(model: nn.Module) -> None:
    if is_quantised(model):
        raise ValueError(
            "GOLDTrainer: under FSDP and ZeRO-3 the student must be in 16 or 32 bits, got one in 8 "
            "or 4 bits; train it with DDP or ZeRO-2, which leave the weights whole."
        )


def _refuse_tied_copy(model: nn.Module) -> None:
    base = base_model(model)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    original = getattr(head, "original_module", None)  # of peft's modules_to_save
    if original is not None and original.weight is embeddings.weight:
        raise ValueError(
            "GOLDTrainer: under FSDP a head in modules_to_save must not be tied to the embeddings, "
            "got one that is; save the model with tie_word_embeddings=False in its config and "
            "load it again, or train with DDP or DeepSpeed."
        )


class PicturesForAll:
    """A forward pass runs the vision tower once for its pictures and once for its videos. A rank
    whose micro-batch has none, while another's has, gets a row with one: the tower runs as often on
    all ranks. No token of that row is scored, so its gradient is zero.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: nn.Module | None,
        collators: Mapping[str, GOLDCollator],  # of "student" and "teacher"
    ) -> None:
        self.accelerator, self.teacher, self.collators = accelerator, teacher, collators
        self.examples: dict[tuple[str, str], Example] = {}  # by side and kind

    @cached_property
    def is_needed(self) -> bool:
        """Asked when weights are where they will be."""
        is_vlm = self.collators["student"].is_vlm
        return is_vlm and (runs_layers_together(self.accelerator) or is_sharded(self.teacher))

    def example(self, side: str, kind: str) -> Example:
        """Made where it is needed: a template may have no place for a video."""
        if (side, kind) not in self.examples:
            content = [{"type": MEDIA[kind]}, {"type": "text", "text": "."}]
            row = Row(
                -1 - list(MEDIA).index(kind), [{"role": "user", "content": content}], None, []
            )
            size = (PICTURE_SIZE, PICTURE_SIZE)
            if kind == "images":
                row.images.append(Image.new("RGB", size))
            else:
                row.videos.append(Video(np.zeros((4, *size, 3), np.uint8), fps=2.0))
            self.examples[side, kind] = self.collators[side].example(row).with_completion([])
        return self.examples[side, kind]

    def add(self, batches: list[WindowBatch]) -> list[WindowBatch]:
        """Called on all ranks, with as many batches. Waits for the device, once a window."""
        if not self.is_needed:
            return batches
        sides = ("student", "teacher") if is_sharded(self.teacher) else ("student",)
        places = [(side, kind) for side in sides for kind in MEDIA]
        seen = [{"student": b.examples, "teacher": b.teacher_examples} for b in batches]
        own = [[has_media(batch[side], kind) for side, kind in places] for batch in seen]
        flags = torch.tensor(own, dtype=torch.float32, device=self.accelerator.device)
        counts = self.accelerator.reduce(flags, reduction="sum").tolist()
        result = []
        for batch, has, of_all in zip(batches, own, counts, strict=True):
            due = [p for p, here, n in zip(places, has, of_all, strict=True) if n and not here]
            kinds = {side: [k for s, k in due if s == side] for side in sides}
            rows = {side: [self.example(side, kind) for kind in kinds[side]] for side in sides}
            others = batch.teacher_examples
            if kinds.get("teacher", kinds["student"]) != kinds["student"]:
                others = list(others)  # another list: the sides are made apart
            student, teacher = rows["student"], rows.get("teacher", [])
            result.append(
                replace(batch, teacher_examples=others, unscored=student, teacher_unscored=teacher)
            )
        return result


def has_media(examples: Sequence[Example], kind: str) -> bool:
    return any(getattr(example, kind) for example in examples)


def missing_media(examples: Sequence[Example], unscored: Sequence[Example]) -> list[Example]:
    """One of the unscored examples for each kind that the others have not."""
    kinds = [kind for kind in MEDIA if not has_media(examples, kind)]
    found = (next((e for e in unscored if getattr(e, kind)), None) for kind in kinds)
    return [example for example in found if example is not None]


def save_whole(trainer: "GOLDTrainer", output_dir: str | None) -> None:
    """The final model as from_pretrained reads it, where checkpoints keep each rank's part and the
    Trainer would save nothing.
    """
    if trainer.is_fsdp_enabled:
        kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        if "FULL_STATE_DICT" not in kind:
            state_dict = trainer.accelerator.get_state_dict(trainer.model)
            trainer._save(output_dir, state_dict=state_dict)


def forget_preparation(trainer: "GOLDTrainer") -> None:
    """Called after an evaluation outside of training: what is marked as prepared, there without
    DDP, train() leaves as it is, and every rank would learn from its own rows alone.
    """
    is_apart = trainer.is_in_train or trainer.is_fsdp_enabled
    if trainer.accelerator.use_distributed and not is_apart:
        model: Any = trainer.model
        model._is_accelerate_prepared = False


def refuse_early_evaluation(trainer: "GOLDTrainer") -> None:
    """FSDP and DeepSpeed prepare the weights together with the optimizer, which train() makes."""
    accelerator = trainer.accelerator
    model: Any = trainer.model
    is_fsdp = accelerator.is_fsdp2 and not any(isinstance(m, FSDPModule) for m in model.modules())
    # DeepSpeed can evaluate without an optimizer, but not train after that
    is_deepspeed = trainer.is_deepspeed_enabled and trainer.deepspeed is None
    if is_fsdp or (is_deepspeed and trainer.train_dataset is not None):
        raise ValueError(
            "GOLDTrainer: under FSDP and DeepSpeed evaluate() is expected after train(), got a "
            "model that is not prepared yet; set eval_on_start=True, which evaluates before the "
            "first step, or evaluate without them (DeepSpeed: with train_dataset=None)."
        )
