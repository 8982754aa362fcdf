"""Hooks of mkdocs: trainer/ under the name that is imported, and tables of its config's fields."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIELDS = re.compile(r"^<!-- fields of (\S+) -->$", re.MULTILINE)


def on_startup(**_: object) -> None:
    """Link build/docs/gold_trainer to trainer/, where mkdocstrings looks for it."""
    link = ROOT / "build" / "docs" / "gold_trainer"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT / "trainer", target_is_directory=True)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put a table in the place of <!-- fields of trainer/config.py -->."""
    return FIELDS.sub(lambda match: fields_table(ROOT / match[1]), markdown)


def fields_table(path: Path) -> str:
    """Name, default and help of every field(default=..., metadata={"help": ...}) of a module."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        options = {option.arg: option.value for option in node.value.keywords}
        if "metadata" not in options:
            continue
        metadata = dict(zip(options["metadata"].keys, options["metadata"].values, strict=True))
        text = next(value for key, value in metadata.items() if key.value == "help")
        default = options.get("default") or options["default_factory"]
        cells = (ast.unparse(node.target), ast.unparse(default), _text_of(text))
        name, default, text = (cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| `{name}` | `{default}` | {text} |")
    return "\n".join(lines)


def _text_of(node: ast.expr) -> str:
    """A string of the source, with ... for what is formatted in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
    return ast.literal_eval(node)
