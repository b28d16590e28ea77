"""`MemoryContrast`: when its banks move, torch's conventions for modules, and what it says to wrong input."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from pyext.nn import MemoryContrast

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
INDEX = torch.tensor([4, 0, 4, 9])


def make(**options) -> MemoryContrast:
    torch.manual_seed(0)
    return MemoryContrast(3, 6, 8, **{"num_samples": 10, "num_negatives": 5, "labels": LABELS} | options)


def features(peers: int = 3, batch: int = 4, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, width, generator=generator) for _ in range(peers)]


def _saved(module: MemoryContrast) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def banks(module: MemoryContrast) -> torch.Tensor:
    return torch.stack(module.contrast.banks()).clone()


def test_banks_start_in_the_papers_range():
    for bank in make(num_samples=400, labels=None).contrast.banks():
        assert bank.abs().max() <= (3 / 8) ** 0.5
        assert bank.var().item() == pytest.approx(1 / 8, rel=0.1)


def test_training_steps_lower_the_loss_and_move_the_batchs_rows_alone():
    module, x = make(), features()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    negatives = module.draw(INDEX)
    before, losses = banks(module), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(x, INDEX, negatives)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    module.update()
    moved = (banks(module) != before).any(dim=2)
    assert losses[-1] < 0.8 * losses[0]
    assert moved[:, INDEX].all()
    assert moved.sum() == 3 * len(INDEX.unique())


def test_evaluation_moves_nothing():
    module = make().eval()
    before = banks(module)
    module(features(), INDEX)
    module(features(), INDEX)
    module.update()
    assert torch.equal(banks(module), before)


def test_rows_move_once_and_not_before_backward():
    module = make()
    before = banks(module)
    module(features(), INDEX).backward()
    assert torch.equal(banks(module), before)
    module.update()
    after = banks(module)
    assert not torch.equal(after, before)
    module.update()
    module.state_dict()
    assert torch.equal(banks(module), after)


def test_update_before_backward_is_refused():
    module = make()
    loss = module(features(), INDEX)
    module.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: torch.load(_saved(module), weights_only=False)])
def test_copies_keep_rows_that_are_still_to_move(copied):
    module = make()
    module(features(), INDEX).backward()
    twin = copied(module)
    module.update()
    assert not torch.equal(banks(twin), banks(module))
    twin.update()
    assert torch.equal(banks(twin), banks(module))


def test_negatives_are_of_other_classes_or_any():
    module = make(num_negatives=400)
    assert (LABELS[module.draw(INDEX)] != LABELS[INDEX].unsqueeze(1)).all()
    relaxed = make(labels=None, relaxed=True, num_negatives=400)
    assert len(relaxed.draw(INDEX).unique()) == 10
    drawn = [module.draw(INDEX, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_copies_pickles_and_loads():
    module, x = make().eval(), features()
    twins = [copy.deepcopy(module), make()]
    twins.append(torch.load(_saved(module), weights_only=False))
    twins[1].eval().load_state_dict(module.state_dict())
    negatives = module.draw(INDEX)
    expected = module(x, INDEX, negatives)
    for twin in twins:
        assert torch.equal(twin(x, INDEX, negatives), expected)
    assert "num_negatives=5, temperature=0.1, momentum=0.5" in repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    module = make().to(dtype)
    x = [f.to(dtype) for f in features()]
    loss = module(x, INDEX)
    loss.backward()
    module.update()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert module.embed_list[0].linear.weight.grad.isfinite().all()


def test_autocast():
    module = make()
    negatives = module.draw(INDEX)
    expected = module(features(), INDEX, negatives).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.eval()(features(), INDEX, negatives)
    loss.backward()
    assert loss.dtype == torch.float32
    assert module.embed_list[0].linear.weight.grad.dtype == torch.float32
    module.eval()
    assert loss.item() == pytest.approx(module(features(), INDEX, negatives).item(), rel=0.02)
    assert expected > 0


def test_compiles_without_graph_break():
    module, x = make(), features()
    twin = copy.deepcopy(module)
    negatives = module.draw(INDEX)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for which in (compiled, twin):
            which(x, INDEX, negatives).backward()
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    module.update()
    twin.update()
    torch.testing.assert_close(banks(module), banks(twin))


CONSTRUCTION = {
    "one peer": (lambda: MemoryContrast(1, 6, num_samples=10), "num_peers is 1, expected at least 2"),
    "temperature": (lambda: make(temperature=0), "temperature is 0, expected more than 0"),
    "momentum": (lambda: make(momentum=1.5), "momentum is 1.5, expected 0 to 1"),
    "no samples": (lambda: make(num_samples=0, labels=None), "num_samples is 0"),
    "no negatives": (lambda: make(num_negatives=0), "num_negatives is 0"),
    "labels": (lambda: make(labels=LABELS[1:]), r"labels has shape \(9,\), expected \(10,\)"),
    "one class": (lambda: make(labels=torch.zeros(10).long()), "all 10 rows are of class 0"),
}


@pytest.mark.parametrize(("build", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_wrong_construction_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


CALLS = {
    "peers": (lambda: make()(features(2), INDEX), ValueError, "features of 2 peers, expected 3"),
    "no peers": (lambda: make()([], INDEX), ValueError, "features of 0 peers, expected 3"),
    "batches": (
        lambda: make()([*features(2), features(1, 3)[0]], INDEX),
        ValueError,
        r"features\[2\] has shape \(3, 6\), expected \(4, 6\)",
    ),
    "width": (lambda: make()(features(width=5), INDEX), ValueError, r"features\[0\] has shape \(4, 5\)"),
    "index's shape": (lambda: make()(features(), INDEX[:3]), ValueError, r"index is \(3,\)"),
    "index": (lambda: make()(features(), INDEX + 1), IndexError, "index holds 10, expected 0 to num_samples - 1 = 9"),
    "negative index": (lambda: make()(features(), INDEX - 1), IndexError, "index holds -1, expected 0 to num_samples"),
    "no labels": (lambda: make(labels=None)(features(), INDEX), ValueError, "need labels"),
    "negatives": (
        lambda: make()(features(), INDEX, torch.full((4, 2), 10)),
        IndexError,
        "indices holds 10, expected rows of the banks, 0 to 9",
    ),
    "a bank of another size": (
        lambda: make().load_state_dict(make(num_samples=12, labels=None).state_dict()),
        RuntimeError,
        "size mismatch for contrast.memory_v0",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_wrong_call_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
