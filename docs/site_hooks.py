"""Hooks of mkdocs: trainer/ under the name that is imported, and tables of its config's fields."""

import re
from pathlib import Path

from gold_trainer import flags

ROOT = Path(__file__).parents[1]
FIELDS = re.compile(r"^<!-- fields of (\w+) -->$", re.MULTILINE)


def on_startup(**_: object) -> None:
    """Link build/docs/gold_trainer to trainer/, where mkdocstrings looks for it."""
    link = ROOT / "build" / "docs" / "gold_trainer"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT / "trainer", target_is_directory=True)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put a table in the place of <!-- fields of GOLDConfig -->."""
    return FIELDS.sub(lambda match: fields_table(match[1]), markdown)


def fields_table(class_name: str) -> str:
    """Name, default and help of the fields that a class declares, as --help has them."""
    (file,) = (file for file, name, _ in flags.GROUPS if name == class_name)
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for flag in flags.fields_of(ROOT / "trainer" / file, class_name):
        text = flag.help.replace("|", "\\|")
        lines.append(f"| `{flag.name}` | `{flag.default or None}` | {text} |")
    return "\n".join(lines)
