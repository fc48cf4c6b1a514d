"""Grad-CAM of a planted feature."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from mmman.analysis.grad_cam import class_score, grad_cam
from mmman.errors import ConfigError
from mmman.partition import Feature, Unit

RED, GREEN, UNUSED = (Unit.single(name, 0) for name in ('colours', 'pooled', 'unused'))


class Colours(nn.Module):
    """One unit: channels are the colours of the image, halved in size; the second copies it."""

    def __init__(self):
        super().__init__()
        self.colours, self.pooled, self.unused = nn.AvgPool2d(2), nn.Identity(), nn.Softplus()

    def forward(self, x):
        x = self.pooled(self.colours(x))
        self.unused(x)
        return x


class ColourClassifier(BaseModel):
    """The logit of class c is the mean of colour c, minus half of that of the next colour."""

    def __init__(self):
        super().__init__()
        self.backbone = Colours()

    def forward(self, inputs, data_samples=None, mode='tensor'):
        means = self.backbone(inputs).mean((2, 3))
        return means - means.roll(-1, 1) / 2


@pytest.fixture
def images():
    """Two images: red at the top left and green at the bottom right; the other way round, brighter."""
    x = torch.zeros(2, 3, 16, 16)
    x[0, 0, :4, :4] = x[0, 1, 12:, 12:] = 1
    x[1, 1, :4, :4] = x[1, 0, 12:, 12:] = 3
    return x


def cam(images, label, unit=RED):
    model = ColourClassifier().eval()
    return grad_cam(model.backbone, unit, Feature(3, 2), images, lambda x: class_score(model, x, None, label))


@pytest.mark.parametrize('unit', [RED, GREEN])
def test_it_lights_up_where_the_feature_is(images, unit):
    red, green = cam(images, 0, unit), cam(images, 1, unit)
    assert red.shape == (2, 16, 16)
    assert red[0, :3, :3].min() > 0.7 and red[0, 6:, 6:].max() == 0
    assert green[0, 13:, 13:].min() > 0.7 and green[0, :10, :10].max() == 0
    assert red[1, 13:, 13:].min() > 0.7 and red[1, :10, :10].max() == 0
    assert red.amax((1, 2)).tolist() == pytest.approx([1, 1])


def test_the_map_is_that_of_the_equation(images):
    """The weights are 1/64 for the class's colour and -1/128 for the next: the map is their sum, without what is negative."""
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pooled = nn.functional.avg_pool2d(noise, 2)
    expected = (pooled[:, 2] - pooled[:, 0] / 2).relu()
    expected = nn.functional.interpolate(expected[:, None], size=(16, 16), mode='bilinear')[:, 0]
    torch.testing.assert_close(cam(noise, 2), expected / expected.amax((1, 2), keepdim=True))


def test_by_default_it_explains_the_predicted_class(images):
    torch.testing.assert_close(cam(images[:1], None), cam(images[:1], 1))  # 1 - 0 / 2 is more than 1 - 1 / 2


def test_tokens_become_a_map(images):
    class Tokens(nn.Module):
        def forward(self, x):
            patches = nn.functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
            return torch.cat([100 * torch.ones_like(patches[:, :1]), patches], 1)

    backbone = nn.ModuleDict({'colours': Tokens()})
    maps = grad_cam(backbone, RED, Feature(3, 2, 1), images, lambda x: backbone['colours'](x)[:, 1:, 0].sum())
    assert maps[0, :3, :3].min() > 0.7 and maps[0, 6:, 6:].max() == 0


def test_a_unit_that_does_not_matter_is_refused(images):
    with pytest.raises(ConfigError, match='--unit'):
        cam(images, 0, UNUSED)


def test_other_models_and_classes_are_refused(images):
    with pytest.raises(ConfigError, match='from 0 to 2'):
        cam(images, 3)
    model = ColourClassifier()
    model.forward = lambda *args, **kwargs: images
    with pytest.raises(ConfigError, match='not ColourClassifier'):
        class_score(model, images, None)


class BaseDetector(ColourClassifier):
    """A model with the name of mmdet's base class and a dense head: two anchors a place, which detect the two first colours."""

    def __init__(self, **head):
        super().__init__()
        self.bbox_head = SimpleNamespace(**{'cls_out_channels': 2, 'use_sigmoid_cls': True, **head})

    def forward(self, inputs, data_samples=None, mode='tensor'):
        colours = 8 * self.backbone(inputs) - 4
        return [torch.cat([colours[:, :2], colours[:, :2] - 9], 1)], []


def detect(images, label, **head):
    model = BaseDetector(**head).eval()
    return grad_cam(model.backbone, RED, Feature(3, 2), images, lambda x: class_score(model, x, [], label))


def test_detections_of_a_class_or_of_all(images):
    both, red, green = (detect(images, label) for label in (None, 0, 1))
    torch.testing.assert_close(red, cam(images, 0), atol=0.02, rtol=0)
    assert both[0, :3, :3].min() > 0.3 and both[0, 13:, 13:].min() > 0.3
    assert green[0, 13:, 13:].min() > 0.7 and green[0, :10, :10].max() == 0


def test_without_detections_nothing_lights_up(images):
    maps = detect(images / 4, None)
    assert maps.shape == (2, 16, 16) and not maps[0].any()  # the second image is brighter


def test_probabilities_of_softmax_heads_are_those_without_the_background(images):
    model = BaseDetector(use_sigmoid_cls=False)
    model.backbone = nn.Identity()
    model.forward = lambda inputs, *_, mode: ([torch.tensor([4.0, 0.0]).reshape(1, 2, 1, 1)], [])
    assert class_score(model, images, []) == pytest.approx(torch.tensor([4.0, 0.0]).softmax(0)[0])
    model.roi_head = True
    model.forward = lambda inputs, *_, mode: ((torch.tensor([[4.0, 0, 1], [0, 4, 1], [0, 0, 9]]), None),)
    expected = torch.tensor([4.0, 0, 1]).softmax(0)[0]
    assert class_score(model, images, [], 1) == pytest.approx(expected)
    assert class_score(model, images, []) == pytest.approx(2 * expected)


def test_detectors_without_such_heads_are_refused(images):
    with pytest.raises(ConfigError, match='not BaseDetector'):
        detect(images, 0, cls_out_channels=None)
