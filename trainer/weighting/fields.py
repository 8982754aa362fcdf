"""Fields of GOLDConfig for weights of tokens in the loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gold_trainer.fields.checks import as_dict
from gold_trainer.fields.teacher import args_by_teacher
from gold_trainer.weighting.named import find_weighting, name_of
from gold_trainer.weighting.picture_detail import PictureDetail


@dataclass
class WeightingFields:
    """The loss between teacher and student is the mean over N units of the global batch:

        sum of w_i loss_i / N

    A unit is a token, or with two tokenizers a group, whose w is the mean over its tokens. N counts
    units and not weights: weights whose mean is 1 leave the size of the loss as it is, and the loss
    does not depend on the split into micro-batches and ranks. The cross-entropy has no weights.
    """

    token_weighting: str | None = field(
        default=None,
        metadata={
            "help": "Weights of tokens in the loss: picture_detail, by what the detail of the "
            "pictures tells the teacher of a token, or module:function of a function of yours. "
            "None: all alike."
        },
    )
    token_weighting_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Arguments of that function, as {"high_weight": 0.7}; docs/training.md has '
            "those of picture_detail."
        },
    )

    def name_weighting(self) -> None:
        """Put the name of a function in its place, which a checkpoint can hold."""
        given: Any = self.token_weighting
        if given is None or isinstance(given, str) or not callable(given):
            return
        self.token_weighting = name_of(given)
        if self.token_weighting is None:
            raise ValueError(
                "GOLDConfig: token_weighting must be a function that a module has by its name, got "
                f"{getattr(given, '__qualname__', type(given).__name__)}; pass it to "
                "GOLDTrainer(token_weighting=)."
            )

    def check_weighting(self) -> None:
        """ValueError for a function that cannot be found, and for runs in which it has no use."""
        if self.token_weighting is None:
            return  # a function may come as an argument of GOLDTrainer
        function = find_weighting(self.token_weighting, self.weighting_kwargs)
        check_use(self, function, self.token_weighting)

    @property
    def weighting_kwargs(self) -> dict[str, Any]:
        return as_dict(self.token_weighting_kwargs)


def check_use(args: Any, function: Callable[..., Any], name: str) -> None:  # args: a GOLDConfig
    """ValueError for a loss that takes no weights, and for a teacher that cannot look again."""
    weight = "uld_distillation_weight" if args.use_uld_loss else "distillation_weight"
    if getattr(args, weight) == 0:
        raise ValueError(
            f"GOLDConfig: token_weighting weighs the loss between teacher and student, got {name} "
            f"and {weight}=0; leave token_weighting out: the cross-entropy takes no weights."
        )
    if not isinstance(function, PictureDetail):
        return
    has_tokens = any(one.asks_for_tokens for one in (args, *args_by_teacher(args).values()))
    if args.teacher_cache is not None or has_tokens:
        got = "loss_top_k of a server" if has_tokens else "teacher_cache"
        raise ValueError(
            "GOLDConfig: token_weighting='picture_detail' needs a teacher that looks at pictures "
            f"without detail too, got {got}; leave one of the two out."
        )
    is_together = args.per_device_train_batch_size % args.num_generations == 0
    if not is_together and function.temperature is not None:
        raise ValueError(
            "GOLDConfig: per_device_train_batch_size must be a multiple of num_generations with "
            "token_weighting='picture_detail', which weighs the completions of a prompt against "
            f"each other, got {args.per_device_train_batch_size} and {args.num_generations}; set "
            'it, or token_weighting_kwargs={"temperature": null}.'
        )


def refuse_text(name: str | None, is_text: bool) -> None:
    if is_text and name == PictureDetail.name:
        raise ValueError(
            "GOLDTrainer: token_weighting='picture_detail' needs a vision-language student, got a "
            "text-only one; leave it out, or give a function of your own."
        )
