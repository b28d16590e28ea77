"""MCL-OKD's memory-bank contrast against the outputs of its reference implementation (../shared/parity)."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_hcgnet_parity import PARITY, assert_close, weights

from pyext._backend import backend
from pyext.nn import MemoryContrast
from pyext.ops import memory_contrast, memory_update


@pytest.fixture(scope="module")
def case():
    file = np.load(PARITY / "mcl_okd_nce.npz")
    return {key: list(file[key]) if file[key].dtype.kind == "U" else torch.as_tensor(file[key]) for key in file}


def module_of(case):
    module = MemoryContrast(
        int(case["M"]),
        int(case["rep_dim"]),
        int(case["feat_dim"]),
        num_samples=int(case["n_data"]),
        num_negatives=int(case["K"]),
        temperature=float(case["T"]),
        momentum=float(case["momentum"]),
    ).double()
    module.load_state_dict(weights.fill(module.state_dict()))
    for bank in module.contrast.banks():
        bank.copy_(F.normalize(bank, dim=1))
    return module


def test_names_and_order_are_those_of_published_checkpoints(case):
    assert list(module_of(case).state_dict()) == case["state_keys"]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_operators(case, name):
    embeddings = case["embeddings"].clone().requires_grad_()
    banks = module_of(case).contrast.banks()
    with backend(name):
        loss = memory_contrast(embeddings, banks, case["contrast_idx"], temperature=float(case["T"]))
        (gradient,) = torch.autograd.grad(loss, embeddings)
        memory_update(banks, embeddings, case["idx"], momentum=float(case["momentum"]))
    assert_close(loss.detach(), case["loss"])
    assert_close(gradient, case["grad_embeddings"])
    assert_close(torch.stack([bank[case["idx"]] for bank in banks]), case["memory_rows_after"])


@pytest.mark.parametrize("tiled", [False, True])
def test_both_orders_of_rows(case, tiled):
    banks = module_of(case).contrast.banks()
    loss, *_ = torch.ops.pyext.memory_contrast(case["embeddings"], banks, case["contrast_idx"], float(case["T"]), tiled)
    assert_close(loss, case["loss"])


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("finish", ["update", "state_dict", "next forward"])
def test_module(case, name, finish):
    module = module_of(case)
    shape = (int(case["B"]), int(case["rep_dim"]))
    features = [weights.normal(int(case["seed"]) + i, shape).requires_grad_() for i in range(int(case["M"]))]
    step = functools.partial(module, features, case["idx"], case["contrast_idx"][:, 1:])
    with backend(name):
        loss = step()
        gradients = torch.autograd.grad(loss, features)
        {"update": module.update, "state_dict": module.state_dict, "next forward": step}[finish]()
    assert_close(loss.detach(), case["loss"])
    assert_close(torch.stack(gradients), case["grad_inputs"])
    rows = torch.stack([bank[case["idx"]] for bank in module.contrast.banks()])
    assert_close(rows, case["memory_rows_after"])
