"""Table VIII of the paper, training time per epoch in seconds, and the simulator's predictions for its rows.

Times and batches are from the paper and its recipes; all times are on A100 GPUs. FLOPs and sizes of the blocks were counted
with torch's FLOP counter on this project's configs: the rows ``table2/*`` of ``configs/paper/rows.py`` at 224x224,
``configs/paper/retinanet_*`` at 608x1024, ``configs/paper/deeplabv3_*`` at 768x768.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmman.experimental.scaling.network import Network
from mmman.experimental.scaling.profile import BlockCost, StageProfile
from mmman.experimental.scaling.simulate import simulate_end_to_end, simulate_pipeline


@dataclass(frozen=True)
class Table8Row:
    """One row of the table. Times are in seconds per epoch.

    Attributes:
        dataset, model: Names in the paper.
        images: Number of training images.
        batch: Images per iteration, of all GPUs together.
        pixels: Pixels per image.
        end_to_end, end_to_end_ddp: Time of E2E on one GPU, and under DDP on K GPUs.
        local, local_ddp, pipeline: Time of MAN++ on one GPU, under DDP on K GPUs, and as a pipeline (PPLL) on K GPUs.
        blocks, whole: Blocks under local and end-to-end training. Times are GFLOPs per image; features are per image.
    """

    dataset: str
    model: str
    images: int
    batch: int
    pixels: int
    end_to_end: float
    end_to_end_ddp: float
    local: float
    local_ddp: float
    pipeline: float
    blocks: tuple[BlockCost, ...]
    whole: tuple[BlockCost, ...]

    def profile(self, equal: bool) -> StageProfile:
        """A profile with the paper's one-GPU times, divided among the blocks equally or in proportion to their FLOPs."""
        batch = self.batch // len(self.blocks)
        blocks = [replace(b, features=b.features * batch, taps=b.taps * batch) for b in self.blocks]
        counted = StageProfile(batch, tuple(blocks), self.whole, images=4 * 3 * self.pixels * batch)
        local, whole = (seconds * batch / self.images for seconds in (self.local, self.end_to_end))
        if equal:
            counted = replace(counted, blocks=tuple(_equal(block) for block in counted.blocks))
        return counted.with_totals(local, whole)


@dataclass(frozen=True)
class RowPrediction:
    """The simulator's predictions for a row, in seconds per epoch.

    Attributes:
        row: The row of the paper.
        ddp: E2E under DDP on K GPUs.
        equal: The pipeline, if all blocks take the same time.
        by_flops: The pipeline, if the time of a block is proportional to its FLOPs.
        flops_ratio: FLOPs of MAN++ over those of E2E.
    """

    row: Table8Row
    ddp: float
    equal: float
    by_flops: float
    flops_ratio: float


