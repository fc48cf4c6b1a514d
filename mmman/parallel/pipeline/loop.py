"""The loop of a stage that follows: what the stage before sends is what it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mmengine.dist import get_rank
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mmman.parallel.pipeline.neighbours import Batch
from mmman.runtime.seeded import seed_iteration


class StageLoop(BaseLoop):
    """Trains on batches and answers requests, in the order in which they come, until the last request.

    Args:
        runner: The stage's runner.
        max_iters: Iterations of the run, as the first stage counts them.
        metainfo: What the first stage's training set says of itself.
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
        runner.message_hub.log_scalars.clear()  # a checkpoint brings what the first stage has logged
        stage.train()
        while True:
            message = stage.neighbours.receive()
            if isinstance(message, Batch):
                self._train(message)
                continue
            parts = stage.neighbours.request(message.content, message.last)
            if message.content is not None:
                parts[stage.place.stage] = self._content(message.content)
            stage.neighbours.note([self._logged()])
            stage.neighbours.answer(parts)
            if message.last:
                break
        runner.call_hook('after_train')
        return stage

    def _train(self, batch: Batch) -> None:
        runner, stage = self.runner, self.runner.model
        steps = runner.optim_wrapper.steps
        seed_iteration(runner, self._iter, get_rank(), stage.place.stage)
        runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=batch)
        outputs = stage.train_step(batch, runner.optim_wrapper)
        log = {f'train/{name}': float(value.detach()) for name, value in outputs.items()}
        stage.neighbours.note([log | self._logged()])
        stage.reply(runner.optim_wrapper.steps, runner.optim_wrapper.steps != steps)
        runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=batch, outputs=outputs)
        self._iter += 1

    def _logged(self) -> dict[str, float]:
        """What was logged in this process since the last call."""
        scalars = self.runner.message_hub.log_scalars
        log = {name: float(buffer.current()) for name, buffer in scalars.items()}
        scalars.clear()
        return log

    def _content(self, kind: str) -> dict[str, Any]:
        part = self.runner.model.part
        content: dict[str, dict[str | int, Tensor | dict]] = {'weights': part.weights()}
        if kind == 'checkpoint':
            content['optimizer'] = part.optimizer_state(self.runner.optim_wrapper.optimizer)
        return content
