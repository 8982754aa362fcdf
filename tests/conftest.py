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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
