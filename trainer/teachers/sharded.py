"""A frozen teacher of which each process holds a part: teacher_sharding.

V_t vocabulary, D_t hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from gold_trainer import models
from gold_trainer.config import GOLDConfig
from gold_trainer.rendering.collator import Processor
from gold_trainer.teachers.frozen import FrozenTeacher, refuse_kinds
from gold_trainer.teachers.layer_stream import outermost_lists


@dataclass(frozen=True)
class GatheredHead:
    """A head in parts. Its weight is gathered from all processes when it is asked for, so all must
    ask together, and gone when the loss lets go of it.
    """

    head: Any  # an nn.Linear whose tensors are DTensors

    @property
    def weight(self) -> Tensor:  # (V_t, D_t)
        return self.head.weight.full_tensor()

    @property
    def bias(self) -> Tensor | None:  # (V_t,)
        return None if self.head.bias is None else self.head.bias.full_tensor()

    @property
    def out_features(self) -> int:
        return self.head.out_features


class ShardedTeacher(FrozenTeacher):
    """Runs as a frozen teacher, on all processes together: a layer is gathered when it runs. The
    student may be under any engine, or none.
    """

    def __init__(self, model: nn.Module, processor: Processor, args: GOLDConfig) -> None:
        refuse_kinds(model, "teacher_sharding")
        super().__init__(model, processor, args)

    def place(self, device: torch.device) -> None:
        self.model.requires_grad_(False).eval()
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))

        def shard(module: nn.Module) -> None:
            # the root too: fully_shard would keep it gathered for a backward pass
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

        for _, layers in outermost_lists(self.model):
            for layer in layers:
                shard(layer)
        base = models.base_model(self.model)
        ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
        if ends[0].weight is not ends[1].weight:  # each is gathered for its own use alone
            for end in ends:
                shard(end)
        shard(self.model)
        # generate() runs the vision tower before the model as a whole
        register_fsdp_forward_method(self.model, "generate")
        self.model.to(device)  # buffers
        self.side = replace(self.side, head=GatheredHead(self.side.head))
