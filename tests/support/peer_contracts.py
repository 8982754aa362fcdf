"""What adapters need of packages that tests do not install: names and signatures of axolotl 0.19,
verl 0.9.1 and ms-swift 4.6, read in their wheels. What was written down here is all that is here.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType

import torch
from transformers import Trainer


def install(monkeypatch, **modules):
    """Modules by dotted names, with the packages above them."""
    for name, content in modules.items():
        parts = name.split("__")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules or end == len(parts):
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
            if end > 1:
                parent = sys.modules[".".join(parts[: end - 1])]
                monkeypatch.setattr(parent, parts[end - 1], sys.modules[path], raising=False)
        vars(sys.modules[".".join(parts)]).update(content)


class BasePlugin:
    """axolotl.integrations.base: hooks that this adapter does not have do nothing."""

    def register(self, cfg):
        pass

    def get_input_args(self):
        return None

    def get_trainer_cls(self, cfg):
        return None

    def post_trainer_create(self, cfg, trainer):
        pass


def axolotl(monkeypatch):
    install(
        monkeypatch,
        axolotl__integrations__base={"BasePlugin": BasePlugin},
        axolotl__core__trainers__base={"AxolotlTrainer": Trainer},
    )


@dataclass
class DistillationLossSettings:
    """verl.trainer.distillation.losses: what the logits are needed for; exactly one is set."""

    names: list = field(default_factory=list)
    use_topk: bool = False
    use_estimator: bool = False

    def __post_init__(self):
        assert self.use_topk + self.use_estimator == 1


def verl(monkeypatch):
    """The registry of the losses, which it returns."""
    registry = {}

    def register_distillation_loss(loss_settings):
        def decorator(function):
            for name in loss_settings.names:
                if name in registry:
                    raise ValueError(f"{name} is already registered")
                registry[name] = function
            return function

        return decorator

    content = {
        "DistillationLossSettings": DistillationLossSettings,
        "register_distillation_loss": register_distillation_loss,
    }
    install(monkeypatch, verl__trainer__distillation__losses=content)
    return registry


def aggregated(losses, mask):
    """verl's agg_loss with loss_agg_mode "token-mean"."""
    return torch.where(mask.bool(), losses, 0).sum() / mask.sum()


def swift(monkeypatch, **names):
    """swift.rlhf_trainers.gkd_trainer, as far as it makes and calls a loss."""
    install(
        monkeypatch, swift__rlhf_trainers__gkd_trainer={"_liger_kernel_available": False, **names}
    )
    return sys.modules["swift.rlhf_trainers.gkd_trainer"]


def swift_loss(module, **weights):
    """As GKDTrainer._prepare_liger_loss builds it; releases before 4.6 pass no weights."""
    assert module._liger_kernel_available
    return module.LigerFusedLinearJSDLoss(
        beta=0.5, ignore_index=-100, temperature=0.9, compiled=False, **weights
    )


def swift_call(loss, given, labels):
    """As GKDTrainer.compute_loss calls it."""
    names = ("student_input", "student_weight", "teacher_input", "teacher_weight")
    tensors = dict(zip(names, given, strict=True))
    return loss(**tensors, true_labels=labels, student_bias=None, teacher_bias=None)
