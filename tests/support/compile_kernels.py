"""Compile every Triton kernel for a compute capability (80 Ampere, 90 Hopper, 100 Blackwell),
without a GPU; prints one line per cubin: architecture, kernel, its bytes and the bytes of shared
memory that a program needs.

The first variant of a kernel is compiled for all of them, each other one for one of them in turn.

Run as a script in a process without TRITON_INTERPRET (the interpreter replaces triton.jit).
"""

import re
import sys
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gold_kernels.jsd import triton_rows as jsd_rows
from gold_kernels.jsd import triton_slices as jsd_slices
from gold_kernels.losses import LOSSES, FormulaLoss
from gold_kernels.projection import triton_folds as folds
from gold_kernels.projection import triton_rows as projected_rows
from gold_kernels.tokens.projection import FOLD_WIDTH
from gold_kernels.triton import call_facts, formula_rows, formula_slices, scale, slice_rows
from gold_kernels.triton.launch import ROW_ALIGNMENT
from gold_kernels.uld import count_kernels, open_kernels
from gold_kernels.uld import triton_rows as uld_rows
from gold_kernels.uld import triton_sums as uld_sums
from gold_kernels.uld import triton_token_rows as token_rows
from gold_kernels.uld.bins import LIST_SIZES
from gold_kernels.uld.lists import list_words
from gold_trainer.writers import (
    attention_kernel,
    layer_attention,
    layer_products,
    layer_steps,
    linear_kernel,
    sampling_kernel,
)

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = 99 << 10  # of a program, on devices for desktops

# Of arguments by these names, in all kernels.
FLOATS = {
    *("beta", "one_minus_beta", "inverse_temperature", "teacher_scale", "softcap", "group_scale"),
    *("first_number", "second_number", "matched_weight", "unmatched_weight", "top_p", "log_min_p"),
    *("bits", "student_bits", "teacher_bits", "scale", "eps", "query_eps", "key_eps"),
}
POINTERS = {
    **dict.fromkeys(
        ("labels", "student_spans", "teacher_spans", "spans", "position", "first"), "*i64"
    ),
    **dict.fromkeys(("befores", "counts", "ends", "entries", "keys", "last_low", "lists"), "*i32"),
    **dict.fromkeys(("low", "next", "offsets", "owners", "places", "pools", "row_places"), "*i32"),
    **dict.fromkeys(("student_ids", "table", "teacher_ids", "words"), "*i32"),
    **dict.fromkeys(("mask", "student_matched", "teacher_matched"), "*i1"),
    "grad": "*bf16",
}
CONSTEXPRS = {
    "BLOCK_V": 4096,
    "NUM_BINS": uld_rows.NUM_BINS,
    "TABLE_WORDS": uld_rows.TABLE_WORDS,
    "SCAN_BINS": uld_rows.SCAN_BINS,
    "MAX_LISTED": uld_rows.MAX_LISTED,
    "LIST_SIZE": LIST_SIZES[0],
    "LIST_WORDS": list_words(LIST_SIZES[0]),
    "SLICE": 1 << 14,
    "NUM_SLICES": 16,
    "LANES": folds.LANES,
}


class Variant(NamedTuple):
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


def variant(kernel, types=None, others="*fp32", options=None, **constexprs) -> Variant:
    """types: of pointers that have others than POINTERS says, where the kernel has them; others: of
    pointers that are in neither. Constexprs that the kernel has not are left out. Strides are
    int64, what is no float an int32.
    """
    types = {f"{name}_ptr": kind for name, kind in (POINTERS | (types or {})).items()}
    logits = types.get("student_ptr", others)
    constexprs = {"LINE": 4 if logits == "*fp32" else 8} | CONSTEXPRS | constexprs
    constexprs = {name: constexprs[name] for name in kernel.arg_names if name in constexprs}
    missing = {param.name for param in kernel.params if param.is_constexpr} - constexprs.keys()
    assert not missing, f"{kernel.__name__} would be compiled with a number for {missing}"

    def kind_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name.endswith("_ptr"):
            return types.get(name, others)
        return "fp32" if name in FLOATS else "i64" if name.endswith("stride") else "i32"

    signature = {name: kind_of(name) for name in kernel.arg_names}
    return Variant(kernel, signature, constexprs, options or {})


def both(logits: str) -> dict[str, str]:
    return {"student": logits, "teacher": logits}


