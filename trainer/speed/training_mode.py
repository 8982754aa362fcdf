"""A model that is in training mode need not be told so in each micro-batch.

The Trainer calls model.train() before each pass. With an adapter a model has 1,500 modules, in each
of which that sets an attribute; it takes some milliseconds, in which the device has nothing to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

KNOWN = (nn.Module.train, PreTrainedModel.train)  # where the mode stays they do nothing else


class TrainingMode:
    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.parts: list[nn.Module] = []
        self.is_plain = False  # no part does something else when it is told

    @contextmanager
    def kept(self, model: nn.Module) -> Iterator[None]:
        """Within, model.train() does nothing if it would change nothing."""
        if model is not self.model:
            self.model, self.parts = model, list(model.modules())
            self.is_plain = all(type(part).train in KNOWN for part in self.parts)
        if "train" in vars(model) or not self.is_plain or not all(p.training for p in self.parts):
            yield
            return
        own = vars(model)

        def train(mode: bool = True) -> nn.Module:
            return model if mode and model.training else type(model).train(model, mode)

        own["train"] = train
        try:
            yield
        finally:
            del own["train"]
