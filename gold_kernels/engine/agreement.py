"""A call on the processes of a group: whose slices its heads are, and whether all call alike.

N scored rows of a side, D hidden size, V vocabulary, R processes.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from gold_kernels.engine.chunk_plan import float_dtype
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.options import (
    CallTensors,
    LinearOptions,
    Options,
    resolve_options,
)
from gold_kernels.engine.slices import Slices

if TYPE_CHECKING:  # a build without distributed has no such class
    from torch.distributed import ProcessGroup

# Of the norm of what is summed: rounding that differs between processes moves a sum by 1e-3 of it,
# other rows by about as much as it is.
MAX_GAP = 1e-2
NUM_FACTS, REFUSED = 26, -1.0
NUM_FLOATS = 5  # of the samples that processes compare; behind them are whole numbers
SAMPLE_ENTRIES = 64  # of a slice, by which it is told from another
SIDES = ("student", "teacher")
Heads = tuple[LinearHead, ...]  # the student's and, if it has one, the teacher's


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, of which there are none without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # whoever has one has imported it

    return isinstance(tensor, DTensor)


def own_part(
    function: str, name: str, tensor: Any, is_replicated: bool
) -> tuple[Tensor, "ProcessGroup"]:
    """The local tensor of a DTensor, and its group: hidden states and weights of rows are
    replicated, heads sharded over the vocabulary.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    is_known = placements[0].is_replicate() if is_replicated else placements[0].is_shard(0)
    if mesh.ndim != 1 or not is_known:
        expected = "Replicate()" if is_replicated else "Shard(0), over the vocabulary,"
        raise ValueError(
            f"{function}: {name} as a DTensor must be {expected} on a mesh of one dimension, got "
            f"{tuple(placements)} on one of {mesh.ndim}; redistribute it, or pass "
            f"{name}.full_tensor()."
        )
    return tensor.to_local(), mesh.get_group()


def own_heads(function: str, heads: Heads, options: Options) -> tuple[Heads, Options]:
    """Heads with this process' tensors in place of DTensors, whose group becomes process_group."""
    group = options.process_group
    if group is not None:
        check_group(function, group)
    kinds = {name: is_sharded(head.weight) for name, head in zip(SIDES, heads, strict=False)}
    if len(set(kinds.values())) > 1 and group is None:
        sharded, plain = sorted(kinds, key=lambda side: not kinds[side])
        raise ValueError(
            f"{function}: {plain}_weight must be in slices like {sharded}_weight, a DTensor, got a "
            "plain tensor; distribute it with Shard(0) on the same mesh, or pass "
            f"{sharded}_weight.full_tensor()."
        )
    result = []
    for side, head in zip(SIDES, heads, strict=False):
        parts = [head.hidden, head.weight, head.bias]
        for place, field in enumerate(("hidden", "weight", "bias")):
            tensor, name = parts[place], f"{side}_{field}"
            if not is_sharded(tensor):
                continue
            parts[place], own = own_part(function, name, tensor, field == "hidden")
            if field == "hidden":
                continue
            group = own if group is None else group
            ranks = [dist.get_process_group_ranks(one) for one in (own, group)]
            if ranks[0] != ranks[1]:
                raise ValueError(
                    f"{function}: both heads must be in slices over one group of processes, got "
                    f"{name} over ranks {ranks[0]} beside {ranks[1]}; distribute it on the same "
                    "mesh."
                )
        hidden, weight, bias = parts
        assert hidden is not None and weight is not None, "only a bias may be None"
        result.append(head._replace(hidden=hidden, weight=weight, bias=bias))
    labels = own_rows(function, "labels", options.labels)
    label_weights = own_rows(function, "label_weights", options.label_weights)
    options = options._replace(labels=labels, label_weights=label_weights, process_group=group)
    return tuple(result), options


def own_rows(function: str, name: str, tensor: Tensor | None) -> Tensor | None:  # (N,)
    """What is the same on all processes, out of a DTensor too."""
    return own_part(function, name, tensor, True)[0] if is_sharded(tensor) else tensor


def is_member(group: Any) -> bool:
    is_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
    return is_group and dist.get_rank(group) >= 0


def check_group(function: str, group: Any) -> None:
    if is_member(group):
        return
    is_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
    # what new_group gives to a process that it leaves out
    is_other = is_group or (dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER)
    got = "a group without it" if is_other else type(group).__name__
    raise ValueError(
        f"{function}: process_group must be a process group of this process, over which both heads "
        f"are in slices, got {got}; pass torch.distributed.group.WORLD or mesh.get_group(), on its "
        "ranks alone."
    )


