"""The linear probe on data whose answer is known."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from mmman.analysis.linear_probe import PIXELS, Samples, loads_boxes_after_resize, samples_of, separability
from mmman.errors import ConfigError
from mmman.partition import Feature


def clusters(count=120, width=6, classes=3, seed=0):
    """Points around one centre a class, so far apart that a plane separates them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return 20 * torch.eye(width)[labels] + torch.randn(count, width, generator=generator), labels


def test_separable_features_reach_one():
    x, labels = clusters()
    found = separability(x, labels + 5, torch.arange(len(x)))
    assert (found.accuracy, found.balanced) == (1, 1)


def test_random_labels_stay_at_chance():
    x, labels = clusters(600)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    assert 0.25 < separability(x, labels, torch.arange(len(x))).accuracy < 0.42


def test_what_no_plane_separates_does_not_reach_one():
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] * x[:, 1] > 0).long()  # exclusive or
    assert separability(x, labels, torch.arange(400)).accuracy < 0.7


def test_rare_classes_count_as_much_in_the_balanced_accuracy():
    labels = (torch.arange(400) % 20 == 0).long()
    found = separability(torch.zeros(400, 3), labels, torch.arange(400))
    assert (found.accuracy, found.balanced) == (pytest.approx(0.95), pytest.approx(0.5))


def test_samples_of_one_image_are_not_split():
    """Features name the image and nothing else: with its other samples in the fit, the class would be known."""
    images = torch.arange(400) // 20
    labels = torch.randint(2, (20,), generator=torch.Generator().manual_seed(0))[images]
    assert separability(torch.eye(20)[images], labels, torch.arange(400)).accuracy == 1
    assert separability(torch.eye(20)[images], labels, images).accuracy < 0.9


@pytest.mark.parametrize('labels, images', [([0, 0, 0], [0, 1, 2]), ([0, 1, 1], [0, 0, 0])])
def test_too_little_data_is_refused(labels, images):
    with pytest.raises(ConfigError, match='at least 2 classes on 2 images'):
        separability(torch.ones(3, 2), torch.tensor(labels), torch.tensor(images))


def test_images_of_a_classifier():
    labels = torch.tensor([3, 1])
    samples = [SimpleNamespaceSample(gt_label=label.reshape(1)) for label in labels]
    x = torch.randn(2, 4, 3, 3)
    for given in (labels, samples):
        found = samples_of(given)
        assert found.labels.tolist() == [3, 1] and found.boxes is None
        torch.testing.assert_close(found.pool(x, Feature(4, 8), (24, 24)), x.mean((2, 3)))
    tokens = torch.randn(2, 10, 4)
    torch.testing.assert_close(samples_of(labels).pool(tokens, Feature(4, 8, 1), (24, 24)), tokens[:, 0])


class SimpleNamespaceSample(SimpleNamespace):
    def __contains__(self, name):
        return hasattr(self, name)


def test_objects_of_a_detector():
    pytest.importorskip('mmcv')
    sample = BaseDataElement(metainfo={'scale_factor': (2.0, 0.5)})
    sample.gt_instances = InstanceData(labels=torch.tensor([2, 0]), bboxes=torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 8]]))
    found = samples_of([sample, sample])
    assert found.labels.tolist() == [2, 0, 2, 0] and found.images.tolist() == [0, 0, 1, 1]
    assert samples_of([sample], boxes_are_scaled=False).boxes.tolist() == [[0, 0, 8, 2], [8, 0, 16, 4]]
    x = torch.zeros(2, 1, 4, 4)  # stride 2
    x[0, 0, :2, :2], x[1, 0, :, 2:] = 3, 5
    assert found.pool(x, Feature(1, 2), (8, 8)).flatten().tolist() == pytest.approx([3, 0, 0, 5], abs=1.3)
    assert found.pool(x, Feature(1, 2), (8, 8)).argmax() == 3


def test_pixels_of_a_segmentor():
    pytest.importorskip('mmcv')
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, :, 4:], labels[0, 0] = 1, 255
    sample = BaseDataElement(metainfo={'img_shape': (16, 32)})
    sample.gt_sem_seg = PixelData(data=labels)
    found = samples_of([sample])
    assert len(found.labels) == 56 <= PIXELS and set(found.labels.tolist()) == {0, 1}
    x = torch.zeros(1, 2, 4, 8)  # of an input of 16 x 32: the channel is the label
    x[:, 0, :, :4], x[:, 1, :, 4:] = 1, 1
    inner = (found.boxes[:, 0] < 12) | (found.boxes[:, 0] >= 16)
    assert torch.equal(found.pool(x, Feature(2, 4), (16, 32)).argmax(1)[inner], found.labels[inner])


def test_data_without_classes_is_refused():
    with pytest.raises(ConfigError, match='gt_sem_seg'):
        samples_of([BaseDataElement()])


def test_the_place_of_boxes_depends_on_the_order_of_the_pipeline():
    load, resize = {'type': 'mmdet.LoadAnnotations'}, {'type': 'Resize', 'scale': (2, 2)}
    assert loads_boxes_after_resize([resize, load]) and not loads_boxes_after_resize([load, resize])
    assert not loads_boxes_after_resize([{'type': 'mmman.KeepInMemory', 'transforms': [load, resize]}])
    assert not loads_boxes_after_resize([{'type': 'LoadImageFromFile'}])


def test_samples_are_compared_on_the_whole_image_without_boxes():
    found = Samples(torch.tensor([1]), torch.tensor([1]))
    assert found.pool(torch.arange(8.0).reshape(2, 1, 2, 2), Feature(1, 1), (2, 2)).tolist() == [[5.5]]
