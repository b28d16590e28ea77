"""Numerics of the Triton kernels, by Triton's interpreter on CPU tensors, against float64 truth.

tests/conftest.py sets TRITON_INTERPRET before anything imports triton. The interpreter is slow, so shapes are small;
they still cover several channel blocks, several position chunks, and both forward paths.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from exactness import assert_as_exact, plain_results
from inputs import make_inputs
from torch import Tensor

from pyext.ops.gated_excitation import PARAMETERS
from pyext.triton_kernels import gated_excitation as kernels

EPS = 1e-5
SAVED = ("position", "pooled", "hidden", "map_statistics", "hidden_statistics")

# images, channels, height, width, forget rows, attention rows
SMALL = (3, 5, 7, 9, 3, 4)
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1),
    "one row": (3, 3, 1, 11, 2, 2),
    "one column": (3, 4, 13, 1, 2, 5),
    "smaller than the dilated kernel": (3, 3, 2, 2, 2, 2),
    "several position chunks": (1, 6, 17, 19, 3, 2),
    "one block of channels, several of rows": (1, 70, 4, 5, 67, 35),
    "more channels than one tile": (3, kernels.MAX_BLOCK_C + 3, 2, 3, 17, 33),
}


@pytest.fixture(autouse=True)
def seeded_and_empty_is_nan():
    """Uninitialised memory holds NaN, as torch fills it in deterministic mode."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape: tuple[int, ...], dtype=torch.float32, **options) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *sizes, forget, attention = shape
    return make_inputs(*sizes, forget=forget, attention=attention, dtype=dtype, **options)


def check_forward(u: Tensor, parameters: list[Tensor], running: list[Tensor], training: bool, save: bool) -> None:
    out, *saved = kernels.forward(u, parameters, [] if training else running, training, EPS, save)
    assert out.dtype == u.dtype
    assert out.stride() == torch.empty_like(u).stride()
    for name, tensor in zip(SAVED, saved, strict=True):
        expected = training if name.endswith("statistics") else save
        assert (tensor.numel() > 0) == expected, name
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all(), name
    assert_as_exact(plain_results(training), u, parameters, running, {"out": out})


MODES = {"inference": (False, False), "evaluation, saved": (False, True), "training": (True, True)}


@pytest.mark.parametrize(("training", "save"), MODES.values(), ids=MODES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(dtype, layout, training, save):
    check_forward(*inputs(SMALL, dtype, layout=layout), training, save)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_of_shape(shape, save):
    check_forward(*inputs(shape, seed=1), False, save)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if shape[0] > 1], ids=str)
