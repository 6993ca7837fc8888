"""Counting sort of routed copies and the table of row tiles: three launches, no atomics on results, no host reads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _run_rank(key_a, rank_a, key_b, rank_b):
    """Scan step: the position of each element inside its run of equal keys."""
    return key_b, tl.where(key_a == key_b, rank_a + rank_b, rank_b)


@triton.jit
def _keys(ids_ptr, copies, N, E):
    """Expert of each copy; E for those that are dropped, E + 1 past the end."""
    ids = tl.load(ids_ptr + copies, mask=copies < N, other=0)
    keys = tl.where((ids >= 0) & (ids < E), ids, E)
    return tl.where(copies < N, keys, E + 1).to(tl.int32)


@triton.jit
def count_kernel(ids_ptr, counts_ptr, N, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """counts (blocks, BINS): how often each expert occurs in each block of copies. BINS >= E + 2, a power of two."""
    block = tl.program_id(0)
    keys = _keys(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), N, E)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), tl.histogram(keys, BINS))


@triton.jit
def scan_kernel(counts_ptr, totals_ptr, blocks, BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """In place: counts become the copies of that expert in earlier blocks; totals (BINS,) over all blocks."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    place = counts_ptr + row[:, None] * BINS + column[None, :]
    counts = tl.load(place, mask=(row < blocks)[:, None], other=0)
    tl.store(place, tl.cumsum(counts, axis=0) - counts, mask=(row < blocks)[:, None])
    tl.store(totals_ptr + column, tl.sum(counts, axis=0))


@triton.jit
def _write_table(
    chunk, totals, offsets_ptr, longest_ptr, tiles_ptr, num_tiles_ptr, E, max_tiles,
    BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Entries [chunk * CHUNK, ...) of the tile table and of the order by falling count; chunk 0 writes the offsets."""
    bins = tl.arange(0, BINS)
    totals = tl.where(bins < E, totals, 0)
    offsets = tl.cumsum(totals, axis=0) - totals
    tiles = (totals + (BM - 1)) // BM
    starts = tl.cumsum(tiles, axis=0) - tiles
    if chunk == 0:
        tl.store(offsets_ptr + bins, offsets, mask=bins <= E)
        tl.store(num_tiles_ptr, tl.sum(tiles, axis=0))
    entry = chunk * CHUNK + tl.arange(0, CHUNK)
    own = (starts[None, :] <= entry[:, None]) & (entry[:, None] < (starts + tiles)[None, :])
    expert = tl.sum(tl.where(own, bins[None, :], 0), axis=1)
    first = tl.sum(tl.where(own, offsets[None, :] + (entry[:, None] - starts[None, :]) * BM, 0), axis=1)
    end = tl.sum(tl.where(own, (offsets + totals)[None, :], 0), axis=1)
    place = tiles_ptr + entry * 4
    tl.store(place, expert, mask=entry < max_tiles)
    tl.store(place + 1, first, mask=entry < max_tiles)
    tl.store(place + 2, end, mask=entry < max_tiles)
    mine = tl.sum(tl.where(entry[:, None] == bins[None, :], totals[None, :], 0), axis=1)
    ahead = (totals[None, :] > mine[:, None]) | ((totals[None, :] == mine[:, None]) & (bins[None, :] < entry[:, None]))
    rank = tl.sum((ahead & (bins < E)[None, :]).to(tl.int32), axis=1)
    tl.store(longest_ptr + rank, entry, mask=entry < E)


@triton.jit
def table_kernel(
    totals_ptr, offsets_ptr, longest_ptr, tiles_ptr, num_tiles_ptr, E, max_tiles,
    BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The table of rows that are already sorted, from totals (E,)."""
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins, mask=bins < E, other=0).to(tl.int32)
    _write_table(
        tl.program_id(0), totals, offsets_ptr, longest_ptr, tiles_ptr, num_tiles_ptr, E, max_tiles, BINS, BM, CHUNK
    )


@triton.jit
def place_kernel(
    ids_ptr, counts_ptr, totals_ptr, copies_ptr, position_ptr,
    offsets_ptr, longest_ptr, tiles_ptr, num_tiles_ptr, N, E, max_tiles, blocks,
    BLOCK: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program b < blocks gives block b's copies their sorted rows, stably; the others write the table."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    if program >= blocks:
        _write_table(
            program - blocks, totals, offsets_ptr, longest_ptr, tiles_ptr, num_tiles_ptr, E, max_tiles, BINS, BM, CHUNK
        )
    else:
        local = tl.arange(0, BLOCK)
        keys = _keys(ids_ptr, program * BLOCK + local, N, E)
        packed = tl.sort(keys * BLOCK + local)
        keys = packed // BLOCK
        copies = program * BLOCK + packed % BLOCK
        _, rank = tl.associative_scan((keys, tl.full((BLOCK,), 1, tl.int32)), 0, _run_rank)
        offsets = tl.cumsum(totals, axis=0) - totals
        row = tl.gather(offsets, keys, 0) + tl.load(counts_ptr + program * BINS + keys) + rank - 1
        tl.store(copies_ptr + row, copies, mask=copies < N)
        tl.store(position_ptr + copies, tl.where(keys < E, row, -1), mask=copies < N)