def jsd_variants():
    """Each specialisation that the launcher can ask for."""
    modes = (jsd_rows.FORWARD_KL, jsd_rows.REVERSE_KL, jsd_rows.JSD, jsd_rows.SYMMETRIC_JSD)
    flags = ((False, False, False, True), (True, True, True, True), (False, True, False, False))
    dtypes = [("*fp32", "*bf16"), ("*bf16", "*bf16"), ("*fp32", "*fp32"), ("*fp32", "*fp16")]
    variants = [(mode, flag, dtypes[0]) for mode in modes for flag in flags]
    variants += [(jsd_rows.SYMMETRIC_JSD, flags[0], dtype) for dtype in dtypes[1:]]
    for mode, (has_labels, has_metrics, has_softcap, needs_grad), (logits, grad) in variants:
        yield variant(
            jsd_rows.jsd_rows_kernel,
            both(logits) | {"grad": grad},
            MODE=mode,
            HAS_PAIR=has_labels,
            HAS_LABELS=has_labels,
            HAS_METRICS=has_metrics,
            HAS_MASKS=has_metrics,
            HAS_SOFTCAP=has_softcap,
            NEEDS_GRAD=needs_grad,
            IS_PACKED=has_softcap,
        )


def formula_variants():
    """Every loss that is a formula, plain and with everything."""
    formulas = [loss.kernel_entries for loss in LOSSES.values() if issubclass(loss, FormulaLoss)]
    for entries in formulas:
        for has_all, logits in ((False, "*fp32"), (True, "*bf16")):
            flags = dict.fromkeys(("HAS_PAIR", "HAS_LABELS", "HAS_SOFTCAP"), has_all)
            flags |= {"NEEDS_GRAD": True, "IS_PACKED": not has_all}
            yield variant(formula_rows.formula_rows_kernel, both(logits), ENTRIES=entries, **flags)


def slice_variants():
    """The passes over slices of rows, with everything that they may have."""
    names = ("HAS_PAIR", "HAS_LABELS", "HAS_SOFTCAP", "HAS_METRICS")
    flags, entries = dict.fromkeys(names, True), LOSSES["skew_kl"].kernel_entries
    yield variant(slice_rows.slice_sums_kernel, **flags)
    for mode in (jsd_rows.REVERSE_KL, jsd_rows.SYMMETRIC_JSD):
        yield variant(jsd_slices.jsd_slice_sums_kernel, MODE=mode, **flags)
        yield variant(jsd_slices.jsd_slice_gradient_kernel, MODE=mode, **flags)
    yield variant(formula_slices.formula_slice_sums_kernel, ENTRIES=entries, **flags)
    yield variant(formula_slices.formula_slice_gradient_kernel, ENTRIES=entries, **flags)


def uld_variants():
    names = ("HAS_SCALES", "HAS_LABELS", "HAS_OVERLAP", "HAS_SOFTCAP", "HAS_SPANS")
    for mode, has_all, needs_grad, is_shared, logits in (
        (uld_rows.JSD, False, True, True, "*fp32"),
        (uld_rows.JSD, False, True, True, "*bf16"),
        (uld_rows.FORWARD_KL, True, True, True, "*fp32"),
        (uld_rows.REVERSE_KL, True, False, True, "*fp32"),
        (uld_rows.JSD, True, True, True, "*bf16"),
        (uld_rows.JSD, True, True, False, "*fp32"),
    ):
        yield variant(
            uld_rows.uld_rows_kernel,
            both(logits) | {"signs": "*bf16", "partners": logits, "sums": "*fp64"},
            MODE=mode,
            NEEDS_GRAD=needs_grad,
            ARE_SIGNS_GRAD=needs_grad,
            IS_SHARED=is_shared,
            HAS_LISTS=logits == "*fp32",
            BLOCK_V=4096 if logits == "*fp32" else 8192,
            PAIR_BLOCK=uld_rows.PAIR_BLOCK,
            **dict.fromkeys(names, has_all),
        )
    for logits, has_overlap in (("*fp32", True), ("*bf16", True), ("*fp16", False)):
        types = {"sums": "*fp64"}
        if not has_overlap:  # which the launcher has none for
            types |= {"teacher_ids": "*fp64", "partners": "*fp64"}
        flags = {"PAIR_BLOCK": uld_sums.PAIR_BLOCK, "HAS_OVERLAP": has_overlap}
        yield variant(uld_sums.uld_sums_kernel, types, logits, **flags)


def count_variants():
    """The passes of ULD over slices of rows, of two processes and, once more, of three."""
    for num_ranks, grad in ((2, "*bf16"), (3, "*fp32")):
        types = {"sums": "*fp64", "grad": grad, "own_signs": grad, "state": "*i32"}
        for kernel in (
            count_kernels.count_columns_kernel,
            count_kernels.scan_counts_kernel,
            open_kernels.collect_open_kernel,
            open_kernels.order_open_kernel,
            count_kernels.sign_columns_kernel,
        ):
            yield variant(
                kernel,
                types | {"found": "*fp16", "signs": "*fp16"},
                IS_SHARED=num_ranks == 2,
                NUM_RANKS=num_ranks,
                RANK_BLOCK=1 << (num_ranks - 1).bit_length(),
                NEEDS_GRAD=True,
                HAS_SOFTCAP=True,
            )


