"""Further families of stock configs: `mmman fit`'s dry run, a training step of the whole model on two small random images."""

import pytest

from mmman.planning.choice import Changes
from mmman.runtime.localized_child import localize
from mmman.runtime.stock_config import StockConfig
from tests.conftest import ROOT

pytest.importorskip('mmpretrain')

BLOCKS = 4
STOCK = (
    'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'mmdet::detr/detr_r18_8xb2-500e_coco.py',
    'mmdet::solov2/solov2-light_r18_fpn_ms-3x_coco.py',
    'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
    'mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-769x769.py',
    'mmseg::mobilenet_v2/mobilenet-v2-d8_fcn_4xb4-160k_ade20k-512x512.py',
    'mmpretrain::csra/resnet101-csra_1xb16_voc07-448px.py',
    'mmpretrain::cspnet/cspresnext50_8xb32_in1k.py',
    'mmpretrain::deit/deit-tiny-distilled_4xb256_in1k.py',
    'mmpretrain::resnest/resnest50_32xb64_in1k.py',
    'mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py',
    'mmpretrain::seresnet/seresnet50_8xb32_in1k.py',
    'mmpretrain::spark/benchmarks/convnextv2-tiny_8xb256-coslr-300e_in1k.py',
)


def table_row(stock, head):
    task = next(module for name in ('bbox_head', 'decode_head', 'head') if (module := getattr(head, name, None)))
    library, _, path = stock.partition('::')
    return f'| {library} | `{path}` | `{type(head).__name__}`, {type(task).__name__} |'


@pytest.mark.parametrize('stock', STOCK)
def test_the_whole_model_steps(stock):
    pytest.importorskip(stock.partition('::')[0])
    child = localize(StockConfig.read(stock), Changes(local={'num_blocks': BLOCKS}))
    assert 'tested: a training step on two small random images' in child.reasons
    assert not [reason for reason in child.reasons if reason.startswith('no gradient reaches')]
    assert len(child.backbone.local) == BLOCKS - 1
    row = table_row(stock, next(iter(child.backbone.local.values())))
    assert row in (ROOT / 'docs' / 'supported_models.md').read_text()
