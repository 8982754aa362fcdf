"""Rows that a trainer evaluates: read like those of training, all of them, each time anew."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from gold_trainer.config import GOLDConfig
from gold_trainer.data.bad_rows import tolerant
from gold_trainer.data.filled import WithoutFill, filled, filled_sampler
from gold_trainer.data.row_errors import shown
from gold_trainer.data.streams import read_rows
from gold_trainer.preparing import Prepared


class Evaluating(Trainer):
    """transformers.Trainer with rows of docs/data.md to evaluate."""

    args: GOLDConfig
    prepared: Prepared
    objective: Any  # whose collator makes blank batches

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

    def _get_dataloader(  # type: ignore[override]  # the Trainer passes names
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        **kwargs: Any,
    ) -> DataLoader:
        rows = tolerant(dataset) if self.args.on_bad_row == "skip" else dataset
        # each process reads a stream for itself: one cannot deal out batches of pictures
        self.accelerator.dataloader_config.dispatch_batches = False
        num_processes = self.accelerator.num_processes
        if not is_training and num_processes > 1:
            multiple = batch_size * num_processes
            rows, sampler_fn = filled(rows, multiple), filled_sampler(sampler_fn, multiple)
        options = {"sampler_fn": sampler_fn, "is_training": is_training, **kwargs}
        with nullcontext() if is_training else self._all_rows():
            return super()._get_dataloader(rows, description, batch_size, **options)

    @contextmanager
    def _all_rows(self) -> Iterator[None]:
        """Also those that fill no batch: dataloader_drop_last is for steps of one size. And each
        once: what fills a batch is no row.
        """
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        collate: Any = self.data_collator
        self.data_collator = WithoutFill(collate, self.objective.collator.blank)
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops
            self.data_collator = collate


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
