"""Frozen vision towers of Qwen-VL: without a graph of gradients, and recorded as CUDA graphs.

A tower is some thirty layers over few patches. A device computes one in less time than the host
takes to launch it, and at the beginning of a step it has nothing else to do. What a tower launches
follows from the sizes of its pictures alone. So it is recorded when the same sizes come twice in a
row: a step with these sizes copies its patches and launches the recording. Other sizes run as they
always do.

A recording keeps memory for the tower's hidden states. Towers share it, as they run one after the
other.

T patches, D entries of a patch.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gold_kernels.engine.logit_form import forward_is
from gold_trainer.data.row_errors import first_line
from gold_trainer.speed import on_host
from gold_trainer.speed.compiling import RECORDERS
from gold_trainer.speed.media import TYPES
from gold_trainer.speed.segments import drops_out

logger = logging.getLogger(__name__)

SIZES = "grid_thw"  # of a tower's pictures: frames, rows and columns of patches
PLAIN = (bool, int, float, str, type(None))


class Recording:
    """What a function of no arguments launches on the device, to be launched again at once."""

    def __init__(self, function: Callable[[], Any], pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # other threads pin memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function()

    def replay(self) -> None:
        self.graph.replay()


class Call(NamedTuple):
    """A call of a tower, as it can be recorded."""

    key: tuple[Any, ...]  # calls with the same one launch the same
    patches: Tensor  # (T, D)
    function: Callable[[Tensor], Any]  # of patches


class Pool:
    """Memory of recordings."""

    @cached_property
    def handle(self) -> Any:
        return torch.cuda.graph_pool_handle()


class Tower:
    def __init__(self, name: str, module: nn.Module, pool: Pool) -> None:
        self.name, self.module, self.pool = name, module, pool
        self.parts = list(module.modules())
        self.weights = list(module.parameters())
        self.holders = [part for part in self.parts if part._buffers]
        has_chance = any(drops_out(part) or _is_dropout(part) for part in self.parts)
        has_switch = any(hasattr(part, "_disable_adapters") for part in self.parts)  # of peft
        self.can_be_recorded = _is_here(self.weights[0].device) and not (has_chance or has_switch)
        self.last_key: tuple[Any, ...] | None = None
        self.key: tuple[Any, ...] | None = None  # of what is recorded
        self.recording: Recording
        self.patches: Tensor  # (T, D) from where the recording reads

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's forward."""
        forward = partial(type(self.module).forward, self.module)
        if not self._is_frozen((*args, *kwargs.values())):
            return forward(*args, **kwargs)
        with torch.no_grad():
            call = self._call(forward, args, kwargs) if self.can_be_recorded else None
            if call is None:
                return forward(*args, **kwargs)
            if call.key == self.key:
                self.patches.copy_(call.patches)
                self.recording.replay()
                return tree_map(_copy, self.recording.output)
            is_again, self.last_key = call.key == self.last_key, call.key
            if self.key is None and is_again:
                return self._record(call)
            return call.function(call.patches)

    def _is_frozen(self, values: tuple[Any, ...]) -> bool:
        """Nobody needs a gradient, and nobody looks at what is inside."""
        inputs = (value for value in values if isinstance(value, Tensor))
        return not (
            any(tensor.requires_grad for tensor in (*self.weights, *inputs))
            or any(part._forward_pre_hooks or _others(part) for part in self.parts)
        )

    def _call(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """None: what it does does not follow from what is known on the host."""
        given = inspect.signature(forward).bind(*args, **kwargs).arguments
        name, patches = next(iter(given.items()))
        sizes = given.get(SIZES)
        host = None if sizes is None else on_host.host_of(sizes)
        others = given.get("kwargs", {})
        config: Any = self.module.config
        implementation = config._attn_implementation or ""
        if host is None or not isinstance(patches, Tensor) or "flash" not in implementation:
            return None  # other attention reads lengths of pictures from the device
        if not all(isinstance(value, PLAIN) for value in others.values()):
            return None
        key = (
            *(patches.shape, patches.dtype, str(host.tolist()), tuple(sorted(others.items()))),
            *(implementation, torch.backends.cuda.cudnn_sdp_enabled()),
            *(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
            tuple(weight.data_ptr() for weight in self.weights),
            # a move of the module makes new ones of them
            tuple(one.data_ptr() for part in self.holders for one in part.buffers(recurse=False)),
        )

        def function(own: Tensor) -> Any:
            return forward(**{name: own, SIZES: sizes}, **others)

        return Call(key, patches, function)

    def _record(self, call: Call) -> Any:
        """The output of this call, and a recording of it that has given the same."""
        self.patches = call.patches.clone()
        function = partial(call.function, self.patches)
        answers: list[Any] = []
        with on_host.answers_kept(answers):
            output = function()
        try:
            with on_host.answers_given(answers):
                self.recording = Recording(function, self.pool.handle)
            self.recording.replay()
            if _are_equal(self.recording.output, output):
                self.key, self.answers = call.key, answers  # which the recording reads
            else:
                self._give_up("its outputs differ from those of the tower")
        except (RuntimeError, ValueError) as error:
            self._give_up(first_line(error))
        return output

    def _give_up(self, reason: str) -> None:
        self.can_be_recorded = False
        del self.patches
        vars(self).pop("recording", None)
        logger.warning(
            "GOLDTrainer: %s runs without a CUDA graph, which costs time: %s", self.name, reason
        )


class Towers:
    """Within its context towers of student and teacher do not keep what no gradient needs."""

    def __init__(self, sides: Mapping[str, nn.Module | None], *, can_be_recorded: bool) -> None:
        self.sides, self.can_be_recorded = sides, can_be_recorded

    @cached_property
    def all(self) -> list[Tower]:
        """Asked when weights are where they will be."""
        found: dict[int, Tower] = {}
        pool = Pool()
        for side, model in self.sides.items():
            for module in () if model is None else model.modules():
                if id(module) not in found and _is_tower(module):
                    name = f"{type(module).__name__} of the {side}"
                    found[id(module)] = Tower(name, module, pool)
        for tower in found.values():
            tower.can_be_recorded &= self.can_be_recorded
        return list(found.values())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around forward and backward pass of a micro-batch."""
        with ExitStack() as stack:
            for tower in self.all:
                if "forward" not in vars(tower.module):  # else somebody has put another into it
                    stack.enter_context(forward_is(tower.module, tower.run))
            yield


def _is_tower(module: nn.Module) -> bool:
    kind = type(module)
    is_known = any(own.__module__.rpartition(".modeling_")[2] in TYPES for own in kind.__mro__)
    has_config = hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
    return is_known and has_config and SIZES in inspect.signature(kind.forward).parameters


def _is_here(device: torch.device) -> bool:
    """Whether it is the GPU of this process."""
    return device.type == "cuda" and device.index == torch.cuda.current_device()


def _is_dropout(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0


def _others(part: nn.Module) -> bool:
    """Whether it has hooks but those that transformers leaves."""
    hooks = part._forward_hooks.values()
    return any(getattr(hook, "__module__", None) != RECORDERS for hook in hooks)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _are_equal(one: Any, other: Any) -> bool:
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    known = all(isinstance(value, (Tensor, *PLAIN)) for pair in pairs for value in pair)
    return known and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
