"""Attention and relevance through it (docs/math.md, section 7), a block of logits at a time.

Per query i and key j of a query head, with ``stab(z) = z + eps * (z >= 0 ? 1 : -1)``:
  z = scale * q_i k_j;   p = exp(z + mask - lse_i), 0 where hidden;   c = kept / (1 - rate)
  s_i = r_i, or r_i / (2 stab(out_i)) by AttnLRP;   delta_i = s_i out_i = sum_j p c (s_i v_j)
  dz = p * (c * (s_i v_j) - delta_i), by AttnLRP times z / (2 stab(z))
  r_v = sum_i p c s_i;   r_q = scale * sum_j dz k_j;   r_k = scale * sum_i dz q_i
and by AttnLRP each of the three times its own tensor.

One kernel owns queries (r_q; it also makes s and delta), the next owns keys (r_k, r_v) and walks
over the query heads that share them, so nothing is added by two programs. Blocks that the causal
mask hides are not visited. All tensors have neighbouring elements of a head beside each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import accumulate_type, stabilize, store
from .._triton_product import operand_type, product
from ..spiking.triton_kernels import words_of

NO_MASK, HIDES, ADDS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COLUMNS = tl.constexpr(16)


@triton.jit
def multiply(a, b, total, MODE: tl.constexpr):
    """total[m, n] + a[m, k] b[k, n]"""
    if MODE == "fp64":  # a column times a row: few devices have tensor cores for float64
        place = tl.arange(0, a.shape[1])
        for k in range(a.shape[1]):
            column = tl.sum(tl.where((place == k)[None, :], a, 0.0), 1)
            row = tl.sum(tl.where((place == k)[:, None], b, 0.0), 0)
            total += column[:, None] * row[None, :]
        return total
    else:
        return product(a, b, total, MODE)


@triton.jit
def along_rows(
    a, a_ptr, i, a_stride, a_rows, b, b_ptr, j, b_stride, b_rows, width, total, MODE: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """total[i, j] + a b^T. HELD: a and b are values; else both are read a few columns at a time,
    because without tensor cores every thread would hold whole rows of them."""
    if HELD:
        return multiply(a, tl.trans(b), total, MODE)
    else:
        for first in range(0, width, COLUMNS):
            some_a = load_rows(a_ptr + first, i, a_stride, a_rows, width - first, COLUMNS)
            some_b = load_rows(b_ptr + first, j, b_stride, b_rows, width - first, COLUMNS)
            total = multiply(some_a, tl.trans(some_b), total, MODE)
        return total


@triton.jit
def head_of(program, blocks, heads):
    """(batch, head, block) of a program, int64"""
    head = (program // blocks).to(tl.int64)
    return head // heads, head % heads, (program % blocks).to(tl.int64)


@triton.jit
def load_rows(pointer, row, stride, rows, width, WIDTH: tl.constexpr):
    """[row, WIDTH], 0 outside of rows x width"""
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    start = pointer + row * stride
    return tl.load(start[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, value, row, stride, rows, width, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    start = pointer + row * stride
    store(start[:, None] + column[None, :], value, inside)


@triton.jit
def masked(
    z, i, j, mask_ptr, mask_i, mask_j, queries, keys, CAUSAL: tl.constexpr, MASK: tl.constexpr
):
    """The logits of queries i and keys j that softmax takes: -inf where hidden.

    i and j have the shape of z but for the axis of the other, which is 1."""
    inside = (i < queries) & (j < keys)
    if CAUSAL:
        inside = inside & (j <= i)
    if MASK == HIDES:
        inside = inside & tl.load(mask_ptr + i * mask_i + j * mask_j, mask=inside, other=0)
    elif MASK == ADDS:
        z += tl.load(mask_ptr + i * mask_i + j * mask_j, mask=inside, other=0.0).to(z.dtype)
    return tl.where(inside, z, -float("inf"))


@triton.jit
def kept(
    first, i, begin, keys, rate, keep, seed, dtype: tl.constexpr, FOURS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """c[i, N] of the keys from ``begin`` on; ``first``: index of the head's first probability.
    FOURS: rows and ``begin`` are multiples of four, which one Philox block serves."""
    row = first + i * keys + begin
    if FOURS:
        a, b, c, d = words_of((row >> 2)[:, None] + tl.arange(0, N // 4)[None, :], seed)
        a, b = draw(a, rate, keep, dtype), draw(b, rate, keep, dtype)
        c, d = draw(c, rate, keep, dtype), draw(d, rate, keep, dtype)
        return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        index = row[:, None] + tl.arange(0, N)[None, :]
        a, b, c, d = words_of(index >> 2, seed)
        upper = (index & 2) != 0
        word = tl.where((index & 1) == 0, tl.where(upper, c, a), tl.where(upper, d, b))
        return draw(word, rate, keep, dtype)


@triton.jit
def draw(word, rate, keep, dtype: tl.constexpr):
    """``keep`` where the upper 24 bits, as a number in [0, 1), reach the rate, else 0"""
    uniform = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    return tl.where(uniform >= rate.to(tl.float32), keep.to(dtype), 0.0).to(dtype)


@triton.jit
def as_operand(s, MODE: tl.constexpr):
    """s as products take it, so that sums of s alone can have the same rounding."""
    if MODE == "tf32":  # to the nearest of 10 bits of mantissa
        bits = (s.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(s == s, bits.to(tl.float32, bitcast=True), s)
    else:
        return s.to(operand_type(MODE))


@triton.jit
def to_logits(p, z, x, to_p, delta, eps, ATTNLRP: tl.constexpr):
    """dz of logits z (masked: x), from what arrives at p"""
    dz = p * (to_p - delta)
    if ATTNLRP:
        dz *= z / (2 * stabilize(z, eps))
    return tl.where(x == -float("inf"), 0.0, dz)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "seed"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, queries, keys, heads, shared, width, values,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b, mask_h, mask_i, mask_j,
    scale: tl.float64, rate: tl.float64, keep: tl.float64, seed,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, FOURS: tl.constexpr,
    MODE: tl.constexpr, HELD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """out and lse of M queries, over the keys with a running maximum and sum.

    Relevance divides by out, also where large terms cancel in it: probabilities rounded once to 16
    bits would make such outputs wrong by many times their own rounding. They are multiplied in two
    parts, the rounded value and what the rounding left."""
    acc: tl.constexpr = accumulate_type(q_ptr.dtype.element_ty)
    blocks = tl.cdiv(queries, M)
    b, h, block = head_of(tl.program_id(0), blocks, heads)
    block = blocks - 1 - block  # by the causal mask the last ones take longest: they go first
    i = block * M + tl.arange(0, M)
    kv = h // shared
    k_ptr += b * k_b + kv * k_h
    v_ptr += b * v_b + kv * v_h
    mask_ptr += b * mask_b + h * mask_h
    row = (b * heads + h) * queries
    q_ptr += b * q_b + h * q_h
    q = load_rows(q_ptr, i, q_l, queries, width, E) if HELD else None
    most = tl.full((M,), -float("inf"), acc)
    total = tl.zeros((M,), acc)
    out = tl.zeros((M, F), acc)
    end = keys.to(tl.int64)
    if CAUSAL:
        end = tl.minimum(end, block * M + M)
    for begin in range(0, end, N):
        j = begin + tl.arange(0, N)
        k = load_rows(k_ptr, j, k_l, keys, width, E)
        z = along_rows(
            q, q_ptr, i, q_l, queries, k, k_ptr, j, k_l, keys, width, tl.zeros((M, N), acc), MODE,
            HELD,
        )  # fmt: skip
        z *= scale.to(acc)
        x = masked(z, i[:, None], j[None, :], mask_ptr, mask_i, mask_j, queries, keys, CAUSAL, MASK)
        before = most
        most = tl.maximum(before, tl.max(x, 1))
        shift = tl.where(most == -float("inf"), 0.0, most)  # of a row that has seen no key yet
        p = tl.exp(x - shift[:, None])
        fade = tl.exp(before - shift)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p *= kept(row * keys, i, begin, keys, rate, keep, seed, acc, FOURS, N)
        v = load_rows(v_ptr, j, v_l, keys, values, F)
        out *= fade[:, None]
        if MODE == "fp16" or MODE == "bf16":
            rounded = p.to(operand_type(MODE))
            out = multiply(p - rounded.to(acc), v, out, MODE)
            out = multiply(rounded, v, out, MODE)
        else:
            out = multiply(p, v, out, MODE)
    seen = total != 0
    out = out / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, most + tl.log(tl.where(seen, total, 1.0)), float("inf"))
    place = (b * queries * heads + h) * values
    store_rows(out_ptr + place, out, i, heads * values, queries, values, F)
    store(lse_ptr + row + i, lse, i < queries)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "seed"])
def query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, reward_ptr, mask_ptr, to_q_ptr, s_ptr, delta_ptr,
    queries, keys, heads, shared, width, values,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l, r_b, r_h, r_l,
    s_b, s_h, s_l, mask_b, mask_h, mask_i, mask_j,
    scale: tl.float64, eps: tl.float64, rate: tl.float64, keep: tl.float64, seed,
    ATTNLRP: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    FOURS: tl.constexpr, FORWARD: tl.constexpr, MODE: tl.constexpr, HELD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """r_q of M queries; also their s [B, H, L, F] (AttnLRP) and delta [B, H, L]."""
    acc: tl.constexpr = accumulate_type(q_ptr.dtype.element_ty)
    blocks = tl.cdiv(queries, M)
    b, h, block = head_of(tl.program_id(0), blocks, heads)
    block = blocks - 1 - block
    i = block * M + tl.arange(0, M)
    kv = h // shared
    k_ptr += b * k_b + kv * k_h
    v_ptr += b * v_b + kv * v_h
    mask_ptr += b * mask_b + h * mask_h
    s_ptr += b * s_b + h * s_h
    row = (b * heads + h) * queries
    out = load_rows(out_ptr + b * out_b + h * out_h, i, out_l, queries, values, F).to(acc)
    s = load_rows(reward_ptr + b * r_b + h * r_h, i, r_l, queries, values, F)
    inside = (i < queries)[:, None] & (tl.arange(0, F) < values)[None, :]
    if ATTNLRP:  # s is rounded here, so that both kernels and delta have the same one
        s = s.to(acc) / (2 * stabilize(out, eps.to(acc)))
        s = as_operand(tl.where(inside, s, 0.0), MODE)
        store_rows(s_ptr, s, i, s_l, queries, values, F)
    # The choice keeps products and sums apart: threads that hold the same sum would otherwise fuse
    # different ones of them, and differ in the last bit.
    delta = tl.sum(tl.where(inside, s.to(acc) * out, 0.0), 1)
    store(delta_ptr + row + i, delta, i < queries)
    if ATTNLRP and not HELD:
        tl.debug_barrier()  # s is read again, by other threads
    q_ptr += b * q_b + h * q_h
    q = load_rows(q_ptr, i, q_l, queries, width, E) if HELD else None
    lse = tl.load(lse_ptr + row + i, mask=i < queries, other=float("inf"))
    total = tl.zeros((M, E), acc)
    end = keys.to(tl.int64)
    if CAUSAL:
        end = tl.minimum(end, block * M + M)
    for begin in range(0, end, N):
        j = begin + tl.arange(0, N)
        k = load_rows(k_ptr, j, k_l, keys, width, E)
        z = along_rows(
            q, q_ptr, i, q_l, queries, k, k_ptr, j, k_l, keys, width, tl.zeros((M, N), acc),
            FORWARD, HELD,
        )  # fmt: skip
        z *= scale.to(acc)
        x = masked(z, i[:, None], j[None, :], mask_ptr, mask_i, mask_j, queries, keys, CAUSAL, MASK)
        p = tl.exp(x - lse[:, None])
        v = load_rows(v_ptr, j, v_l, keys, values, F)
        to_p = along_rows(
            s, s_ptr, i, s_l, queries, v, v_ptr, j, v_l, keys, values, tl.zeros((M, N), acc), MODE,
            HELD,
        )  # fmt: skip
        if DROPOUT:
            to_p *= kept(row * keys, i, begin, keys, rate, keep, seed, acc, FOURS, N)
        dz = to_logits(p, z, x, to_p, delta[:, None], eps.to(acc), ATTNLRP)
        total = multiply(dz, k, total, MODE)
    total *= scale.to(acc)
    if ATTNLRP:
        total *= load_rows(q_ptr, i, q_l, queries, width, E).to(acc)
    place = (b * queries * heads + h) * width
    store_rows(to_q_ptr + place, total, i, heads * width, queries, width, E)


@triton.jit(do_not_specialize=["queries", "keys", "heads", "seed"])
def key_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, s_ptr, delta_ptr, mask_ptr, to_k_ptr, to_v_ptr,
    queries, keys, heads, shared, width, values,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, s_b, s_h, s_l, mask_b, mask_h, mask_i, mask_j,
    scale: tl.float64, eps: tl.float64, rate: tl.float64, keep: tl.float64, seed,
    ATTNLRP: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    FOURS: tl.constexpr, FORWARD: tl.constexpr, MODE: tl.constexpr, HELD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """r_k, r_v of N keys of a key head, over the queries of the ``shared`` heads that read it.

    The logits are [keys, queries] here: sums over queries take them as they come."""
    acc: tl.constexpr = accumulate_type(q_ptr.dtype.element_ty)
    key_heads = heads // shared
    b, kv, block = head_of(tl.program_id(0), tl.cdiv(keys, N), key_heads)
    start = block * N  # by the causal mask the first blocks take longest
    j = start + tl.arange(0, N)
    k_ptr += b * k_b + kv * k_h
    v_ptr += b * v_b + kv * v_h
    k = load_rows(k_ptr, j, k_l, keys, width, E) if HELD else None
    v = load_rows(v_ptr, j, v_l, keys, values, F) if HELD else None
    to_k = tl.zeros((N, E), acc)
    to_v = tl.zeros((N, F), acc)
    first = tl.zeros_like(start)
    if CAUSAL:
        first = start // M * M
    for h in range(kv * shared, kv * shared + shared):
        row = (b * heads + h) * queries
        of_q, of_s = q_ptr + b * q_b + h * q_h, s_ptr + b * s_b + h * s_h
        for begin in range(first, queries, M):
            i = begin + tl.arange(0, M)
            q = load_rows(of_q, i, q_l, queries, width, E)
            z = along_rows(
                k, k_ptr, j, k_l, keys, q, of_q, i, q_l, queries, width, tl.zeros((N, M), acc),
                FORWARD, HELD,
            )  # fmt: skip
            z *= scale.to(acc)
            x = masked(
                z, i[None, :], j[:, None], mask_ptr + b * mask_b + h * mask_h, mask_i, mask_j,
                queries, keys, CAUSAL, MASK,
            )  # fmt: skip
            lse = tl.load(lse_ptr + row + i, mask=i < queries, other=float("inf"))
            delta = tl.load(delta_ptr + row + i, mask=i < queries, other=0.0)
            p = tl.exp(x - lse[None, :])
            s = load_rows(of_s, i, s_l, queries, values, F)
            to_p = along_rows(
                v, v_ptr, j, v_l, keys, s, of_s, i, s_l, queries, values, tl.zeros((N, M), acc),
                MODE, HELD,
            )  # fmt: skip
            if DROPOUT:
                c = kept(row * keys, i, start, keys, rate, keep, seed, acc, FOURS, N)
                c = tl.trans(c)
                to_v = multiply(p * c, s, to_v, MODE)
                to_p *= c
            else:
                to_v = multiply(p, s, to_v, MODE)
            dz = to_logits(p, z, x, to_p, delta[None, :], eps.to(acc), ATTNLRP)
            to_k = multiply(dz, q, to_k, MODE)
    to_k *= scale.to(acc)
    if ATTNLRP:
        to_k *= load_rows(k_ptr, j, k_l, keys, width, E).to(acc)
        to_v *= load_rows(v_ptr, j, v_l, keys, values, F).to(acc)
    place = b * keys * key_heads + kv
    store_rows(to_k_ptr + place * width, to_k, j, key_heads * width, keys, width, E)
    store_rows(to_v_ptr + place * values, to_v, j, key_heads * values, keys, values, F)
