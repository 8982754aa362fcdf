"""The folder for the kernels hub: relative imports, torch and triton only, loaded without an
installed gold_kernels.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gold_kernels

ROOT = Path(__file__).parents[2]
RUN = """
import sys
import torch

generator = torch.Generator().manual_seed(0)
student, teacher, head = (torch.randn(6, 16, generator=generator) for _ in range(3))
student.requires_grad_()
loss = kernel.fused_linear_jsd(student, head, teacher, head, beta=0.5)
loss.backward()
assert loss > 0 and student.grad.abs().sum() > 0
assert kernel.fused_linear_uld(student, head, teacher, head[:5]) > 0
assert "gold_kernels" not in sys.modules, "it was loaded from elsewhere"
print("ran", kernel.__name__)
"""
AS_ITS_IMPORTER = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location({name!r}, Path({folder!r}) / "__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[{name!r}] = kernel
spec.loader.exec_module(kernel)
"""
AS_USERS = """
from pathlib import Path
from kernels import get_local_kernel

kernel = get_local_kernel(Path({folder!r}))
"""
CHECK_BUILD = """
from kernels._rust import Build

Build.open({folder!r})
print("build.toml is valid")
"""
has_kernels = importlib.util.find_spec("kernels") is not None


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    subprocess.run([sys.executable, ROOT / "hub" / "make_kernel.py", folder], check=True)
    return folder


def run(code, folder):
    """Output of Python code, in a process that does not find gold_kernels; "." is not on its path
    with -P, nor an editable install with an import hook.
    """
    hidden = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    hidden += f"; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", hidden + code],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_losses_run_under_the_name_of_a_kernel(kernel):
    variant = kernel / "build" / "torch-universal"
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    code = AS_ITS_IMPORTER.format(name=name, folder=str(variant)) + RUN
    assert run(code, kernel) == f"ran {name}\n"


def test_kernel_and_installed_package_live_in_one_process(kernel, monkeypatch):
    folder = kernel / "build" / "torch-universal"
    spec = importlib.util.spec_from_file_location("_beside", folder / "__init__.py")
    beside = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_beside", beside)
    spec.loader.exec_module(beside)
    given = torch.randn(6, 16), torch.randn(9, 16), torch.randn(6, 8), torch.randn(9, 8)
    assert torch.equal(beside.fused_linear_jsd(*given), gold_kernels.fused_linear_jsd(*given))
    size = {"beta": 0.5, "chunk_size": 4}
    assert beside.fused_linear_jsd(*given, **size) == gold_kernels.fused_linear_jsd(*given, **size)


@pytest.mark.skipif(not has_kernels, reason="kernels is of the extra hub")
def test_the_package_kernels_loads_the_folder(kernel):
    assert "ran " in run(AS_USERS.format(folder=str(kernel)) + RUN, kernel)
    assert "is valid" in run(CHECK_BUILD.format(folder=str(kernel)), kernel)


def test_no_import_is_absolute_and_other_libraries_stay_out(kernel):
    files = sorted((kernel / "torch-ext" / "gold_kernels").rglob("*.py"))
    assert len(files) > 40
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) gold_kernels", text, re.MULTILINE), path
        assert "integrations" not in path.parts


def test_metadata_needs_no_package_but_torch(kernel):
    variant = kernel / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["python-depends"] == []
    build = (kernel / "build.toml").read_text(encoding="utf-8")
    assert f'name = "{metadata["name"]}"' in build
    assert f"version = {metadata['version']}" in build
