"""Lock-step parity of MLAAN with the reference on a toy chain, and proof that breaking it breaks parity."""

import pytest
import torch
from mmengine.registry import MODELS

from mmman import LAMLocalHead
from mmman.engine import window as windows
from mmman.engine.window import WindowSession
from mmman.local.transfer import MomentumTransfer
from tests.parity.lockstep import ROWS, LockStepHook, pairs, reference_of, run_lockstep
from tests.toy import classify, task_logits, toy_batches, toy_config

LAM = {
    'transfer': {'source_unit': 'next_stage', 'scale': False},
    'local_head': {'type': 'mmman.LAMLocalHead', 'depth': 3, 'head': {'type': 'mmman.ToyLinearHead', 'num_classes': 5}},
}
LINEAR = {'type': 'mmman.LinearLocalHead', 'head': LAM['local_head']['head']}
NET = {'units': (2, 2, 3)}
# The units that LAM samples in ToyNet of 2, 2 and 3 units, where each is a block.
LEAPS = [
    *[['layer2.0', 'layer3.0', 'layer3.2']] * 3,
    *[['layer3.0', 'layer3.1', 'layer3.2']] * 2,
    ['layer3.1', 'layer3.2'],
    ['layer3.2'],
]
SGD = {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-3}


def lockstep(tmp_path, is_lam=True, window=1, iters=4, accumulate=1, max_norm=0.5):
    torch.manual_seed(0)
    options = LAM if is_lam else {}
    if window > 1:
        options = {**options, 'window': window, 'independent_head': None if is_lam else LINEAR}
    model = MODELS.build(toy_config(8, net=NET, **options)).double()

    def pooled_loss(linear, x, batch):
        return classify(linear.fc(x.mean((2, 3))), batch['data_samples'])['loss_ce']

    def toy_loss(fc, y, batch):
        return classify(fc(torch.nn.functional.adaptive_avg_pool2d(y, 2)), batch['data_samples'])['loss_ce']

    def local_task(head):
        return head.head if is_lam else head.fc

    def make_reference(model):
        return reference_of(
            model.backbone,
            [model.head],
            ROWS['man' if is_lam else 'manpp'],
            local_task=local_task,
            local_loss=lambda j, task, y, batch: (pooled_loss if is_lam else toy_loss)(task, y, batch),
            task_loss=lambda own, features, batch: classify(task_logits(own[0], features), batch['data_samples'])['loss_ce'],
            leaps=LEAPS if is_lam else None,
            own_loss=pooled_loss if window > 1 else None,
            window=window,
            optimizer=lambda parameters: torch.optim.SGD(parameters, **SGD),
            momentum=0.9,
            accumulate=accumulate,
            max_norm=max_norm,
        )

    hook = LockStepHook(make_reference, lambda model, ref: pairs(model, ref, local_task, lambda model: [model.head]))
    run_lockstep(
        model,
        hook,
        torch.utils.data.DataLoader(toy_batches(iters), collate_fn=lambda batch: batch[0]),
        tmp_path,
        iters,
        {
            'optimizer': {'type': 'SGD', **SGD},
            'accumulative_counts': accumulate,
            'clip_grad': None if max_norm is None else {'max_norm': max_norm},
        },
    )


def test_lam(tmp_path):
    lockstep(tmp_path)


@pytest.mark.parametrize('is_lam', [False, True], ids=['manpp', 'lam'])
@pytest.mark.parametrize('window', [2, 3])
def test_windows(window, is_lam, tmp_path):
    lockstep(tmp_path, is_lam, window)


def no_momentum_update(patch):
    patch.setattr(MomentumTransfer, 'ema_update_', lambda self, source, momentum: None)


def no_gradient_through_the_copy(patch):
    patch.setattr(MomentumTransfer, 'forward', lambda self, x: self.momentum(x.detach()) + self.bias(x))


def units_in_another_order(patch):
    def embed(self, y, inputs):
        *first, a, b = (torch.nn.Identity(), torch.nn.Identity(), *self.units)
        for unit in (*first, *((b, a) if self.unit_inputs[-2:] == [self.last_feature] * 2 else (a, b))):
            y = unit(y)
        return self.last_feature.pool(y)

    patch.setattr(LAMLocalHead, 'embed', embed)


BROKEN_LAM = [no_momentum_update, no_gradient_through_the_copy, units_in_another_order]


@pytest.mark.parametrize('mutate', BROKEN_LAM, ids=lambda mutation: mutation.__name__)
def test_a_broken_lam_fails_parity(mutate, tmp_path, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match='differs after iteration'):
        lockstep(tmp_path, max_norm=None)


def no_gradient_across_blocks(patch):
    propagate = WindowSession._propagate
    patch.setattr(WindowSession, '_propagate', lambda self, grad, blocks, frees: propagate(self, grad, 1, False))


def no_end(patch):
    patch.setattr(WindowSession, 'end_windows', lambda self: (self._window.clear(), setattr(self, '_input', None)))


def one_block_more(patch):
    train_block = WindowSession.train_block

    def wider(self, head, x):
        with patch.context() as inner:
            inner.setattr(self.local, 'window', self.local.window + 1)
            return train_block(self, head, x)

    patch.setattr(WindowSession, 'train_block', wider)


def independent_loss_crosses_blocks(patch):
    propagate = WindowSession._propagate
    patch.setattr(
        WindowSession, '_propagate', lambda self, grad, blocks, frees: propagate(self, grad, self.local.window, False)
    )


def cascade_alone(patch):
    patch.setattr(windows, 'INDEPENDENT', 0.0)


BROKEN_WINDOWS = [no_gradient_across_blocks, no_end, one_block_more, independent_loss_crosses_blocks, cascade_alone]


@pytest.mark.parametrize('mutate', BROKEN_WINDOWS, ids=lambda mutation: mutation.__name__)
def test_broken_windows_fail_parity(mutate, tmp_path, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match='differs after iteration'):
        lockstep(tmp_path, is_lam=False, window=2, iters=2, max_norm=None)
