"""Hidden states where a trainer's code expects logits.

B sequences, L positions, N scored rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gold_kernels.engine.logit_form import LogitForm, forward_is, probe_rows, solve_form


class NotTakenError(Exception):
    """Why a model's logits cannot be left out."""


class PendingLogits:
    """Logits that were not made: what a head was given, and the head."""

    def __init__(self, hidden: Tensor, head: nn.Linear, form: LogitForm, dtype: torch.dtype | None):
        self.hidden = hidden  # (B, L, D)
        self.head = head
        self.form = form
        self.autocast_dtype = dtype  # in which the head would have been computed; None: its own

    def __getitem__(self, index: Any) -> "PendingLogits | Tensor":
        """Some sequences and positions with all entries; any other part is made."""
        if isinstance(index, tuple) and len(index) == 3 and index[2] == slice(None):
            return PendingLogits(self.hidden[index], self.head, self.form, self.autocast_dtype)
        return self.logits()[index]

    def logits(self) -> Tensor:  # (B, L, V)
        """All of them, as the model makes them."""
        with self.precision():
            return self.form(self.head(self.hidden)[..., : self.form.num_entries])

    def precision(self) -> torch.autocast:
        """The autocast of the model's forward pass, which has ended where a loss is computed."""
        device = self.hidden.device.type
        return torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def rows(self, positions: Tensor) -> Tensor:  # (N,) flat positions -> (N, D)
        rows = self.hidden.flatten(0, 1).index_select(0, positions.to(self.hidden.device))
        return rows.to(self.head.weight.device)


@contextmanager
def heads_at_hand(student: PendingLogits, teacher: PendingLogits) -> Iterator[None]:
    """Within it heads are whole, and in the precision of the model's forward pass."""
    heads = student.head, teacher.head
    with student.precision(), gathered(*(t for head in heads for t in (head.weight, head.bias))):
        yield


@contextmanager
def gathered(*parameters: Tensor | None) -> Iterator[None]:
    """Parameters that ZeRO-3 has sharded, as trl gathers them."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    gather: Any = maybe_gather_lm_head_ctx
    with gather(*parameters):
        yield


def head_options(student: PendingLogits, teacher: PendingLogits) -> dict[str, Any]:
    """Biases, scales and softcaps of both heads, as options of a fused loss."""
    sides = student, teacher
    return {
        "student_bias": _first_entries(student, student.head.bias),
        "teacher_bias": _first_entries(teacher, teacher.head.bias),
        "logit_scale": tuple(side.form.scale for side in sides),
        "final_logit_softcapping": tuple(side.form.softcap for side in sides),
    }


def head_weight(logits: PendingLogits) -> Tensor:  # (V, D)
    weight = _first_entries(logits, logits.head.weight)
    assert weight is not None, "a head has a weight"
    return weight


def _first_entries(logits: PendingLogits, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    tensor = whole(tensor)
    entries = logits.form.num_entries
    return tensor if entries is None else tensor[:entries]


def whole(tensor: Tensor) -> Tensor:
    """A sharded parameter gathered, as trl gathers those of FSDP2."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


_FORMS: WeakKeyDictionary[nn.Module, LogitForm] = WeakKeyDictionary()  # measured once a model


class HiddenModel:
    """Called in the place of a model; the logits of its outputs are PendingLogits.

    The head is not called. The first call measures what the model makes of its head's output:
    the head returns known numbers, later a single zero.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        self.model = model  # without its wrapper
        self.call = call  # the model's forward, through a wrapper or not
        self.place, self.head = head_of(model)

    def eval(self) -> None:
        self.model.eval()

    def __call__(self, **inputs: Any) -> Any:
        seen: list[tuple[Tensor, torch.dtype | None]] = []
        form = _FORMS.get(self.model)
        try:
            with self._head_left_out(seen, is_known=form is not None):
                output = self.call(**inputs)
        except (IndexError, RuntimeError, TypeError) as error:
            if not seen or isinstance(error, torch.OutOfMemoryError):
                raise  # the model's own
            raise NotTakenError(f"a forward that cannot go on from its head ({error})") from error
        if len(seen) != 1:
            raise NotTakenError(f"a forward that calls its head {len(seen)} times")
        hidden, dtype = seen[0]
        if hidden.shape[:-1] != inputs["input_ids"].shape:
            raise NotTakenError(f"hidden states of shape {tuple(hidden.shape)} at its head")
        if form is None:
            probe = probe_rows(self.head.out_features, hidden.device)
            solved = solve_form(probe, output.logits)
            if isinstance(solved, str):
                raise NotTakenError(solved)
            form = _FORMS[self.model] = solved
        output.logits = PendingLogits(hidden, self.head, form, dtype)
        return output

    @contextmanager
    def _head_left_out(
        self, seen: list[tuple[Tensor, torch.dtype | None]], is_known: bool
    ) -> Iterator[None]:
        def at_head(hidden: Tensor) -> Tensor:
            device = hidden.device
            is_autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if is_autocast else None
            seen.append((hidden, dtype))
            if is_known:
                return torch.zeros(1, 1, 1, device=device)
            return probe_rows(self.head.out_features, device)

        with forward_is(self.place, at_head):
            yield


def head_of(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The module that the model calls, and the layer whose weight makes the logits."""
    from accelerate.utils import is_peft_model

    base: Any = model
    if is_peft_model(model):
        base = base.get_base_model()
    place = base.get_output_embeddings()
    head = place
    if is_peft_model(model):
        from peft.utils import ModulesToSaveWrapper

        if isinstance(place, ModulesToSaveWrapper):
            head = place.modules_to_save[place.active_adapters[0]]
    if not isinstance(head, nn.Linear):
        raise NotTakenError(f"the head {type(head).__name__}, which is no nn.Linear")
    weight = head.weight
    is_plain = type(weight) is nn.Parameter or isinstance(weight, DTensor)
    if not is_plain or weight.is_meta or not weight.is_floating_point():
        raise NotTakenError(f"a head whose weight is {type(weight).__name__} {weight.dtype}")
    return place, head
