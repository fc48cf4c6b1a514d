"""Configs that a pipeline refuses. What it trains is in tests/parity/test_pipeline.py."""

import pytest

from mmman.errors import ConfigError
from mmman.parallel.pipeline.runner import PipelineRunner
from mmman.watchdog import monitor as watchdog_module
from tests.parity.pipeline_runs import environment, free_port, toy_run


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'pipeline': {'queue': 3}}, 'PipelineOptions has no option queue; the options are staleness, timeout'),
        ({'pipeline': {'staleness': -1}}, 'pipeline.staleness=-1: expected an integer >= 0'),
        ({'model': {'type': 'ToyClassifier', 'backbone': {'type': 'ToyNet'}}}, 'trains the blocks of a localised model'),
        ({'custom_hooks': [{'type': 'EMAHook'}]}, 'EMAHook averages a whole model'),
        ({'optim_wrapper.clip_grad': {'max_norm': 1}, 'optim_wrapper.clip_scope': 'global'}, 'needs all gradients at once'),
        ({'optim_wrapper.loss_scale': 'dynamic', 'optim_wrapper.dtype': 'bfloat16'}, 'which steps to skip'),
    ],
)
def test_what_stages_cannot_do_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog_module.atexit, 'register', lambda *args: None)
    cfg = toy_run(tmp_path, model={'num_blocks': 1})  # one stage: one process is a whole pipeline
    cfg.merge_from_dict({key: value for key, value in options.items() if key != 'model'})
    cfg.model = options.get('model', cfg.model)
    cfg.launcher = 'pytorch'
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        PipelineRunner.from_cfg(cfg).train()