def refuse_slices(function: str, *tensors: Tensor) -> None:
    """For losses whose heads must be whole, and which have no option process_group."""
    if any(is_sharded(tensor) for tensor in tensors):
        raise ValueError(
            f"{function}: heads, hidden states and logits must be whole, got a DTensor; pass its "
            "full_tensor(), or use fused_linear_jsd, which takes slices of a vocabulary."
        )


def join_slices(
    function: str,
    heads: Heads,
    options: Options,
    tensors: Sequence[Tensor | None],  # floats of the rows, two at most
    settings: object,  # of the loss, and whether there are metrics
    ids: Sequence[Tensor] = (),  # int64 of the call beside labels
) -> Heads:
    """Heads that know the slices of all processes. Every process calls this; each of them raises
    what one of them would have to. Waits for the device.
    """
    group = options.process_group
    if group is None:
        return heads
    slices = Slices(group.group_name, (1,) * dist.get_world_size(group))
    facts = slices.gather(_facts(heads, options, tensors, settings, ids)).tolist()
    _compare(function, facts)
    sizes = [tuple(int(own[place]) for own in facts) for place in range(len(heads))]
    return tuple(
        head._replace(slices=slices._replace(sizes=own))
        for head, own in zip(heads, sizes, strict=True)
    )


@contextmanager
def told(group: Any, hidden: Any, weight: Any) -> Iterator[None]:
    """What is checked before join_slices may raise on this process alone: then the others, which
    wait in join_slices, learn of it. group is the process group that was given, if any.
    """
    try:
        yield
    except Exception:
        _tell_refusal(group, hidden, weight)
        raise


def linear_options(
    function: str,
    given: Mapping[str, Any],
    hidden: Tensor,
    weight: Any,
    known: type = LinearOptions,
    **flags: bool,
) -> Options:
    """resolve_options of a call of linear heads."""
    with told(given.get("process_group"), hidden, weight):
        return resolve_options(function, given, known, **flags)


def module_options(
    function: str, own: Mapping[str, Any], tensors: Mapping[str, Any], hidden: Tensor, weight: Any
) -> Options:
    """Options of a module and the tensors of its call."""
    with told(own.get("process_group"), hidden, weight):
        resolve_options(function, tensors, CallTensors)
    return Options(**own, **tensors)


def _tell_refusal(group: Any, hidden: Any, weight: Any) -> None:
    """In join_slices' place: this process raises an error that the others may not see, perhaps
    because something is no tensor.
    """
    if group is None and is_sharded(weight) and weight.device_mesh.ndim == 1:
        group = weight.device_mesh.get_group()
    if group is not None and is_member(group):
        # where others have theirs: what is wrong here may be the device of one, or that none is
        kinds = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
        devices = [one.device for one in (weight, hidden) if isinstance(one, Tensor)]
        devices = [device for device in devices if device.type in kinds]
        device = devices[0] if devices else torch.device(kinds[0])
        facts = torch.full((NUM_FACTS,), REFUSED, dtype=torch.float64, device=device)
        Slices(group.group_name, (1,) * dist.get_world_size(group)).gather(facts)


def _facts(
    heads: Heads,
    options: Options,
    tensors: Sequence[Tensor | None],
    settings: object,
    ids: Sequence[Tensor],
) -> Tensor:  # (NUM_FACTS,) float64
    """Both sizes; a number of all that must be equal; sums of some entries of either slice, and of
    what rows have.
    """
    student, teacher = heads[0], heads[1] if len(heads) > 1 else None
    device = student.hidden.device
    joined = torch.cat([part.flatten().to(device) for part in ids]) if ids else None
    is_live = _live_rows(student.num_rows, tensors[0], options)
    samples = [None if head is None else head.hidden for head in (student, teacher)]
    samples += [*tensors, *[None] * (2 - len(tensors))]
    samples += [options.label_weights, options.labels, joined]
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (student.hidden, student.weight, student.bias)
    ]
    plain = [
        (name, value)
        for name, value in options._asdict().items()
        if name != "process_group" and not isinstance(value, Tensor)
    ]
    shapes = [None if t is None else (tuple(t.shape), t.dtype) for t in samples]
    dtypes = [(head.weight.dtype, head.bias is None) for head in heads]
    same = zlib.crc32(repr((needs, plain, shapes, dtypes, settings)).encode())
    sizes = [head.weight.shape[0] for head in heads] + [0] * (2 - len(heads))
    facts = [student.hidden.new_tensor([*sizes, same], dtype=torch.float64)]
    slices = [_sample_sum(head.weight) for head in heads]
    facts.append(torch.stack([*slices, *slices][:2]))  # without a teacher the student's twice
    for kind, is_whole in ((samples[:NUM_FLOATS], False), (samples[NUM_FLOATS:], True)):
        facts.append(_sums(kind, is_live, is_whole, facts[0]).flatten())
    return torch.cat(facts)


