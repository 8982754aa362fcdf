"""Habits that a linter does not check: who imports whom, how long a file is, which characters."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gold_kernels", "trainer")
MAX_LINES = 400

# file -> why it may be longer
LONGER: dict[str, str] = {}

# from the bottom up: a package may import those before it
LAYERS = ("gold_kernels", "gold_trainer", "benchmarks")

# what the library may import outside of functions
NEEDED = ("gold_kernels", "torch", "triton", "typing_extensions")

# a subclass of what another library defines, which alone imports it
PLUGIN = "gold_kernels/integrations/axolotl.py"


def folders_of_the_docs():
    """Folder of gold_kernels -> those that it may import, from a table of docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Imports point one way\n")[2].partition("\n## ")[0]
    found = {}
    for names, below in re.findall(r"^\| (`.+?`) \| (.+) \|$", section, re.MULTILINE):
        for name in re.findall(r"`(\w+)/`", names):
            above = set(found)
            found[name] = set(re.findall(r"`(\w+)/`", below))
            if "every other folder of the library" in below:
                found[name] = above
    del found["trainer"]
    return found


FOLDERS = folders_of_the_docs()


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path):
    """Full names of what a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_no_test_file_imports_another():
    tests = python_files("tests")
    assert len(tests) > 50
    names = {path.stem for path in tests if path.stem.startswith("test_")} | {"conftest"}
    for path in tests:
        parts = {part for name in imported_modules(path) for part in name.split(".")}
        assert not parts & names, f"{relative(path)}: shared code belongs in tests/support"


def test_test_files_have_different_names():
    """Without packages in tests/, pytest takes two files of one name for one module."""
    names = [path.name for path in python_files("tests") if path.name.startswith("test_")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short_enough_to_hold_in_ones_head(package):
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(package)
    }
    long = {path for path, lines in lengths.items() if lines > MAX_LINES}
    assert long == {path for path in LONGER if path.startswith(f"{package}/")}


def test_sources_are_ascii():
    for path in [*python_files(*PACKAGES), *(ROOT / "trainer/recipes").glob("*.yaml")]:
        assert path.read_bytes().isascii(), relative(path)


@pytest.mark.parametrize(("folder", "layer"), [("gold_kernels", 0), ("trainer", 1)])
def test_imports_point_one_way(folder, layer):
    above = (*LAYERS[layer + 1 :], "tests", "support")
    for path in python_files(folder):
        for name in imported_modules(path):
            assert name.partition(".")[0] not in above, f"{relative(path)} imports {name}"


def test_library_needs_torch_and_triton_alone_when_it_is_imported():
    for path in python_files("gold_kernels"):
        if relative(path) == PLUGIN:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                full = names if isinstance(node, ast.Import) else [node.module or ""]
                firsts = {name.partition(".")[0] for name in full}
                others = firsts - sys.stdlib_module_names - set(NEEDED)
                assert not others, f"{relative(path)} imports {others}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_the_library_import_those_that_the_docs_name(folder):
    for path in python_files(f"gold_kernels/{folder}"):
        for name in imported_modules(path):
            first, _, rest = name.partition(".")
            imported = rest.partition(".")[0]
            if first == "gold_kernels" and imported in FOLDERS:
                assert imported in (folder, *FOLDERS[folder]), f"{relative(path)} imports {name}"


def test_the_docs_have_a_row_for_every_folder_of_the_trainer():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Files\n")[2].partition("\n## ")[0]
    rows = set(
        re.findall(r"`trainer/(\w+)/`", "\n".join(re.findall(r"^\| (.+?) \|", section, re.M)))
    )
    assert rows == {path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py")}


def test_the_docs_name_every_folder_of_the_library_and_no_two_import_each_other():
    folders = {path.name for path in (ROOT / "gold_kernels").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == set(FOLDERS)
    assert not any(a in FOLDERS[b] and b in FOLDERS[a] for a in FOLDERS for b in FOLDERS)
