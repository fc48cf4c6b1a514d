"""Training loop of the stages after the first one. It is driven by the messages of the previous stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mmengine.dist import get_rank
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mmman.parallel.pipeline.comm import Batch
from mmman.runtime.seeded import seed_iteration


class StageLoop(BaseLoop):
    """Trains on batches and answers requests in the order of their arrival, until the last request.

    Args:
        runner: The stage's runner.
        max_iters: Number of iterations of the run, taken from the first stage's loop.
        metainfo: ``metainfo`` of the first stage's training set.
    """

    def __init__(self, runner: Runner, max_iters: int, metainfo: dict | None) -> None:
        super().__init__(runner, SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo)))
        self.max_iters = max_iters
        self._iter = self._epoch = 0

    @property
    def iter(self) -> int:
        return self._iter

    @property
    def epoch(self) -> int:
        return self._epoch

    def run(self) -> nn.Module:
        runner, stage = self.runner, self.runner.model
        runner.call_hook('before_train')
        runner.message_hub.log_scalars.clear()  # a resumed checkpoint restores the scalars that the first stage logged
        stage.train()
        while True:
            message = stage.comm.recv()
            if isinstance(message, Batch):
                self._train(message)
                continue
            contents = stage.comm.request(message.content, message.last)
            if message.content is not None:
                contents[stage.stage_rank.stage] = self._content(message.content)
            stage.comm.add_log([self._pop_log()])
            stage.comm.answer(contents)
            if message.last:
                break
        runner.call_hook('after_train')
        return stage

    def _train(self, batch: Batch) -> None:
        runner, stage = self.runner, self.runner.model
        steps = runner.optim_wrapper.steps
        seed_iteration(runner, self._iter, get_rank(), stage.stage_rank.stage)
        runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=batch)
        outputs = stage.train_step(batch, runner.optim_wrapper)
        log = {f'train/{name}': float(value.detach()) for name, value in outputs.items()}
        stage.comm.add_log([log | self._pop_log()])
        stage.reply(runner.optim_wrapper.steps, runner.optim_wrapper.steps != steps)
        runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=batch, outputs=outputs)
        self._iter += 1

    def _pop_log(self) -> dict[str, float]:
        """Return the scalars that this process logged since the last call, and clear them."""
        scalars = self.runner.message_hub.log_scalars
        log = {name: float(buffer.current()) for name, buffer in scalars.items()}
        scalars.clear()
        return log

    def _content(self, kind: str) -> dict[str, Any]:
        """This stage's part of an answer: its weights and, for ``'checkpoint'``, its optimizer state."""
        shard = self.runner.model.shard
        content: dict[str, dict[str | int, Tensor | dict]] = {'weights': shard.weights()}
        if kind == 'checkpoint':
            content['optimizer'] = shard.optimizer_state(self.runner.optim_wrapper.optimizer)
        return content
