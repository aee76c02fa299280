"""Matrix product with sums in FP32, FP16 or BF16: what 16-bit accumulators cost and give. Explored, not in the product.

    out[r, n] = sum_k x[r, k] w[k, n]

Tensor cores sum in FP32 or, from FP16 operands, in FP16. None sums in BF16: here each block of K is summed in FP32 and
the running sum rounded to BF16 behind it, so that its registers are halved, but not its arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SUMS = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64


@triton.jit(do_not_specialize=["rows"])
def product_fwd_kernel(
    x_ptr,  # [rows, K]
    w_ptr,  # [K, N]
    out_ptr,  # [rows, N]
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + k[:, None] * N + column[None, :], mask=(k < K)[:, None] & (column < N)[None, :], other=0.0)
        if INTERPRET:  # its dot is wrong for bf16
            x, w = x.to(tl.float32), w.to(tl.float32)
        if tl.float16 == ACC and not INTERPRET:
            acc = tl.dot(x, w, acc, out_dtype=tl.float16)
        else:
            acc = tl.dot(x, w, acc.to(tl.float32)).to(ACC)
    place = out_ptr + row[:, None] * N + column[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < N)[None, :])


def product(x: torch.Tensor, w: torch.Tensor, sums: str) -> torch.Tensor:
    """x w for contiguous x [rows, K] and w [K, N] in BF16 or FP16, in their dtype. FP16 sums need FP16 operands."""
    out = torch.empty((len(x), w.shape[1]), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(len(x), BLOCK_M), triton.cdiv(w.shape[1], BLOCK_N))
    with torch.cuda.device_of(x):
        product_fwd_kernel[grid](
            x, w, out, len(x), K=x.shape[1], N=w.shape[1], ACC=SUMS[sums], INTERPRET=not x.is_cuda,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out
