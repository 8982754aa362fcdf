"""The weights of a run's tokens: the function that gives them, what is refused of its answers, and
how they reach the loss.

N scored tokens of the student, N_t rows of the teacher, D_t its hidden size.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gold_trainer.batches import MicroBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.teachers.teacher import Teacher
from gold_trainer.weighting.fields import check_use
from gold_trainer.weighting.named import check_arguments, find_weighting, name_of
from gold_trainer.weighting.picture_detail import PictureDetail
from gold_trainer.weighting.tokens import ScoredTokens, means_of_groups

if TYPE_CHECKING:
    from gold_trainer.speed.teacher_passes import TeacherPasses


class Weighting:
    """A function of ScoredTokens with its arguments."""

    def __init__(
        self, function: Callable[..., Any], kwargs: Mapping[str, Any], args: GOLDConfig
    ) -> None:
        self.function, self.kwargs = function, kwargs
        self.detail = None
        self.is_alone = args.world_size == 1
        self.name = getattr(function, "__qualname__", type(function).__name__)
        if isinstance(function, PictureDetail):  # which has its numbers
            self.detail, self.name, self.kwargs = function, function.name, {}

    @property
    def settings(self) -> dict[str, Any]:
        """The weighting as a config would name it."""
        kwargs = self.kwargs if self.detail is None else dataclasses.asdict(self.detail)
        name = self.name if self.detail is not None else name_of(self.function) or self.name
        return {"token_weighting": name, "token_weighting_kwargs": dict(kwargs)}

    @torch.no_grad()
    def units(self, tokens: ScoredTokens, *, may_wait: bool) -> Tensor:
        """(N,) weights of tokens or, with two tokenizers, (G,) of groups."""
        if not tokens.ids.shape[0]:
            weights = torch.zeros(0, device=tokens.ids.device)
        else:
            weights = self._checked(self.function(tokens, **self.kwargs), tokens, may_wait)
        return weights if tokens.groups is None else means_of_groups(tokens.groups, weights)

    def _checked(self, weights: Any, tokens: ScoredTokens, may_wait: bool) -> Tensor:
        """The weights in float32. What is wrong with values that a device holds is found before the
        optimizer's step, unless anybody may wait for it.
        """
        number = tokens.ids.shape[0]
        if not isinstance(weights, Tensor) or weights.shape != (number,) or weights.is_complex():
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"token_weighting: {self.name} must return a real tensor of shape (N,) = "
                f"({number},), a weight for each of tokens.ids, got {got}; weigh every token."
            )
        weights = weights.detach().float()
        is_bad = ~(weights.isfinite() & (weights >= 0))
        if is_bad.device.type == "cpu" or may_wait:
            self._refuse(weights, is_bad, tokens)
        else:
            tokens.batch.bad_weights = is_bad.any()
        return tokens.to_device(weights) if weights.device != tokens.ids.device else weights

    def _refuse(self, weights: Tensor, is_bad: Tensor, tokens: ScoredTokens) -> None:
        if is_bad.any():
            place = int(is_bad.nonzero()[0])
            example = tokens.batch.student.examples[int(tokens.completions[place])]
            raise ValueError(
                f"{example.where}: token_weighting: {self.name} must return weights that are "
                f"finite and not negative, got {weights[place].item():g} for token "
                f"{int(tokens.positions[place])} of the completion; clamp them."
            )


def make_weighting(
    args: GOLDConfig, given: Callable[..., Any] | str | None = None
) -> Weighting | None:
    """The weighting that GOLDTrainer was given, else that of the config, which stays as it is."""
    if given is not None and not isinstance(given, str) and not callable(given):
        raise ValueError(
            "GOLDTrainer: token_weighting must be a function of ScoredTokens, or its name, got "
            f"{type(given).__name__}; None weighs all tokens alike."
        )
    if given is not None and args.token_weighting is not None:
        name = given if isinstance(given, str) else getattr(given, "__qualname__", given)
        raise ValueError(
            f"GOLDTrainer: token_weighting must be given once, got {name} and "
            f"GOLDConfig(token_weighting={args.token_weighting!r}); leave one of them out."
        )
    given, kwargs = args.token_weighting if given is None else given, args.weighting_kwargs
    if kwargs and (given is None or isinstance(given, PictureDetail)):
        what = "without token_weighting" if given is None else f"beside {given}, which has its own"
        raise ValueError(
            f"GOLDTrainer: token_weighting_kwargs must be None {what}, got {kwargs}; leave it out."
        )
    if given is None:
        return None
    function = find_weighting(given, kwargs) if isinstance(given, str) else given
    weighting = Weighting(function, kwargs, args)
    if weighting.detail is not None:
        weighting.detail.check()
    else:
        check_arguments(function, weighting.name, kwargs)
    check_use(args, function, weighting.name)
    return weighting


def hidden_rows(  # (N_t, D_t)
    teacher: Teacher, batch: MicroBatch, passes: "TeacherPasses"
) -> Tensor:
    """The teacher's, and into the batch those of its second look, where there is one."""
    if batch.without_detail is not None:
        batch.hidden_without_detail = teacher.hidden_rows(batch.without_detail)
    return passes.hidden_rows(teacher, batch.teacher)
