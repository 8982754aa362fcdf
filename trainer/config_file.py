"""A YAML file of fields: read as its author means it, refused in one line."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

REPLACED = ("int", "float", "timestamp")


class WrittenInt(int):
    """A whole number of a file, and how it is written there: 1234567 may be a revision."""

    text: str


class WrittenFloat(float):
    """The same of other numbers: 1.10 and 12e4 may be names too."""

    text: str


def as_written(value: Any) -> str:
    """The text of a value, as the file has it."""
    return getattr(value, "text", None) or str(value)


class Loader(yaml.SafeLoader):
    """YAML 1.1 with its mistakes mended: 1e-5 is a number, 010, 1:30 and 2026-11-30 are as they are
    written (not 8, 90 and a date), and a key may stand once.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # of the class that it is derived from
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in REPLACED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key} stands twice, first in line {lines[key]}",
                    key_node.start_mark,
                )
            if isinstance(key, str) and key != "<<":
                lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        number = WrittenInt(self.construct_yaml_int(node))
        number.text = node.value
        return number

    def construct_float(self, node: yaml.ScalarNode) -> float:
        number = WrittenFloat(self.construct_yaml_float(node))
        number.text = node.value
        return number


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_float)

# As YAML 1.2 and JSON have them; YAML 1.1 wants a dot and a sign: 1.0e+5.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0|[1-9][\d_]*)$|0x[\da-fA-F]+$"),
    list("-+0123456789"),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+)$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_mapping(path: Path) -> dict[str, Any]:
    """Its fields by name; ValueError says which line is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: a text in UTF-8 is expected, got byte {error.object[error.start]:#04x} at "
            f"{error.start}; save it as UTF-8"
        ) from error
    try:
        config = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}, "
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(
            f"{path} is not valid YAML: {where}{problem}; write one `name: value` a line, indented "
            "by spaces"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one `name: value` a line, got {type(config).__name__}")
    return config
