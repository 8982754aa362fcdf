"""A table of 32-bit counters that belongs to one program, in shared or in global memory.

A row makes 217k additions. Shared memory takes one a clock and lane. In global memory all of them
meet in the L2 cache, and they would be the whole cost of counting. Triton has no atomics on shared
memory. So the table is a static array of PTX on NVIDIA GPUs; elsewhere, and in the interpreter, it
is a pointer to global memory.
"""

import triton
import triton.language as tl

# 40 KiB of the 48 KiB that PTX gives to static arrays: Triton's reductions take 4 KiB, and a memory
# checker needs some of the rest.
NUM_BINS = 5 << 11
TABLE_WORDS = NUM_BINS + 4  # and a counter
# The word of a bin is its sign, a float from -1 to 1, unless its entries are to be ordered. Then it
# is LISTED (2.0) while they are in the list, with a count of keys in its low 22 bits, and WAITING
# (4.0) before.
LISTED = tl.constexpr(0x40000000)
WAITING = tl.constexpr(0x40800000)
_TABLE_ADDRESS = tl.constexpr(
    f"{{ .shared .align 16 .b8 gold_kernels_bins[{4 * TABLE_WORDS}];"
    " mov.u32 $0, gold_kernels_bins; }"
)
_STORE = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.%s [$1], $2; } mov.u32 $0, 0;"
_STORE_HALF = tl.constexpr(_STORE % "b16")
_STORE_WORD = tl.constexpr(_STORE % "b32")


@triton.jit
def shared_table():
    """Address of the TABLE_WORDS words of this program; not cleared."""
    return tl.inline_asm_elementwise(
        _TABLE_ADDRESS,
        "=r,r",
        [tl.program_id(0)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def add_to_table(table, bins, values, IS_SHARED: tl.constexpr):
    """Add all values, 0 too: PTX's assembler would make a branch of a masked addition."""
    if IS_SHARED:
        tl.inline_asm_elementwise(
            "red.shared.add.s32 [$1], $2; mov.u32 $0, 0;",
            "=r,r,r",
            [table + 4 * bins, values],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(table + bins, values, sem="relaxed")


@triton.jit
def take_from_table(table, bins, step, mask, IS_SHARED: tl.constexpr):  # int32, before the addition
    """Add step where mask is true. The counts before differ, so each is a place of its own."""
    if IS_SHARED:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.u32 $0, 0;"
            "@p atom.shared.add.u32 $0, [$1], $2; }",
            "=&r,r,r,r",
            [table + 4 * bins, step, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.atomic_add(table + bins, step, mask=mask, sem="relaxed")


@triton.jit
def load_table(table, bins, IS_SHARED: tl.constexpr):  # int32
    if IS_SHARED:
        return tl.inline_asm_elementwise(
            "ld.volatile.shared.s32 $0, [$1];",
            "=r,r",
            [table + 4 * bins],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:  # additions are in L2, not in L1
        return tl.load(table + bins, cache_modifier=".cg")


@triton.jit
def store_table(table, bins, values, IS_SHARED: tl.constexpr):
    if IS_SHARED:
        tl.inline_asm_elementwise(
            "st.volatile.shared.s32 [$1], $2; mov.u32 $0, 0;",
            "=r,r,r",
            [table + 4 * bins, values],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(table + bins, values)


@triton.jit
def append_listed(counter, list_ptr, words, entries, IS_SHARED: tl.constexpr):
    """Append the entries whose bin is LISTED, and has no keys yet, to a list. The counter holds the
    length of the list.

    One piece of PTX, because every entry of a row passes through it and hardly any is listed.
    """
    is_listed = words == LISTED
    if IS_SHARED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 place; .reg .b64 address; mov.u32 $0, 0;"
            " setp.lt.s32 p, $1, 0;"
            " @p bra DONE;"
            " atom.shared.add.u32 place, [$2], 1;"
            " mad.wide.u32 address, place, 4, $3;"
            " st.global.b32 [address], $1;"
            " DONE: }",
            "=&r,r,r,l",
            [tl.where(is_listed, entries, -1), counter, list_ptr.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        counters = counter + tl.zeros_like(words)
        places = tl.atomic_add(counters, 1, mask=is_listed, sem="relaxed")
        tl.store(list_ptr + places, entries, mask=is_listed)


@triton.jit
def scatter(pointers, values, mask, IS_SHARED: tl.constexpr):
    """Store 16-bit or 32-bit values far apart in global memory.

    Triton gives such a store a layout of its own. It moves pointers, values and mask to it through
    32 KiB of shared memory, which the table needs: so the store is PTX where the table is shared.
    """
    if IS_SHARED:
        is_half: tl.constexpr = values.dtype.primitive_bitwidth == 16
        words = values.to(tl.int16 if is_half else tl.int32, bitcast=True).to(tl.int32)
        tl.inline_asm_elementwise(
            _STORE_HALF if is_half else _STORE_WORD,
            "=r,l,r,r",
            [pointers.to(tl.int64), words, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointers, values, mask=mask)
