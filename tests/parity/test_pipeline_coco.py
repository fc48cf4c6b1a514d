"""RetinaNet-R18 with K=4 on COCO128 in four processes: bitwise one process whose momentum copies are as stale as stated."""

import torch
from mmengine.config import Config

from tests.conftest import ROOT
from tests.parity.pipeline_runs import last_checkpoint, run_alone, run_in_processes
from tests.parity.test_pipeline import assert_same, stale_hook

IMAGES = 8
SIZE = (160, 160)


def config(root, work_dir):
    cfg = Config.fromfile(ROOT / 'configs' / 'retinanet_r18_manpp_k4.py')
    images = {'data_root': str(root), 'ann_file': 'annotations/instances_train2017.json', 'indices': IMAGES}
    options = {
        'runner_type': 'mmman.PipelineRunner',
        'work_dir': str(work_dir),
        'model.backbone.backbone.init_cfg': None,
        'train_dataloader.batch_size': 2,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_cfg.max_epochs': 2,
        'default_hooks.checkpoint.interval': 2,
        'optim_wrapper.clip_grad': {'max_norm': 1.0},
        'param_scheduler.0.end': 4,
        'randomness.seed': 0,
        'custom_imports': {'imports': ['tests.parity.pipeline_runs']},
        'pipeline': {'staleness': 1, 'timeout': 60},
        'log_level': 'WARNING',
        'model_wrapper_cfg': None,
    }
    options |= {f'train_dataloader.dataset.{key}': value for key, value in images.items()}
    options['train_dataloader.dataset.pipeline.2.scale'] = SIZE
    cfg.merge_from_dict(options)
    for split in ('val', 'test'):
        for key in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{split}_{key}'] = None
    return cfg


def test_retinanet_on_coco(test_data, tmp_path):
    cfg = config(test_data / 'coco128', tmp_path / 'stages')
    run_in_processes([(cfg, 4)])
    stages = last_checkpoint(cfg.work_dir)
    iters = 2 * IMAGES // cfg.train_dataloader.batch_size
    assert stages['meta']['iter'] == iters

    alone = config(test_data / 'coco128', tmp_path / 'alone')
    alone.custom_hooks[-1] = {**stale_hook(staleness=1, flush_every=iters), 'momentum': 0.995}
    assert_same(stages, run_alone(alone))
    copies = {name: value for name, value in stages['state_dict'].items() if '.transfer.momentum.' in name}
    biases = {name.replace('.momentum.', '.bias.'): value for name, value in copies.items()}
    assert any(not torch.equal(value, stages['state_dict'][name]) for name, value in biases.items())
