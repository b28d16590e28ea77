"""The CUDA kernels compiled for the host, once, and global memory for them, afresh for each test."""

from collections.abc import Iterator

import pytest
import torch
from cuda_host.device import Device
from cuda_host.library import Library, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(build(tmp_path_factory.mktemp("cuda_host")))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Truth is computed by torch on small tensors, where its threads would spend their time on waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(library: Library, one_thread: None) -> Iterator[Device]:
    device = Device(library)
    yield device
    device.reset()
