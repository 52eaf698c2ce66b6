"""Every Triton kernel compiles for every target, NVIDIA ones to machine code without spills.

The ops run on meta tensors of realistic shapes; a hook of Triton's notes what would be compiled and
launches nothing. AMD's compiler runs as far as it can without a GPU, to the code object.
"""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gpusim.pytest_support import require_triton

from lfp_kernels.ops.conv.geometry import ConvGeometry
from lfp_kernels.ops.reward.codes import Kind
from lfp_kernels.ops.spiking.codes import Reset
from lfp_kernels.optim import STATES, Update
from lfp_kernels.rules import REGISTRY, Epsilon, RuleCall

pytestmark = pytest.mark.gpusim

OPS = (
    "activation", "batch_norm", "combine", "conv", "linear", "pool", "reward", "spiking", "update",
)  # fmt: skip
NVIDIA = (80, 90, 100, 120)
RULE = Epsilon()
# Rules with two signals or a matrix that is made on the way in.
NEW = [rule for rule in (cls() for cls in REGISTRY.values()) if rule.split or rule.code & 0xE0]
ALL = (True, True, True)
HYPER = [0.1, 0.01, 1.0, 0.9, 0.0, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, 0.01]


class Request(NamedTuple):
    """What Triton was asked to compile."""

    kernel: object
    signature: dict
    constexprs: dict
    attributes: dict
    options: dict


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def update(param: torch.Tensor, code: int) -> Update:
    return Update(code, HYPER, [torch.empty_like(param) for _ in range(STATES[code])])


def run_activation(op, dtype) -> None:
    op.step(empty(64, 1000, dtype=dtype))


def run_combine(op, dtype) -> None:
    x = empty(64, 1000, dtype=dtype)
    op.sum_redistribute(x, x, x, RULE, False)
    op.dropout_redistribute(x, empty(64, 1000, dtype=torch.bool), 2.0)


def run_update(op, dtype) -> None:
    params = [empty(4096, 4096, dtype=dtype) for _ in STATES]
    op.update(params, params, [update(p, code) for p, code in zip(params, STATES)])
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
    for n in (16, 1024):
        x, z = empty(n, 4096, dtype=dtype), empty(n, 4096, dtype=dtype)
        weight, bias = empty(4096, 4096, dtype=dtype), empty(4096, dtype=dtype)
        op.forward(x, weight, bias, True)
        for product in {dtype, torch.bfloat16 if dtype == torch.float32 else dtype}:
            call = RuleCall(RULE, None, RULE, False, False, product)
            op.redistribute(x, weight, bias, z, z, call, ALL)
            for code in STATES:
                steps = update(weight, code), update(bias, code)
                call = RuleCall(RULE, None, RULE, True, False, product)
                op.redistribute_update(x, weight, bias, z, z, *steps, call, True)
    for rule in NEW:
        steps = update(weight, 1), update(bias, 1)
        call = RuleCall(rule, weight if rule.takes_matrix else None)
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
                call = RuleCall(rule, weight if rule.takes_matrix else None)
                op.redistribute_update(
                    x, weight, bias, z, z, geometry, *steps, call, rule.has_input
                )


RUNS = {name: globals()[f"run_{name}"] for name in OPS}


@pytest.fixture
def requests_of(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """requests_of(op, dtype): what the op's kernels would be compiled for, each case once."""
    require_triton()
    import triton
    from gpusim.triton_driver import SimDriver

    noted: dict[str, Request] = {}

    def note(*, fn, key, compile, **_) -> bool:
        attributes = compile["configs"][0]
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        kernel = fn.jit_function
        request = Request(
            kernel, compile["signature"], compile["constants"], attributes, options
        )  # fmt: skip
        noted.setdefault(f"{kernel.__name__} {key}", request)
        return True  # neither compile nor launch

    def collect(name: str, dtype: torch.dtype) -> list[Request]:
        noted.clear()
        RUNS[name](importlib.import_module(f"lfp_kernels.ops.{name}.triton"), dtype)
        return list(noted.values())

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(SimDriver(80))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    yield collect
    triton.runtime.driver._active = before


def compiled(request: Request, target):
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(request.kernel, request.signature, request.constexprs, request.attributes)
    return triton.compile(source, target=target, options=request.options)


def machine_code(binary: bytes, folder: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    done = subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("capability", NVIDIA)
@pytest.mark.parametrize("name", OPS)
def test_nvidia(name, capability, requests_of, tmp_path):
    from triton.backends.compiler import GPUTarget

    for dtype in (torch.float32, torch.bfloat16):
        found = requests_of(name, dtype)
        assert found
        for request in found:
            kernel = compiled(request, GPUTarget("cuda", capability, 32))
            code = machine_code(kernel.asm["cubin"], tmp_path)
            label = f"{request.kernel.__name__} {dtype} {request.constexprs}"
            assert "EXIT" in code, label
            spills = [line for line in code.splitlines() if " LDL" in line or " STL" in line]
            assert not spills, f"{label}: {len(spills)} accesses to local memory"


@pytest.mark.parametrize("name", OPS)
def test_amd(name, requests_of):
    from triton.backends.compiler import GPUTarget

    for dtype in (torch.float32, torch.bfloat16):
        for request in requests_of(name, dtype):
            kernel = compiled(request, GPUTarget("hip", "gfx942", 64))
            assert "s_endpgm" in kernel.asm["amdgcn"]
            assert kernel.asm["hsaco"][:4] == b"\x7fELF"


def test_half_precision_products_use_tensor_cores(requests_of, tmp_path):
    from triton.backends.compiler import GPUTarget

    instructions = {80: "HMMA", 90: "HGMMA"}
    for name in ("linear", "conv"):
        for request in requests_of(name, torch.bfloat16):
            if request.kernel.__name__.startswith("finish"):
                continue
            thin = min(v for k, v in _sizes(request).items()) < 16
            for capability, instruction in instructions.items():
                kernel = compiled(request, GPUTarget("cuda", capability, 32))
                code = machine_code(kernel.asm["cubin"], tmp_path)
                assert thin or instruction in code or "HMMA" in code, request.constexprs


def _sizes(request: Request) -> dict[str, int]:
    names = request.kernel.arg_names
    named = {names[path[0]]: value for path, value in request.constexprs.items()}
    return {name: named[name] for name in "MNK"}
