"""The rows of the paper's Table VIII, and what is predicted for them."""

import pytest

from mmman.experimental.scaling import Link, Network
from mmman.experimental.scaling.table8 import ROWS, predict


@pytest.mark.whole_models
def test_the_papers_rows():
    """One-GPU times are the paper's; equal blocks give 1/K and the drain at the end of an epoch."""
    network = Network(Link(300e9, 1e-5))
    assert len(ROWS) == 9
    for row in ROWS:
        count = len(row.blocks)
        prediction = predict(row, network)
        assert prediction.ddp == pytest.approx(row.end_to_end / count, rel=0.02)
        batches = row.images // (row.batch // count)
        assert prediction.equal == pytest.approx(row.local / count * (batches + count - 1) / batches, rel=0.02)
        shares = [block.seconds for block in row.blocks]
        assert prediction.by_flops == pytest.approx(row.local * max(shares) / sum(shares), rel=0.03)
        # Every gradient of E2E is one of MAN++'s too.
        whole = sum(block.gradients + block.head_gradients for block in row.whole)
        assert whole == pytest.approx(sum(b.gradients for b in row.blocks) + row.blocks[-1].head_gradients, rel=1e-3)
