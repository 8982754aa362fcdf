"""Layers of student and teacher compiled for a training step: one piece of code for all of a kind.

Between its matrix products a layer runs dozens of small kernels, each of which the host has to
launch and which reads and writes all of the hidden states; compiled they become a few. A model as a
whole would be compiled layer by layer, and again for every shape of everything around them; a layer
takes seconds, and its code serves the others of its list. What stands around the layers (hooks of
FSDP, embeddings, positions, pictures, the head with the loss) runs as it always does.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo import callback as compiler_events
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from gold_kernels.engine.logit_form import forward_is
from gold_trainer import models, sharding
from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import first_line
from gold_trainer.speed.compile_note import CompileNote
from gold_trainer.speed.replacing import replaced
from gold_trainer.speed.segments import (
    OF_SEGMENTS,
    STOCK,
    attention_is,
    can_attend,
    configs_of,
    dtype_of_products,
)
from gold_trainer.teachers.layer_stream import outermost_lists

logger = logging.getLogger(__name__)

BACKEND: str | Callable = "inductor"
DYNAMIC: bool | None = None  # sizes are fixed until a second one comes
# Pieces of code of one kind of layers: with and without gradients, lengths that are fixed and that
# are not, masks or none, attention that slides.
LIMIT = 16  # at least: a user's own may be higher
RECORDERS = "transformers.utils.output_capturing"


class LayerKind:
    """Layers of one class and one list: they differ in their weights alone."""

    def __init__(self, name: str, layers: list[nn.Module], configs: list[Any]) -> None:
        self.name, self.layers = name, layers
        self.parts = [part for layer in layers for part in layer.modules() if part is not layer]
        self.configs = configs  # of layers whose attention is one of segments
        self.is_compiled = True
        # torch keeps what it compiles by the code object: one of our own, which no other kind fills
        self.compiled: Callable = torch.compile(
            _own_copy(name), backend=BACKEND, dynamic=DYNAMIC, fullgraph=True
        )

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward. Its hooks are around it, its gradient checkpointing is in it."""
        if self.is_compiled:
            try:
                return self.compiled(layer, *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may raise
                self._give_up(error)
        with attention_is(STOCK, self.configs):
            return type(layer).forward(layer, *args, **kwargs)

    def _give_up(self, error: Exception) -> None:
        """Run without the compiler from now on. An error of the layer's own comes again without
        it.
        """
        self.is_compiled = False
        reason = first_line(error)
        if isinstance(error, FailOnRecompileLimitHit):
            reason = (
                f"its layers need more than {torch._dynamo.config.recompile_limit} pieces of code, "
                "as hooks or settings differ from layer to layer or from step to step; raise "
                "torch._dynamo.config.recompile_limit, or set compile_models='off'."
            )
        logger.warning(
            "GOLDTrainer: %s runs without being compiled, which costs time: %s", self.name, reason
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(attention_is(OF_SEGMENTS, self.configs))
            for part in self.parts:
                if part._forward_hooks:
                    stack.enter_context(_without_recorders(part))
            for layer in self.layers:
                stack.enter_context(forward_is(layer, partial(self.run, layer)))
            yield


class CompiledStep:
    """Within its context layers are compiled. Rollouts, evaluations and files are outside of it."""

    def __init__(
        self,
        args: GOLDConfig,
        sides: Mapping[str, nn.Module | None],
        note: CompileNote | None = None,
    ) -> None:
        self.args, self.sides = args, sides
        self.note = note or CompileNote()
        self.seconds = 0.0  # of compiling, since they were told

    @cached_property
    def kinds(self) -> list[LayerKind]:
        """Asked when weights are where they will be."""
        kinds: list[LayerKind] = []
        seen: set[int] = set()
        for side, model in self.sides.items() if is_regional(self.args) else ():
            if model is None or id(model) in seen:  # elsewhere; the student's own weights
                continue
            seen.add(id(model))
            reason = _reason_against(model, self.args, side)
            if reason is None:
                kinds += _kinds_of(side, model, self.args)
            else:
                logger.warning(
                    "GOLDTrainer: the %s's layers run without being compiled: %s.", side, reason
                )
        return kinds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around forward and backward pass of a micro-batch."""
        kinds = [kind for kind in self.kinds if kind.is_compiled]
        if not kinds:
            yield
            return
        with ExitStack() as stack:
            limit = max(LIMIT, torch._dynamo.config.recompile_limit)
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit))
            # a layer's code is no other's whose parts have hooks, nor its own once they have some
            stack.enter_context(torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))
            stack.enter_context(self._timed())
            for kind in kinds:
                stack.enter_context(kind.installed())
            yield
        self._tell()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = 0.0

        def start(_: Any) -> None:
            nonlocal started
            started = time.perf_counter()
            self.note.begin()

        def end(_: Any) -> None:
            self.seconds += time.perf_counter() - started

        events = compiler_events.callback_handler
        events.register_start_callback(start)
        events.register_end_callback(end)
        try:
            yield
        finally:
            if start in events.start_callbacks:  # else somebody has reset the compiler
                events.remove_start_callback(start)
                events.remove_end_callback(end)

    def _tell(self) -> None:
        """Say so where a step has compiled something: the first ones, and one with a new kind of
        batch.
        """
        if self.seconds > 0 and self.args.process_index == 0:
            names = ", ".join(kind.name for kind in self.kinds if kind.is_compiled)
            self.note.end(self.seconds, names)
        self.seconds = 0.0


@contextmanager
def _without_recorders(module: nn.Module) -> Iterator[None]:
    """Hooks that transformers leaves in a model which was once asked for attentions or hidden
    states: nobody asks here, and no compiler knows what they look at.
    """
    kept = OrderedDict(
        (number, hook)
        for number, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", None) != RECORDERS
    )
    with replaced(module, "_forward_hooks", kept):
        yield


def is_regional(args: GOLDConfig) -> bool:
    if args.compile_models is None:
        return args.device.type == "cuda"
    return args.compile_models == "regional"


def _kinds_of(side: str, model: nn.Module, args: GOLDConfig) -> Iterator[LayerKind]:
    for _, layers in outermost_lists(models.base_model(model)):
        by_class: dict[type, list[nn.Module]] = {}
        of_own: dict[type, list[nn.Module]] = {}  # somebody has put another forward into them
        for layer in layers:
            # what is computed again in a backward pass: no projector of a picture's features
            if isinstance(layer, GradientCheckpointingLayer) and layer._compiled_call_impl is None:
                found = of_own if "forward" in vars(layer) else by_class
                found.setdefault(type(layer), []).append(layer)
        for kind, members in of_own.items():
            logger.warning(
                "GOLDTrainer: %d layers (%s of the %s) run without being compiled: they have a "
                "forward of their own.",
                *(len(members), kind.__name__, side),
            )
        for kind, members in by_class.items():
            if len(members) > 1:
                weight = next(members[0].parameters())
                is_able = can_attend(weight.device, dtype_of_products(weight, args))
                # a tower has one config: layers that are left alone would read it too
                configs = configs_of(members) if is_able and len(members) == len(layers) else []
                yield LayerKind(f"{kind.__name__} of the {side}", members, configs)


def _reason_against(model: nn.Module, args: GOLDConfig, side: str) -> str | None:
    if models.is_quantised(model):
        return "it is in 8 or 4 bits"
    if side != "student" and args.teacher_offload is not None:
        return "they come to the device one after the other"
    lists = [layers for _, layers in outermost_lists(models.base_model(model))]
    if any(hasattr(module, "_hf_hook") for layers in lists for module in layers.modules()):
        return "accelerate brings their weights one by one"
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FSDP of version 1 keeps their weights flat"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "ZeRO-3 gathers their weights one by one"
    if sharding.tp_size(model) > 1:
        return "their weights are in slices, for which transformers has changed their parts"
    return None


def _run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _own_copy(name: str) -> FunctionType:
    code: CodeType = _run_layer.__code__.replace(co_name=name.replace(" ", "_"))
    return FunctionType(code, globals())
