"""Fields of GOLDConfig for a teacher that is cached: where, and in which form."""

from dataclasses import dataclass, field
from typing import Any

CACHE_FORMS = ("hidden", "head_means", "top_k")


@dataclass
class CacheFields:
    """A cache takes the teacher's place where all completions are known before the run."""

    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the teacher's last hidden states at all rows: gold-trainer "
            "cache-teacher writes it, training reads it and loads no weights of the teacher."
        },
    )
    teacher_cache_form: str | None = field(
        default=None,
        metadata={
            "help": "What the cache holds of a token. hidden: the teacher's last hidden states. "
            "head_means: means of the student's frozen head, for the forward KL. top_k: the tokens "
            "of loss_top_k. None: training takes the form that the cache has, cache-teacher makes "
            "top_k with loss_top_k, hidden without.",
            "choices": CACHE_FORMS,
        },
    )

    @property
    def form_to_make(self) -> str:
        """The form of a cache that gold-trainer cache-teacher makes."""
        args: Any = self  # a GOLDConfig
        return self.teacher_cache_form or ("top_k" if args.loss_top_k else "hidden")

    def check_teacher_cache(self) -> None:
        """ValueError for runs that need a teacher who can still be asked."""
        args: Any = self  # a GOLDConfig
        if self.teacher_cache is None:
            if self.teacher_cache_form is not None:
                raise ValueError(
                    "GOLDConfig: teacher_cache_form must be None without teacher_cache, got "
                    f"{self.teacher_cache_form!r}; set teacher_cache to the cache's folder."
                )
            return
        if not self.teacher_cache:
            raise ValueError(
                "GOLDConfig: teacher_cache must be the folder of a cache, got ''; leave it out for "
                "a teacher that is loaded."
            )
        if args.lmbda > 0:
            raise ValueError(
                f"GOLDConfig: lmbda must be 0 with teacher_cache, got {args.lmbda}; nobody knows "
                "what the student will write: set lmbda=0, or leave teacher_cache out."
            )
        if args.seq_kd:
            raise ValueError(
                "GOLDConfig: seq_kd must be False with teacher_cache, got True; the teacher has "
                "to be there to write: put its completions into the dataset."
            )
        if args.teacher_sharding is not None:
            raise ValueError(
                "GOLDConfig: teacher_sharding must be None with teacher_cache, got "
                f"{args.teacher_sharding!r}; training has no weights of the teacher to share, and "
                "the processes of gold-trainer cache-teacher share the rows: leave it out, or set "
                "teacher_offload where the teacher is too large for a GPU."
            )
        if self.teacher_cache_form == "head_means":
            check_head_means(args)
        if self.teacher_cache_form == "top_k":
            check_top_k(args)


def check_top_k(args: Any) -> None:  # a GOLDConfig
    """ValueError for losses that need more of the teacher than its likeliest tokens."""
    if args.use_uld_loss:
        raise ValueError(
            "GOLDConfig: use_uld_loss must be False where teacher_cache has the teacher's top_k, "
            "got True; they belong to one vocabulary: make a cache of teacher_cache_form=hidden."
        )
    if not args.loss_top_k:
        raise ValueError(
            "GOLDConfig: loss_top_k must be at least 1 where teacher_cache has the teacher's "
            "top_k, got 0; set how many tokens the loss takes, 64 for instance, or make a cache of "
            "teacher_cache_form=hidden."
        )


def check_head_means(args: Any) -> None:  # a GOLDConfig
    """ValueError for losses that need more of the teacher than means of the student's head."""
    if args.use_uld_loss:
        raise ValueError(
            "GOLDConfig: use_uld_loss must be False where teacher_cache has head_means, got True; "
            "they belong to one vocabulary: make a cache of teacher_cache_form=hidden."
        )
    if args.loss_top_k:
        raise ValueError(
            "GOLDConfig: loss_top_k must be 0 where teacher_cache has head_means, got "
            f"{args.loss_top_k}; leave it out, or make a cache of teacher_cache_form=top_k."
        )
    if args.loss != "jsd" or args.beta != 0:
        got = f"beta={args.beta}" if args.loss == "jsd" else f"loss={args.loss!r}"
        raise ValueError(
            "GOLDConfig: the loss must be the forward KL, loss='jsd' and beta=0, where "
            f"teacher_cache has head_means, got {got}; set beta=0, or make a cache of "
            "teacher_cache_form=hidden."
        )
    if args.logits_dtype != "float32":
        raise ValueError(
            "GOLDConfig: logits_dtype must be 'float32' where teacher_cache has head_means, got "
            f"{args.logits_dtype!r}; leave it out, or make a cache of teacher_cache_form=hidden."
        )
