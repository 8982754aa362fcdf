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
# is WAITING, and LISTED while they are in the list, with a count of keys in its low 22 bits. As
# floats LISTED is 0, so that a sum of sign times value need not leave it out, and WAITING -1e-45; a
# sign that is 0 is therefore -0.
LISTED = tl.constexpr(0)
NO_SIGN = tl.constexpr(-(1 << 31))
WAITING = tl.constexpr(NO_SIGN.value + 1)
_END_LISTED = tl.constexpr(1 << 22)
_TABLE_ADDRESS = tl.constexpr(
    f"{{ .shared .align 16 .b8 gold_kernels_bins[{4 * TABLE_WORDS}];"
    " mov.u32 $0, gold_kernels_bins; }"
)
_STORE = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.%s [$1], $2; } mov.u32 $0, 0;"
APPEND_BLOCK = 1 << 11  # entries at a time, at least: four for each thread of 16 warps
_APPEND_ONE = (
    " setp.ne.s32 p, ${word}, {listed}; @p bra NEXT{number};"
    " atom.shared.add.u32 place, [${counter}], 1;"
    " mad.wide.u32 address, place, 4, ${list};"
    " st.global.b32 [address], ${entry};"
    " NEXT{number}:"
)
_APPEND = tl.constexpr(
    "{ .reg .pred p; .reg .b32 place; .reg .b64 address;"
    + "".join(f" mov.u32 ${number}, 0;" for number in range(4))
    + f" setp.ne.s32 p, $4, {LISTED.value};"
    + "".join(f" setp.ne.and.s32 p, ${word}, {LISTED.value}, p;" for word in (5, 6, 7))
    + " @p bra DONE;"
    + "".join(
        _APPEND_ONE.format(
            word=4 + number,
            entry=8 + number,
            counter=12 + number,
            list=16 + number,
            listed=LISTED.value,
            number=number,
        )
        for number in range(4)
    )
    + " DONE: }"
)
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
def is_ordered(words):
    """True for the words of bins whose entries have been in a list."""
    return words.to(tl.uint32, bitcast=True) < _END_LISTED


@triton.jit
def append_listed(counter, list_ptr, words, entries, IS_SHARED: tl.constexpr):
    """Append the entries whose bin is LISTED, and has no keys yet, to a list. The counter holds the
    length of the list.

    One piece of PTX for the four entries of a thread's line, because every entry of a row passes
    through it and hardly any is listed. A thread without a whole line would append what is not
    there: see APPEND_BLOCK.
    """
    is_listed = words == LISTED
    if IS_SHARED:
        tl.inline_asm_elementwise(
            _APPEND,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,l,l,l,l",
            [words, entries, counter, list_ptr.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=4,
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
