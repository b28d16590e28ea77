"""Dissection finds what the published loop finds, image by image, and survives an interruption; the atlas keeps it."""

import copy
import json

import pytest
import torch
from networks import CLASSES, drawn_atlas, network
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.subnets import published_loop
from pyext.checkpoint import CheckpointError
from pyext.subnet import Atlas, AtlasError, dissect, plan
from pyext.subnet.atlas import UNIT
from pyext.subnet.dissection import Gated, Settings, find_gates


def chain():
    """Two convolutions with BN, in float64; confident enough that gates change its mind."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(5, CLASSES)).double()
    model(torch.randn(64, 3, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        model[-1].weight.mul_(4)
    return model.eval()


def batches(count=3, size=4, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, *shape, generator=generator, dtype=torch.float64)
    return list(zip(images, torch.randint(0, CLASSES, (count, size), generator=generator), strict=True))


def same(a, b):
    assert a.layers == b.layers
    return torch.equal(a.counts, b.counts) and all(torch.equal(a.sums[layer], b.sums[layer]) for layer in a.layers)


def test_gates_are_those_of_the_published_loop():
    model, images = chain(), torch.cat([images for images, _ in batches()])
    gated = Gated(plan(model, (3, 8, 8)))
    found = find_gates(gated, images, Settings(steps=30))
    expected = published_loop(model, images, frozen=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found.min() == 0
    assert found.max() > 0.5
    with torch.no_grad():
        assert torch.equal(gated.logits(images, found).argmax(1), model(images).argmax(1))


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2", "densenet10", "mixed", "hcgnet"])
def test_gate_gradient_is_the_derivative_and_gates_of_one_change_nothing(name):
    model, shape = network(name)
    gated, x = Gated(plan(model, shape)), torch.randn(2, *shape, dtype=torch.float64)
    gates = torch.ones(2, sum(gated.widths.values()), dtype=torch.float64)
    torch.testing.assert_close(gated.logits(x, gates), model(x), rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(gates)
    gates.requires_grad_()
    (gradient,) = torch.autograd.grad(gated.logits(x, gates).square().sum(), gates)

    def along(t):
        return gated.logits(x, gates.detach() + t * direction).square().sum()

    numeric = (along(1e-6) - along(-1e-6)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-6)


class Multiplied(fx.Interpreter):
    """The network as it is, with a product where the plan has a gate."""

    def __init__(self, traced, gates):
        super().__init__(traced.module)
        self.of = {gate: gates[layer] for layer, gate in traced.gates.items()}

    def run_node(self, n):
        value = super().run_node(n)
        if n.name not in self.of:
            return value
        return value * self.of[n.name].view(*value.shape[:2], *[1] * (value.dim() - 2))


@pytest.mark.parametrize("name", ["resnet8", "vgg16", "mobilenet_v2", "densenet10", "mixed", "hcgnet"])
def test_gradient_is_that_of_gates_before_the_activations_also_where_they_are_zero(name):
    model, shape = network(name)
    traced, x = plan(model, shape), torch.randn(2, *shape, dtype=torch.float64)
    gated = Gated(traced)
    drawn = torch.tensor([0.0, 0.8, 1.5], dtype=torch.float64)
    gates = drawn[torch.randint(0, 3, (2, sum(gated.widths.values())))].requires_grad_()
    logits, expected = gated.logits(x, gates), Multiplied(traced, gated.split(gates)).run(x)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(expected.square().sum(), gates)
    found = gated.gradient(logits.square().sum(), gates)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10 * float(gradient.abs().max()))


def test_atlas_sums_each_class_and_leaves_the_network_as_it_was():
    model = chain().train()
    before = copy.deepcopy(model.state_dict())
    data = batches()
    atlas = dissect(model, data, CLASSES, steps=5)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    gated = Gated(plan(model, (3, 8, 8)))
    labels = torch.cat([labels for _, labels in data])
    gates = gated.split(torch.cat([find_gates(gated, images, Settings(steps=5)) for images, _ in data]))
    assert atlas.layers == ["0", "4"]
    assert atlas.counts.tolist() == torch.bincount(labels, minlength=CLASSES).tolist()
    for layer in atlas.layers:
        for c in set(labels.tolist()):
            torch.testing.assert_close(atlas.importance(layer)[c], gates[layer][labels == c].mean(0), rtol=0, atol=UNIT)
        assert atlas.importance(layer)[atlas.counts == 0].isnan().all()


def test_patience_stops_an_image_whose_best_is_old():
    model, images = chain(), torch.cat([images for images, _ in batches()])
    gated, calls = Gated(plan(model, (3, 8, 8))), []
    run = gated.logits
    gated.logits = lambda x, gates: calls.append(len(x)) or run(x, gates)
    patient = find_gates(gated, images, Settings(steps=40))
    assert calls == [12] * 41
    calls.clear()
    hasty = find_gates(gated, images, Settings(steps=40, patience=1))
    assert sum(calls) < 12 * 41
    same_path = (patient == hasty).all(1)
    assert 0 < same_path.sum() < 12
    assert (hasty.sum(1) >= patient.sum(1))[~same_path].all()


def test_shards_merge_to_the_whole_bit_for_bit_in_any_order():
    model, data = chain(), batches(5)
    whole = dissect(model, data, CLASSES, steps=3)
    shards = [dissect(model, data, CLASSES, steps=3, shard=(i, 3)) for i in range(3)]
    assert same(shards[2].merge(shards[0], shards[1]), whole)
    assert not same(shards[2].merge(shards[0]), whole)


class Stop(Exception):
    pass


def test_interrupted_dissection_goes_on_after_the_last_whole_batch(tmp_path):
    model, data, path = chain(), batches(4), tmp_path / "work.pt"

    def interrupted():
        yield from data[:2]
        raise Stop

    with pytest.raises(Stop):
        dissect(model, interrupted(), CLASSES, steps=3, checkpoint=path)
    seen = []
    atlas = dissect(model, data, CLASSES, steps=3, checkpoint=path, report=lambda *done: seen.append(done))
    assert seen == [(3, 12), (4, 16)]
    assert same(atlas, dissect(model, data, CLASSES, steps=3))
    assert same(atlas, dissect(model, data, CLASSES, steps=3, checkpoint=path))
    with pytest.raises(CheckpointError, match="begun with another settings"):
        dissect(model, data, CLASSES, steps=4, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"begun for shard \[0, 1\], not \[1, 2\]"):
        dissect(model, data, CLASSES, steps=3, checkpoint=path, shard=(1, 2))
    with torch.no_grad():
        model[0].weight[0] += 1
    with pytest.raises(CheckpointError, match="begun with another fingerprint"):
        dissect(model, data, CLASSES, steps=3, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        dissect(model, data, CLASSES, steps=3, checkpoint=path)


def test_atlas_is_saved_and_loaded_and_damage_is_told(tmp_path):
    model, shape = network("mixed")
    atlas, path = drawn_atlas(model, shape), tmp_path / "atlas.safetensors"
    atlas.save(path)
    loaded = Atlas.load(path)
    assert same(loaded, atlas)
    assert (loaded.fingerprint, loaded.input_shape, loaded.settings) == (atlas.fingerprint, shape, {})
    loaded.check_network(model)
    with pytest.raises(ValueError, match=r"does not end with \.safetensors"):
        atlas.save(tmp_path / "atlas.pt")
    description = json.loads(path.with_suffix(".json").read_text())
    for text, message in [
        ("{", "missing or damaged"),
        ("[]", "not the description of an atlas"),
        (json.dumps({**description, "format": "2"}), "has the format '2'"),
        (json.dumps({**description, "layers": ["other"]}), "is not an atlas"),
        (json.dumps({k: v for k, v in description.items() if k != "fingerprint"}), "is not an atlas"),
    ]:
        path.with_suffix(".json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            Atlas.load(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Atlas.load(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Atlas.load(tmp_path / "none.safetensors")


def test_atlases_of_different_networks_do_not_merge():
    one, two = (drawn_atlas(*network("mixed", seed)) for seed in (0, 1))
    with pytest.raises(AtlasError, match="differ in fingerprint"):
        one.merge(two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"patience": 0}, "patience is 0"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\)"),
        ({"num_classes": CLASSES + 1}, "num_classes is 7, but the network has 6 outputs"),
        ({"num_classes": 1}, "a label is outside 0 to 0"),
        ({"loader": []}, "loader has no batch"),
        ({"loader": [(torch.zeros(3, 8, 8), torch.zeros(3).long())]}, r"gives images \(3, 8, 8\) torch.float32"),
        ({"loader": [(torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2).long())]}, "torch.uint8, expected"),
        ({"loader": [(torch.zeros(2, 3, 8, 8), torch.zeros(3).long())]}, r"gives labels \(3,\) torch.int64"),
        ({"loader": [*batches(1), *batches(1, shape=(3, 9, 9))]}, r"gives images of \(3, 9, 9\) after \(3, 8, 8\)"),
        ({"loader": [(torch.full((2, 3, 8, 8), float("nan")), torch.zeros(2).long())]}, "outputs are not finite"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    given = {"loader": batches(1), "num_classes": CLASSES, "steps": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        dissect(chain(), given.pop("loader"), given.pop("num_classes"), **given)


def test_a_loader_that_shuffles_cannot_be_resumed_or_shared(tmp_path):
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    for arguments in ({"checkpoint": tmp_path / "work.pt"}, {"shard": (0, 2)}):
        with pytest.raises(ValueError, match="loader shuffles"):
            dissect(chain(), loader, CLASSES, steps=1, **arguments)
    assert int(dissect(chain(), loader, CLASSES, steps=1).counts.sum()) == 12
