"""The Triton tests of one compute capability, run by test_gpusim_triton.py in a process each.

A process per capability, because Triton keeps what it compiled for its first device, and because
the checked allocator must not serve the other tests of the repository. Prints one JSON line per
check: its name, and an error text or null.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch

from .. import SimError, hook_torch, name, triton_driver
from ..counting import counting
from . import triton_kernels as kernels

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def operands(b: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(b)
    return [torch.randn(*s, generator=generator).to(dtype) for s in ((b, n), (b, k), (n, k))]


def product_error(shape: tuple, dtype: torch.dtype, precision: str) -> float:
    """Largest error relative to the sum of the magnitudes, the scale of the rounding errors."""
    s, a, w = operands(*shape, dtype)
    result = kernels.weighted_product(s, a, w, precision).double()
    s, a, w = (x.double() for x in (s, a, w))
    scale = s.abs().T @ a.abs() * w.abs()
    return ((result - s.T @ a * w.abs()).abs() / scale).max().item()


SHAPES = [(64, 32, 32), (100, 77, 50), (7, 5, 3)]


@check
def products():
    limits = {
        (torch.float32, "ieee"): 2**-20,
        (torch.float32, "tf32"): 1.5 * 2**-10,
        (torch.float32, "tf32x3"): 2**-19,
        (torch.float16, "tf32"): 2**-20,
        (torch.bfloat16, "tf32"): 2**-20,
    }
    for (dtype, precision), limit in limits.items():
        for shape in SHAPES:
            error = product_error(shape, dtype, precision)
            assert error <= limit, (dtype, precision, shape, error)
            if (dtype, precision) == (torch.float32, "tf32") and shape[0] > 10:
                assert error > 2**-16, "tf32 was not rounded to tf32"


@check
def softmax():
    for n in (1, 100, 1000):
        x = torch.randn(5, n)
        assert torch.allclose(kernels.softmax(x).double(), x.double().softmax(1), atol=1e-6)


@check
def atomics():
    x = torch.randn(100, 130)
    assert torch.allclose(kernels.column_sum(x).double(), x.double().sum(0), atol=1e-4)


@check
def elementwise():
    functions = {
        "erf": torch.erf,
        "tanh": torch.tanh,
        "log1p": lambda x: x.abs().log1p(),
        "sin": lambda x: (x.float() * 100).double().sin(),
        "cumsum": lambda x: x.cumsum(0),
    }
    limits = {torch.float32: 3e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
    for dtype, limit in limits.items():
        x = torch.randn(250).to(dtype)
        for op, function in functions.items():
            y, expected = kernels.elementwise(x, op).double(), function(x.double())
            bound = limit * 1.01 * expected.abs() + limit / 4
            assert ((y - expected).abs() <= bound).all(), (op, dtype)


@check
def offsets_beyond_32_bits():
    """Pointers 6 G elements before their tensors, and an offset that leads back."""
    far = 3 * 2**31

    class Shifted:
        def __init__(self, tensor):
            self.tensor, self.dtype = tensor, tensor.dtype

        def data_ptr(self):
            return self.tensor.data_ptr() - 4 * far

    x = torch.randn(250)
    y = torch.empty_like(x)
    kernels.elementwise_kernel[(1,)](Shifted(x), Shifted(y), 250, far, OP="", MASK=True, BLOCK=256)
    assert torch.equal(x, y)


@check
def tensor_descriptors():
    for dtype in (torch.float16, torch.bfloat16):
        a, b = torch.randn(100, 96).to(dtype), torch.randn(96, 72).to(dtype)
        assert (kernels.tile_product(a, b) - a.double() @ b.double()).abs().max() < 1e-4


@check
def many_launches():
    for rows in range(1, 31):
        x = torch.randn(rows, 32)
        assert torch.allclose(kernels.softmax(x), x.softmax(1), atol=1e-6)


def expect(report: str, function, *args, **options):
    try:
        function(*args, **options)
    except SimError as error:
        assert report in str(error), str(error)
    else:
        raise AssertionError(f"no finding, expected: {report}")


@check
def missing_mask():
    expect("out of bounds", kernels.elementwise, torch.randn(100), "tanh", mask=False)


@check
def uninitialised_input():
    expect("uninitialised", kernels.softmax, torch.empty(3, 40))


@check
def accumulation_without_atomics():
    expect("race", kernels.column_sum, torch.randn(100, 130), atomic=False)


@check
def accumulator_not_zeroed():
    expect("uninitialised", kernels.column_sum, torch.randn(100, 130), zeroed=False)


@check
def findings_name_the_python_line():
    expect("triton_kernels.py:", kernels.softmax, torch.empty(3, 40))


@check
def traffic_is_counted():
    x = torch.randn(16, 256)
    name(x, "x")
    with counting() as counts:
        kernels.softmax(x)
    launch = counts.launches[0]
    assert launch["x"].load.bytes == launch["x"].load.unique_bytes == x.nbytes
    assert launch.bytes == launch.unique_bytes == 2 * x.nbytes
    assert launch["x"].load.sectors == launch["x"].load.ideal_sectors


def main() -> None:
    hook_torch()
    with triton_driver.active(int(sys.argv[1])):
        for title, function in CHECKS.items():
            try:
                function()
                error = None
            except Exception:
                error = traceback.format_exc()
            print(json.dumps([title, error]), flush=True)


if __name__ == "__main__":
    main()
