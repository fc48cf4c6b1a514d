"""Types in configs are looked up in all registries of models."""

from mmman.registry import resolve_type
from tests.toy import ToyLocalHead


def test_types_are_names_or_classes():
    assert resolve_type('mmman.ToyLocalHead') is ToyLocalHead is resolve_type(ToyLocalHead)
    assert resolve_type('mmman.Nothing') is None is resolve_type(None)
