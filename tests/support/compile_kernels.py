"""Compile every Triton kernel for a compute capability (80 Ampere, 90 Hopper, 100 Blackwell),
without a GPU; prints one line per cubin: architecture, kernel, its bytes and the bytes of shared
memory that a program needs.

The first variant of a kernel is compiled for all of them, each other one for one of them in turn.

Run as a script in a process without TRITON_INTERPRET (the interpreter replaces triton.jit).
"""

import re
import sys

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


def signature_of(kernel, types, floats, constexprs):
    """Pointers by name, strides int64, the named floats fp32, everything else int32."""
    missing = {param.name for param in kernel.params if param.is_constexpr} - constexprs.keys()
    assert not missing, f"{kernel.__name__} would be compiled with a number for {missing}"
    return {
        name: "constexpr"
        if name in constexprs
        else types.get(name)
        or ("fp32" if name in floats else "i64" if name.endswith("stride") else "i32")
        for name in kernel.arg_names
    }


def jsd_signatures():
    """(kernel, signature, constexprs) for each specialisation that the launcher can ask for."""
    kernel = jsd_rows.jsd_rows_kernel
    modes = (jsd_rows.FORWARD_KL, jsd_rows.REVERSE_KL, jsd_rows.JSD, jsd_rows.SYMMETRIC_JSD)
    flags = ((False, False, False, True), (True, True, True, True), (False, True, False, False))
    dtypes = [("*fp32", "*bf16"), ("*bf16", "*bf16"), ("*fp32", "*fp32"), ("*fp32", "*fp16")]
    variants = [(mode, flag, dtypes[0]) for mode in modes for flag in flags]
    variants += [(jsd_rows.SYMMETRIC_JSD, flags[0], dtype) for dtype in dtypes[1:]]
    floats = ("beta", "one_minus_beta", "inverse_temperature", "teacher_scale", "softcap")
    for mode, (has_labels, has_metrics, has_softcap, needs_grad), (logits, grad) in variants:
        constexprs = {
            "MODE": mode,
            "HAS_PAIR": has_labels,
            "HAS_LABELS": has_labels,
            "HAS_METRICS": has_metrics,
            "HAS_MASKS": has_metrics,
            "HAS_SOFTCAP": has_softcap,
            "NEEDS_GRAD": needs_grad,
            "IS_PACKED": has_softcap,
            "BLOCK_V": 4096,
            "LINE": 4 if logits == "*fp32" else 8,
        }
        types = {"student_ptr": logits, "teacher_ptr": logits, "grad_ptr": grad}
        types |= {"weights_ptr": "*fp32", "labels_ptr": "*i64", "values_ptr": "*fp32"}
        yield kernel, signature_of(kernel, types, floats, constexprs), constexprs


def formula_signatures():
    """Every loss that is a formula, plain and with everything."""
    kernel = formula_rows.formula_rows_kernel
    floats = ("inverse_temperature", "teacher_scale", "softcap", "first_number", "second_number")
    formulas = [loss.kernel_entries for loss in LOSSES.values() if issubclass(loss, FormulaLoss)]
    for entries in formulas:
        for has_all, logits in ((False, "*fp32"), (True, "*bf16")):
            names = ("HAS_PAIR", "HAS_LABELS", "HAS_SOFTCAP")
            constexprs = dict.fromkeys(names, has_all) | {
                "ENTRIES": entries,
                "NEEDS_GRAD": True,
                "IS_PACKED": not has_all,
                "BLOCK_V": 4096,
                "LINE": 4 if logits == "*fp32" else 8,
            }
            types = {"student_ptr": logits, "teacher_ptr": logits, "grad_ptr": "*bf16"}
            types |= {"weights_ptr": "*fp32", "labels_ptr": "*i64", "values_ptr": "*fp32"}
            yield kernel, signature_of(kernel, types, floats, constexprs), constexprs


