"""Scripts of examples/ run as they stand and learn something; those of docs/ draw and list."""

import importlib.util
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader

from gold_kernels import jsd_loss
from gold_trainer import flags

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


def test_an_accumulated_step_of_lightning_is_that_of_the_whole_batch():
    """With the gradient of a loss from full logits; the teacher is not in what is saved."""
    import lightning  # seconds, which the example takes as well

    example = load(ROOT / "examples" / "lightning_module.py")
    module = example.Distillation(example.make_model(32), example.make_model(64))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
    assert all(name.startswith("student.") for name in module.state_dict())
    rows = torch.randint(example.VOCAB_SIZE, (4, example.LENGTH))
    logits = [
        model(rows).logits[:, example.PROMPT_LENGTH - 1 : -1].flatten(0, 1)
        for model in (module.student, module.teacher[0])
    ]
    loss = jsd_loss(logits[0], logits[1].detach())
    loss.backward()
    expected = {n: (p - p.grad).detach().clone() for n, p in module.named_parameters()}
    module.zero_grad()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", **dict.fromkeys(quiet, False)
    )
    trainer.fit(module, DataLoader(rows, batch_size=2))
    assert trainer.callback_metrics["jsd"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_picture_of_the_method_is_drawn_from_the_record(tmp_path):
    module = load(ROOT / "docs" / "draw_method.py")
    assert module.extra_gib("eager", 4096) == pytest.approx(13636.5 / 1024)
    module.draw(tmp_path / "method.png")
    assert (tmp_path / "method.png").stat().st_size > 50_000
    assert module.PICTURE.exists()


def test_site_has_a_table_row_for_each_field_of_the_config_and_the_command_line():
    module = load(ROOT / "docs" / "site_hooks.py")
    page = (ROOT / "docs" / "reference" / "gold_trainer.md").read_text(encoding="utf-8")
    shown = module.on_page_markdown(page)
    assert "| `lmbda` | `0.5` | Probability of a micro-batch" in shown
    assert "| `chunk_size` | `None` |" in shown
    rows = re.findall(r"^\| `(\w+)` \| `.+` \| .+ \|$", shown, re.MULTILINE)
    fields = [flag.name for _, group in flags.own_groups() for flag in group]
    assert len(fields) > 100 and sorted(rows) == sorted(fields)