def test_forward_of_shape_in_training(shape):
    check_forward(*inputs(shape, seed=2), True, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_float32(dtype):
    check_forward(*inputs(SMALL, dtype, parameter_dtype=torch.float32, seed=3), False, False)


def check_backward(
    u: Tensor, parameters: list[Tensor], running: list[Tensor], training: bool, grad_out: Tensor
) -> None:
    statistics = [] if training else running
    out, *saved = kernels.forward(u, parameters, statistics, training, EPS, True)
    grad_u, flat = kernels.backward(grad_out, u, parameters, statistics, *saved, training, EPS)
    assert grad_u.dtype == u.dtype
    assert grad_u.stride() == torch.empty_like(u).stride()
    assert flat.dtype == torch.float32
    parts = dict(zip(PARAMETERS, flat.split([p.numel() for p in parameters]), strict=True))
    actual = {"out": out, "u": grad_u} | parts
    assert_as_exact(plain_results(training, grad_out), u, parameters, running, actual)


BACKWARD = {
    "float32": {"dtype": torch.float32},
    "float32 channels_last": {"dtype": torch.float32, "layout": "channels_last"},
    "float32 slice": {"dtype": torch.float32, "layout": "slice"},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, float32 parameters": {
        "dtype": torch.bfloat16,
        "parameter_dtype": torch.float32,
        "layout": "channels_last",
    },
    "float16": {"dtype": torch.float16, "layout": "slice"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", BACKWARD.values(), ids=BACKWARD)
def test_backward(options, training):
    u, parameters, running = inputs(SMALL, seed=4, **options)
    check_backward(u, parameters, running, training, torch.randn(u.shape).to(u.dtype))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["one row", "smaller than the dilated kernel", "more channels than one tile"])
def test_backward_of_shape(name, training):
    u, parameters, running = inputs(SHAPES[name], seed=5)
    check_backward(u, parameters, running, training, torch.randn(u.shape))


def test_backward_of_several_position_chunks():
    u, parameters, running = inputs(SHAPES["several position chunks"], seed=6)
    check_backward(u, parameters, running, False, torch.randn(u.shape))


def test_backward_of_an_expanded_gradient_and_a_cropped_map():
    larger, parameters, running = inputs((2, 3, 6, 9, 2, 2), seed=7)
    check_backward(larger[:, :, 1:5, 2:8], parameters, running, False, torch.tensor(0.7).expand(2, 3, 4, 6))


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    u, parameters, running = inputs(SMALL, dtype, layout="channels_last", seed=14)
    check_forward(u, parameters, running, False, False)
    for training in (False, True):
        check_backward(u, parameters, running, training, torch.randn(u.shape).to(dtype))


def test_forward_of_a_transposed_map():
    u, parameters, running = inputs((2, 3, 6, 4, 2, 2), seed=8)
    check_forward(u.transpose(2, 3), parameters, running, False, False)


def views_of_larger(u: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Buffers full of 7, and the part of each that shall receive the output."""
    n, c, h, w = u.shape
    wide = torch.full((n, c + 4, h, w), 7.0, dtype=u.dtype)
    last = wide.clone(memory_format=torch.channels_last)
    framed = torch.full((n, c, h + 2, w + 3), 7.0, dtype=u.dtype)
    return {
        "slice": (wide, wide[:, 3 : c + 3]),
        "channels_last slice": (last, last[:, 1 : c + 1]),
        "crop": (framed, framed[:, :, 1:-1, 2:-1]),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_is_written_alone_and_as_forward_does(dtype, training):
    u, parameters, running = inputs(SMALL, dtype, layout="channels_last", seed=9)
    statistics = [] if training else running
    expected, _, _, _, *batch = kernels.forward(u, parameters, statistics, training, EPS, False)
    for name, (buffer, out) in views_of_larger(u).items():
        result = kernels.forward_out(u, parameters, statistics, training, EPS, out)
        assert torch.equal(out, expected), name
        assert all(torch.equal(a, b) for a, b in zip(result, batch, strict=True)), name
        assert (buffer == 7).sum() - (out == 7).sum() == buffer.numel() - out.numel(), name


@pytest.mark.parametrize("training", [False, True])
def test_no_images(training):
    u, parameters, running = inputs((0, 5, 7, 9, 3, 4))
    statistics = [] if training else running
    out, *saved = kernels.forward(u, parameters, statistics, training, EPS, True)
    assert out.shape == u.shape
    assert [tuple(x.shape) for x in saved[:3]] == [(0, 3, 63), (0, 3, 5), (0, 7)]
    grad_u, flat = kernels.backward(out, u, parameters, statistics, *saved, training, EPS)
    assert grad_u.shape == u.shape
    assert torch.equal(flat, torch.zeros(sum(p.numel() for p in parameters)))


@pytest.mark.parametrize("save", [False, True])
def test_nan_spoils_its_own_image_alone(save):
    u, parameters, running = inputs(SMALL, seed=10)
    clean = kernels.forward(u, parameters, running, False, EPS, save)[0]
    u[1, 2, 3, 4] = float("nan")
    out = kernels.forward(u, parameters, running, False, EPS, save)[0]
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("save", [False, True])
def test_large_logits(save):
    """Position logits of some thousands: exp overflows unless the largest is subtracted, chunk after chunk."""
    u, parameters, running = inputs(SHAPES["several position chunks"], seed=11)
    check_forward(1000 * u, parameters, running, False, save)


def test_statistics_of_a_large_mean():
    """No large squares are subtracted from each other: the variance of values near 1000 keeps all its digits."""
    u, parameters, _ = inputs((3, 5, 17, 19, 3, 4), seed=12)
    u = u + 1000
    statistics = kernels.forward(u, parameters, [], True, EPS, False)[4].double()
    variance, mean = torch.var_mean(u.double(), dim=(0, 2, 3), correction=0)
    eps = torch.finfo(torch.float32).eps
    assert (statistics[0] - mean).abs().max() <= 2 * eps * mean.abs().max()
    assert (statistics[1] - variance).abs().max() <= 4 * eps * variance.max()


def test_bit_equal_from_run_to_run_and_under_autocast():
    u, parameters, _ = inputs(SMALL, seed=13)

    def run() -> list[Tensor]:
        out, *saved = kernels.forward(u, parameters, [], True, EPS, True)
        return [out, *saved, *kernels.backward(out, u, parameters, [], *saved, True, EPS)]

    first = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_package_does_not_need_triton():
    program = "import sys; sys.modules['triton'] = None; import pyext.ops, pyext.triton_kernels"
    subprocess.run([sys.executable, "-c", program], check=True)
