"""The student's weights as a checkpoint has them: whole, merged, by the names of the hub.

Sharded weights are gathered a parameter at a time, on all ranks, and kept on the main one alone, in
its CPU memory. Adapters are merged into copies, a layer at a time: the student's own stay.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import is_peft_available

from gold_trainer.models import base_model, has_adapter, whole
from gold_trainer.ranks import raise_on_all
from gold_trainer.sharding import gathered

# What stands in the names of layers that are checkpointed or compiled.
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def whole_copy(module: nn.Module) -> nn.Module:
    """A module with the same settings and copies of whole weights."""
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__ = {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(module).items()
    }
    copy._parameters = {
        name: None if p is None else nn.Parameter(whole(p).clone(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    copy._buffers = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
    copy._modules = {
        name: None if part is None else whole_copy(part) for name, part in module._modules.items()
    }
    return copy


def plain_weights(
    module: nn.Module,
    *,
    is_merged: bool,  # with adapters, or those below them
    prefix: str = "",
    seen: set[int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of every parameter and persistent buffer, tied ones once. Called on all
    ranks, which see the same.
    """
    seen = set() if seen is None else seen
    plain = _plain(module, is_merged)
    if plain is not None:
        is_copy = all(part is not plain for part in module.modules())
        own = set() if is_copy else seen  # a copy goes, and its parameters' ids come again
        yield from plain_weights(plain, is_merged=is_merged, prefix=prefix, seen=own)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            with gathered([parameter]):
                yield prefix + name, whole(parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, whole(buffer)
    for name, part in module._modules.items():
        if part is not None:
            place = unwrapped(f"{prefix}{name}.")
            yield from plain_weights(part, is_merged=is_merged, prefix=place, seen=seen)


def unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _plain(module: nn.Module, is_merged: bool) -> nn.Module | None:
    """The plain layer that a layer of peft amounts to; None for any other module."""
    if not is_peft_available():
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if is_merged:
            return module.modules_to_save[module.active_adapters[0]]
        return module.original_module
    if isinstance(module, TrainableTokensWrapper):
        return _plain(module.token_adapter, is_merged)
    if not isinstance(module, BaseTunerLayer):
        return None
    if not is_merged:
        return module.get_base_layer()
    with gathered(list(module.parameters())):
        copy: Any = whole_copy(module)
    with torch.no_grad():
        copy.merge()
    return copy.get_base_layer()


def gathered_weights(
    model: nn.Module, dtype: torch.dtype | None, *, is_merged: bool, is_kept: bool
) -> dict[str, Tensor]:
    """Weights by the model's own names, in CPU memory, floats in this dtype; {} on ranks that keep
    nothing. Called on all ranks.
    """
    pairs = plain_weights(base_model(model), is_merged=is_merged)
    return _all_kept(pairs, dtype, is_kept=is_kept)


def _all_kept(
    pairs: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None, *, is_kept: bool
) -> dict[str, Tensor]:
    """A rank that has no memory for them gathers on with the others, and then all end."""
    weights: dict[str, Tensor] = {}
    failed: Exception | None = None
    for name, tensor in pairs:
        if is_kept and failed is None:
            try:
                weights[name] = _kept(tensor, dtype)
            except (RuntimeError, MemoryError) as error:
                failed, weights = error, {}
    raise_on_all(failed)
    return weights


def checkpoint_weights(model: nn.Module, gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that from_pretrained reads. It runs on one rank, whose error others have
    to hear of.
    """
    base, weights = base_model(model), dict(gathered)
    for target, source in base.all_tied_weights_keys.items():
        if target in weights and source in weights:
            if not torch.equal(weights[target], weights[source]):
                raise ValueError(
                    f"GOLDTrainer: {target} must be {source}, as the model's config ties them, got "
                    "two that differ, of which vLLM would read one; train the adapter without "
                    "embeddings and head, or untie the model first."
                )
            del weights[target]
    return revert_weight_conversion(base, weights)


def _kept(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to("cpu", kind, copy=True).contiguous()


def adapter_weights(model: nn.Module, *, is_kept: bool) -> dict[str, Tensor]:
    """What is trained, by the model's own names; {} on ranks that keep nothing. Called on all
    ranks.
    """
    assert has_adapter(model), "the adapter of a model that has one"
    return _all_kept(_trained(model), None, is_kept=is_kept)


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                yield unwrapped(name), whole(parameter)


def adapter_checkpoint(model: Any, gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that peft saves. It runs on one rank, whose error others have to hear
    of.
    """
    from peft import get_peft_model_state_dict

    named: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=gathered, save_embedding_layers=False
    )
    return named
