"""A call on the processes of a group: whose slices its heads are, and whether all call alike.

N scored rows of a side, D hidden size, V vocabulary, R processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gold_kernels.engine.comparison import (
    NUM_FACTS,
    REFUSED,
    SIDES,
    Comparison,
    Heads,
    Result,
)
from gold_kernels.engine.options import (
    CallTensors,
    LinearOptions,
    Options,
    resolve_options,
)
from gold_kernels.engine.slices import Slices

if TYPE_CHECKING:  # a build without distributed has no such class
    from torch.distributed import ProcessGroup


Given = TypeVar("Given", Tensor, Tensor | None)


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


def own_rows(function: str, name: str, tensor: Given) -> Given:  # (N, ...)
    """The local tensor of what is the same on all processes, out of a DTensor too."""
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


def refuse_slices(function: str, options: Options, **tensors: Tensor | None) -> None:
    """Refuse slices for losses whose heads must be whole, and which have no process_group."""
    for name, tensor in {**tensors, **options._asdict()}.items():
        if is_sharded(tensor):
            raise ValueError(
                f"{function}: heads, hidden states and logits must be whole, got a DTensor as "
                f"{name}; pass its full_tensor(), or use fused_linear_jsd, which takes slices of a "
                "vocabulary."
            )


def with_slices(
    function: str,
    heads: Heads,
    options: Options,
    tensors: Sequence[Tensor | None],  # floats of the rows, two at most
    settings: object,  # of the loss, and whether there are metrics
    run: Callable[..., Result],  # of heads that know the slices of all processes
    ids: Sequence[Tensor] = (),  # int64 of the call beside labels
) -> Result:
    """What run returns. Every process calls this; each of them raises what one of them would have
    to. run may be called twice: see Comparison.
    """
    group = options.process_group
    if group is None:
        return run(*heads)
    slices = Slices(group.group_name, (1,) * dist.get_world_size(group))
    comparison = Comparison(function, slices, heads, options, tensors, settings, ids)
    return comparison.run(lambda sizes: run(*_in_slices(heads, slices, sizes)))


def _in_slices(heads: Heads, slices: Slices, sizes: Sequence[Sequence[int]]) -> Heads:
    return tuple(
        head._replace(slices=slices._replace(sizes=tuple(own)))
        for head, own in zip(heads, sizes, strict=True)
    )


@contextmanager
def told(group: Any, hidden: Any, weight: Any) -> Iterator[None]:
    """What is checked before with_slices may raise on this process alone: then the others, which
    wait in with_slices, learn of it. group is the process group that was given, if any.
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
    """Stands in with_slices' place: this process raises an error that the others may not see,
    perhaps because something is no tensor.
    """
    if group is None and is_sharded(weight) and weight.device_mesh.ndim == 1:
        group = weight.device_mesh.get_group()
    if group is not None and is_member(group):
        # where others have theirs: what is wrong here may be the device of one, or that none is
        kinds = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
        devices = [one.device for one in (weight, hidden) if isinstance(one, Tensor)]
        devices = [device for device in devices if device.type in kinds]
        device = devices[0] if devices else torch.device(kinds[0])
        slices = Slices(group.group_name, (1,) * dist.get_world_size(group))
        facts = torch.zeros(len(slices.sizes), NUM_FACTS, dtype=torch.float64, device=device)
        facts[slices.rank] = REFUSED
        slices.sum_(facts)
