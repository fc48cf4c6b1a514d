"""The text of a config in a checkpoint: what is kept word by word, and what is left out."""

import pytest
from mmengine.config import Config

from mmman.runtime.config_text import plain_config

MODEL = "model = dict(type='mmdet.RetinaNet', backbone=dict(depth=50, type='ResNet'))\n"


def test_what_mmengine_writes_of_a_config_is_kept_word_by_word():
    config = Config(
        dict(
            model=dict(type='mmdet.RetinaNet', std=[-1.0, 2], names=('a', 'ä'), keys={'.norm': dict(a=0.0), 3: None}),
            custom_imports=dict(imports=['mmman', 'mmpretrain.models'], allow_failed_imports=False),
            default_scope='mmdet',
            test_cfg=dict(nms=dict(type='nms', iou_threshold=0.5)),
            pipeline=[dict(type='torchvision/Resize', size=2), dict(type='PackDetInputs'), dict(type='iSAIDDataset')],
            filename_tmpl='epoch_{}.pth',
        )
    )
    assert plain_config(config.pretty_text) == (config.pretty_text, [])
    infinite = "model = dict(a=[float('inf'), float('-inf')])"
    assert plain_config(infinite) == (infinite, [])


@pytest.mark.parametrize(
    'line',
    [
        'import os',
        'x = open',
        "x = __import__('os')",
        'x = [i for i in (1, 2)]',
        'x = 1 if 2 else 3',
        "x = f'{1}'",
        'x = lambda: 1',
        'x = dict(*[], **{})',
        'x = dict([1], 2)',
        "x = float('1')",
        'x = y = 1',
        'x: int = 1',
        'x += 1',
        'x.y = 1',
        '(x := 1)',
        '__x__ = 1',
        "_base_ = 'a.py'",
        "x = dict(type='os.system')",
        "x = dict(type='mmengine.load')",
        "x = dict(type='mmengine.runner.Runner')",
        "x = dict(type='antigravity')",
        "x = {'type': 'os.system'}",
        "x = dict({'type': 'os.system'})",
        "x = [(dict(a=[dict(type='os.system')]),)]",
        "x = dict(_scope_='os')",
        "default_scope = 'os'",
        "custom_imports = dict(imports=['antigravity'])",
        "custom_imports = dict(imports='os')",
        'custom_imports = dict(imports=3)',
        "custom_imports = ['os']",
        "x = dict(trust_remote_code=1, type='AutoModel')",
        "x = '{{ fileDirname }}'",
        "x = '{{$HOME:a}}'",
        "x = dict(warp_mode='print(1)')",
        "x = dict(dtype='float32 if [1 for torch.load in []] else 1')",
        "x = dict(dtype='{1 for torch.load in {2}}')",
        "x = 'a.__class__'",
        "x = {'a()': 1}",
        "x = dict(ann_file='a.PKL')",
        f'x = {"[" * 70}{"]" * 70}',
    ],
)
def test_an_assignment_of_something_else_is_left_out(line):
    text, left_out = plain_config(f'{line}\n{MODEL}')
    assert Config.fromstring(text, '.py').to_dict() == Config.fromstring(MODEL, '.py').to_dict()
    assert len(left_out) == 1 and left_out[0].startswith('line 1 ')


@pytest.mark.parametrize(
    'text', ['', 'model = (', 'model = build()', "model = dict(type='os.system')", 'a\0', '(' * 9000, 'x' * 2**22 + '=1']
)
def test_a_text_without_a_plain_model_is_left_out_as_a_whole(text):
    kept, left_out = plain_config(text)
    assert kept == '' and left_out


def test_characters_that_editors_hide_are_not_kept():
    for hidden in ('\r', '\f', '\ufeff', '\u2028'):
        text, _ = plain_config(f'{MODEL}#{hidden}import os')
        assert hidden not in text and 'import' not in text
