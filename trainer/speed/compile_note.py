"""Compiling in the progress bar: why the first steps take longer than the others."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from transformers import ProgressCallback, TrainerCallback

WORTH_A_LINE = 0.1  # seconds


class CompileNote:
    """What the process that shows the progress says of compiling; without a bar, lines alone."""

    def __init__(self, callbacks: Sequence[TrainerCallback] = ()) -> None:
        self.callbacks = callbacks  # those of the trainer, to which others may still come
        self.all_seconds = 0.0  # of compiling, since the run began

    @property
    def bar(self) -> Any | None:
        bars = (c.training_bar for c in self.callbacks if isinstance(c, ProgressCallback))
        return next((bar for bar in bars if bar is not None), None)

    def begin(self) -> None:
        """While something is compiled, which may take a minute."""
        if self.bar is not None:
            self.bar.set_description("compiling")

    def end(self, seconds: float, names: str = "") -> None:
        """What that took; with names, a line says what has been compiled."""
        self.all_seconds += seconds
        bar = self.bar
        if bar is not None:
            bar.set_description()
        if seconds < WORTH_A_LINE:
            return
        if bar is not None:
            bar.set_postfix_str(f"{self.all_seconds:.0f} s of compiling")
        if names:
            line = f"  compiled   {names} in {seconds:.1f} s"
            if bar is None:
                Console(highlight=False).print(line, markup=False, soft_wrap=True)
            else:
                bar.write(line)
