"""The losses as a kernel of the Hugging Face hub: a folder that the package `kernels` loads.

    python hub/make_kernel.py build/hub

A kernel is loaded under a name of its own, without being installed, so its imports are relative:
absolute ones of gold_kernels are rewritten. What imports other libraries stays out. The folder has

    build.toml, torch-ext/gold_kernels/        what kernel-builder reads
    build/torch-universal/                     what `kernels.get_local_kernel` loads
"""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "gold_kernels"
NAMESPACE = "gold_kernels_hub"
LEFT_OUT = ("integrations", "__pycache__")
IMPORT = re.compile(rf"^( *)(?:from {PACKAGE}((?:\.\w+)*) import )", re.MULTILINE)


def as_kernel(text: str, depth: int) -> str:  # depth: folders below the package
    """Relative imports, and operators in a namespace beside that of an installed package."""
    for quoted in (f'"{PACKAGE}::', f'"{PACKAGE}"'):
        text = text.replace(quoted, quoted.replace(PACKAGE, NAMESPACE))
    return IMPORT.sub(
        lambda found: f"{found[1]}from {'.' * (depth + 1)}{found[2][1:]} import ", text
    )


def copy_package(folder: Path) -> None:
    source = ROOT / PACKAGE
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).parts
        if not set(parts) & set(LEFT_OUT):
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = as_kernel(path.read_text(encoding="utf-8"), len(parts) - 1)
            target.write_text(text, encoding="utf-8")


def make_kernel(folder: Path) -> Path:
    """The folder, made anew."""
    if folder.exists():
        shutil.rmtree(folder)
    variant = folder / "build" / "torch-universal"
    copy_package(folder / "torch-ext" / PACKAGE)
    copy_package(variant)
    shutil.copy(ROOT / "hub" / "build.toml", folder / "build.toml")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    metadata = {
        "id": "_gold_kernels_universal",  # the name under which it is imported
        "name": "gold-kernels",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    return folder


if __name__ == "__main__":
    make_kernel(Path(sys.argv[1]))
