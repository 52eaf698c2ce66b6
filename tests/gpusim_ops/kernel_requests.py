"""What Triton would compile for realistic calls of every op, for NVIDIA's and for AMD's GPUs.

The ops run on meta tensors; a hook of Triton's notes what would be compiled and launches nothing.
"""

from __future__ import annotations

import importlib
import json
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from gpusim.triton_driver import SimDriver
from triton.backends.compiler import GPUTarget

from lfp_kernels.ops import _cuda
from lfp_kernels.ops.conv.geometry import ConvGeometry
from lfp_kernels.ops.reward.codes import Kind
from lfp_kernels.ops.spiking.codes import Reset
from lfp_kernels.optim import STATES, Update
from lfp_kernels.rules import REGISTRY, Epsilon, RuleCall

RULE = Epsilon()
# Rules with two signals or a matrix that is made on the way in.
NEW = [rule for rule in (cls() for cls in REGISTRY.values()) if rule.split or rule.code & 0xE0]
ALL = (True, True, True)
HYPER = [0.1, 0.01, 1.0, 0.9, 0.0, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, 0.01]


class Request(NamedTuple):
    """What Triton was asked to compile."""

    kernel: Any
    signature: dict
    constexprs: dict
    attributes: dict
    options: dict

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments by name."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.constexprs.items()}


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def update(param: torch.Tensor, code: int) -> Update:
    return Update(code, HYPER, [torch.empty_like(param) for _ in range(STATES[code])])


def run_activation(op, dtype) -> None:
    op.step(empty(64, 1000, dtype=dtype))


def run_alignment(op, dtype) -> None:
    op.sums(empty(10, 4096, dtype=dtype), empty(10, 4096, dtype=dtype))


def run_attention(op, dtype) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for width in (32, 64, 128, 256):
        q = empty(2, 8, 1024, width, dtype=dtype)
        lse = empty(2, 8, 1024, dtype=acc)
        hides = empty(1, 1, 1024, 1024, dtype=torch.bool).expand(2, 8, 1024, 1024)
        adds = empty(1, 1, 1024, 1024, dtype=dtype).expand(2, 8, 1024, 1024)
        for mask, causal, dropout in ((None, True, 0.0), (hides, False, 0.1), (adds, False, 0.0)):
            options = (mask, causal, 0.125, dropout, 3)
            op.forward(q, q, q, *options)
            for attnlrp in (False, True):
                op.redistribute(q, q, q, q, lse, q, *options, attnlrp, 1e-6)


def run_combine(op, dtype) -> None:
    x = empty(64, 1000, dtype=dtype)
    op.sum_redistribute(x, x, x, RULE, False)
    op.dropout_redistribute(x, empty(64, 1000, dtype=torch.bool), 2.0)


def run_embedding(op, dtype) -> None:
    weight, tokens = empty(50000, 768, dtype=dtype), empty(4096, dtype=torch.int64)
    reward = empty(4096, 768, dtype=dtype)
    op.redistribute(weight, tokens, reward, -1, 1e-6)
    for code in STATES:
        op.redistribute_update(weight, tokens, reward, 0, 1e-6, update(weight, code))


def run_layer_norm(op, dtype) -> None:
    for rows, columns in ((8192, 768), (512, 8192), (99, 77)):
        x, weight = empty(rows, columns, dtype=dtype), empty(columns, dtype=dtype)
        op.redistribute(x, weight, weight, x, True, 1e-5, 1e-6, False)
        op.redistribute(x, weight, None, x, False, 1e-5, 1e-6, True)
    planes, weight = empty(64, 128, 784, dtype=dtype), empty(128, dtype=dtype)
    for identity in (False, True):
        op.group_redistribute(planes, weight, weight, planes, 32, 1e-5, 1e-6, identity)


def run_softmax(op, dtype) -> None:
    for columns in (197, 1024, 50000):
        x = empty(512, columns, dtype=dtype)
        op.redistribute(x, x, x)


def run_update(op, dtype) -> None:
    params = [empty(4096, 4096, dtype=dtype) for _ in STATES]
    op.update(params, params, [update(p, code) for p, code in zip(params, STATES)], None)
    op.global_norm(params)


def run_reward(op, dtype) -> None:
    labels = empty(128, dtype=torch.int64)
    for classes in (10, 1000, 50000):
        out = empty(128, classes, dtype=dtype)
        for kind in (Kind.SOFTMAX, Kind.CORRECT_CLASSIFICATION, Kind.MISCLASSIFICATION):
            op.reward(out, labels, kind, [0.1, 0.6, 1.0, -1.0])
    op.reward(out, out, Kind.REGRESSION, [0.0, 1.0, 0.0, -1.0])
    for steps in (25, 100):
        op.spike_rate(empty(steps, 128, 10, dtype=dtype), labels)


def run_spiking(op, dtype) -> None:
    current, state = empty(25, 128 * 1000, dtype=dtype), empty(128 * 1000, dtype=dtype)
    beta, channel = empty(1, dtype=dtype), empty(1000, dtype=dtype)
    for reset in Reset:
        for before, threshold in ((None, beta), (state, channel)):
            neuron = (beta, threshold, 1)
            bits, membrane, _ = op.forward(current, before, *neuron, 25, reset, True)
            sums = before is not None
            op.feedback(
                current, membrane, bits, before, before, *neuron, 1e-6, reset, sums, sums, sums
            )  # fmt: skip
    op.forward(current[:1], None, *neuron, 25, Reset.SUBTRACT, False)
    for noise in (0.0, 0.1):
        op.unpack(bits, 25, dtype, noise, 1, 0)
        op.add_noise(current[:1], 25, noise, 1, 0)
        op.add_noise(current, 25, noise, 1, 0)
    op.unpack(bits[:, :999], 25, dtype, 0.1, 1, 0)


