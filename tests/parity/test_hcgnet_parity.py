"""HCGNet against the outputs of its reference implementation (../shared/parity, beside the checkout)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyext import models
from pyext._backend import backend
from pyext.nn import SMG, Transition


def shared_parity():
    """The folder shared/parity in or beside one of the folders that this file lies in."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "shared" / "parity" / "weights.py").is_file():
            return folder / "shared" / "parity"
    raise FileNotFoundError(f"no shared/parity in or beside any folder above {__file__}")


PARITY = shared_parity()
_spec = importlib.util.spec_from_file_location("parity_weights", PARITY / "weights.py")
weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(weights)

CASES = {
    "smg": lambda: SMG(24, 12),
    "transition": lambda: Transition(120, 60),
    "a1": lambda: models.hcgnet_a1(100),
    "b_eval": lambda: models.hcgnet_b(1000),
}
TRAINED = ("smg", "transition", "a1")
BACKENDS = ("reference", "cpu")


class Case:
    def __init__(self, name):
        self.file = np.load(PARITY / f"hcgnet_{name}.npz")
        self.name = name

    def __getitem__(self, key):
        value = self.file[key]
        return list(value) if value.dtype.kind == "U" else torch.as_tensor(value)

    def module(self, dtype=torch.float64):
        module = CASES[self.name]().double()
        module.load_state_dict(weights.fill(module.state_dict()))
        return module.to(dtype)

    def input(self, dtype=torch.float64):
        return weights.normal(int(self["x_seed"]), self["x_shape"].tolist()).to(dtype)

    def loss(self, out):
        if self.name == "a1":
            return F.cross_entropy(out, torch.arange(4))
        return (out * weights.normal(8, tuple(out.shape)).to(out.dtype)).mean()


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


@pytest.fixture(params=TRAINED)
def trained_case(request):
    return Case(request.param)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_names_shapes_and_order_are_those_of_published_checkpoints(case):
    state = CASES[case.name]().state_dict()
    assert list(state) == case["state_keys"]
    assert [str(tuple(t.shape)) for t in state.values()] == case["state_shapes"]
    assert sum(p.numel() for p in CASES[case.name]().parameters()) == int(case["n_params"])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation(case, name, grad):
    module = case.module().eval()
    with backend(name), torch.set_grad_enabled(grad):
        assert_close(module(case.input()), case["eval_out"])


@pytest.mark.parametrize("name", BACKENDS)
def test_training(trained_case, name):
    case = trained_case
    module = case.module().train()
    with backend(name):
        out = module(case.input())
        loss = case.loss(out)
        loss.backward()
    assert_close(out, case["train_out"])
    assert_close(loss, case["loss"])
    grads = {n: p.grad for n, p in module.named_parameters()}
    assert list(grads) == case["grad_keys"]
    assert_close(torch.stack([g.norm() for g in grads.values()]), case["grad_norms"])
    assert_close(torch.stack([g.sum() for g in grads.values()]), case["grad_sums"])
    buffers = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    assert_close(torch.stack([buffers[n].sum() for n in case["buf_keys"]]), case["buf_sums"])
    assert all(int(b) == 1 for n, b in module.named_buffers() if n.endswith("num_batches_tracked"))


def nearby(x, count=8):
    """x, and float32 inputs within about 1% of it: one draw's rounding errors can cancel, or pile up, by luck."""
    draws = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=draws) for _ in range(count - 1)]
    return [x.float(), *(x.float() * (1 + 0.01 * n) for n in noise)]


def assert_error_is_at_most_twice_that_of_plain_torch(run, inputs, dtype):
    """`run(dtype, input)` by the backend that `auto` takes against the plain torch composition, over all inputs."""
    with backend("reference"):
        truth = torch.stack([run(torch.float64, x) for x in inputs])
        plain = torch.stack([run(dtype, x) for x in inputs])
    ours = torch.stack([run(dtype, x) for x in inputs])
    ulps = 4 * torch.finfo(dtype).eps * truth.norm() / truth.numel() ** 0.5
    assert (ours - truth).norm() <= 2 * (plain - truth).norm() + ulps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype, training):
    def run(dtype, x):
        with torch.no_grad():
            return case.module(dtype).train(training and case.name in TRAINED)(x.to(dtype))

    assert_error_is_at_most_twice_that_of_plain_torch(run, [x.to(dtype) for x in nearby(case.input())], dtype)


@pytest.mark.parametrize("name", ["smg", "transition"])
def test_gradient_error_is_at_most_twice_that_of_plain_torch(name):
    case = Case(name)

    def run(dtype, x):
        module, x = case.module(dtype).train(), x.to(dtype, copy=True).requires_grad_()
        case.loss(module(x)).backward()
        return torch.cat([g.grad.flatten() for g in (x, *module.parameters())])

    assert_error_is_at_most_twice_that_of_plain_torch(run, nearby(case.input()), torch.float32)
