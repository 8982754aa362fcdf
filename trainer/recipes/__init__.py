"""Settings of whole runs, a YAML file each, found by name wherever the package is installed."""

from pathlib import Path

FOLDER = Path(__file__).parent
OF_ROWS = (".jsonl", ".parquet", ".csv")  # files that no YAML file is called


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_config(name: str) -> Path:
    """A file by its path, or a recipe by its name; the file wins where both exist."""
    path = Path(name)
    if path.exists() and not path.is_dir() and path.suffix not in OF_ROWS:
        return path
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    if path.suffix in OF_ROWS:
        raise ValueError(
            f"gold-trainer train: a YAML file or the name of a recipe is expected, got {name!r}; "
            f"pass a file of rows as --dataset_name {name}"
        )
    is_file = path.suffix in (".yaml", ".yml")
    what = ", a folder" if path.is_dir() else ", and there is no such file" if is_file else ""
    raise ValueError(
        f"gold-trainer train: a YAML file or the name of a recipe is expected, got {name!r}{what}; "
        f"the recipes are {', '.join(recipe_names())}"
    )
