"""In-batch mutual contrast against the outputs of its reference implementation (../shared/parity)."""

import numpy as np
import pytest
import torch
from test_hcgnet_parity import PARITY, assert_close

from pyext._backend import backend
from pyext.nn import PeerContrast
from pyext.ops import PeerContrastTerms


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("term", PeerContrastTerms._fields)
def test_terms_and_gradients(term, name):
    file = np.load(PARITY / "sup_mcl.npz")
    embeddings = torch.as_tensor(file["embeddings"]).requires_grad_()
    module = PeerContrast(float(file["tau"]), float(file["kd_T"]), normalize=False)
    with backend(name):
        value = getattr(module(embeddings, torch.as_tensor(file["labels"])), term)
        (gradient,) = torch.autograd.grad(value, embeddings)
    assert_close(value.detach(), torch.as_tensor(file[term]))
    assert_close(gradient, torch.as_tensor(file[f"grad_{term}"]))