def call_variants():
    """Facts of a call: of everything, and of hidden states alone. What is not there is float64."""
    hidden = ("student_entries", "teacher_entries", "student_hidden", "teacher_hidden")
    few = {"num_warps": 4}
    for has_live, dtype in ((False, "*bf16"), (True, "*fp32")):
        constexprs = {"HAS_LIVE": has_live, "ROWS": call_facts.ROWS, "BLOCK": call_facts.BLOCK}
        types = dict.fromkeys(hidden, dtype)
        if has_live:
            types |= {"first_floats": "*fp32", "second_floats": "*bf16"}
            types |= {"ids": "*i64", "live": "*i1"}
        else:
            constexprs |= {"first_size": 1, "second_size": 1}  # as the launcher makes of a 1
            types["labels"] = "*fp64"
        yield variant(call_facts.call_facts_kernel, types, "*fp64", few, **constexprs)


def token_variants():
    for has_softcap, needs_grad, grad, mode in (
        (False, False, "*bf16", None),
        (True, True, "*bf16", None),
        (False, True, "*fp32", None),  # of means
        (False, True, "*bf16", jsd_rows.FORWARD_KL),  # of rows that end groups
        (True, True, "*bf16", jsd_rows.JSD),
        (False, False, "*bf16", jsd_rows.REVERSE_KL),
    ):
        yield variant(
            token_rows.token_rows_kernel,
            {"grad": grad, "ids": "*i64"},
            HAS_SOFTCAP=has_softcap,
            NEEDS_GRAD=needs_grad,
            MODE=mode or 0,
            HAS_ENDS=mode is not None,
            HAS_SCALES=mode is not None,
        )


def projection_variants():
    yield variant(projected_rows.join_rows_kernel, {"sums": "*fp64"})
    tile, few = {"BLOCK": folds.TILE_COLUMNS}, {"num_warps": folds.TILE_WARPS}
    for logits in ("*fp32", "*bf16", "*fp16"):
        yield variant(folds.spread_rows_kernel, both(logits), options=few, **tile)
    yield variant(folds.fold_rows_kernel, {"ids": "*i32"}, options=few, WIDTH=FOLD_WIDTH, **tile)
    names = ("HAS_SPANS", "HAS_SCALES", "HAS_LABELS", "HAS_SOFTCAP")
    for has_all, logits, mode in (
        (False, "*fp32", jsd_rows.FORWARD_KL),
        (True, "*bf16", jsd_rows.JSD),
        (True, "*fp32", jsd_rows.REVERSE_KL),
    ):
        given = dict.fromkeys(names, has_all) | {"MODE": mode, "NUM_PIECES": 4, **tile}
        given |= {"CLOSE_BLOCK": projected_rows.CLOSE_BLOCK}
        yield variant(projected_rows.pair_rows_kernel, both(logits), options=few, **given)
        yield variant(projected_rows.close_rows_kernel, both(logits), **given)
        yield variant(folds.grad_rows_kernel, both(logits), options=few, **given)


def scale_variants():
    for tensor, out, is_in_place in (
        ("*bf16", "*bf16", True),
        ("*bf16", "*bf16", False),
        ("*fp32", "*fp16", False),
        ("*fp32", "*fp32", False),
    ):
        types = {"out": out, "tensor": tensor}
        yield variant(scale.scale_kernel, types, IS_IN_PLACE=is_in_place, BLOCK=4096)


def draw_variants():
    types = {"ids": "*i64"}
    sizes = {"PARTS": sampling_kernel.NUM_PARTS, "COUNT": sampling_kernel.CANDIDATES}
    yield variant(sampling_kernel.sum_parts_kernel, types, BLOCK_V=1024, **sizes)
    for is_on in (True, False):
        own = {"IS_FIRST": is_on, "BLOCK_V": 512}
        yield variant(sampling_kernel.weigh_candidates_kernel, types, **own, **sizes)
        own = {"HAS_TOP_P": is_on, "HAS_MIN_P": is_on, "BLOCK_V": 1024}
        yield variant(sampling_kernel.draw_parts_kernel, types, **own, **sizes)
    yield variant(sampling_kernel.join_draws_kernel, types, **sizes)


