"""Lock-step parity of the engine with the reference on a toy chain, and proof that breaking the engine breaks it."""

import pytest
import torch
from mmengine.registry import MODELS

from mmman.engine import EMABiasHook, LocalLearningOptimWrapper
from mmman.local.session import Session
from mmman.local.transfer import MomentumTransfer
from tests.parity.lockstep import ROWS, LockStepHook, pairs, reference_of, run_lockstep
from tests.toy import classify, task_logits, toy_batches, toy_config


def lockstep(tmp_path, row='manpp', iters=6, accumulate=1, max_norm=0.5, num_blocks=4, net=None):
    torch.manual_seed(0)
    model = MODELS.build(toy_config(num_blocks, transfer=ROWS[row], net=net)).double()

    def make_reference(model):
        return reference_of(
            model.backbone,
            [model.head],
            ROWS[row],
            local_task=lambda head: head.fc,
            local_loss=lambda j, fc, y, batch: classify(
                fc(torch.nn.functional.adaptive_avg_pool2d(y, 2)), batch['data_samples']
            )['loss_ce'],
            task_loss=lambda own, features, batch: classify(task_logits(own[0], features), batch['data_samples'])['loss_ce'],
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
            momentum=0.9,
            accumulate=accumulate,
            max_norm=max_norm,
        )

    hook = LockStepHook(make_reference, lambda model, ref: pairs(model, ref, lambda head: head.fc, lambda model: [model.head]))
    run_lockstep(
        model,
        hook,
        torch.utils.data.DataLoader(toy_batches(iters), collate_fn=lambda batch: batch[0]),
        tmp_path,
        iters,
        {
            'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-3},
            'accumulative_counts': accumulate,
            'clip_grad': None if max_norm is None else {'max_norm': max_norm},
        },
    )


@pytest.mark.parametrize('row', ROWS)
def test_bitwise_parity(row, tmp_path):
    lockstep(tmp_path, row)


@pytest.mark.parametrize('num_blocks', [1, 2, 3, 7])
def test_parity_for_every_number_of_blocks(num_blocks, tmp_path):
    lockstep(tmp_path, num_blocks=num_blocks, max_norm=None)


def test_parity_with_accumulation(tmp_path):
    lockstep(tmp_path, accumulate=3)


INNER_TAP = {'num_blocks': 2, 'net': {'units': (1, 1, 5)}}  # block 1 ends at layer3.0, the head also takes layer2


def test_parity_with_an_output_from_inside_a_block(tmp_path):
    lockstep(tmp_path, **INNER_TAP)


def no_detach(patch):
    at_boundary = Session.at_boundary

    def attached(self, head, x):
        at_boundary(self, head, x)
        return x

    patch.setattr(Session, 'at_boundary', attached)
    patch.setattr(LocalLearningOptimWrapper, 'local_backward', lambda self, loss, block: loss.backward(retain_graph=True))


def no_tap_detach(patch):
    patch.setattr('mmman.local.blocks.LocalBlocks.detach_outputs', lambda self, backbone, args, outputs: None)
    patch.setattr(LocalLearningOptimWrapper, 'local_backward', lambda self, loss, block: loss.backward(retain_graph=True))


def momentum_before_the_step(patch):
    after, step = EMABiasHook.after_train_iter, LocalLearningOptimWrapper.step

    def early(self, **kwargs):
        for head in self._backbone.local.values():
            head.transfer.ema_update_(head.source.of(self._backbone), 0.9)
        step(self, **kwargs)

    def late(self, runner, *args, **kwargs):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(MomentumTransfer, 'ema_update_', lambda *args: None)
            after(self, runner, *args, **kwargs)

    patch.setattr(LocalLearningOptimWrapper, 'step', early)
    patch.setattr(EMABiasHook, 'after_train_iter', late)


def swapped_s(patch):
    patch.setattr(MomentumTransfer, 'forward', lambda self, x: (2 - self.s) * self.momentum(x) + self.s * self.bias(x))


def copies_not_synced(patch):
    patch.setattr(MomentumTransfer, 'init_from_', lambda self, source, keep_loaded: setattr(self, 'is_initialized', True))


def accuracy_in_the_loss(patch):
    at_boundary = Session.at_boundary

    class SumsAll:
        def __init__(self, model):
            self.model = model

        def parse_losses(self, losses):
            _, log = self.model.parse_losses(losses)
            return sum(value for name, value in log.items() if name != 'loss'), log

    def summed(self, head, x):
        self.model = SumsAll(self.model)
        try:
            return at_boundary(self, head, x)
        finally:
            self.model = self.model.model

    patch.setattr(Session, 'at_boundary', summed)


MUTATIONS = [no_detach, no_tap_detach, momentum_before_the_step, swapped_s, copies_not_synced, accuracy_in_the_loss]


@pytest.mark.parametrize('mutate', MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_broken_engine_fails_parity(mutate, tmp_path, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match='differs after iteration'):
        lockstep(tmp_path, max_norm=None, **(INNER_TAP if mutate is no_tap_detach else {}))
