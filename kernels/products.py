"""Tiles of irreps: their loads, stores and products, shared by the linear maps and the radial network.

mul_ir tiles are moved as [channels / LANES, rows, LANES]: a warp then touches LANES channels of several m of the same
node, which lie side by side in memory. With 32 lanes along the channels it would touch every (2l+1)-th word only.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, whose products need care (see `dot`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


LONGEST = {"tf32x3": 32}
"""mode -> how many products the matrix units may add up themselves, whatever the tile says. They cut what they add: a
sum of 128 has 2.8 times the error of four of 32 whose own sum is rounded (`dot`, docs/numerics.md)."""


def summed(block: int, mode: str) -> int:
    """`block` products of a sum, no more than the matrix units may add up."""
    return min(block, LONGEST.get(mode, block))


@triton.jit
def _view_rows(row, LAYOUT: tl.constexpr):
    """Per-row values [R] shaped to broadcast over a tile's view."""
    if LAYOUT == "ir_mul":
        return row[:, None]
    else:
        return row[None, :, None]


@triton.jit
def _view_channels(BLOCK_C: tl.constexpr, LAYOUT: tl.constexpr, LANES: tl.constexpr):
    """Channel numbers shaped to broadcast over a tile's view: [1, C], or [C / LANES, 1, LANES] for mul_ir."""
    if LAYOUT == "ir_mul":
        return tl.arange(0, BLOCK_C)[None, :]
    else:
        return LANES * tl.arange(0, BLOCK_C // LANES)[:, None, None] + tl.arange(0, LANES)[None, None, :]


@triton.jit
def _to_view(tile, LAYOUT: tl.constexpr, LANES: tl.constexpr):
    """A tile [R, C] as its view."""
    if LAYOUT == "ir_mul":
        return tile
    else:
        return tl.permute(tl.reshape(tile, (tile.shape[0], tile.shape[1] // LANES, LANES)), (1, 0, 2))


@triton.jit
def _from_view(view, LAYOUT: tl.constexpr):
    """The tile [R, C] of a view."""
    if LAYOUT == "ir_mul":
        return view
    else:
        return tl.reshape(tl.permute(view, (1, 0, 2)), (view.shape[1], view.shape[0] * view.shape[2]))


@triton.jit
def load_rows(ptr, row, row_mask, first, mul, dim, BLOCK_C: tl.constexpr, LAYOUT: tl.constexpr, LANES: tl.constexpr,
               EVEN: tl.constexpr):  # fmt: skip
    """Tile [R, BLOCK_C] of channels first.. of one slot; `row` [R] holds the places of each row's channel 0."""
    channel = first + _view_channels(BLOCK_C, LAYOUT, LANES)
    mask = _view_rows(row_mask, LAYOUT)
    if not EVEN:
        mask = mask & (channel < mul)
    if LAYOUT == "mul_ir":
        channel *= dim
    return _from_view(tl.load(ptr + _view_rows(row, LAYOUT) + channel, mask=mask, other=0.0), LAYOUT)


@triton.jit
def store_rows(ptr, tile, row, row_mask, first, mul, dim, LAYOUT: tl.constexpr, LANES: tl.constexpr,
                EVEN: tl.constexpr):  # fmt: skip
    """Store a tile [R, C] as channels first.. of one slot; `row` as in `load_rows`."""
    channel = first + _view_channels(tile.shape[1], LAYOUT, LANES)
    mask = _view_rows(row_mask, LAYOUT)
    if not EVEN:
        mask = mask & (channel < mul)
    if LAYOUT == "mul_ir":
        channel *= dim
    tl.store(ptr + _view_rows(row, LAYOUT) + channel, _to_view(tile, LAYOUT, LANES), mask=mask)


@triton.jit
def load_weights(w_ptr, k, column, k_mul, mul, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr):
    """Tile [BLOCK_K, BLOCK_N] of one weight block; transposed, it is packed [mul written, mul read]."""
    place = k[:, None] + column[None, :] * k_mul if TRANSPOSED else k[:, None] * mul + column[None, :]
    if EVEN:
        return tl.load(w_ptr + place)
    else:
        return tl.load(w_ptr + place, mask=(k < k_mul)[:, None] & (column < mul)[None, :], other=0.0)


@triton.jit
def row_places(node, m, width, mul, LAYOUT: tl.constexpr):
    """Place of channel 0 of rows (node, m) from the slot's first element on. 64 bit: node * width may pass 2^31."""
    place = node.to(tl.int64) * width
    if LAYOUT == "ir_mul":
        return place + m * mul
    else:
        return place + m


@triton.jit
def round_tf32(x):
    """x (FP32) rounded to nearest in TF32's 10 mantissa bits. The carry may turn a NaN into zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot_tf32(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a b in TF32; what an operand holds beyond TF32's bits is cut off."""
    return tl.dot(a, b, acc, input_precision="ieee" if INTERPRET else "tf32")


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a b with the operands rounded to MODE."""
    if MODE == "tf32":
        a, b = tl.where(a == a, round_tf32(a), a), tl.where(b == b, round_tf32(b), b)  # a NaN stays one
        return dot_tf32(a, b, acc, INTERPRET)
    elif MODE == "tf32x3":
        # a b = (a' + a'')(b' + b''), without a'' b''; small terms first. a'' has at most 12 bits: to cut it costs no
        # more than to round it, and keeps the NaNs that a' may lose. Tensor cores truncate what they add to their
        # accumulator: a block of K sums from zero there and joins the long sum in an ordinary, rounded addition.
        high_a, high_b = round_tf32(a), round_tf32(b)
        block = dot_tf32(a - high_a, high_b, tl.zeros_like(acc), INTERPRET)
        block = dot_tf32(high_a, b - high_b, block, INTERPRET)
        return acc + dot_tf32(high_a, high_b, block, INTERPRET)
    elif MODE == "fp64":
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    elif MODE == "ieee":
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        dtype: tl.constexpr = tl.bfloat16 if MODE == "bf16" else tl.float16
        a, b = a.to(dtype), b.to(dtype)
        if INTERPRET:  # its dot is wrong for bf16, so it gets the rounded operands in the type of the sum
            return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee")
        else:
            return tl.dot(a, b, acc)


@triton.jit
def sum_products(product, mask, axis: tl.constexpr):
    """Sum of a tile of products along an axis. Masking them keeps them out of fused multiply-adds: lanes that hold one
    product each would round their sums differently, and all of them write the same result."""
    return tl.sum(tl.where(mask, product, 0.0), axis=axis)


@triton.jit
def exp(x):
    """exp(x) to the last bits: 2^n 2^f with |f| <= 1/2, as the fast exponential of x itself would lose a bit for each
    doubling of x. In FP32 x is taken to lie in -87 .. 87, where neither the result nor its inverse over- or underflows.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.clamp(x, -87.0, 87.0, propagate_nan=tl.PropagateNan.ALL)
        shifted = tl.fma(x, tl.full(x.shape, 1.4426950216293335, tl.float32), tl.full(x.shape, 12582912.0, tl.float32))
        n = shifted - 12582912.0  # 1.5 * 2^23: adding it rounded to an integer, which its last bits are
        f = tl.fma(x, tl.full(x.shape, 1.4426950216293335, tl.float32), -n)  # log2(e) in two parts
        f = tl.fma(x, tl.full(x.shape, 1.9259629911266175e-08, tl.float32), f)
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # 2^n
        return power * tl.exp2(f)


@triton.jit
def find_group(group_ptr, n_nodes, extra, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(group, tile inside the group) of this program: groups lie one after another in the grid.

    extra: row tiles of each group beyond those that its rows fill.
    """
    tile = tl.program_id(0)
    group = 0
    count = (tl.cdiv(n_nodes * tl.load(group_ptr + 2), BLOCK_M) + extra) * tl.cdiv(tl.load(group_ptr + 1), BLOCK_N)
    while tile >= count:
        tile -= count
        group += 1
        entry = group_ptr + group * 6
        count = (tl.cdiv(n_nodes * tl.load(entry + 2), BLOCK_M) + extra) * tl.cdiv(tl.load(entry + 1), BLOCK_N)
    return group, tile
