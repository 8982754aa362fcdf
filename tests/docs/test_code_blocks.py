"""Every Python block of README and docs/ runs on its own; the sample that trains a model learns."""

import re
from pathlib import Path

import pytest

from gold_trainer import GOLDTrainer
from support.tiny_models import save_tiny, tiny

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCKS = {
    f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}": match[1]
    for page in PAGES
    for text in (page.read_text(encoding="utf-8"),)
    for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
}
STUDENT, TEACHER = '"Qwen/Qwen3-0.6B"', '"Qwen/Qwen3-8B"'


def run(block: str, name: str, folder: Path) -> dict:
    """Run a block in which models of the hub are tiny ones of the same family in a folder."""
    for hub_name, size in ((TEACHER, "teacher"), (STUDENT, "student")):
        if hub_name in block:
            saved = save_tiny(folder / size, "qwen3", size)
            block = block.replace(hub_name, repr(str(saved)))
    namespace: dict = {}
    exec(compile(block, name, "exec"), namespace)
    return namespace


def test_readme_has_python_blocks():
    assert sum(name.startswith("README") for name in BLOCKS) >= 2


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = run(BLOCKS[name], name, tmp_path).get("trainer")
    if isinstance(trainer, GOLDTrainer):
        check_that_it_learned(trainer)


def check_that_it_learned(trainer: GOLDTrainer):
    start = tiny("qwen3")[0].state_dict()
    trained = trainer.model.state_dict()
    moved = max((trained[key].cpu() - value).abs().max() for key, value in start.items())
    assert moved > 1e-3, "at TRL's learning rate of 1e-7, 30 steps move no weight by 1e-5"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