def predict(row: Table8Row, network: Network, staleness: int = 1) -> RowPrediction:
    """Predict the multi-GPU times of a row from its two one-GPU times."""
    count = len(row.blocks)
    iterations = max(1, row.images // (row.batch // count))

    def pipeline(equal: bool) -> float:
        outcome = simulate_pipeline(row.profile(equal), count, network, staleness, iterations)
        return row.images / outcome.images_per_second

    return RowPrediction(
        row=row,
        ddp=row.images / simulate_end_to_end(row.profile(True), count, network).images_per_second,
        equal=pipeline(True),
        by_flops=pipeline(False),
        flops_ratio=sum(b.seconds for b in row.blocks) / sum(b.seconds for b in row.whole),
    )


def _equal(block: BlockCost) -> BlockCost:
    """Scale the times of a block so that they sum to 1."""
    total = block.seconds
    return replace(block, forward=block.forward / total, head=block.head / total, backward=block.backward / total)


def _block(
    forward: float,
    head: float,
    backward: float,
    gradients: float,
    head_gradients: float,
    features: float = 0.0,
    taps: float = 0.0,
    first_unit: float = 0.0,
    needs_images: bool = False,
) -> BlockCost:
    """Create a block from GFLOPs and MB."""
    mega = 1e6
    return BlockCost(
        forward=forward,
        head=head,
        backward=backward,
        gradients=gradients * mega,
        head_gradients=head_gradients * mega,
        features=features * mega,
        taps=taps * mega,
        first_unit=first_unit * mega,
        needs_images=needs_images,
    )


ROWS = (
    Table8Row(
        'ImageNet',
        'ResNet-101',
        images=1281167,
        batch=1024,
        pixels=224 * 224,
        end_to_end=2242,
        end_to_end_ddp=795,
        local=2726,
        local_ddp=973,
        pipeline=726,
        blocks=(
            _block(3.19, 1.767, 9.243, 4.659, 20.12, 1.606, 0, 0, needs_images=True),
            _block(4.676, 1.678, 12.17, 42.92, 26.74, 0.8028, 0, 1.126, needs_images=True),
            _block(3.494, 1.678, 9.805, 35.75, 26.74, 0.8028, 0, 4.481, needs_images=True),
            _block(4.239, 0.004096, 8.383, 86.67, 8.196, 0, 0, 4.481),
        ),
        whole=(
            _block(3.19, 0, 6.145, 4.659, 0),
            _block(4.676, 0, 9.351, 42.92, 0),
            _block(3.494, 0, 6.988, 35.75, 0),
            _block(4.239, 0.004096, 8.486, 86.67, 8.196),
        ),
    ),
    Table8Row(
        'ImageNet',
        'ResNet-152',
        images=1281167,
        batch=1024,
        pixels=224 * 224,
        end_to_end=3299,
        end_to_end_ddp=1135,
        local=3758,
        local_ddp=1298,
        pipeline=1018,
        blocks=(
            _block(4.937, 1.767, 12.74, 9.14, 20.12, 1.606, 0, 0, needs_images=True),
            _block(6.859, 1.678, 16.54, 65.26, 26.74, 0.8028, 0, 1.126, needs_images=True),
            _block(5.241, 1.678, 13.3, 53.62, 26.74, 0.8028, 0, 4.481, needs_images=True),
            _block(5.986, 0.004096, 11.88, 104.5, 8.196, 0, 0, 4.481),
        ),
        whole=(
            _block(4.937, 0, 9.639, 9.14, 0),
            _block(6.859, 0, 13.72, 65.26, 0),
            _block(5.241, 0, 10.48, 53.62, 0),
            _block(5.986, 0.004096, 11.98, 104.5, 8.196),
        ),
    ),
    Table8Row(
        'ImageNet',
        'ViT-Tiny/16',
        images=1281167,
        batch=1024,
        pixels=224 * 224,
        end_to_end=1282,
        end_to_end_ddp=503,
        local=1613,
        local_ddp=636,
        pipeline=458,
        blocks=(
            _block(0.5807, 0.5233, 1.976, 6.081, 4.332, 0.1513, 0, 0),
            _block(0.5229, 0.5233, 1.918, 5.338, 4.332, 0.1513, 0, 1.779),
            _block(0.5229, 0.5233, 1.918, 5.338, 4.332, 0.1513, 0, 1.779),
            _block(0.5229, 0.000384, 1.047, 5.338, 0.772, 0, 0, 1.779),
        ),
        whole=(
            _block(0.5807, 0, 1.104, 6.081, 0),
            _block(0.5229, 0, 1.046, 5.338, 0),
            _block(0.5229, 0, 1.046, 5.338, 0),
            _block(0.5229, 0.000384, 1.047, 5.338, 0.772),
        ),
    ),
    Table8Row(
        'ImageNet',
        'ViT-Base/16',
        images=1281167,
        batch=1024,
        pixels=224 * 224,
        end_to_end=9103,
        end_to_end_ddp=2976,
        local=11433,
        local_ddp=3620,
        pipeline=2895,
        blocks=(
            _block(8.597, 8.368, 30.91, 88.03, 59.79, 0.6052, 0, 0),
            _block(8.366, 8.368, 30.68, 85.05, 59.79, 0.6052, 0, 28.35),
            _block(8.366, 8.368, 30.68, 85.05, 59.79, 0.6052, 0, 28.35),
            _block(8.366, 0.001536, 16.74, 85.05, 3.076, 0, 0, 28.35),
        ),
        whole=(
            _block(8.597, 0, 16.96, 88.03, 0),
            _block(8.366, 0, 16.73, 85.05, 0),
            _block(8.366, 0, 16.73, 85.05, 0),
            _block(8.366, 0.001536, 16.74, 85.05, 3.076),
        ),
    ),
    Table8Row(
        'COCO',
        'RetinaNet-R34',
        images=117266,
        batch=64,
        pixels=608 * 1024,
        end_to_end=9407,
        end_to_end_ddp=3137,
        local=10903,
        local_ddp=3667,
        pipeline=2869,
        blocks=(
            _block(20.14, 89.35, 211.6, 0.926, 17.46, 9.961, 9.961, 0),
            _block(21.68, 29.19, 95.68, 4.466, 20.35, 4.981, 4.981, 0.9236),
            _block(33.15, 15.95, 92.14, 27.29, 36.35, 2.49, 2.49, 3.682),
            _block(15.94, 184.2, 397.6, 52.46, 40.93, 0, 0, 14.7),
        ),
        whole=(
            _block(20.14, 0, 37.36, 0.926, 0),
            _block(21.68, 0, 43.35, 4.466, 0),
            _block(33.15, 0, 66.3, 27.29, 0),
            _block(15.94, 184.2, 400.2, 52.46, 40.93),
        ),
    ),
    Table8Row(
        'COCO',
        'RetinaNet-R101',
        images=117266,
        batch=64,
        pixels=608 * 1024,
        end_to_end=10654,
        end_to_end_ddp=3481,
        local=12271,
        local_ddp=4081,
        pipeline=3257,
        blocks=(
            _block(19.5, 100.8, 228.5, 0.9014, 18.45, 39.85, 39.85, 0),
            _block(25.5, 39.71, 116.1, 4.878, 23.51, 19.92, 19.92, 1.528),
            _block(128.5, 25.99, 294.6, 104.4, 47.39, 9.961, 9.961, 6.07),
            _block(20.08, 188.6, 408.5, 59.86, 57.84, 0, 0, 24.2),
        ),
        whole=(
            _block(19.5, 0, 36.08, 0.9014, 0),
            _block(25.5, 0, 51, 4.878, 0),
            _block(128.5, 0, 256.9, 104.4, 0),
            _block(20.08, 188.6, 417.4, 59.86, 57.84),
        ),
    ),
    Table8Row(
        'COCO',
        'RetinaNet-R152',
        images=117266,
        batch=64,
        pixels=608 * 1024,
        end_to_end=11076,
        end_to_end_ddp=3758,
        local=12689,
        local_ddp=4346,
        pipeline=3328,
        blocks=(
            _block(19.5, 100.8, 228.5, 0.9014, 18.45, 39.85, 39.85, 0),
            _block(47.18, 39.71, 159.4, 9.359, 23.51, 19.92, 19.92, 1.528),
            _block(198.9, 25.99, 435.5, 162.5, 47.39, 9.961, 9.961, 6.07),
            _block(20.08, 188.6, 408.5, 59.86, 57.84, 0, 0, 24.2),
        ),
        whole=(
            _block(19.5, 0, 36.08, 0.9014, 0),
            _block(47.18, 0, 94.36, 9.359, 0),
            _block(198.9, 0, 397.8, 162.5, 0),
            _block(20.08, 188.6, 417.4, 59.86, 57.84),
        ),
    ),
    Table8Row(
        'Cityscapes',
        'DeepLabV3-R50',
        images=2975,
        batch=128,
        pixels=768 * 768,
        end_to_end=80,
        end_to_end_ddp=52,
        local=103,
        local_ddp=64,
        pipeline=54,
        blocks=(
            _block(117.1, 96.32, 406.1, 20.84, 15.29, 94.37, 56.62, 0, needs_images=True),
            _block(337, 802.4, 2274, 73.27, 178.3, 0, 0, 4.481),
        ),
        whole=(
            _block(117.1, 0, 234, 20.84, 0),
            _block(337, 802.4, 2279, 73.27, 178.3),
        ),
    ),
    Table8Row(
        'Cityscapes',
        'DeepLabV3-R101',
        images=2975,
        batch=128,
        pixels=768 * 768,
        end_to_end=95,
        end_to_end_ddp=58,
        local=131,
        local_ddp=79,
        pipeline=61,
        blocks=(
            _block(322.5, 96.32, 816.8, 65.53, 15.29, 94.37, 56.62, 0, needs_images=True),
            _block(480.8, 802.4, 2561, 104.5, 178.3, 0, 0, 4.481),
        ),
        whole=(
            _block(322.5, 0, 644.7, 65.53, 0),
            _block(480.8, 802.4, 2566, 104.5, 178.3),
        ),
    ),
)
