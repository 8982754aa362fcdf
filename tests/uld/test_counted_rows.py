"""ULD of heads in slices by counts: several processes in one launch."""

import pytest

from support.processes import start_ranks


@pytest.mark.parametrize(("backend", "processes"), [("torch", 3), ("triton", 2)])
def test_counts_of_slices_give_the_loss_of_whole_heads(backend, processes):
    """In float64 to 1e-12, and as near as an exchange of rows. A chunk with more open entries than
    there is room for is exchanged, and only such a chunk.
    """
    done = start_ranks("counted_step", processes, backend)
    assert done.returncode == 0, done.stderr