def slice_signatures():
    """The passes over slices of rows, with everything that they may have."""
    floats = ("beta", "one_minus_beta", "inverse_temperature", "teacher_scale", "softcap")
    floats += ("first_number", "second_number")
    entries = LOSSES["skew_kl"].kernel_entries
    kernels = [(slice_rows.slice_sums_kernel, {})]
    for mode in (jsd_rows.REVERSE_KL, jsd_rows.SYMMETRIC_JSD):
        kernels.append((jsd_slices.jsd_slice_sums_kernel, {"MODE": mode, "HAS_METRICS": True}))
        kernels.append((jsd_slices.jsd_slice_gradient_kernel, {"MODE": mode}))
    kernels.append((formula_slices.formula_slice_sums_kernel, {"ENTRIES": entries}))
    kernels.append((formula_slices.formula_slice_gradient_kernel, {"ENTRIES": entries}))
    for kernel, own in kernels:
        flags = [n for n in ("HAS_PAIR", "HAS_LABELS", "HAS_SOFTCAP") if n in kernel.arg_names]
        constexprs = own | dict.fromkeys(flags, True) | {"BLOCK_V": 4096, "LINE": 4}
        types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        given = {"labels_ptr": "*i64", "grad_ptr": "*bf16"}
        types |= {name: kind for name, kind in given.items() if name in types}
        yield kernel, signature_of(kernel, types, floats, constexprs), constexprs


def uld_signatures():
    kernel = uld_rows.uld_rows_kernel
    floats = ("beta", "one_minus_beta", "student_bits", "teacher_bits")
    floats += ("matched_weight", "unmatched_weight")
    everything, nothing = (True,) * 4, (False,) * 4
    for mode, flags, needs_grad, is_shared, logits in (
        (uld_rows.JSD, nothing, True, True, "*fp32"),
        (uld_rows.JSD, nothing, True, True, "*bf16"),
        (uld_rows.FORWARD_KL, everything, True, True, "*fp32"),
        (uld_rows.REVERSE_KL, everything, False, True, "*fp32"),
        (uld_rows.JSD, everything, True, True, "*bf16"),
        (uld_rows.JSD, everything, True, False, "*fp32"),
    ):
        names = ("HAS_SCALES", "HAS_LABELS", "HAS_OVERLAP", "HAS_SOFTCAP")
        has_lists = logits == "*fp32"
        constexprs = dict(zip(names, flags, strict=True)) | {
            "MODE": mode,
            "HAS_SPANS": flags is everything,
            "NEEDS_GRAD": needs_grad,
            "IS_SHARED": is_shared,
            "HAS_LISTS": has_lists,
            "ARE_SIGNS_GRAD": needs_grad,
            "NUM_BINS": uld_rows.NUM_BINS,
            "TABLE_WORDS": uld_rows.TABLE_WORDS,
            "SCAN_BINS": uld_rows.SCAN_BINS,
            "LIST_SIZE": LIST_SIZES[0],
            "MAX_LISTED": uld_rows.MAX_LISTED,
            "LIST_WORDS": list_words(LIST_SIZES[0]),
            "BLOCK_V": 4096 if has_lists else 8192,
            "PAIR_BLOCK": uld_rows.PAIR_BLOCK,
            "SLICE": 1 << 14,
            "NUM_SLICES": 16,
            "LINE": 4 if logits == "*fp32" else 8,
        }
        types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {"student_ptr": logits, "teacher_ptr": logits, "grad_ptr": "*bf16"}
        types |= {"labels_ptr": "*i64", "table_ptr": "*i32", "lists_ptr": "*i32"}
        types |= {"signs_ptr": "*bf16"}
        types |= {"student_ids_ptr": "*i32", "partners_ptr": logits}
        types |= {"sums_ptr": "*fp64", "next_ptr": "*i32"}
        types |= {"student_matched_ptr": "*i1", "teacher_matched_ptr": "*i1"}
        types |= {"student_spans_ptr": "*i64", "teacher_spans_ptr": "*i64"}
        signature = signature_of(kernel, types, (*floats, "softcap"), constexprs)
        yield kernel, signature, constexprs


