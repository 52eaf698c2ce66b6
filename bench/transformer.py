"""One training step of a small GPT: gradient descent, LFP drop-in and fused, LFP nested.

    python -m bench.transformer [--repeats 9] [--memory] [--attention] [--heap]

Four layers, 256 wide, four heads, 256 symbols, batch 16 of 128 tokens; AdamW on all sides. `nested`
is the algorithm as the official package runs it for layers (nested autograd calls; everything else
plain autograd). --memory: highest sum of live allocations of one attention redistribution
(attnlrp) over the length of the sequence. --attention: the kernels against torch's own. --heap: the
resident set of the process over 100 fused steps.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, optim, rewards
from lfp_kernels import functional as F
from lfp_kernels.nested import NestedReference

from .environment import environment
from .timing import Plan, interleave, paired_ratio, settle_allocator

WIDTH, LAYERS, HEADS, LENGTH, BATCH, SYMBOLS = 256, 4, 4, 128, 16, 256
LR = 1e-6


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.act, self.down = (
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        n, steps, width = x.shape
        parts = self.qkv(self.norm1(x)).view(n, steps, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = TF.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, steps, width))
        return x + self.down(self.act(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(SYMBOLS, (BATCH, LENGTH + 1), generator=g)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradient() -> Callable[[], Any]:
    model, (x, y) = GPT(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), LR)

    def step() -> None:
        optimizer.zero_grad()
        TF.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()

    return step


def drop_in(mode: str) -> Callable[[], Any]:
    model, (x, y) = GPT(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    composites.Transformer(mode).attach(model)

    def step() -> None:
        optimizer.zero_grad()
        out = model(x)
        lfp_kernels.backward(out, rewards.softmax(out, y))
        optimizer.step()

    return step


def fused(mode: str) -> Callable[[], Any]:
    x, y = batch()
    step = lfp_kernels.fuse(
        GPT(), composites.Transformer(mode), reward="softmax", optimizer=optim.AdamW(LR)
    )
    return lambda: step(x, y)


def nested() -> Callable[[], Any]:
    model, (x, y) = GPT(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    reference = NestedReference(model)

    def step() -> None:
        optimizer.zero_grad()
        with reference.context():
            out = model(x)
            torch.autograd.backward(out, rewards.softmax(out.detach(), y))
        for p in model.parameters():
            found = getattr(p, "feedback", None)
            if found is not None:
                p.grad = -found
                del p.feedback  # type: ignore[attr-defined]
        optimizer.step()

    return step


def attention_memory(length: int) -> int:
    """Bytes that one redistribution through attention allocates at most, two heads of 64."""
    q, k, v, reward = (torch.randn(1, 2, length, 64) for _ in range(4))
    out, lse = F.attention(q, k, v, causal=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        F.attention_redistribute(q, k, v, out, reward, lse=lse, causal=True)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def attention_times(repeats: int) -> None:
    """Causal attention, float32, milliseconds: torch's and ours, there and back."""
    print("| batch, heads, tokens, width | torch forward, back | forward, plain, attnlrp |")
    print("|---|---|---|")
    for n, heads, length in ((16, 4, 128), (2, 8, 1024), (1, 8, 2048)):
        q, k, v = torch.randn(n, length, 3, heads, 64).permute(2, 0, 3, 1, 4).unbind(0)
        reward = torch.randn(n, length, heads, 64).transpose(1, 2)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        torch_out = TF.scaled_dot_product_attention(*leaves, is_causal=True)
        out, lse = F.attention(q, k, v, causal=True)

        attend = partial(F.attention, q, k, v, causal=True)
        back = partial(F.attention_redistribute, q, k, v, out, reward, lse=lse, causal=True)
        runs: dict[str, Callable[[], Any]] = {
            "torch": partial(TF.scaled_dot_product_attention, q, k, v, is_causal=True),
            "torch back": partial(
                torch.autograd.grad, torch_out, leaves, reward, retain_graph=True
            ),
            "ours": attend,
            "plain": partial(back, mode="plain"),
            "attnlrp": partial(back, mode="attnlrp"),
        }
        times = interleave(runs, Plan(repeats=repeats, warmup=2))
        ms = [f"{1e3 * statistics.median(found):.2f}" for found in times.values()]
        print(f"| {n}, {heads}, {length}, 64 | {', '.join(ms[:2])} | {', '.join(ms[2:])} |")


def heap_over_steps() -> None:
    step = fused("attnlrp")
    for done in range(1, 101):
        step()
        if done in (1, 10) or done % 20 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"after {done} steps: {pages * resource.getpagesize() >> 20} MiB resident")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.transformer", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds")
    for extra in ("--memory", "--attention", "--heap"):
        parser.add_argument(extra, action="store_true")
    options = parser.parse_args()
    here = environment("cpu")
    print(f"{here.machine}, {here.threads} threads, torch {here.torch}, {here.commit}, {here.date}")
    if options.memory:
        print("| length | MiB | bytes per token |\n|---|---|---|")
        for length in (512, 1024, 2048, 4096, 8192):
            found = attention_memory(length)
            print(f"| {length} | {found / 2**20:.1f} | {found // length} |")
        return 0
    if options.heap:
        heap_over_steps()
        return 0
    settle_allocator()
    if options.attention:
        attention_times(options.repeats)
        return 0
    runs = {"gradient, AdamW": gradient(), "nested": nested()}
    for mode in ("plain", "attnlrp"):
        runs |= {f"drop-in, {mode}": drop_in(mode), f"fused, {mode}": fused(mode)}
    times = interleave(runs, Plan(repeats=options.repeats, warmup=1))
    print("| step | ms | / gradient | / nested |\n|---|---|---|---|")
    for name, found in times.items():
        ratios = [paired_ratio(found, times[base]) for base in ("gradient, AdamW", "nested")]
        milliseconds = 1e3 * statistics.median(found)
        print(f"| {name} | {milliseconds:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
