"""The paper's rows of classifiers as their configs say: their own data and recipe, with the schedule scaled to other epochs."""

from __future__ import annotations

from training_rows.task import Metric, Task

TASK = Task(
    name='paper',
    rows={},
    metrics=(Metric('accuracy/top1', 'top-1 accuracy, %'), Metric('accuracy/top5', 'top-5 accuracy, %')),
)
