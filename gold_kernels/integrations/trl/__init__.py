"""One call for the users of trl: its trainers keep their names and lose their logits.

from gold_kernels.integrations.trl import patch_trl

patch_trl()  # then trl's DistillationTrainer, GKDTrainer and GOLDTrainer, as before
"""

from typing import Any

from typing_extensions import Unpack

from gold_kernels.engine.checks import check_chosen
from gold_kernels.engine.options import resolve_options
from gold_kernels.integrations.patching import Patch, Target, prepare
from gold_kernels.integrations.trl.options import PatchOptions

VERSIONS = ("1.16.0",)  # of trl, whose code was read
FUNCTION = "patch_trl"

_active: Patch | None = None


def patch_trl(**options: Unpack[PatchOptions]) -> Patch:
    """Replace the losses of the installed trl by fused ones, for all its trainers in this process.

    - DistillationTrainer: the chunked divergence;
    - GKDTrainer and GOLDTrainer: the generalized JSD, and GOLDTrainer's ULD (positional, extended,
      hybrid), from hidden states, without logits.

    Returns a Patch: undo() puts trl's own functions back, and so does the end of `with
    patch_trl():`. A second call returns the same. Raises ValueError, and replaces nothing, for a
    version of trl that is none of VERSIONS, for a function that takes other parameters, for options
    that no loss takes, and for other options while a patch is active. docs/integrations.md says
    what keeps trl's own loss.
    """
    global _active
    check_chosen(FUNCTION, resolve_options(FUNCTION, options, PatchOptions))
    if _active is not None and _active.is_active:
        if _active.settings != options:
            raise ValueError(
                f"{FUNCTION}: one set of options is expected, got {options} where trl is patched "
                f"with {_active.settings}; call undo() first."
            )
        return _active
    replacements = prepare(FUNCTION, _targets(dict(options)))
    _active = Patch(replacements, dict(options))
    return _active


def undo() -> None:
    """What undo() of the Patch does, for who did not keep it."""
    if _active is not None:
        _active.undo()


def _targets(options: Any) -> list[Target]:
    import trl

    if trl.__version__ not in VERSIONS:
        raise ValueError(
            f"{FUNCTION}: trl {' or '.join(VERSIONS)} is expected, got trl {trl.__version__}; "
            f"pip install trl=={VERSIONS[-1]}, or a release of gold-kernels that knows yours."
        )
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.gold.gold_trainer import GOLDTrainer, ULDLoss
    from trl.trainer import distillation_trainer

    from gold_kernels.integrations.trl.jsd import gkd_jsd, gold_jsd
    from gold_kernels.integrations.trl.losses import without_logits
    from gold_kernels.integrations.trl.stable import divergence_of
    from gold_kernels.integrations.trl.uld import uld_call

    return [
        Target(distillation_trainer, "_chunked_divergence_loss", divergence_of(options)),
        Target(GKDTrainer, "generalized_jsd_loss", gkd_jsd(options)),
        Target(GKDTrainer, "compute_loss", without_logits(_gkd_readers)),
        Target(GOLDTrainer, "generalized_jsd_loss", gold_jsd(options)),
        Target(GOLDTrainer, "compute_loss", without_logits(_gold_readers)),
        Target(ULDLoss, "__call__", uld_call(options)),
    ]


def _gkd_readers(trainer: Any) -> list[Any]:
    return [trainer.generalized_jsd_loss]


def _gold_readers(trainer: Any) -> list[Any]:
    if trainer.use_uld_loss and trainer.teacher_tokenizer is not None:
        return [type(trainer.uld_loss_fn).__call__]
    return [trainer.generalized_jsd_loss]