def decoding_variants():
    """Attention of heads of 128 and 256, in 16 and 32 bits, and matrices for 4 and 64 rows."""
    for dtype, width, has_mask in (
        ("*bf16", 128, True),
        ("*bf16", 256, False),
        ("*fp32", 128, True),
    ):
        block_l, num_stages = attention_kernel.block_of(width, 2 if dtype == "*bf16" else 4)
        yield variant(
            attention_kernel.attend_part_kernel,
            dict.fromkeys(("query", "key", "value"), dtype),
            options={"num_warps": 4, "num_stages": num_stages},
            GROUP=2,
            WIDTH=width,
            HAS_MASK=has_mask,
            BLOCK_G=16,
            BLOCK_D=width,
            BLOCK_L=block_l,
        )
    sizes = {"NUM_PARTS": 9, "GROUP": 2, "WIDTH": 128, "BLOCK_S": 16, "BLOCK_D": 128}
    yield variant(attention_kernel.join_parts_kernel, {"out": "*bf16"}, **sizes)
    for block_m in (16, 64):
        yield variant(
            linear_kernel.linear_rows_kernel,
            others="*bf16",
            options={"num_warps": 4, "num_stages": linear_kernel.num_stages_of(block_m)},
            BLOCK_M=block_m,
            BLOCK_N=linear_kernel.BLOCK_N,
            BLOCK_K=linear_kernel.BLOCK_K,
            SLOTS=linear_kernel.SLOTS,
        )


def layer_variants():
    """Layers of 2048 with norms of heads, for 16 and 64 rows, on a device with SHARED_BYTES."""
    given = dict.fromkeys(("squares", "parts", "sums"), "*fp32"), "*bf16"
    few = {"num_warps": 8}
    yield variant(layer_products.scale_rows_kernel, *given, few, BLOCK_K=2048, BLOCK_T=128)
    for num_rows in (16, 64):
        for name, is_gated, kernel in (
            ("heads", False, layer_products.normed_product_kernel),
            ("gate", True, layer_products.normed_product_kernel),
            ("down", False, layer_products.added_product_kernel),
        ):
            blocks = layer_steps.BLOCKS[name][num_rows > 16]
            size = layer_products.block_bytes(blocks, num_rows, 1 + is_gated, 2)
            stages = layer_products.stages_of(blocks, size, SHARED_BYTES)
            yield variant(
                kernel,
                *given,
                {"num_warps": blocks.warps, "num_stages": stages},
                BLOCK_M=num_rows,
                BLOCK_N=blocks.outputs,
                BLOCK_K=blocks.inputs,
                NUM_INPUTS=2048,
                NUM_PARTS=blocks.parts,
                HAS_BIAS=not is_gated,
                IS_GATED=is_gated,
                BLOCK_T=32,
            )
    dealt = layer_attention.DEALT
    options = {"num_warps": dealt.warps, "num_stages": dealt.stages}
    sizes = {"GROUP": 2, "WIDTH": 128, "BLOCK_S": 16, "BLOCK_G": 16, "BLOCK_D": 128}
    sizes |= {"BLOCK_L": dealt.tokens, "HAS_MASK": True}
    for is_split in (True, False):
        own = {"HAS_NORM": is_split, "IS_SPLIT": is_split}
        yield variant(layer_attention.attend_new_kernel, *given, options, **own, **sizes)


OF_LOSSES = (jsd_variants, formula_variants, slice_variants, scale_variants, uld_variants)
OF_LOSSES += (count_variants, call_variants, token_variants, projection_variants)
ALL_VARIANTS = *OF_LOSSES, draw_variants, decoding_variants, layer_variants


def alignment_of(kernel, signature, constexprs):
    """What the launcher says of pointers and strides; rows are aligned where the kernel keeps its
    table in shared memory, and sizes are any number.
    """
    is_aligned = constexprs.get("IS_SHARED", True)
    any_number = {p.name for p in kernel.params if p.do_not_specialize}
    any_number |= {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    return {
        (position,): [["tt.divisibility", ROW_ALIGNMENT]]
        for position, name in enumerate(kernel.arg_names)
        if name not in any_number
        and (name.endswith("_ptr") or (is_aligned and signature[name] == "i64"))
    }


def shared_bytes(compiled) -> int:
    """Static and dynamic shared memory of a program."""
    return compiled.metadata.shared + sum(
        int(size) for size in re.findall(r"\.shared .*?\.b8 \w+\[(\d+)\]", compiled.asm["ptx"])
    )


def main(capability: int) -> None:
    target, turn = GPUTarget("cuda", capability, 32), CAPABILITIES.index(capability)
    turns: dict[str, int] = {}
    for kernel, signature, constexprs, more in (one for kind in ALL_VARIANTS for one in kind()):
        number = turns.setdefault(kernel.__name__, 0)
        turns[kernel.__name__] += 1
        if number > 0 and number % len(CAPABILITIES) != turn:
            continue
        attributes = alignment_of(kernel, signature, constexprs)
        source = ASTSource(kernel, signature, constexprs, attributes)
        options = {"num_warps": 16} | ({"maxnreg": 64} if "IS_SHARED" in constexprs else {})
        compiled = triton.compile(source, target=target, options=options | more)
        size, shared = len(compiled.asm["cubin"]), shared_bytes(compiled)
        sys.stdout.write(f"sm_{capability} {kernel.__name__} {size} {shared}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
