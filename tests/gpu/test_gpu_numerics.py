"""Every operator and backend on the device against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from operators import (
    DEVICE,
    assert_exact,
    draw,
    each_backend,
    each_dtype,
    each_mode,
    each_operator,
    each_operator_with,
    on_device,
    results,
)

import pyext
from bench.samples import SAMPLES

ODD = [(name, label) for name, samples in SAMPLES.items() for label in samples.odd]
LAYOUTS = [(name, layout) for name, samples in SAMPLES.items() for layout in samples.layouts]


@each_dtype
@each_backend
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_inference(name, backend, dtype, layout):
    call = draw(name, dtype, layout)
    with torch.no_grad():
        actual = results(SAMPLES[name], call, False, backend, gradient=False)
    assert_exact(SAMPLES[name], call, False, actual, gradient=False)


@each_mode
@each_dtype
@each_backend
@pytest.mark.parametrize(("name", "layout"), [item for item in LAYOUTS if SAMPLES[item[0]].differentiable])
def test_gradients(name, backend, dtype, training, layout):
    call = draw(name, dtype, layout)
    actual = results(SAMPLES[name], call, training, backend, gradient=True)
    assert_exact(SAMPLES[name], call, training, actual, gradient=True)


@each_mode
@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 0), (torch.bfloat16, 1)])
@each_backend
@pytest.mark.parametrize(("name", "label"), ODD)
def test_odd_shapes(name, label, backend, dtype, number, training):
    samples = SAMPLES[name]
    call = draw(name, dtype, samples.layouts[number], samples.odd[label])
    with torch.no_grad():
        actual = results(samples, call, False, backend, gradient=False)
    assert_exact(samples, call, False, actual, gradient=False)
    actual = results(samples, call, training, backend, gradient=True)
    assert_exact(samples, call, training, actual, gradient=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_mode
@each_backend
@each_operator
def test_parameters_in_float32(name, backend, training, dtype):
    """Plain torch stays in the main input's dtype: its own mixed mode differs from one operator to the next."""
    mixed = draw(name, dtype, parameter_dtype=torch.float32)
    actual = results(SAMPLES[name], mixed, training, backend, gradient=True)
    in_dtype = {key: value.to(dtype) for key, value in actual.items()}
    assert_exact(SAMPLES[name], mixed.to(dtype), training, in_dtype, gradient=True)


@each_mode
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@each_backend
@each_operator_with("takes_out")
def test_out_is_a_slice_of_a_larger_tensor(name, backend, memory_format, training):
    samples = SAMPLES[name]
    with torch.no_grad():
        expected = samples.run(on_device(draw(name)), training, backend=backend)
        n, c, h, w = expected.shape
        larger = torch.full((n, c + 9, h, w), 7.0, device=DEVICE).to(memory_format=memory_format)
        out = larger[:, 4 : 4 + c]
        assert samples.run(on_device(draw(name)), training, backend=backend, out=out) is out
    assert torch.equal(out, expected)
    assert (larger[:, :4] == 7).all()
    assert (larger[:, 4 + c :] == 7).all()


@each_mode
@each_backend
@each_operator
def test_runs_are_bit_equal(name, backend, training):
    first, second = (results(SAMPLES[name], draw(name), training, backend, gradient=True) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@each_mode
@each_backend
@each_operator_with("independent_images")
def test_empty_batch(name, backend, training):
    call = on_device(draw(name), differentiable=True)
    u, *parameters = call.leaves.values()
    call.leaves[next(iter(call.leaves))] = u[:0]
    out = SAMPLES[name].run(call, training, backend=backend)
    assert out.shape[0] == 0
    for gradient in torch.autograd.grad(out.sum(), parameters) if SAMPLES[name].differentiable else ():
        assert (gradient == 0).all()


@each_mode
@each_backend
@each_operator_with("differentiable")
def test_compiles_without_graph_break(name, backend, training):
    samples = SAMPLES[name]

    def network(call, x):
        call.leaves[next(iter(call.leaves))] = torch.relu(x)
        return 2 * samples.run(call, training)

    call, again = on_device(draw(name), True), on_device(draw(name), True)
    u = next(iter(call.leaves.values())).detach()
    with pyext.backend(backend):
        compiled = torch.compile(lambda x: network(call, x), fullgraph=True)
        leaf, other = u.clone().requires_grad_(), u.clone().requires_grad_()
        actual, expected = compiled(leaf), network(again, other)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out, x in ((actual, leaf), (expected, other))]
    assert torch.equal(*gradients)
    for key, value in call.state.items():  # moved by torch's lerp, which the compiler rounds differently
        torch.testing.assert_close(value, again.state[key], rtol=1e-6, atol=1e-6, msg=key)
