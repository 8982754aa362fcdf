"""What of a served teacher is here: the norm behind its last layer, and its head.

A server gives what the last layer made. The norm, and the form of the logits, are found by running
the model without its layers, which needs none of its weights. Two tensors or three are then read
from the checkpoint.

N rows, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gold_trainer import loading, models
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict
from gold_trainer.loss_at_head import run_to_head
from gold_trainer.models import StoredHead
from gold_trainer.rendering.collator import Processor
from gold_trainer.sides import Side
from gold_trainer.speed.on_host import with_positions
from gold_trainer.teachers.layer_stream import outermost_lists
from gold_trainer.teachers.served.checkpoint import read_tensors


@dataclass
class Tail:
    norm: nn.Module
    side: Side  # its head is a StoredHead, the form of its logits is measured

    def __call__(self, hidden: Tensor) -> Tensor:  # (N, D) of the last layer, (N, D) at the head
        rows: Tensor = self.norm(hidden)
        return rows.to(self.side.head.weight.dtype)

    def log_probs(self, hidden: Tensor) -> Tensor:  # (N, D) of the last layer -> (N, V)
        """What the teacher says, as the loss will take it."""
        head, form = self.side.head, self.side.form
        logits = (self(hidden) @ head.weight.T).float()
        if head.bias is not None:
            logits = logits + head.bias
        return form(logits)[..., : form.num_entries].log_softmax(-1)


class _Given(nn.Module):
    """Stands in the place of the embeddings: rows of the right width, which nobody reads."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        return torch.zeros(*input_ids.shape, self.width, dtype=self.dtype)


@torch.no_grad()
def read_tail(name: str, processor: Processor, args: GOLDConfig) -> Tail:
    """Read norm and head of the checkpoint, a folder or hub id."""
    model: Any = loading.empty_model(
        name, args.teacher_model_init_kwargs, args.teacher_model_revision
    )
    side = Side.of(model, "teacher", processor, args)
    empty = loading.empty_model(name, args.teacher_model_init_kwargs, args.teacher_model_revision)
    norm = _find_norm(model, side)
    names = {module: path for path, module in model.named_modules()}
    head: Any = side.head
    own = {f"{names[norm]}.{n}": n for n, _ in norm.named_parameters()}
    heads = {f"{names[head]}.{n}": n for n, _ in head.named_parameters()}
    embeddings = _name_of_embeddings(empty)
    tensors = read_tensors(
        name,
        empty,
        {*own, *heads, embeddings},
        loading.hub_options(args.teacher_model_init_kwargs, args.teacher_model_revision),
    )
    weight = f"{names[head]}.weight"
    if weight not in tensors and models.base_model(empty).config.tie_word_embeddings:
        tensors[weight] = tensors[embeddings]  # one tensor under one name
    for wanted in (*own, *heads):
        if wanted not in tensors:
            raise _refusal(name, f"{wanted} in its checkpoint, got none")
        if not tensors[wanted].is_floating_point() or tensors[wanted].itemsize < 2:
            raise _refusal(name, f"{wanted} in 16 or 32 bits, got {tensors[wanted].dtype}")
    dtype = _dtype_of(args)
    norm.load_state_dict({n: tensors[path] for path, n in own.items()}, assign=True)
    parts = {n: tensors[path].to(dtype or tensors[path].dtype) for path, n in heads.items()}
    return Tail(norm, replace(side, head=StoredHead(parts["weight"], parts.get("bias"))))


def _dtype_of(args: GOLDConfig) -> torch.dtype | None:
    """None: that of the files."""
    given = as_dict(args.teacher_model_init_kwargs)
    dtype = given.get("dtype", given.get("torch_dtype"))
    if dtype in (None, "auto"):
        return None
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def _name_of_embeddings(model: Any) -> str:
    weight = model.get_input_embeddings().weight
    named = model.named_parameters(remove_duplicate=False)
    return next(name for name, parameter in named if parameter is weight)


def _find_norm(model: Any, side: Side) -> nn.Module:
    """The module whose output is what the head gets; measures the form of the logits as well."""
    name = type(models.base_model(model)).__name__
    width = side.head.weight.shape[1]
    for _, layers in outermost_lists(model):
        del layers[:]
    calls: list[tuple[nn.Module, Tensor]] = []
    at_head: list[Tensor] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            calls.append((module, output))

    def take(hidden: Tensor) -> Tensor:
        at_head.append(hidden)
        return hidden.sum()

    ids = torch.zeros(1, 2, dtype=torch.int64)
    try:
        model.set_input_embeddings(_Given(width, side.head.weight.dtype))
        decoder = model.get_decoder()
        _make_real(model, side.head)
        hooks = [m.register_forward_hook(note) for m in decoder.modules() if not [*m.children()]]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = with_positions(models.base_model(model), models.forward_inputs(model, given))
        run_to_head(model.eval(), model, side.place, side.form, inputs, take)
        for hook in hooks:
            hook.remove()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError) as error:
        raise _refusal(name, f"layers that can be left out, got {error}") from error
    last = [module for module, output in calls if _is_same(output, at_head[-1])]
    if not last or not [*last[-1].parameters()]:
        raise _refusal(name, "a norm as the last that comes before its head, got none")
    return last[-1]


def _make_real(model: nn.Module, head: Any) -> None:
    """What is left of it beside layers, embeddings and head: norms, tables of positions, and what
    stands before the pictures, whose device some models take for their own.
    """
    for module in model.modules():
        if module is head or not any(tensor.is_meta for tensor in _own(module)):
            continue
        module.to_empty(device="cpu", recurse=False)
        for tensor in _own(module):
            tensor.zero_()


def _own(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _is_same(output: Tensor, hidden: Tensor) -> bool:
    """Some models slice what they give their head."""
    return output.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()


def _refusal(name: str, what: str) -> ValueError:
    return ValueError(
        f"GOLDTrainer: a served teacher must have {what} of {name}; leave teacher_model_server_url "
        "out, or choose another teacher."
    )
