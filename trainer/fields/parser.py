"""What reads the fields of a run from a command line."""

import argparse
import re
from collections.abc import Callable
from types import GenericAlias, NoneType
from typing import Any, NoReturn

from transformers import HfArgumentParser

from gold_trainer.fields.checks import MORE_KINDS, kinds_of
from gold_trainer.nearest import did_you_mean


class Parser(HfArgumentParser):
    """Says what is wrong in one line: the usage text of 150 fields would hide it. What begins as a
    negative number, -1e-5 too, is a value and no flag. None is no value, and 1e3 a whole number.
    """

    def __init__(self, kinds: Any, **kwargs: Any) -> None:
        super().__init__(kinds, **kwargs)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")
        fields = {name: own for kind in kinds for name, (own, _) in kinds_of(kind).items()}
        self.texts = {n for n, own in fields.items() if {*own} <= {str, NoneType, list[str]}}
        self.texts -= {*MORE_KINDS}
        for name, own in fields.items():
            action = self.action_of(name)
            if action.choices is None and action.nargs != "+" and dict not in own:
                kind = action.type
                if {bool, str} <= {*own}:
                    kind = _truth_or_text
                elif isinstance(kind, type | GenericAlias) and kind not in (int, float):
                    kind = str  # whose fields say what they take
                action.type = _reader(kind, is_optional=NoneType in own)
        for name in {*MORE_KINDS} & {*fields}:
            self.action_of(name).type = _truth_or_text

    def is_text(self, name: str) -> bool:
        """Whether a field holds a text, or a list of them, and nothing else."""
        return name in self.texts

    def error(self, message: str) -> NoReturn:
        if re.search(r"expected (at least )?one argument", message):
            message += "; write a value that begins with - behind =, as --stop_strings=---"
        raise ValueError(_in_our_words(message))

    def action_of(self, name: str) -> argparse.Action:
        return self._option_string_actions[f"--{name}"]


def _reader(kind: Any, *, is_optional: bool) -> Callable[[str], Any]:
    """What reads the text of a value of this kind."""
    nothing = {"None", "null", *([] if kind is str else ["none"])} if is_optional else set()

    def read(text: str) -> Any:
        if text in nothing:
            return None
        if kind is int and re.fullmatch(r"-?\d*\.?\d+e\+?\d+|-?\d+\.\d*", text.lower()):
            number = float(text)
            return int(number) if number.is_integer() else int(text)
        return kind(text)

    read.__name__ = getattr(kind, "__name__", str(kind))
    return read


def _truth_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _in_our_words(message: str) -> str:
    """A message of argparse, which names a flag twice, and every choice that there is."""
    message = re.sub(r"^argument --(\w+)\S*: ", r"\1: ", message)
    for kind, expected in (("int", "a whole number"), ("float", "a number")):
        if f": invalid {kind} value: " in message:
            return f"{message}; {expected} is expected"
    found = re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message, re.DOTALL)
    if found is None:
        return message
    known = re.findall(r"[\w-]+", found[3])
    return found[1] + (did_you_mean(found[2], known) or f"; it may be {', '.join(known)}")
