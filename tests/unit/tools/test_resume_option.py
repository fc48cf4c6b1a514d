"""What ``tools/train.py --resume`` chooses, and what ``use_exact_resume`` makes of a config."""

import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop

from mmman.runtime.launch import set_resume
from mmman.runtime.resume import use_exact_resume

pytestmark = pytest.mark.whole_models


def config(folder, **options):
    return Config({'work_dir': str(folder), **options})


def save(folder, *iterations):
    paths = [folder / f'iter_{i}.pth' for i in iterations]
    for path, iteration in zip(paths, iterations, strict=True):
        torch.save({'meta': {'epoch': 0, 'iter': iteration}, 'state_dict': {'a': torch.zeros(9)}}, path)
    return paths


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def chosen(choice, folder, **options):
    cfg = config(folder, **options)
    set_resume(cfg, choice)
    return cfg.get('resume'), cfg.get('load_from')


def test_what_is_chosen(tmp_path):
    older, latest = map(str, save(tmp_path, 4, 6))
    assert chosen('auto', tmp_path) == (True, latest)
    assert chosen('previous', tmp_path) == (True, older)
    assert chosen(older, tmp_path) == (True, older)
    assert chosen(None, tmp_path) == (None, None)
    assert chosen(None, tmp_path, resume=True) == (True, latest)
    assert chosen(None, tmp_path, resume=True, load_from=older) == (True, older)
    assert chosen(None, tmp_path, resume=False, load_from=older) == (False, older)
    assert chosen('https://host/a.pth', tmp_path) == (True, 'https://host/a.pth')


def test_a_run_without_a_checkpoint_begins_as_the_config_says(tmp_path):
    assert chosen('auto', tmp_path, load_from='pretrained.pth') == (False, 'pretrained.pth')
    with pytest.raises(SystemExit, match='--resume previous: .* has no checkpoint before the latest; give a path'):
        chosen('previous', tmp_path)


def test_a_truncated_checkpoint_is_refused_and_the_one_before_is_named(tmp_path):
    older, latest = save(tmp_path, 4, 6)
    cut(latest)
    with pytest.raises(SystemExit) as error:
        chosen('auto', tmp_path)
    assert str(error.value) == (
        f'--resume: {latest} is truncated, damaged or not a checkpoint: File is not a zip file; '
        'copy or download it again, or give another checkpoint; '
        f'use --resume previous to continue from {older}'
    )
    assert chosen('previous', tmp_path) == (True, str(older))
    cut(older)
    with pytest.raises(SystemExit, match=r'iter_4.pth is truncated.*another checkpoint; or start a new run, without --resume'):
        chosen('previous', tmp_path)


@pytest.mark.parametrize('loop', ['EpochBasedTrainLoop', 'mmengine.EpochBasedTrainLoop', EpochBasedTrainLoop, None])
def test_stock_loops_and_hooks_are_replaced(loop):
    cfg = Config({'train_cfg': {'max_epochs': 3, **({'type': loop} if loop else {'by_epoch': True})}})
    use_exact_resume(cfg)
    assert cfg.train_cfg == {'type': 'mmman.EpochBasedTrainLoop', 'max_epochs': 3}
    assert cfg.default_hooks.checkpoint == {'type': 'mmman.CheckpointHook', 'interval': 1}
    again = cfg.copy()
    use_exact_resume(again)
    assert again.to_dict() == cfg.to_dict()


@pytest.mark.parametrize('kind', ['CheckpointHook', CheckpointHook])
def test_options_of_loop_and_hook_are_kept(kind):
    cfg = Config(
        {'train_cfg': {'by_epoch': False, 'max_iters': 9}, 'default_hooks': {'checkpoint': {'type': kind, 'max_keep_ckpts': 2}}}
    )
    use_exact_resume(cfg)
    assert cfg.train_cfg == {'type': 'mmman.IterBasedTrainLoop', 'max_iters': 9}
    assert cfg.default_hooks.checkpoint == {'type': 'mmman.CheckpointHook', 'max_keep_ckpts': 2}


def test_custom_classes_are_kept_with_a_warning(monkeypatch):
    messages = []
    monkeypatch.setattr('mmman.runtime.resume.print_log', lambda message, **_: messages.append(message))
    options = {'train_cfg': {'type': 'MyLoop'}, 'default_hooks': {'checkpoint': {'type': 'MyHook'}}}
    cfg = Config(options)
    use_exact_resume(cfg)
    assert cfg.to_dict() == options
    assert messages == [
        'train_cfg.type=MyLoop is not an mmengine loop: a resumed run will not be exact',
        'default_hooks.checkpoint.type=MyHook is not the hook of mmengine: a killed run may lose checkpoints',
    ]
    loop = type('EpochBasedTrainLoop', (EpochBasedTrainLoop,), {'__module__': 'library.loops'})
    cfg = Config({'train_cfg': {'type': loop}, 'default_hooks': {'checkpoint': None}})
    use_exact_resume(cfg)
    assert cfg.train_cfg.type is loop and cfg.default_hooks.checkpoint is None


def test_a_config_of_another_train_script_finds_loop_and_hook():
    code = """
from mmengine.registry import HOOKS, LOOPS, init_default_scope
init_default_scope('mmdet')
print(LOOPS.get('mmman.EpochBasedTrainLoop').__module__, HOOKS.get('mmman.CheckpointHook').__module__)
"""
    printed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ['mmman.runtime.loops', 'mmman.runtime.checkpoint_hook']
