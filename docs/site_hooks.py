"""Hook of mkdocs: trainer/ under the name that is imported, so that mkdocstrings can read it."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_startup(**_: object) -> None:
    """Link build/docs/gold_trainer to trainer/."""
    link = ROOT / "build" / "docs" / "gold_trainer"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT / "trainer", target_is_directory=True)
