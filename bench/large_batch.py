"""`python -m bench.large_batch`: peer_contrast, forward and backward, on a batch whose similarities no peer can store.

4 peers x 16,384 images: all similarities would take 17 GB in float32. The terms of the first rows are held against
the reference in float64; then one step of all rows is timed, and the peak memory above the inputs told.
"""

from __future__ import annotations

import argparse
import time

import torch

from bench.memory import peak_resident, reset_peak_resident
from bench.test_peer_contrast import Setup
from pyext.ops import peer_contrast
from pyext.ops.peer_contrast import reference

_CHECKED_ROWS = (0, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    embeddings, labels = Setup(options.peers, options.images, torch.device("cpu"), torch.float32).draw(torch.float32)
    embeddings.requires_grad_()
    start = reset_peak_resident()
    begin = time.perf_counter()
    sum(peer_contrast(embeddings, labels)).backward()
    seconds, extra = time.perf_counter() - begin, peak_resident() - start
    found = torch.stack(list(peer_contrast(embeddings.detach(), labels, rows=_CHECKED_ROWS))).double()
    truth = torch.stack(list(reference(embeddings.detach().double(), labels, rows=_CHECKED_ROWS)))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)
    if not embeddings.grad.isfinite().all():
        raise ArithmeticError("the gradient is not finite")
    size = f"{options.peers} peers x {options.images} images"
    print(f"{size}: {seconds:.1f} s, peak {extra / 1e6:.0f} MB above the inputs")


if __name__ == "__main__":
    main()
