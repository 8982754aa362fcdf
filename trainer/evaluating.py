"""Rows that a trainer evaluates: read like those of training, all of them, each time anew."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from gold_trainer.bad_rows import tolerant
from gold_trainer.config import GOLDConfig
from gold_trainer.preparing import Prepared
from gold_trainer.row_errors import shown
from gold_trainer.streams import read_rows


class Evaluating(Trainer):
    """transformers.Trainer with rows of docs/data.md to evaluate."""

    args: GOLDConfig
    prepared: Prepared

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See transformers.Trainer.evaluate."""
        _check_evaluated(eval_dataset, self.eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """See transformers.Trainer.predict: metrics, as there are no logits."""
        if isinstance(test_dataset, Mapping):
            raise ValueError(
                "GOLDTrainer: predict takes one dataset, got a dict of "
                f"{shown(list(test_dataset))}; pass one of them, or call evaluate."
            )
        return super().predict(test_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            return self.get_test_dataloader(eval_dataset)  # not kept in the place of its own
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._eval_rows(test_dataset))

    def _eval_rows(self, dataset: Any) -> Any:
        return read_rows(dataset, self.args, **self.prepared.eval_row_options)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        rows = tolerant(dataset) if self.args.on_bad_row == "skip" else dataset
        if kwargs.get("is_training"):
            return super()._get_dataloader(rows, *args, **kwargs)
        with _all_rows(self.args):
            return super()._get_dataloader(rows, *args, **kwargs)


@contextmanager
def _all_rows(args: GOLDConfig) -> Iterator[None]:
    """Also those that fill no batch: dataloader_drop_last is for steps of one size."""
    drops, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drops


def _check_evaluated(given: Any, own: Any) -> None:
    """given: None or a name for those of the constructor, which are own."""
    if isinstance(given, str) and not (isinstance(own, Mapping) and given in own):
        there = "no dict of them" if not isinstance(own, Mapping) else f"one of {shown(list(own))}"
        raise ValueError(
            f"GOLDTrainer: evaluate takes rows, or the name of an eval_dataset, got {given!r} and "
            f"{there}; pass the rows themselves."
        )
    if isinstance(given, Mapping) and (not given or None in given.values()):
        raise ValueError(
            "GOLDTrainer: evaluate takes a dataset, or a dict of at least one by name, got "
            f"{shown({name: type(part).__name__ for name, part in given.items()})}; pass the rows, "
            "or nothing for those of eval_dataset."
        )
