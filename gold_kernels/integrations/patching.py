"""Functions of another package replaced all together or not at all, and put back."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MISSING = object()


class Target(NamedTuple):
    """A function that is replaced: an attribute of a module or a class."""

    owner: Any
    name: str
    make: Callable[[Callable[..., Any]], Any]  # what is there -> what takes its place

    @property
    def label(self) -> str:
        home = getattr(self.owner, "__module__", None)  # a module has none
        path = self.owner.__name__ if home is None else f"{home}.{self.owner.__qualname__}"
        return f"{path}.{self.name}"

    def is_of(self, other: "Target") -> bool:
        return self.owner is other.owner and self.name == other.name


class Replacement(NamedTuple):
    target: Target
    before: Any  # the very object, a staticmethod where it is one; MISSING: there was none
    after: Any


def prepare(function: str, targets: Sequence[Target]) -> list[Replacement]:
    """All replacements, or a ValueError that names the function whose parameters are others."""
    replacements = []
    for target in targets:
        before = vars(target.owner).get(target.name)
        called = getattr(before, "__func__", before)  # below a staticmethod
        if not callable(called):
            raise ValueError(
                f"{function}: {target.label} is expected, got none; install the version of the "
                "package that this release names."
            )
        after = target.make(called)
        expected, found = (_parameters(f) for f in (after, called))
        if expected != found:
            raise ValueError(
                f"{function}: {target.label} must take ({', '.join(expected)}), got "
                f"({', '.join(found)}); undo what changed it, or install the version of the "
                "package that this release names."
            )
        if isinstance(before, staticmethod):
            after = staticmethod(after)
        replacements.append(Replacement(target, before, after))
    return replacements


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names, kinds and defaults, without annotations."""
    empty = inspect.Parameter.empty
    parameters = inspect.signature(function).parameters.values()
    return [str(parameter.replace(annotation=empty)) for parameter in parameters]


_patched: list[Target] = []  # by patches that are active


class Patch:
    """Functions that are replaced until undo(), or until the end of a with block. Calling the patch
    is undo() too. ValueError for one that a patch has replaced already: which of two undo() calls
    comes first would decide what is left.
    """

    def __init__(self, replacements: Sequence[Replacement], settings: Any = None) -> None:
        for target, *_ in replacements:
            if any(target.is_of(other) for other in _patched):
                raise ValueError(
                    f"gold_kernels: {target.label} as its package made it is expected, got one "
                    "that is patched; call undo() of the first patch."
                )
        self.settings = settings
        self._replacements = list(replacements)
        _patched.extend(target for target, *_ in replacements)
        for (owner, name, _), _before, after in self._replacements:
            setattr(owner, name, after)

    @property
    def is_active(self) -> bool:
        return bool(self._replacements)

    def undo(self) -> None:
        """Puts the very objects back; a second call changes nothing. What somebody has put in the
        place of ours since then stays, with a warning.
        """
        while self._replacements:
            target, before, after = self._replacements.pop()
            if vars(target.owner).get(target.name) is not after:
                message = f"gold_kernels: {target.label} was replaced after the patch and stays"
                warnings.warn(f"{message}; undo that first.", stacklevel=2)
            elif before is MISSING:
                delattr(target.owner, target.name)
            else:
                setattr(target.owner, target.name, before)
            _patched[:] = [other for other in _patched if not target.is_of(other)]

    __call__ = undo

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()