def uld_sums_signatures():
    kernel = uld_sums.uld_sums_kernel
    for logits, has_overlap in (("*fp32", True), ("*bf16", True), ("*fp16", False)):
        constexprs = {"NUM_SLICES": 16, "SLICE": 1 << 14, "PAIR_BLOCK": uld_sums.PAIR_BLOCK}
        constexprs |= {"HAS_OVERLAP": has_overlap}
        constexprs |= {"BLOCK_V": 4096, "LINE": 4 if logits == "*fp32" else 8}
        types = {name: logits for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {"teacher_ids_ptr": "*i32", "sums_ptr": "*fp64", "next_ptr": "*i32"}
        if not has_overlap:  # which the launcher has none for
            types |= {"teacher_ids_ptr": "*fp64", "partners_ptr": "*fp64"}
        floats = ("student_bits", "teacher_bits")
        yield kernel, signature_of(kernel, types, floats, constexprs), constexprs


def count_signatures():
    """The passes of ULD over slices of rows, of two processes and, once more, of three."""
    kernels = (
        count_kernels.count_columns_kernel,
        count_kernels.scan_counts_kernel,
        open_kernels.collect_open_kernel,
        open_kernels.order_open_kernel,
        count_kernels.sign_columns_kernel,
    )
    integers = ("counts", "words", "offsets", "befores", "state", "next", "lists", "pools")
    integers += ("entries", "ends", "keys", "owners", "table")
    floats = ("student_bits", "teacher_bits", "unmatched_weight", "softcap")
    for num_ranks, grad in ((2, "*bf16"), (3, "*fp32")):
        sizes = {"IS_SHARED": num_ranks == 2, "NUM_BINS": uld_rows.NUM_BINS, "LINE": 4}
        sizes |= {"TABLE_WORDS": uld_rows.TABLE_WORDS, "SCAN_BINS": uld_rows.SCAN_BINS}
        sizes |= {"NUM_SLICES": 16, "NUM_RANKS": num_ranks, "BLOCK_V": 4096}
        sizes |= {"RANK_BLOCK": 1 << (num_ranks - 1).bit_length()}
        sizes |= {"MAX_LISTED": uld_rows.MAX_LISTED, "NEEDS_GRAD": True, "HAS_SOFTCAP": True}
        for kernel in kernels:
            constexprs = {k: v for k, v in sizes.items() if k in kernel.arg_names}
            types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
            types |= {f"{k}_ptr": "*i32" for k in integers if f"{k}_ptr" in types}
            given = {"sums_ptr": "*fp64", "grad_ptr": grad, "own_signs_ptr": grad}
            given |= {"found_ptr": "*fp16", "signs_ptr": "*fp16"}
            types |= {name: kind for name, kind in given.items() if name in types}
            yield kernel, signature_of(kernel, types, floats, constexprs), constexprs


def call_signatures():
    """Facts of a call: of everything, and of hidden states alone. What is not there is float64."""
    kernel = call_facts.call_facts_kernel
    hidden = ("student_entries", "teacher_entries", "student_hidden", "teacher_hidden")
    for has_live, dtype in ((False, "*bf16"), (True, "*fp32")):
        constexprs = {"HAS_LIVE": has_live, "ROWS": call_facts.ROWS, "BLOCK": call_facts.BLOCK}
        types = {name: "*fp64" for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {f"{name}_ptr": dtype for name in hidden}
        if not has_live:
            constexprs |= {"first_size": 1, "second_size": 1}  # as the launcher makes of a 1
        if has_live:
            types |= {"first_floats_ptr": "*fp32", "second_floats_ptr": "*bf16"}
            types |= {"labels_ptr": "*i64", "ids_ptr": "*i64", "live_ptr": "*i1"}
        signature = signature_of(kernel, types, (), constexprs)
        yield kernel, signature, constexprs, {"num_warps": 4}


def token_signatures():
    kernel = token_rows.token_rows_kernel
    for has_softcap, needs_grad, grad, mode in (
        (False, False, "*bf16", None),
        (True, True, "*bf16", None),
        (False, True, "*fp32", None),  # of means
        (False, True, "*bf16", jsd_rows.FORWARD_KL),  # of rows that end groups
        (True, True, "*bf16", jsd_rows.JSD),
        (False, False, "*bf16", jsd_rows.REVERSE_KL),
    ):
        constexprs = {"HAS_SOFTCAP": has_softcap, "NEEDS_GRAD": needs_grad}
        has_ends = mode is not None
        constexprs |= {"MODE": mode or 0, "HAS_ENDS": has_ends, "HAS_SCALES": has_ends}
        constexprs |= {"BLOCK_V": 4096, "LINE": 4}
        types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {"grad_ptr": grad, "ids_ptr": "*i64", "labels_ptr": "*i64"}
        floats = ("bits", "softcap", "beta", "one_minus_beta", "group_scale")
        yield kernel, signature_of(kernel, types, floats, constexprs), constexprs


def projection_signatures():
    bits = ("student_bits", "teacher_bits")
    kernel = projected_rows.join_rows_kernel
    types = {"sums_ptr": "*fp64", "state_ptr": "*fp32"}
    constexprs = {"SLICE": 1 << 14, "NUM_SLICES": 16}
    yield kernel, signature_of(kernel, types, bits, constexprs), constexprs
    kernel, tile = folds.spread_rows_kernel, {"LANES": folds.LANES, "BLOCK": folds.TILE_COLUMNS}
    few = {"num_warps": folds.TILE_WARPS}
    for logits in ("*fp32", "*bf16", "*fp16"):
        types = {"student_ptr": logits, "probs_ptr": "*fp32", "state_ptr": "*fp32"}
        yield kernel, signature_of(kernel, types, ("bits",), tile), tile, few
    kernel = folds.fold_rows_kernel
    types = {"in_ptr": "*fp32", "out_ptr": "*fp32", "ids_ptr": "*i32", "weights_ptr": "*fp32"}
    constexprs = {"WIDTH": FOLD_WIDTH, **tile}
    yield kernel, signature_of(kernel, types, (), constexprs), constexprs, few
    integers = {"teacher_ids_ptr": "*i32", "places_ptr": "*i32", "row_places_ptr": "*i32"}
    integers |= {"student_spans_ptr": "*i64", "teacher_spans_ptr": "*i64"}
    integers |= {"labels_ptr": "*i64", "spans_ptr": "*i64"}
    for has_all, logits, mode in (
        (False, "*fp32", jsd_rows.FORWARD_KL),
        (True, "*bf16", jsd_rows.JSD),
        (True, "*fp32", jsd_rows.REVERSE_KL),
    ):
        given = {"student_ptr": logits, "teacher_ptr": logits, "grad_ptr": "*bf16"}
        flags = dict.fromkeys(("HAS_SPANS", "HAS_SCALES", "HAS_LABELS"), has_all)
        sizes = {"CLOSE_BLOCK": projected_rows.CLOSE_BLOCK, "LANES": folds.LANES}
        sizes |= {"BLOCK_V": 4096, "LINE": 4 if logits == "*fp32" else 8}
        floats = (*bits, "beta", "one_minus_beta", "bits", "softcap")
        for kernel, constexprs, *options in (
            (projected_rows.pair_rows_kernel, {"MODE": mode, **tile}, few),
            (projected_rows.close_rows_kernel, {"MODE": mode, **flags, **sizes}),
            (
                folds.grad_rows_kernel,
                {"HAS_SPANS": has_all, "HAS_LABELS": has_all, "HAS_SOFTCAP": has_all}
                | {"NUM_PIECES": 4, **tile},
                few,
            ),
        ):
            types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
            types |= {name: kind for name, kind in (integers | given).items() if name in types}
            yield kernel, signature_of(kernel, types, floats, constexprs), constexprs, *options


def scale_signatures():
    kernel = scale.scale_kernel
    for tensor, out, is_in_place in (
        ("*bf16", "*bf16", True),
        ("*bf16", "*bf16", False),
        ("*fp32", "*fp16", False),
        ("*fp32", "*fp32", False),
    ):
        types = {"out_ptr": out, "tensor_ptr": tensor, "scale_ptr": "*fp32"}
        constexprs = {"IS_IN_PLACE": is_in_place, "BLOCK": 4096}
        yield kernel, signature_of(kernel, types, (), constexprs), constexprs


def draw_signatures():
    types = dict.fromkeys(("logits_ptr", "parts_ptr", "masses_ptr", "best_ptr"), "*fp32")
    types |= {"last_masses_ptr": "*fp32", "logprobs_ptr": "*fp32", "ids_ptr": "*i64"}
    types |= dict.fromkeys(("low_ptr", "last_low_ptr", "keys_ptr", "places_ptr"), "*i32")
    sizes = {"PARTS": sampling_kernel.NUM_PARTS, "COUNT": sampling_kernel.CANDIDATES}
    variants = [
        (sampling_kernel.sum_parts_kernel, {"BLOCK_V": 1024}),
        *[
            (sampling_kernel.weigh_candidates_kernel, {"IS_FIRST": is_first, "BLOCK_V": 512})
            for is_first in (True, False)
        ],
        *[
            (
                sampling_kernel.draw_parts_kernel,
                {"HAS_TOP_P": is_on, "HAS_MIN_P": is_on, "BLOCK_V": 1024},
            )
            for is_on in (True, False)
        ],
        (sampling_kernel.join_draws_kernel, {}),
    ]
    for kernel, own in variants:
        constexprs = own | {k: v for k, v in sizes.items() if k in kernel.arg_names}
        yield kernel, signature_of(kernel, types, ("top_p", "log_min_p"), constexprs), constexprs


def decoding_signatures():
    """Attention of heads of 128 and 256, in 16 and 32 bits, and matrices for 4 and 64 rows."""
    kernel = attention_kernel.attend_part_kernel
    shapes = (("*bf16", 128, True), ("*bf16", 256, False), ("*fp32", 128, True))
    for dtype, width, has_mask in shapes:
        types = {f"{name}_ptr": dtype for name in ("query", "key", "value")}
        types |= {"mask_ptr": "*i1", "states_ptr": "*fp32", "sums_ptr": "*fp32"}
        block_l, num_stages = attention_kernel.block_of(width, 2 if dtype == "*bf16" else 4)
        options = {"num_warps": 4, "num_stages": num_stages}
        constexprs = {"GROUP": 2, "WIDTH": width, "HAS_MASK": has_mask}
        constexprs |= {"BLOCK_G": 16, "BLOCK_D": width, "BLOCK_L": block_l}
        yield kernel, signature_of(kernel, types, ("scale",), constexprs), constexprs, options
    kernel = attention_kernel.join_parts_kernel
    types = {"states_ptr": "*fp32", "sums_ptr": "*fp32", "out_ptr": "*bf16"}
    constexprs = {"NUM_PARTS": 9, "GROUP": 2, "WIDTH": 128, "BLOCK_S": 16, "BLOCK_D": 128}
    yield kernel, signature_of(kernel, types, (), constexprs), constexprs
    kernel = linear_kernel.linear_rows_kernel
    names = ("input_ptr", "out_ptr", *(f"weight_{i}_ptr" for i in range(linear_kernel.SLOTS)))
    for block_m in (16, 64):
        constexprs = {"BLOCK_M": block_m, "BLOCK_N": linear_kernel.BLOCK_N}
        constexprs |= {"BLOCK_K": linear_kernel.BLOCK_K, "SLOTS": linear_kernel.SLOTS}
        types = dict.fromkeys(names, "*bf16")
        options = {"num_warps": 4, "num_stages": linear_kernel.num_stages_of(block_m)}
        yield kernel, signature_of(kernel, types, (), constexprs), constexprs, options


def layer_signatures(shared_bytes):
    """Layers of 2048 with norms of heads, for 16 and 64 rows, on a device with so much memory."""
    types = {"squares_ptr": "*fp32", "parts_ptr": "*fp32", "sums_ptr": "*fp32"}
    types |= {"counts_ptr": "*i32", "position_ptr": "*i64", "first_ptr": "*i64", "mask_ptr": "*i1"}

    def of(kernel, constexprs, **options):
        own = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")} | types
        signature = signature_of(kernel, own, ("eps", "query_eps", "key_eps", "scale"), constexprs)
        return kernel, signature, constexprs, options

    yield of(layer_products.scale_rows_kernel, {"BLOCK_K": 2048, "BLOCK_T": 128}, num_warps=8)
    kernels = layer_products.normed_product_kernel, layer_products.added_product_kernel
    for num_rows in (16, 64):
        for name, is_gated, kernel in (
            ("heads", False, kernels[0]),
            ("gate", True, kernels[0]),
            ("down", False, kernels[1]),
        ):
            blocks = layer_steps.BLOCKS[name][num_rows > 16]
            own = {"BLOCK_M": num_rows, "BLOCK_N": blocks.outputs, "BLOCK_K": blocks.inputs}
            own |= {"NUM_INPUTS": 2048, "NUM_PARTS": blocks.parts}
            if kernel is kernels[0]:
                own |= {"HAS_BIAS": not is_gated, "IS_GATED": is_gated, "BLOCK_T": 32}
            size = layer_products.block_bytes(blocks, num_rows, 1 + is_gated, 2)
            stages = layer_products.stages_of(blocks, size, shared_bytes)
            yield of(kernel, own, num_warps=blocks.warps, num_stages=stages)
    dealt = layer_attention.DEALT
    for is_split in (True, False):
        own = {"GROUP": 2, "WIDTH": 128, "HAS_NORM": is_split, "HAS_MASK": True}
        own |= {"IS_SPLIT": is_split, "BLOCK_S": 16, "BLOCK_G": 16, "BLOCK_D": 128}
        own |= {"BLOCK_L": dealt.tokens}
        options = {"num_warps": dealt.warps, "num_stages": dealt.stages}
        yield of(layer_attention.attend_new_kernel, own, **options)


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
    variants: dict[str, int] = {}
    for kernel, signature, constexprs, *more in (
        *jsd_signatures(),
        *formula_signatures(),
        *slice_signatures(),
        *scale_signatures(),
        *uld_signatures(),
        *uld_sums_signatures(),
        *count_signatures(),
        *call_signatures(),
        *token_signatures(),
        *projection_signatures(),
        *draw_signatures(),
        *decoding_signatures(),
        *layer_signatures(SHARED_BYTES),
    ):
        variant = variants.setdefault(kernel.__name__, 0)
        variants[kernel.__name__] += 1
        if variant > 0 and variant % len(CAPABILITIES) != turn:
            continue
        attributes = alignment_of(kernel, signature, constexprs)
        source = ASTSource(kernel, signature, constexprs, attributes)
        options = {"num_warps": 16} | ({"maxnreg": 64} if "IS_SHARED" in constexprs else {})
        options |= more[0] if more else {}
        compiled = triton.compile(source, target=target, options=options)
        size, shared = len(compiled.asm["cubin"]), shared_bytes(compiled)
        sys.stdout.write(f"sm_{capability} {kernel.__name__} {size} {shared}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
