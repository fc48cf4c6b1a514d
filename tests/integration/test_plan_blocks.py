"""The command that plans cuts, on a small classifier."""

import pytest

from mmman import LocalLearningError
from tests.conftest import ROOT
from tools import plan_blocks
from tools.plan_blocks import parse_args, run, size

CONFIG = str(ROOT / 'configs' / 'resnet32_manpp_k16_cifar10.py')


def command(*words: str) -> list:
    return run(parse_args([CONFIG, '--shape', '32', '32', '--batch', '64', *words]))


def test_plan_with_blocks_is_checked_and_can_be_pasted(capsys):
    planned, stage, uniform, whole = command('--blocks', '3', '--check')
    assert len(planned.plan.cuts) == 2 and whole.plan.cuts == ()
    assert planned.peak.total <= min(stage.peak.total, uniform.peak.total)
    text = capsys.readouterr().out
    assert 'num_blocks=3, partition=[' in text
    assert 'the prediction is' in text
    assert abs(float(text.partition('the prediction is ')[2].partition('%')[0])) < 1


def test_least_overhead_within_a_target():
    fewest, *_ = command('--max-overhead', '0.0')
    assert fewest.plan.cuts == ()
    smallest, *_ = command('--max-overhead', '9')
    target = (smallest.peak.total + fewest.peak.total) // 2
    planned, *_ = command('--target-memory', f'{target / 1e3:.3f}kB')
    assert planned.peak.total <= target + 1
    assert 0 < planned.overhead <= smallest.overhead
    with pytest.raises(LocalLearningError, match=rf'the smallest peak is {smallest.peak.total / 1e6:.1f} MB'):
        command('--target-memory', '1kB')


def test_number_of_blocks_and_a_limit(capsys):
    free, *_ = command('--max-overhead', '9')
    planned, *_ = command('--blocks', '4', '--max-overhead', '0.9')
    assert len(planned.plan.cuts) == 3 and planned.overhead <= 0.9
    fewest, *_ = command('--blocks', '4', '--target-memory', f'{planned.peak.total / 1e3 + 1:.3f}kB')
    assert len(fewest.plan.cuts) == 3 and fewest.overhead <= planned.overhead and free.peak.total <= planned.peak.total
    with pytest.raises(SystemExit):
        command()
    assert 'ask for a plan: --blocks, --target-memory or --max-overhead' in capsys.readouterr().err


def test_end_to_end_is_without_recompute():
    *_, stock = command('--blocks', '2')
    planned, *_, whole = command('model.backbone.recompute=True', '--blocks', '2')
    assert (whole.peak, whole.overhead) == (stock.peak, 0.0)
    assert planned.overhead > 0.3  # the forward pass of all units but the stem, beside the local head


def test_blocks_to_recompute_are_planned_too(capsys):
    without, *_ = command('--blocks', '3')
    planned, stage, uniform, _ = command('--blocks', '3', '--recompute', '--check')
    assert planned.peak.total < without.peak.total
    assert planned.peak.total <= min(stage.peak.total, uniform.peak.total)
    assert any(planned.plan.modes) and all(stage.plan.modes + uniform.plan.modes)
    text = capsys.readouterr().out
    assert 'recompute=[' in text and 'selective_recompute=[' in text
    assert abs(float(text.partition('the prediction is ')[2].partition('%')[0])) < 1


@pytest.mark.parametrize('words', [['--fused-focal-loss'], []])
def test_a_focal_loss_as_on_a_gpu(words, monkeypatch):
    library = pytest.importorskip('mmdet.models.losses.focal_loss')
    stock, seen = library.FocalLoss.forward, []
    monkeypatch.setattr(plan_blocks, 'run', lambda args: seen.append(library.FocalLoss.forward is stock))
    monkeypatch.setattr('sys.argv', ['plan_blocks.py', CONFIG, '--blocks', '2', *words])
    plan_blocks.main()
    assert seen == [not words] and library.FocalLoss.forward is stock


def test_sizes():
    assert size('8GB') == 8_000_000_000
    assert size('1.5MiB') == 1_572_864
    with pytest.raises(Exception, match='such as 8GB'):
        size('8')
