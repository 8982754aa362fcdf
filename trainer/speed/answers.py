"""All that models would ask the device for within a pass, answered without it."""

from collections.abc import Collection

from torch import nn

from gold_trainer.speed.deepstack import additions_of
from gold_trainer.speed.masks import rows_are_whole
from gold_trainer.speed.media import methods_of
from gold_trainer.speed.on_host import functions_of
from gold_trainer.speed.replacing import Replacement


def answers_of(models: Collection[nn.Module | None]) -> list[Replacement]:
    return [*functions_of(models), *methods_of(models), *additions_of(models), *rows_are_whole()]
