"""The loss of a mixture of experts' routers, which a model's forward returns where its config has
output_router_logits.
"""

from typing import Any

from torch import Tensor, nn

from gold_trainer.metrics import MetricWindow
from gold_trainer.models import base_model

# Of the model, or of its config, whose text part has it in models with pictures.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def with_router_loss(
    loss: Tensor,  # ()
    output: Any,  # ModelOutput
    model: nn.Module,
    window: MetricWindow,
    num_batches: int,  # micro-batches of the step, whose routers' losses are averaged
    is_on_policy: bool,
) -> Tensor:  # ()
    """The loss plus that of the routers, times the coefficient that the model has for it."""
    auxiliary = getattr(output, "aux_loss", None)
    if not isinstance(auxiliary, Tensor):
        return loss
    coefficient = coefficient_of(model)
    window.add_auxiliary(auxiliary, coefficient, is_on_policy)
    return loss + coefficient / num_batches * auxiliary.to(loss.device)


def coefficient_of(model: nn.Module) -> float:
    """What the model itself multiplies it with where it gets labels."""
    base = base_model(model)
    for owner in (base, base.config.get_text_config(), base.config):
        for name in COEFFICIENTS:
            value = getattr(owner, name, None)
            if isinstance(value, int | float):
                return float(value)
    raise ValueError(
        "GOLDTrainer: a student whose forward returns aux_loss must say its coefficient, got "
        f"{type(base).__name__} without {' and '.join(COEFFICIENTS)}; set output_router_logits="
        "False in its config to train without it."
    )