def _sample_sum(weight: Tensor) -> Tensor:  # (V_r, D) -> ()
    """Of some entries, all over the slice: two slices that differ do not share them. A sum of all
    would read the head, and make float64 numbers of it.
    """
    step = max(1, weight.shape[0] // SAMPLE_ENTRIES)
    return weight.detach()[::step].sum(dtype=float_dtype(weight))


def _live_rows(
    num_rows: int, row_weights: Tensor | None, options: Options
) -> Tensor | None:  # (N,); None: all, or groups of rows have the weights
    """Other rows may hold anything, and not the same on all processes."""
    if row_weights is None or row_weights.shape != (num_rows,):
        return None
    is_live = row_weights != 0
    if options.labels is not None:
        weights = options.label_weights
        is_live = is_live | ((options.labels >= 0) if weights is None else (weights != 0))
    return is_live


def _sums(
    samples: Sequence[Tensor | None], is_live: Tensor | None, is_whole: bool, like: Tensor
) -> Tensor:  # (number of samples, 3), those that there are before the others
    """Two sums of each, the second of which sees the order, and the norm; of whole numbers, which
    must be equal, 0. All at once: the device waits for each launch.
    """
    rows = [_row_numbers(one.detach(), is_live) for one in samples if one is not None]
    size = max(map(len, rows), default=0)
    if not size:
        return like.new_zeros(len(samples), 3)
    pads = [one if len(one) == size else pad(one, (0, size - len(one))) for one in rows]
    stacked = torch.stack(pads).double().nan_to_num_(0.0, 0.0, 0.0)
    if is_whole:
        factors = torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
    else:
        places = torch.linspace(0, size - 1, size, device=like.device, dtype=like.dtype)
        factors = places.mul_(1.3).cos_()
    norms = stacked.new_zeros(len(rows)) if is_whole else stacked.norm(dim=1)
    sums = torch.stack([stacked.sum(1), stacked @ factors, norms], dim=1)
    return sums if len(rows) == len(samples) else pad(sums, (0, 0, 0, len(samples) - len(rows)))


def _row_numbers(tensor: Tensor, is_live: Tensor | None) -> Tensor:  # (N, D) or (N,) -> (N,)
    """A number of each row: of hidden states the sum."""
    rows = tensor.flatten()
    if tensor.ndim == 2 and tensor.is_floating_point():
        rows = tensor.sum(1, dtype=float_dtype(tensor))
    elif tensor.dtype.itemsize < 4:  # no stack of 16-bit numbers with others
        rows = rows.float()
    if is_live is not None and is_live.shape == rows.shape:
        rows = torch.where(is_live, rows, 0)
    return rows


def _compare(function: str, facts: list[list[float]]) -> None:
    """Facts of all processes, by rank."""
    first, others = facts[0], list(enumerate(facts))[1:]
    refused = [rank for rank, own in enumerate(facts) if own[0] == REFUSED]
    if refused:
        raise ValueError(
            f"{function}: every process of the group must make a call that fits, got errors on "
            f"ranks {refused}; they say what to do."
        )
    differ = [rank for rank, own in others if own[2] != first[2]]
    if differ:
        raise ValueError(
            f"{function}: every process of the group must make the same call, got other options, "
            f"shapes, dtypes or needed gradients on ranks {differ} than on rank 0; pass the same "
            "on all of them. What FSDP has in parts are no slices: pass weight.full_tensor()."
        )
    differ = [rank for rank, own in others if _has_other_rows(own, first)]
    if differ:
        raise ValueError(
            f"{function}: hidden states, weights, labels and ids of rows must be the same on all "
            f"processes of the group, got other ones on ranks {differ} than on rank 0; a group "
            "shares its batch. What FSDP has in parts are no slices: pass weight.full_tensor()."
        )
    for place, side in enumerate(SIDES):
        size, total = first[place], first[3 + place]
        is_same = [own[place] == size and own[3 + place] == total for _, own in others]
        if others and total and all(is_same):
            raise ValueError(
                f"{function}: {side}_weight must be a slice of its own on each process of the "
                "group, got the same on all; pass weight.tensor_split(size)[rank], or whole heads "
                "without process_group."
            )


def _has_other_rows(own: list[float], first: list[float]) -> bool:
    for start in range(5, len(first), 3):
        *sums, norm = own[start : start + 3]
        *expected, other_norm = first[start : start + 3]
        limit = MAX_GAP * max(norm, other_norm)
        if any(abs(a - b) > limit for a, b in zip(sums, expected, strict=True)):
            return True
    return False
