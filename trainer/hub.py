"""The student on the hub, with push_to_hub: a login before models are loaded, a push that loses
nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from gold_trainer.data.row_errors import told

if TYPE_CHECKING:
    from gold_trainer.config import GOLDConfig


def check_login(args: "GOLDConfig") -> None:
    """ValueError where a push would fail after hours of training."""
    if not args.push_to_hub or args.process_index:
        return
    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:  # of the network, of a token, or of its absence
        raise ValueError(
            "GOLDTrainer: push_to_hub needs the hub and a login, got "
            f"{type(error).__name__}: {told(error).rstrip('.')}; run `hf auth login`, set "
            "hub_token, or leave push_to_hub out."
        ) from error


@contextmanager
def pushing(folder: str | None) -> Iterator[None]:
    """An error of a push of this folder says that the student is saved there."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"GOLDTrainer: the hub must take the student, got {type(error).__name__}: "
            f"{told(error).rstrip('.')}; it is saved in {folder}: `hf upload REPOSITORY {folder}` "
            "pushes it."
        ) from error
