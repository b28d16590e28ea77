"""`gated_excitation` on the CPU: numbers, layouts, states, and what it says to wrong input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from exactness import assert_as_exact, plain_results
from inputs import make_inputs
from torch import Tensor

import pyext
from pyext.ops import gated_excitation
from pyext.ops.gated_excitation import PARAMETERS, RUNNING, parameter_shapes, reference

SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1),
    "one row": (3, 3, 1, 41, 2, 2),
    "one column": (3, 4, 37, 1, 2, 5),
    "smaller than the dilated kernel": (3, 3, 2, 2, 2, 2),
    "odd": (5, 7, 9, 11, 3, 5),
    "whole vectors": (3, 12, 16, 16, 6, 12),
    "several strips and chunks": (2, 5, 53, 47, 3, 4),
    "wide": (2, 3, 3, 1100, 2, 2),
    "maps beyond one strip of the backward pass": (2, 9, 83, 97, 3, 4),
    "more channels than positions": (4, 130, 3, 3, 31, 65),
}
TRAINABLE = {name: shape for name, shape in SHAPES.items() if shape[0] > 1}
LAYOUTS = ["nchw", "channels_last", "slice"]
SMALL = SHAPES["odd"]


def inputs(shape=SMALL, dtype=torch.float32, **options) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *sizes, forget, attention = shape
    return make_inputs(*sizes, forget=forget, attention=attention, dtype=dtype, **options)


def run(u, parameters, running, training, grad_out=None) -> dict[str, Tensor]:
    """Output, and with `grad_out` the gradients, of the kernel."""
    leaves = [x.detach().requires_grad_(grad_out is not None) for x in (u, *parameters)]
    states = [r.clone() for r in running]
    out = gated_excitation(leaves[0], leaves[1:], states, training=training, momentum=0.3, backend="cpu")
    if grad_out is None:
        return {"out": out}
    gradients = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach(), **dict(zip(("u", *PARAMETERS), gradients, strict=True))}


def draw_gradient(u: Tensor) -> Tensor:
    return torch.randn(u.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(u.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inference(shape, dtype, layout):
    arguments = inputs(shape, dtype, layout=layout)
    with torch.no_grad():
        actual = run(*arguments, training=False)
    assert actual["out"].stride() == torch.empty_like(arguments[0]).stride()
    assert_as_exact(plain_results(training=False), *arguments, actual)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", TRAINABLE.values(), ids=TRAINABLE)
def test_gradients(shape, dtype, training):
    arguments = inputs(shape, dtype, seed=1)
    grad_out = draw_gradient(arguments[0])
    actual = run(*arguments, training, grad_out)
    assert_as_exact(plain_results(training, grad_out), *arguments, actual)


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_in_other_layouts(training, layout):
    arguments = inputs(layout=layout, seed=2)
    grad_out = draw_gradient(arguments[0]).transpose(2, 3).contiguous().transpose(2, 3)
    actual = run(*arguments, training, grad_out)
    assert actual["u"].stride() == torch.empty_like(arguments[0]).stride()
    assert_as_exact(plain_results(training, grad_out), *arguments, actual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_parameters_in_float32(dtype, training):
    arguments = inputs(dtype=dtype, parameter_dtype=torch.float32, seed=3)
    grad_out = draw_gradient(arguments[0])
    actual = run(*arguments, training, grad_out)
    assert actual["fc1.weight"].dtype == torch.float32
    # Plain torch in u's dtype throughout: its own mixed mode differs from one operator to the next.
    in_dtype = [[x.to(dtype) for x in tensors] for tensors in arguments[1:]]
    exact = {name: x.to(dtype) for name, x in actual.items()}
    assert_as_exact(plain_results(training, grad_out), arguments[0], *in_dtype, exact)


def test_running_statistics_move_as_torch_moves_them():
    u, parameters, running = inputs(dtype=torch.float64)
    expected, actual = ([r.clone() for r in running] for _ in range(2))
    reference(u, parameters, expected, True, 0.3)
    gated_excitation(u, parameters, actual, training=True, momentum=0.3, backend="cpu")
    for name, a, e in zip(RUNNING, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13, msg=name)


def test_no_running_statistics_stand_for_batch_statistics():
    u, parameters, running = inputs(dtype=torch.float64)
    expected = gated_excitation(u, parameters, running, training=True, backend="cpu")
    assert torch.equal(gated_excitation(u, parameters, None, backend="cpu"), expected)


def test_constant_channel_far_from_zero():
    """A variance computed as E[x^2] - E[x]^2 would be wrong or negative here."""
    u, parameters, running = inputs()
    u[:, 1] = 1000 + 0.01 * u[:, 1]
    assert_as_exact(plain_results(training=True), u, parameters, running, run(u, parameters, running, True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_out_is_a_slice_of_a_larger_tensor(backend, memory_format, training):
    u, parameters, running = inputs()
    n, c, h, w = u.shape
    larger = torch.full((n, c + 9, h, w), 7.0).to(memory_format=memory_format)
    with torch.no_grad(), pyext.backend(backend):
        expected = gated_excitation(u, parameters, [r.clone() for r in running], training=training)
        out = larger[:, 4 : 4 + c]
        assert gated_excitation(u, parameters, running, training=training, out=out) is out
    assert torch.equal(out, expected)
    assert (larger[:, :4] == 7).all()
    assert (larger[:, 4 + c :] == 7).all()


@pytest.mark.parametrize("training", [False, True])
def test_runs_are_bit_equal(training):
    arguments = inputs(SHAPES["several strips and chunks"])
    grad_out = draw_gradient(arguments[0])
    first, second = (run(*arguments, training, grad_out) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads_changes_rounding_alone(threads):
    arguments = inputs(dtype=torch.float64)
    grad_out = draw_gradient(arguments[0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = run(*arguments, True, grad_out)
    finally:
        torch.set_num_threads(before)
    assert_as_exact(plain_results(True, grad_out), *arguments, actual)


def test_nan_stays_in_its_image():
    u, parameters, running = inputs()
    clean = run(u, parameters, running, False)["out"]
    u[1, 2, 3, 4] = float("nan")
    out = run(u, parameters, running, False)["out"]
    assert out[1].isnan().all()
    for n in (0, 2, 3, 4):
        assert torch.equal(out[n], clean[n])
    assert run(u, parameters, running, True)["out"].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("branch", ["conv_3x3.conv.weight", "conv_5x5.conv.weight"])
@pytest.mark.parametrize("shape", [(3, 3, 5, 1, 2, 2), (3, 3, 1, 5, 2, 2), (3, 3, 2, 2, 2, 2), SMALL], ids=str)
def test_tap_that_is_not_finite_also_where_it_meets_padding_alone(shape, branch, value):
    """Plain torch in float64 multiplies the zero padding by it; in float32 that depends on the shape."""
    exact = inputs(shape, torch.float64)
    for tap in range(9):
        exact[1][PARAMETERS.index(branch)].view(-1, 9)[1] = 0.5
        exact[1][PARAMETERS.index(branch)].view(-1, 9)[1, tap] = value
        for training in (False, True):
            expected = reference(exact[0], exact[1], [r.clone() for r in exact[2]], training).isfinite()
            for dtype in (torch.float64, torch.float32):
                u, *others = (exact[0].to(dtype), *([x.to(dtype) for x in tensors] for tensors in exact[1:]))
                assert torch.equal(run(u, *others, training)["out"].isfinite(), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_batch(backend, training):
    u, parameters, running = inputs()
    before = [r.clone() for r in running]
    leaves = [p.requires_grad_() for p in parameters]
    empty = u[:0].requires_grad_()
    out = gated_excitation(empty, leaves, running, training=training, backend=backend)
    assert out.shape == empty.shape
    for gradient in torch.autograd.grad(out.sum(), [empty, *leaves]):
        assert (gradient == 0).all()
    for a, b in zip(running, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 5, 7, 9), (1, 5, 1, 1)])
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_training_with_one_value_per_channel_is_torchs_own_error(backend, shape):
    u, parameters, running = inputs((*shape, 3, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        gated_excitation(u, parameters, running, training=True, backend=backend)


def replaced(tensors: list[Tensor], index: int, tensor: Tensor) -> list[Tensor]:
    return [*tensors[:index], tensor, *tensors[index + 1 :]]


WRONG = {
    "channels": (lambda u, p, r: (u[:, 1:], p, r), ValueError, r"conv_3x3\.norm\.weight has shape \(7,\), expected"),
    "dimensions": (lambda u, p, r: (u[0], p, r), ValueError, r"expected \(N, C, H, W\)"),
    "no positions": (lambda u, p, r: (u[:, :, :0], p, r), ValueError, "at least one channel and position"),
    "integers": (lambda u, p, r: (u.int(), p, r), TypeError, "u has dtype torch.int32"),
    "mixed dtypes": (
        lambda u, p, r: (u, replaced(p, 3, p[3].double()), r),
        TypeError,
        "conv_5x5.norm.weight has dtype",
    ),
    "parameters in half": (lambda u, p, r: (u, [x.half() for x in p], r), TypeError, "conv_3x3.norm.weight has dtype"),
    "mixed devices": (lambda u, p, r: (u, replaced(p, 22, p[22].to("meta")), r), ValueError, "fc1.weight is on meta"),
    "too few parameters": (lambda u, p, r: (u, p[:-1], r), ValueError, "25 parameters, expected 26"),
    "too few statistics": (lambda u, p, r: (u, p, r[:-1]), ValueError, "7 running statistics, expected 8"),
    "hidden rows": (lambda u, p, r: (u, replaced(p, 22, p[22][1:]), r), ValueError, r"fc1\.weight has shape \(2, 7"),
    "running shape": (lambda u, p, r: (u, p, replaced(r, 6, r[6][1:])), ValueError, "bn_forget.running_mean has shape"),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("spoil", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(spoil, error, message, backend):
    arguments = spoil(*inputs())
    with pytest.raises(error, match=message):
        gated_excitation(*arguments, backend=backend)


def test_wrong_out_is_named():
    u, parameters, running = inputs()
    with pytest.raises(ValueError, match="out is"), torch.no_grad():
        gated_excitation(u, parameters, running, out=u.new_empty(u.shape[1:]))
    with pytest.raises(RuntimeError, match="out= does not support automatic differentiation"):
        gated_excitation(u.requires_grad_(), parameters, running, out=torch.empty_like(u))


def test_backend_that_cannot_run_says_why():
    u, parameters, running = inputs()
    with pytest.raises(pyext.BackendError, match="backend 'cuda' cannot run: u is on cpu"):
        gated_excitation(u, parameters, running, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        gated_excitation(u, parameters, running, backend="gpu")
    with pytest.raises(pyext.BackendError, match="float64"), pyext.backend("triton"):
        gated_excitation(u.double(), [p.double() for p in parameters], [r.double() for r in running])


def test_explain_names_the_choice_and_the_reasons():
    u = inputs()[0]
    text = pyext.explain(gated_excitation, u)
    assert re.search(r"^gated_excitation: backend 'cpu' \(auto\)$", text, re.MULTILINE)
    assert re.search(r"^  cuda +cannot run: u is on cpu", text, re.MULTILINE)
    with pyext.backend("reference"):
        assert "backend 'reference' (asked for)" in pyext.explain("gated_excitation", u)
    with pytest.raises(ValueError, match="no operator softmax"):
        pyext.explain("softmax", u)


def test_double_backward_works_in_the_reference_and_is_refused_by_the_kernel():
    u, parameters, running = inputs((2, 3, 2, 3, 2, 2), torch.float64)
    u.requires_grad_()
    for backend in ("reference", "cpu"):
        out = gated_excitation(u, parameters, running, backend=backend)
        (gradient,) = torch.autograd.grad(out.square().sum(), u, create_graph=True)
        if backend == "reference":
            (second,) = torch.autograd.grad(gradient.sum(), u)
            assert second.abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="can be differentiated once"):
                torch.autograd.grad(gradient.sum(), u)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_break_and_exports(training):
    u, parameters, running = inputs()

    def network(x):
        return gated_excitation(torch.relu(x), parameters, running, training=training, momentum=0.0)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    leaf = u.clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf), network(leaf), rtol=0, atol=0)
    (expected,) = torch.autograd.grad(network(leaf).square().sum(), leaf)
    (actual,) = torch.autograd.grad(compiled(leaf).square().sum(), leaf)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    class Network(torch.nn.Module):
        def forward(self, x):
            return gated_excitation(x, parameters, running)

    program = torch.export.export(Network(), (u,))
    assert "pyext.gated_excitation" in program.graph_module.code
    assert torch.equal(program.module()(u), Network()(u))


def test_order_of_tensors_is_the_headers():
    """csrc/math/gated_excitation.h holds the same order under the kernels' names, with the same number of elements."""
    header = (Path(__file__).parents[2] / "csrc/math/gated_excitation.h").read_text()
    for enumeration, names in (("Parameter", PARAMETERS), ("Running", RUNNING)):
        body = re.search(rf"enum {enumeration} {{(.*?)}}", header, re.DOTALL).group(1)
        entries = re.findall(r"\bk\w+", body)[:-1]
        assert len(entries) == len(names)
        for entry, name in zip(entries, names, strict=True):
            assert entry[1:].lower().endswith(name.rsplit("_", 1)[-1].rsplit(".", 1)[-1]), (entry, name)
    assert list(parameter_shapes(3, 2, 4)) == list(PARAMETERS)
