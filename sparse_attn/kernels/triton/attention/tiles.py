"""Parts that the attention kernels share: tiles, products, masks, dropout, and statistics of rows for a backward."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.attention.weights import divided, place
from sparse_attn.kernels.triton.family import away_from_zero
from sparse_attn.kernels.triton.pairs import INTERPRETED, single


@triton.jit
def queries_of_program(inputs, lengths, BLOCK_M: tl.constexpr, AGAIN: tl.constexpr = False):
    """The tile of queries that a program computes; the last tiles, with most work under a causal mask, come first.

    With ``AGAIN`` the results are the same, but the program computes them again. Otherwise the compiler would keep the
    results of the earlier call in registers, and the loops between the two calls need all registers.

    Returns:
        The number of tiles per head, the tile, the index of the pair of batch entry and head, the batch entry, the
        head, and the indices of the queries.
    """
    tiles = tl.cdiv(lengths.queries, BLOCK_M)
    program = tl.program_id(0)
    if AGAIN and not INTERPRETED:
        program = tl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r,r", [lengths.queries], tl.int32, False, 1)
    tile = tiles - 1 - program % tiles
    head = program // tiles
    n, h = (head // inputs.heads).to(tl.int64), (head % inputs.heads).to(tl.int64)
    return tiles, tile, head, n, h, tile * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def head_of_program(inputs, lengths, BLOCK_M: tl.constexpr):
    """The head of a program, as :func:`queries_of_program` returns it."""
    return (tl.program_id(0) // tl.cdiv(lengths.queries, BLOCK_M) % inputs.heads).to(tl.int64)


@triton.jit
def of_head(operand, n, h):
    """A pointer to the first row of a batch entry and a head."""
    return operand.start + n * operand.n + h * operand.h


@triton.jit
def of_mask(mask, n, h):
    """A pointer to the mask of a batch entry and a head."""
    return mask.start + n * mask.n + h * mask.h


@triton.jit
def head_a(inputs, h):
    """``a = α - 1`` of a head, never exactly 0. If α is a tensor, 1 is subtracted in float64."""
    if inputs.alpha.start is None:
        a = inputs.a + tl.zeros([1], tl.float32)
    else:
        alpha = tl.load(inputs.alpha.start + h * inputs.alpha.h + tl.arange(0, 1))
        a = (alpha.to(tl.float64) - 1.0).to(tl.float32)
    return away_from_zero(a)


@triton.jit
def keys_of(inputs, lengths, n, CAUSAL: tl.constexpr):
    """How many keys, counted from the first, the queries of a batch entry can see without a mask tensor."""
    limit = inputs.keys
    if inputs.key_lengths is not None:
        limit = tl.minimum(limit, tl.load(inputs.key_lengths + n).to(tl.int32))
    if CAUSAL:
        limit = tl.minimum(limit, tl.maximum(lengths.queries + lengths.offset, 0))
    return limit


@triton.jit
def keys_seen(inputs, n, h, j, limit):
    """Mark the keys ``j`` that are read: keys below the limit, except keys hidden by a mask that all queries share.

    Other keys have weight 0, but must not be read: padding may hold NaN, and 0 · NaN is NaN.
    """
    seen = j < limit
    if inputs.mask.start is not None and inputs.mask.query is None:
        mask = tl.load(of_mask(inputs.mask, n, h) + j.to(tl.int64) * inputs.mask.key, mask=seen, other=0)
        seen = seen & _shown(mask, inputs.lowest)
    return seen


@triton.jit
def _shown(mask, lowest):
    """Mark the keys that a mask shows: a boolean mask where it is True, a float mask where it is above ``lowest``."""
    return mask != 0 if mask.dtype.is_int() else ~(mask.to(tl.float32) <= lowest)


@triton.jit
def dot(x, y, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix product, summed in float32. ``UPCAST`` is for the interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
    else:
        return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def end_of_keys(i, queries, limit, offset, CAUSAL: tl.constexpr):
    """How many keys each of the queries ``i`` sees without a mask tensor; 0 beyond the last query."""
    end = tl.zeros_like(i) + limit
    if CAUSAL:
        end = tl.minimum(end, i + offset + 1)
    return tl.where(i < queries, end, 0)


@triton.jit
def hide(product, i, j, end, inputs, n, h):
    """Products (M, N) with ``-inf`` where a query does not see a key; a float mask, divided by the scale, is added.

    All kernels apply masks with this function, so that their products are the same. An entry at the edge of the support
    must not be inside the support in one kernel and outside in another.
    """
    seen = j < end
    if inputs.mask.start is not None:
        place = of_mask(inputs.mask, n, h) + j.to(tl.int64) * inputs.mask.key
        if inputs.mask.query is None:
            mask = tl.load(place, mask=j < inputs.keys, other=0)
        else:
            mask = tl.load(place + i.to(tl.int64) * inputs.mask.query, mask=seen, other=0)
        seen = seen & _shown(mask, inputs.lowest)
        if not mask.dtype.is_int():
            product += mask.to(tl.float32) * inputs.one_by_scale
    return tl.where(seen, product, float("-inf"))


@triton.jit
def products(
    q,
    k_start,
    first,
    i,
    end,
    inside,
    inputs,
    n,
    h,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A tile of keys, and its products with queries. ``inside`` says which rows of the tile are read.

    Without ``EDGE`` all queries see all keys of the tile.
    """
    k = load_tile(k_start, first, inputs.key.row, inside, D, BLOCK_N, BLOCK_D, EDGE)
    z = dot(q, k.T, UPCAST, PRECISION)
    if EDGE:
        j = first + tl.arange(0, BLOCK_N)
        z = hide(z, i[:, None], j[None, :], end[:, None], inputs, n, h)
    return k, z


