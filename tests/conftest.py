"""Everything runs offline and seeded, Triton kernels in the interpreter where there is no GPU;
tests marked gpu are skipped where there is no CUDA device.

pytest's default import mode puts this folder on sys.path (there is no tests/__init__.py), so tests
say plainly `from tiny_models import tiny`.
"""

import gc
import os

# Tensors are tiny: a second thread costs more than it does, tenfold where the core is wanted.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # no warning from forked data loader workers

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
    from support.interpreter import patch_once_a_launch

    patch_once_a_launch()


# What takes longest begins first: at the end it would leave the other workers of xdist idle.
LONGEST = (
    *("test_engines.py", "test_engine_matrix.py", "test_vllm.py", "test_kernels_compile.py"),
    *("test_frozen_bits.py", "test_linear_uld.py", "test_uld_kernel.py", "test_vllm_colocate.py"),
    *("test_compiled_step.py", "test_family_pairs.py", "test_families.py", "test_benchmarks.py"),
    *("test_linear_jsd.py", "test_loss_edges.py", "test_reduction.py", "test_uld_degenerate.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """What is there already is no garbage: Trainer.train() looks for some, and would go through all
    of torch and transformers for it, half a second a run.
    """
    gc.collect()
    gc.freeze()
