_base_ = '../../_base_/retinanet_coco_paper.py'
