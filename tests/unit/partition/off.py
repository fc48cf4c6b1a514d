"""Off means off: class, keys and outputs of a localised backbone are the stock ones, and it can be undone."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from mmman import delocalize_, localize_
from mmman.partition import chain_of
from tests.narrow import is_narrowed, narrow
from tests.toy import ToyLocalHead

HEAD = {'type': f'mmman.{ToyLocalHead.__name__}'}
VIT = {'embed_dims': 24, 'num_layers': 6, 'num_heads': 3, 'feedforward_channels': 48}
SWIN = {'embed_dims': 24, 'depths': [2, 2, 2, 2], 'num_heads': [1, 2, 4, 8]}


def build(library, kind, options):
    """The backbone ``kind`` of ``library``, or its narrow variant where there is one."""
    pytest.importorskip(library)
    from mmengine.registry import MODELS, DefaultScope

    path = f'{library}.{kind}'
    with DefaultScope.overwrite_default_scope(library):  # backbones change their list of out_indices
        return MODELS.build({'type': narrow(path) if is_narrowed(path) else path, **copy.deepcopy(options)})


@torch.no_grad()
def outputs(backbone, train):
    backbone.train(train)
    torch.manual_seed(1)  # drop path
    return pytree.tree_leaves(backbone(torch.randn(2, 3, *chain_of(backbone).input_size)))


def check_off_means_off(library, kind, options):
    stock = build(library, kind, options)
    local = build(library, kind, options)
    local.load_state_dict(stock.state_dict(), strict=False)  # SwinV2 drops constant buffers, which are compared below
    class_, keys, modes = type(local), list(local.state_dict()), [module.training for module in local.modules()]
    assert localize_(local, 3, HEAD) is local

    assert type(local) is class_
    assert [key for key in local.state_dict() if not key.startswith('local.')] == keys
    for train in (False, True):
        for ours, theirs in zip(outputs(local, train), outputs(stock, train), strict=True):
            assert torch.equal(ours, theirs)
    for key, value in stock.state_dict().items():
        assert torch.equal(local.state_dict()[key], value), key

    assert delocalize_(local) is local
    assert list(local.state_dict()) == keys
    assert [*dict(local.named_modules())] == [*dict(stock.named_modules())]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in local.modules())
    assert len(modes) == len([*local.modules()])
    for ours, theirs in zip(outputs(local, True), outputs(stock, True), strict=True):
        assert torch.equal(ours, theirs)
