"""Compile every Triton kernel for Ampere, Hopper and Blackwell without a GPU; prints one line per
cubin.

Run as a script in a process without TRITON_INTERPRET (the interpreter replaces triton.jit).
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gold_kernels.kernels import jsd_rows

CAPABILITIES = (80, 90, 100)


def jsd_signatures():
    """(signature, constexprs) of jsd_rows_kernel for each specialisation that the launcher can ask
    for.
    """
    kernel = jsd_rows.jsd_rows_kernel
    modes = (jsd_rows.FORWARD_KL, jsd_rows.REVERSE_KL, jsd_rows.JSD)
    flags = ((False, False, True), (True, True, True), (False, True, False))
    variants = [(mode, flag, "*bf16") for mode in modes for flag in flags]
    variants += [(jsd_rows.JSD, flags[0], grad) for grad in ("*fp16", "*fp32")]
    for mode, (has_labels, has_metrics, needs_grad), grad in variants:
        constexprs = {
            "MODE": mode,
            "HAS_LABELS": has_labels,
            "HAS_METRICS": has_metrics,
            "NEEDS_GRAD": needs_grad,
            "BLOCK_V": 4096,
        }
        types = {"student_ptr": "*fp32", "teacher_ptr": "*fp32", "grad_ptr": grad}
        types |= {"row_weights_ptr": "*fp32", "labels_ptr": "*i64", "values_ptr": "*fp32"}
        floats = ("beta", "inverse_temperature", "weight_soft", "weight_hard")
        signature = {
            name: "constexpr"
            if name in constexprs
            else types.get(name)
            or ("fp32" if name in floats else "i64" if name.endswith("stride") else "i32")
            for name in kernel.arg_names
        }
        yield kernel, signature, constexprs


def main() -> None:
    for capability in CAPABILITIES:
        target = GPUTarget("cuda", capability, 32)
        for kernel, signature, constexprs in jsd_signatures():
            source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
            compiled = triton.compile(source, target=target, options={"num_warps": 8})
            size = len(compiled.asm["cubin"])
            sys.stdout.write(f"sm_{capability} {kernel.__name__} {size} bytes\n")


if __name__ == "__main__":
    main()
