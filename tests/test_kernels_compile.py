"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, on a machine without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

from gold_kernels.kernels import jsd_rows


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell():
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    cubins = [line.split() for line in result.stdout.splitlines()]
    kernels = [name for name in vars(jsd_rows) if name.endswith("_kernel")]
    assert kernels == ["jsd_rows_kernel"], "add a new kernel to compile_kernels.py"
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for kernel in kernels:
            sizes = [int(row[2]) for row in cubins if row[:2] == [architecture, kernel]]
            assert len(sizes) == 11 and min(sizes) > 1000
