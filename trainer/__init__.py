"""GOLD distillation on transformers.Trainer, with the fused losses of gold_kernels.

Names are imported when they are asked for: transformers takes seconds, and `gold-trainer --help`
does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gold_trainer.quiet import WARN_OF_THEMSELVES, quiet

if TYPE_CHECKING:
    from gold_trainer.config import GOLDConfig
    from gold_trainer.rendering.collator import GOLDCollator
    from gold_trainer.trainer import GOLDTrainer
    from gold_trainer.weighting.tokens import ScoredTokens

    __version__: str

__all__ = ["GOLDCollator", "GOLDConfig", "GOLDTrainer", "ScoredTokens"]

_MODULES = {
    "GOLDCollator": "rendering.collator",
    "GOLDConfig": "config",
    "GOLDTrainer": "trainer",
    "ScoredTokens": "weighting.tokens",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        try:
            with quiet(*WARN_OF_THEMSELVES):
                return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{__name__}.{name} needs a package that is not installed ({error}): pip install "
                "'gold-kernels[trainer]'",
                name=error.name,
            ) from error
    if name == "__version__":  # from the installed metadata: gold_kernels itself imports torch
        return import_module("importlib.metadata").version("gold-kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also names that nobody has asked for yet, as completion of an editor needs them."""
    return sorted({*globals(), *__all__})