def run_batch_norm(op, dtype) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = empty(64, 128, 28, 28, dtype=dtype).contiguous(memory_format=layout)
        channel = empty(128, dtype=torch.float32)
        for training in (True, False):
            op.forward(x, channel, channel, channel, channel, training, 0.1, 1e-5, True)
            args = (x, channel, channel, x, x, channel, channel, training, RULE, ALL)
            op.redistribute(*args, RULE, False)
            op.redistribute(*args, None, True)


def run_pool(op, dtype) -> None:
    x, z = empty(64, 64, 112, 112, dtype=dtype), empty(64, 64, 56, 56, dtype=dtype)
    for kernel, stride, padding in (((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1))):
        op.avg_redistribute(
            x, z, z, kernel, stride, padding, False, True, None, RULE, RULE, False
        )  # fmt: skip
        _, indices = op.max_forward(x, kernel, stride, padding, (1, 1), False)
        op.max_redistribute(z, indices, x.shape)
    op.adaptive_avg_redistribute(x, z, z, RULE, None, True)


def run_linear(op, dtype) -> None:
    for n in (16, 32, 1024):
        x, z = empty(n, 4096, dtype=dtype), empty(n, 4096, dtype=dtype)
        weight, bias = empty(4096, 4096, dtype=dtype), empty(4096, dtype=dtype)
        op.forward(x, weight, bias, True)
        for product in {dtype, torch.bfloat16 if dtype == torch.float32 else dtype}:
            call = RuleCall(RULE, None, RULE, False, False, product)
            op.redistribute(x, weight, bias, z, z, call, ALL)
            for code in STATES:
                steps = update(weight, code), update(bias, code)
                for signal_in in (False, True) if n <= 32 else (True,):  # one pass or two
                    call = RuleCall(RULE, None, RULE, signal_in, False, product)
                    op.redistribute_update(x, weight, bias, z, z, *steps, call, True)
    for rule in NEW:
        steps = update(weight, 1), update(bias, 1)
        call = RuleCall(rule, weight if rule.takes_matrix else None, product_dtype=dtype)
        op.redistribute_update(x, weight, bias, z, z, *steps, call, rule.has_input)


def run_conv(op, dtype) -> None:
    cases = [  # x, weight, geometry: the first layer, a middle one, depthwise, transposed
        ((128, 3, 224, 224), (64, 3, 7, 7), ConvGeometry.make((7, 7), 2, 3)),
        ((128, 64, 56, 56), (64, 64, 3, 3), ConvGeometry.make((3, 3), 1, 1)),
        ((128, 64, 56, 56), (64, 1, 3, 3), ConvGeometry.make((3, 3), 1, 1, groups=64)),
        ((128, 64, 28, 28), (64, 32, 2, 2), ConvGeometry.make((2, 2), 2, transposed=True)),
    ]
    for layout in (torch.contiguous_format, torch.channels_last):
        for x_shape, w_shape, geometry in cases:
            x = empty(*x_shape, dtype=dtype).contiguous(memory_format=layout)
            weight = empty(*w_shape, dtype=dtype)
            z = op.forward(x, weight, None, geometry, True)
            bias = empty(z.shape[1], dtype=dtype)
            steps = update(weight, 1), update(bias, 1)
            call = RuleCall(RULE, None, RULE, False, False, dtype)
            op.redistribute_update(x, weight, bias, z, z, geometry, *steps, call, True)
            for rule in NEW if x_shape[1] == 64 else ():
                call = RuleCall(rule, weight if rule.takes_matrix else None, product_dtype=dtype)
                op.redistribute_update(
                    x, weight, bias, z, z, geometry, *steps, call, rule.has_input
                )


RUNS = {name[4:]: run for name, run in list(globals().items()) if name.startswith("run_")}


class AmdDriver(SimDriver):
    """Says that the device is AMD's, so that arguments are specialized as its compiler wants them.
    Nothing can be launched on it."""

    def __init__(self, arch: str):
        super().__init__()
        self.target = GPUTarget("hip", arch, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 1  # what Triton keeps for a kernel and a device is for this target


def requests(name: str, dtype: torch.dtype, amd: str | None = None, tf32=False) -> list[Request]:
    """What the kernels of an op would be compiled for, each case once.

    Args:
        amd: for this architecture instead of NVIDIA's. tf32: with torch's switch on.
    """
    noted: dict[str, Request] = {}

    def note(*, fn, key, compile, **_) -> bool:
        given = json.loads(compile["specialization_data"])["options"]
        options = {n: given.get(n) for n in ("num_warps", "num_stages", "maxnreg")}
        kernel = fn.jit_function
        request = Request(
            kernel, compile["signature"], compile["constants"], compile["configs"][0],
            {n: value for n, value in options.items() if value is not None},
        )  # fmt: skip
        noted.setdefault(f"{kernel.__module__} {kernel.__name__} {key}", request)
        return True  # neither compile nor launch

    matmul, config = torch.backends.cuda.matmul, triton.runtime.driver
    before = matmul.fp32_precision, config._active
    config.set_active(SimDriver(80) if amd is None else AmdDriver(amd))
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with (
            mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
            mock.patch.object(torch.version, "hip", None if amd is None else "6.4"),
            mock.patch.object(_cuda, "is_gpu", lambda x: True),
        ):
            RUNS[name](importlib.import_module(f"lfp_kernels.ops.{name}.triton"), dtype)
    finally:
        matmul.fp32_precision, config._active = before
    return list(noted.values())
