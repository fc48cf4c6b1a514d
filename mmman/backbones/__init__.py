from mmman.backbones.cifar_resnet import CIFARResNet

__all__ = ['CIFARResNet']
