"""The form of a model's logits, measured on the model itself: gold_kernels/engine/logit_form.py.

B sequences, L positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from gold_kernels.engine import logit_form
from gold_kernels.engine.logit_form import probe_rows, solve_form
from gold_trainer.models import base_model


def probe_of(model: nn.Module, hidden: Tensor) -> Tensor:  # (1, 2, V)
    return probe_rows(base_model(model).get_output_embeddings().weight.shape[0], hidden.device)


@dataclass
class LogitForm:
    """What a model makes of its head's output x: softcap(scale x), softcap(x) = c tanh(x / c), of
    the first entries where its head has more (Inkling's is padded).
    """

    side: str  # "student" or "teacher", for messages
    scale: float = 1.0
    softcap: float | None = None  # c
    num_entries: int | None = None  # None: all of the head
    is_measured: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return logit_form.LogitForm(self.scale, self.softcap)(x)

    def check_hidden(self, model: nn.Module, hidden: Tensor, input_ids: Tensor) -> None:
        if hidden.ndim != 3 or hidden.shape[:2] != input_ids.shape:
            raise self.refusal(
                model,
                f"hidden states of shape {tuple(hidden.shape)} at its head for input_ids of shape "
                f"{tuple(input_ids.shape)}",
            )

    def solve(self, model: nn.Module, probe: Tensor, logits: Tensor | None) -> None:
        """Scale and softcap from logits, which the model made of the probe (1, 2, V)."""
        form = solve_form(probe, logits)
        if isinstance(form, str):
            raise self.refusal(model, form)
        self.scale, self.softcap, self.num_entries = form
        self.is_measured = True

    def refusal(self, model: nn.Module, what: str) -> ValueError:
        return ValueError(
            f"GOLDTrainer: the {self.side}'s logits must be softcap(scale * (hidden weight^T + "
            f"bias)) of its lm_head at all positions, got {what} from "
            f"{type(base_model(model)).__name__}; choose a model whose logits are, docs/models.md "
            "lists them."
        )
