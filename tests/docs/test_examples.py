"""Scripts of examples/ run as they stand and learn something; those of docs/ draw and list."""

import importlib.util
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_its_loss_falls(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    losses = [
        float(found)
        for found in re.findall(r"^step .*?([\d.]+) ", capsys.readouterr().out, re.MULTILINE)
    ]
    assert len(losses) >= 3
    assert losses[-1] < 0.5 * losses[0]


def test_picture_of_the_method_is_drawn_from_the_record(tmp_path):
    module = load(ROOT / "docs" / "draw_method.py")
    assert module.extra_gib("eager", 4096) == pytest.approx(13636.5 / 1024)
    module.draw(tmp_path / "method.png")
    assert (tmp_path / "method.png").stat().st_size > 50_000
    assert module.PICTURE.exists()


def test_site_has_a_table_of_the_fields_of_the_config():
    module = load(ROOT / "docs" / "site_hooks.py")
    table = module.fields_table(ROOT / "trainer" / "loss_config.py")
    assert "| `beta` | `0.5` |" in table
    page = (ROOT / "docs" / "reference" / "gold_trainer.md").read_text(encoding="utf-8")
    assert len(module.FIELDS.findall(page)) >= 3
    assert "| `lmbda` | `0.5` |" in module.on_page_markdown(page)
