"""The embedding map: what it calls the start is the run's, and its cosines are what the captions say."""

import pytest
import torch

from bench import distill, embedding_map
from pyext.distill.recipe import DistillationRecipe
from pyext.train.data import load_data
from pyext.train.loop import Settings, Trainer


def test_before_training_is_where_the_run_starts(tmp_path):
    settings = Settings(
        distill.ARCH, distill.DATA, tmp_path / "run", DistillationRecipe(), image_size=distill.IMAGE_SIZE, seed=3
    )
    expected = Trainer(settings).network.state_dict()
    found = embedding_map.network(load_data(distill.DATA, None, distill.IMAGE_SIZE), 3).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_cosines_between_peers():
    labels = torch.tensor([0, 0, 1])
    first = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    second = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
    # One image: 1, 0.6, 1. One class: 0.6 and 1. Others, by the image of the first: 0, 0, 0, 0.8.
    image, alike, other = embedding_map.cosines(torch.stack([first, second]), labels)
    assert image == pytest.approx(2.6 / 3)
    assert alike == pytest.approx(0.8)
    assert other == pytest.approx(0.2)
