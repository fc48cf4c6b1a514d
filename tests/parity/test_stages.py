"""A model in stages trains what the model in one piece trains, for every backbone family; without processes between stages."""

import copy
import io

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from mmman.errors import ConfigError
from mmman.parallel.pipeline.channel import _Pickler, _Unpickler
from mmman.parallel.pipeline.stage import PipelineStage
from mmman.parallel.pipeline.stage_rank import StageRank

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')
pytest.importorskip('mmdet')

from tests.parity import test_classifiers as classifiers
from tests.parity import test_retinanet as detectors
from tests.parity import test_segmentors as segmentors
from tests.parity.grids import ALIKE
from tests.parity.test_mlaan import LINEAR
from tests.toy import toy_config

OPTIMIZER = {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}


class Mailbox:
    """A channel whose ends are in one process: keeps the last message, pickled as for another one."""

    def send(self, message):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(message)
        tensors = iter([tensor.clone() for tensor in pickler.tensors])
        self.message = _Unpickler(io.BytesIO(file.getvalue()), lambda *meta: next(tensors)).load()
        assert next(tensors, None) is None


def wrapper_of(model, iters, **options):
    wrapper = build_optim_wrapper(model, {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': OPTIMIZER, **options})
    wrapper.initialize_count_status(model, 0, iters)
    return wrapper


def stage_of(model, stage, iters, **options):
    module = copy.deepcopy(model)
    stage_rank = StageRank(stage, len(model.backbone.local.plan.blocks), 0, 1)
    wrapped = PipelineStage(module, stage_rank, staleness=iters)
    wrapper = wrapper_of(module, iters, **options)
    wrapped.start_(wrapper.optimizer, 'cpu', 0)
    wrapped.comm._to_next = Mailbox()
    return wrapped, wrapper


def compare(model, batches, **options):
    """Train ``model`` in one piece and in stages on the same batches, and compare weights and optimizer state."""
    stages = [stage_of(model, stage, len(batches), **options) for stage in range(len(model.backbone.local.plan.blocks))]
    whole = wrapper_of(model, len(batches), **options)
    for batch in batches:
        torch.manual_seed(1)
        model.train_step(copy.deepcopy(batch), whole)
        torch.manual_seed(1)
        message = copy.deepcopy(batch)
        for stage, wrapper in stages:
            losses = stage.train_step(message, wrapper)
            message = getattr(stage.comm._to_next, 'message', None)
    assert losses, 'the last stage has the task loss'
    weights, optimizer = {}, {}
    for stage, wrapper in stages:
        weights |= stage.shard.weights()
        optimizer |= stage.shard.optimizer_state(wrapper.optimizer)
    theirs = model.state_dict()
    assert weights.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(weights[name], value), name
    theirs = whole.optimizer.state_dict()['state']
    assert optimizer.keys() == theirs.keys()
    for index, state in theirs.items():
        assert torch.equal(optimizer[index]['momentum_buffer'], state['momentum_buffer'])
    return stages


@pytest.mark.filterwarnings('ignore:MMPretrain cannot train the distilled')
@pytest.mark.parametrize('system', ['dgl', 'infopro'])
@pytest.mark.parametrize('family', [family for family in classifiers.FAMILIES if family not in ('eva02', *ALIKE)])
def test_classifiers(family, system):
    torch.manual_seed(0)
    size = classifiers.FAMILIES[family].size
    compare(classifiers.classifier(family, system), [classifiers.images(seed=i, size=size) for i in range(2)])


def test_a_tensor_that_stages_share_is_refused():
    """Layers of EVA02 have one position embedding."""
    model = classifiers.classifier('eva02', 'dgl')
    with pytest.raises(
        ConfigError, match=r'rope.freqs_cos and .*rope.freqs_cos are the same tensor, but belong to different st'
    ):
        stage_of(model, 0, 1)


@pytest.mark.parametrize('family', classifiers.INNER)
def test_norms_on_outputs_from_inside_a_block(family):
    torch.manual_seed(0)
    model = classifiers.classifier(family, num_blocks=2, partition=[classifiers.INNER[family]])
    compare(model, [classifiers.images(seed=i) for i in range(2)])


@pytest.mark.parametrize('partition', segmentors.CUTS, ids=str)
def test_segmentors(partition):
    torch.manual_seed(0)
    model = segmentors.deeplab('deeplabv3plus', 'manpp', partition, **segmentors.INFOPRO)
    compare(model, [segmentors.images(0), segmentors.images(1)])


@pytest.mark.parametrize('options', [{}, {'images_per_chunk': 1}], ids=str)
@pytest.mark.parametrize('partition', ['stage', ['stem', 'layer2.0', 'layer3.1']], ids=str)
def test_detectors(partition, options):
    torch.manual_seed(0)
    model = detectors.retinanet(detectors.ROWS['manpp'], num_blocks=4, partition=partition).train()
    model.backbone.local.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    batches = [detectors.pseudo_collate(detectors.images(2, seed=i)) for i in range(2)]
    stages = compare(model, batches, **options)
    assert [stage._sends_images for stage, _ in stages] == [False] * 4
    held = [sum(p.numel() for p in stage.parameters() if not p.is_meta) for stage, _ in stages]
    assert sum(held) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'transfer': {'source_unit': ['layer3.0', 'layer3.1']}}, 'of the first unit of the next block, not of layer3.0'),
        ({'window': 2, 'independent_head': LINEAR}, 'a pipeline stage trains one block by itself, not window=2'),
    ],
)
def test_local_learning_that_stages_cannot_do_is_refused(options, message):
    model = MODELS.build(toy_config(partition=['layer2.0', 'layer2.1', 'layer3.0'], **options))
    with pytest.raises(ConfigError, match=message):
        PipelineStage(model, StageRank(0, 4, 0, 1), staleness=0)