@triton.jit
def whole_tiles(inputs, lengths, limit, first, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr):
    """How many tiles of keys, counted from the first, all queries from ``first`` on see completely.

    The result is 0 under a mask and with ``EXACT``: separate loops for these tiles would gain little there and
    take long to compile.
    """
    if inputs.mask.start is not None or EXACT:
        return limit * 0
    else:
        if CAUSAL:
            limit = tl.minimum(limit, tl.maximum(first + lengths.offset + 1, 0))
        return limit // BLOCK_N


@triton.jit
def load_tile(
    X, first, stride, inside, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr = True
):
    """Rows from ``first`` on; zeros for rows that are not ``inside``. Without ``EDGE`` all rows are inside."""
    row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    X += tl.cast(first, tl.int64) * stride
    place = X + row.to(tl.int64)[:, None] * stride + d[None, :]
    if EDGE:
        return tl.load(place, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(place)
    else:
        return tl.load(place, mask=(d < D)[None, :], other=0.0)


@triton.jit
def dropout(inputs, head, i, first, queries, KEYS: tl.constexpr):
    """Dropout factors (M, KEYS) of the weights of the queries ``i`` (M,) and the keys from ``first`` on.

    The factors depend only on seed and position: all kernels get the same factors.
    """
    return multiplier(inputs.seed, head, i, first, queries, inputs.keys, inputs.dropout_p, inputs.kept_scale, KEYS)


@triton.jit
def multiplier(seed, head, i, first, queries, keys, dropout_p, kept_scale, KEYS: tl.constexpr):
    """0 with probability ``dropout_p``, else ``kept_scale``. The generator returns four numbers for each index."""
    quad = first // 4 + tl.arange(0, KEYS // 4)
    place = (head.to(tl.int64) * queries + i)[:, None] * ((keys + 3) // 4) + quad[None, :]
    a, b, c, d = tl.rand4x(tl.load(seed), place)
    random = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [i.shape[0], KEYS])
    return tl.where(random >= dropout_p, kept_scale, 0.0)


@triton.jit
def store_rows(
    results,
    acc,
    acc2,
    total,
    slope,
    placed,
    top,
    sigma,
    a,
    scale,
    head,
    i,
    lengths,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MODE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write the output of the rows ``i`` and, for a backward, their statistics."""
    inside = i < lengths.queries
    divisor = single(total)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    factor = tl.where(placed[0] == placed[0], 1.0 / divisor, float("nan"))  # NaN if the row or α is not valid
    row = head.to(tl.int64) * lengths.queries + i
    rows = tl.cast(lengths.rows, tl.int64)  # with eight statistics per row, an index may exceed 2³¹
    d = tl.arange(0, BLOCK_DV)
    place_of = row[:, None] * DV + d[None, :]
    within = inside[:, None] & (d < DV)[None, :]
    tl.store(results.output + place_of, (acc * factor[:, None]).to(results.output.dtype.element_ty), mask=within)
    if results.second is not None:
        divisor_of_second = single(slope)
        acc2 = acc2 * (1.0 / tl.where(divisor_of_second == 0.0, 1.0, divisor_of_second))[:, None]
        tl.store(results.second + place_of, acc2.to(results.second.dtype.element_ty), mask=within)
        if MODE == 0:  # noqa: SIM108, one branch does not exist
            final = divided(placed, divisor, a, EXACT)
        else:
            final = place(top, sigma, divisor, a, scale, MODE, EXACT)
        for n in tl.static_range(len(final)):
            tl.store(results.statistics + n * rows + row, final[n], mask=inside)


@triton.jit
def load_rows(Stats, row, inside, rows, MODE: tl.constexpr):
    """The numbers from ``store_rows``. Rows that are not ``inside`` get numbers for which hidden keys have weight 0."""
    rows = tl.cast(rows, tl.int64)
    first = tl.load(Stats + row, mask=inside, other=0.0)
    second = tl.load(Stats + rows + row, mask=inside, other=0.0)
    third = tl.load(Stats + 2 * rows + row, mask=inside, other=1.0)  # 0 times a hidden product, -inf, would be NaN
    if MODE != 0:
        return first, second, third
    else:
        fourth = tl.load(Stats + 3 * rows + row, mask=inside, other=0.0)
        fifth = tl.load(Stats + 4 * rows + row, mask=inside, other=0.0)
        sixth = tl.load(Stats + 5 * rows + row, mask=inside, other=0.0)
        seventh = tl.load(Stats + 6 * rows + row, mask=inside, other=0.0)
        eighth = tl.load(Stats + 7 * rows + row, mask=inside, other=0.0)
        return first, second, third, fourth, fifth, sixth, seventh, eighth
