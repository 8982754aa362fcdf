"""Sdist and wheel, built and installed as a user gets them, beside another package's `trainer`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "site")
BUILD_SDIST = (
    "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
)


def run(*command, cwd, path=""):
    """stdout of a command that has to succeed; path comes before what is installed already."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, cwd):
    quiet = ("--quiet", "--disable-pip-version-check")
    return run(sys.executable, "-m", "pip", *arguments, *quiet, cwd=cwd)


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """From a copy: a build writes into the folder that it builds, and reads what is left there."""
    source = tmp_path_factory.mktemp("source") / "copy"
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BUILD_SDIST, folder, cwd=source)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """From the sdist, which proves that the sdist lacks nothing."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", sdist, "--no-deps", "--no-build-isolation", "-w", folder, cwd=folder)
    (archive,) = folder.glob("gold_kernels-*.whl")
    return archive


@pytest.fixture(scope="module")
def other_wheel(tmp_path_factory):
    """The registry's package trainer, or one of the same shape where the registry is not there."""
    folder = tmp_path_factory.mktemp("other")
    options = ("--no-deps", "--only-binary=:all:", "--retries", "0", "--timeout", "10")
    try:
        pip("download", "trainer", *options, "-d", folder, cwd=folder)
    except AssertionError:
        package = folder / "source" / "trainer"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package.parent / "setup.py").write_text(
            "import setuptools\nsetuptools.setup(name='trainer', packages=['trainer'])\n"
        )
        pip("wheel", "./source", "--no-deps", "--no-build-isolation", "-w", folder, cwd=folder)
    (archive,) = folder.glob("trainer-*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, other_wheel, tmp_path_factory):
    """Both in one folder; the packages that they need come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    for archive in (other_wheel, wheel):
        pip("install", archive, "--no-deps", "--target", folder, "--upgrade", cwd=folder)
    return folder


def run_python(installed, code):
    return run(sys.executable, "-c", code, cwd=installed.parent, path=installed).splitlines()


def test_the_sdist_holds_tests_docs_and_what_builds_them(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"),
        *("setup.py", "tests/conftest.py", "tests/support/tiny_models.py", "tests/packaging"),
        *("benchmarks/bench_jsd.py", "benchmarks/results/jsd.csv", "trainer/recipes/gold_vlm.yaml"),
    ):
        assert name in names, name
    if (ROOT / "docs").exists():
        assert "docs" in names and "mkdocs.yml" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def test_the_wheel_holds_both_packages_with_types_and_recipes(wheel):
    names = names_in(wheel)
    for package, folder in (("gold_kernels", "gold_kernels"), ("gold_trainer", "trainer")):
        assert f"{package}/py.typed" in names
        modules = {
            f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
            for path in (ROOT / folder).rglob("*.py")
        }
        assert modules <= names, "a module that setup.py does not list"
    for folder in ("recipes", "configs"):
        files = list((ROOT / "trainer" / folder).glob("*.yaml"))
        assert files
        for path in files:
            assert f"gold_trainer/{folder}/{path.name}" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "gold_kernels",
        "gold_trainer",
    }


def test_the_description_for_an_index_names_files_and_links_to_none(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    links = re.compile(r"\]\((?!https?:)")
    assert links.search((ROOT / "README.md").read_text())
    assert "(docs/hardware.md)" in metadata and not links.search(metadata)


def test_it_shares_no_file_with_the_registrys_trainer(wheel, other_wheel, installed):
    assert "trainer/__init__.py" in names_in(other_wheel)
    assert not names_in(wheel) & names_in(other_wheel)
    for archive in (wheel, other_wheel):
        with zipfile.ZipFile(archive) as wheel_file:
            for name in wheel_file.namelist():
                if not name.endswith("/RECORD"):
                    assert (installed / name).read_bytes() == wheel_file.read(name), name


def test_each_import_finds_its_own_package(installed):
    origins = run_python(
        installed,
        "from importlib.util import find_spec\n"
        "for name in ('trainer', 'gold_trainer', 'gold_kernels'): print(find_spec(name).origin)",
    )
    for origin, name in zip(origins, ("trainer", "gold_trainer", "gold_kernels"), strict=False):
        assert Path(origin) == installed / name / "__init__.py"
    lines = run_python(
        installed,
        "import gold_kernels, gold_trainer\n"
        "print(gold_trainer.GOLDConfig.__module__)\n"
        "print(gold_kernels.__version__ == gold_trainer.__version__)\n"
        "print(gold_trainer.__file__)",
    )
    assert lines[:2] == ["gold_trainer.config", "True"]
    assert Path(lines[2]).parent == installed / "gold_trainer"


def test_the_console_script_answers_without_torch(installed):
    script = installed / "bin" / "gold-trainer"
    assert "usage: gold-trainer train" in run(script, "--help", cwd=installed, path=installed)
    (metadata,) = installed.glob("gold_kernels-*.dist-info")
    version = metadata.stem.partition("-")[2]
    assert run(script, "--version", cwd=installed, path=installed) == f"gold-trainer {version}\n"
    recipes = run(script, "recipes", cwd=installed, path=installed)
    assert str(installed / "gold_trainer/recipes/gold_vlm.yaml") in recipes
    lines = run_python(
        installed,
        "import sys\n"
        "from gold_trainer.__main__ import main\n"
        "assert main(['--version']) == 0 and main(['trian']) == main(['train', 'nope']) == 2\n"
        "print([name for name in ('torch', 'transformers', 'rich') if name in sys.modules])",
    )
    assert lines[-1] == "[]", "usage and its errors take 0.1 s, importing torch seconds"


def test_where_the_losses_alone_are_installed_commands_name_the_extra(installed):
    lines = run_python(
        installed,
        "import sys\n"
        "for name in ('yaml', 'rich', 'transformers', 'datasets'): sys.modules[name] = None\n"
        "from gold_trainer.__main__ import main\n"
        "sys.stderr = sys.stdout\n"
        "assert main(['--help']) == main(['recipes']) == 0\n"
        "assert main(['train', 'gold_vlm']) == main(['train', '--help']) == 2\n"
        "import gold_trainer\n"
        "try: gold_trainer.GOLDConfig\n"
        "except ImportError as error: print(error)",
    )
    assert len(lines) > 10
    assert all("pip install 'gold-kernels[trainer]'" in line for line in lines[-3:]), lines[-3:]
