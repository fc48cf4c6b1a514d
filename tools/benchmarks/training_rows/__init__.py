"""Rows of a table of trainings: what ``tools/benchmarks/accuracy.py`` consists of.

``task.py`` describes a task, and ``detection.py``, ``segmentation.py``, ``classification.py`` and ``paper.py`` are the tasks.
``rows.py`` applies a task and a budget (``budget.py``) to the config of a row, ``runs.py`` trains a row with a seed in a
process of its own, ``progress.py`` trains many side by side, ``cost.py`` measures a training step, and ``report.py`` writes the
table and the curves.
"""
