"""The product of what students, losses, rows, runs and engines there are, and a part of it in which
every two of them meet.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from support.engine_cases import CASES, ULD, lora

# The gradient of a bias in front of a softmax is rounding alone: epsilon keeps Adam from steps
# of the size of others along it.
OPTIMIZER = {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-2}
RESUMED = {"is_resumed": True, "save_strategy": "steps", "save_steps": 1}

FACTORS: dict[str, dict[str, dict[str, Any]]] = {  # fields of engine_cases
    "head": {
        "tied": {},
        "untied": {"is_tied": False},
        "frozen": {"is_tied": False, "is_head_frozen": True},
        "lora": {"peft_config": lora()},
        "saved": {"is_tied": False, "peft_config": lora(modules_to_save=["lm_head"])},
    },
    "loss": {"jsd": {}, "uld": ULD},
    "rows": {
        "text": {"family": "qwen3", "images": 0},
        "pictures": {"family": "qwen3_vl", "images": 1},
        "mixed": {"family": "qwen3_vl", "images": "mixed"},
    },
    "run": {  # each trains, evaluates, and is loaded from where it was saved
        "train": {},
        "resumed": RESUMED,
        "resumed_parts": {**RESUMED, "saves_parts": True},
        "on_policy": {"lmbda": 1.0},
        "seq_kd": {"seq_kd": True},
    },
}
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# cases of engine_cases, each alone
ALONE = (
    *(
        "saved_tied_head",
        "own_teacher",
        "bf16",
        "by_name",
        "mixed_media",
        "on_policy_media",
        "seq_kd_media",
        "cached",
        "cached_means",
    ),
    *("on_policy_rooms", "on_policy_lengths", "uneven", "evaluated_first", "early_evaluation"),
)
OF_RANKS = ("by_name", "uneven")  # which depend on how many there are: compared with DDP
RELATIVE = 1e-5  # of losses, norms, evaluations and weights
BFLOAT16 = 1e-2  # under it, which engines compute in more places than DDP
OTHER_FAMILY = {"text": "llama", "pictures": "idefics3", "mixed": "idefics3"}

# engine and level -> how the refusal begins, in words that a page can show
_EARLY = "GOLDTrainer: under FSDP and DeepSpeed evaluate() is expected after train()"
REFUSED = {
    **{(engine, "early_evaluation"): _EARLY for engine in ENGINES[1:]},
    ("fsdp2", "saved_tied_head"): (
        "GOLDTrainer: under FSDP a head in modules_to_save must not be tied to the embeddings"
    ),
}


def name_of(levels: Sequence[str]) -> str:
    return "-".join(levels)


def levels_of(name: str) -> dict[str, str]:
    """By factor; of a case that stands alone it is called a run."""
    if name in CASES:
        return dict.fromkeys(FACTORS, "") | {"run": name}
    return dict(zip(FACTORS, name.split("-"), strict=True))


def case_of(name: str) -> dict[str, Any]:
    """Of "untied-uld-mixed-resumed", a level of each factor, or of one of ALONE."""
    if name in CASES:
        return CASES[name]
    levels = levels_of(name)
    case: dict[str, Any] = dict(OPTIMIZER)
    for factor, level in levels.items():
        case |= FACTORS[factor][level]
    if levels["loss"] == "uld":
        case["teacher_family"] = OTHER_FAMILY[levels["rows"]]
    return case


def reference_of(name: str) -> str:
    """The run with the same losses and weights: a resumed one ends as one without a break does."""
    if name in CASES:
        return name
    *levels, run = name.split("-")
    return name_of([*levels, "train" if run.startswith("resumed") else run])


@cache
def names() -> list[str]:
    return [name_of(levels) for levels in itertools.product(*FACTORS.values())]


def is_a_run_of(engine: str, name: str) -> bool:
    """Others than FSDP2 have one kind of checkpoint."""
    return engine == "fsdp2" or not name.endswith("resumed_parts")


def refusal(engine: str, name: str) -> str | None:
    found = (REFUSED.get((engine, level)) for level in levels_of(name).values())
    return next((sentence for sentence in found if sentence is not None), None)


def pairwise(
    factors: Mapping[str, Sequence[str]], is_possible: Callable[[tuple[str, ...]], bool]
) -> list[tuple[str, ...]]:
    """Rows in which every two levels meet that can: always the row with most new pairs, and the
    first of those.
    """

    def pairs(row: tuple[str, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    rows = {row: pairs(row) for row in itertools.product(*factors.values()) if is_possible(row)}
    left = set().union(*rows.values())
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(left & rows[row]))
        left -= rows[best]
        chosen.append(best)
    return chosen


@cache
def chosen() -> list[tuple[str, str]]:  # engine, name
    def is_possible(row: tuple[str, ...]) -> bool:
        name = name_of(row[1:])
        return is_a_run_of(row[0], name) and refusal(row[0], name) is None

    rows = pairwise({"engine": ENGINES, **{k: list(v) for k, v in FACTORS.items()}}, is_possible)
    return [(row[0], name_of(row[1:])) for row in rows]
