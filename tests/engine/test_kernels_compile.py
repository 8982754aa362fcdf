"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, on a machine without a GPU too."""

import os
import subprocess
import sys

from gold_kernels.jsd import triton_rows as jsd_rows
from gold_kernels.jsd import triton_slices as jsd_slices
from gold_kernels.losses import LOSSES, FormulaLoss
from gold_kernels.projection import triton_folds
from gold_kernels.projection import triton_rows as projected_rows
from gold_kernels.triton import call_facts, formula_rows, formula_slices, scale, slice_rows
from gold_kernels.uld import count_kernels, open_kernels
from gold_kernels.uld import triton_rows as uld_rows
from gold_kernels.uld import triton_sums as uld_sums
from gold_kernels.uld import triton_token_rows as token_rows
from gold_trainer.writers import (
    attention_kernel,
    layer_attention,
    layer_products,
    linear_kernel,
    sampling_kernel,
)
from support.forks import TESTS

SHARED_BYTES = 48 << 10  # a program gets no more without asking the driver
MOST_SHARED_BYTES = 99 << 10  # and no more at all on devices for desktops
ASKING = (
    "added_product_kernel",
    "attend_new_kernel",
    "attend_part_kernel",
    "linear_rows_kernel",
    "normed_product_kernel",
)  # blocks hide the time that memory takes


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell():
    """And each of its variants for one of them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "support.compile_kernels"]
    processes = [
        subprocess.Popen(
            [*command, capability],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=TESTS,
        )
        for capability in ("80", "90", "100")
    ]
    cubins = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        cubins += [line.split() for line in output.splitlines()]
    modules = (jsd_rows, formula_rows, scale, token_rows, uld_rows, uld_sums)
    modules += (triton_folds, projected_rows, slice_rows, jsd_slices, formula_slices)
    modules += (count_kernels, open_kernels, call_facts)
    modules += (sampling_kernel, attention_kernel, linear_kernel)
    modules += (layer_attention, layer_products)
    kernels = {name for part in modules for name in vars(part) if name.endswith("_kernel")}
    for architecture in ("sm_80", "sm_90", "sm_100"):
        compiled = {kernel for target, kernel, *_ in cubins if target == architecture}
        assert compiled == kernels, "a kernel without a signature in compile_kernels.py"
    formulas = sum(issubclass(loss, FormulaLoss) for loss in LOSSES.values())
    variants = 15 + 2 * formulas + 7 + 4 + 6 + 3 + 6 + 14 + 6 + 6 + 9 + 10 + 2
    assert len(cubins) == variants + 2 * len(kernels)
    assert all(int(size) > 1000 for _, _, size, _ in cubins)
    for architecture, kernel, _, shared in cubins:
        most = MOST_SHARED_BYTES if kernel in ASKING else SHARED_BYTES
        assert int(shared) <= most, f"{kernel} asks {architecture} for {shared} bytes"
