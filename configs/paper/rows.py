"""The rows of the paper's tables of accuracy, of the authors' code and of MLAAN: what is trained, and the paper's numbers.

``tools/benchmarks/accuracy.py paper`` lists them (``--list``), trains them (``--rows``) and writes one's config (``--write``).
"""

# How a local head takes its input from the last unit of a block: options of LocalBackbone's `transfer`.
transfers = dict(
    none=dict(ema=False, bias=False, scale=False),
    ema=dict(bias=False, scale=False),
    man=dict(scale=False),
    manpp=dict(),
    release=dict(scale='release'),
    leap=dict(source_unit='next_stage', scale=False),
)

# Local heads. Each gets a copy of the model's own head, too.
cifar_heads = dict(
    dgl=dict(type='mmman.DGLLocalHead'),
    infopro=dict(type='mmman.InfoProLocalHead', classifier='1c2f', lambda_rec=(5.0, 0.0), lambda_task=(0.5, 0.0)),
    lam=dict(type='mmman.LAMLocalHead'),
)
infopro = dict(type='mmman.InfoProLocalHead', classifier='imagenet', lambda_rec=5.0, lambda_task=0.75)
# DGL's original head, as the row without a transfer is DGL's own. mmpretrain's VGG has its linear layers in the backbone, so
# its own head doesn't say num_classes.
vgg_heads = dict(dgl=dict(type='mmman.DGLLocalHead', original=True, head=dict(type='LinearClsHead', num_classes=1000)))
vit_heads = dict(vit=dict(type='mmman.ViTLocalHead'))
seg_heads = dict(infopro=dict(type='mmman.SegLocalHead', lambda_rec=1.5, lambda_task=1.0))
det_heads = dict(dense=dict(type='mmman.DetLocalHead'))
release_heads = dict(dense=dict(type='mmman.DetLocalHead', size_filter=False, projection='release'))

# The last units of the first K-1 blocks, by K; without an entry, LocalBackbone's default.
resnet32_cuts = {
    8: ['layer1.0', 'layer1.2', 'layer1.4', 'layer2.1', 'layer2.3', 'layer3.0', 'layer3.2'],  # InfoPro's
    16: 'uniform',  # the stem, then one residual block each
}
resnet110_cuts = {
    32: [  # those of the authors' code
        *(f'layer1.{i}' for i in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)),
        *(f'layer2.{i}' for i in (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)),
        *(f'layer3.{i}' for i in (1, 3, 4, 6, 7, 9, 11, 13, 15)),
    ],
    55: 'uniform',  # the stem, then one residual block each
}
resnet101_cuts = {2: ['layer2.0'], 4: ['layer2.2', 'layer3.8', 'layer3.16']}
resnet152_cuts = {2: ['layer2.5'], 4: ['layer2.6', 'layer3.13', 'layer3.25']}
vgg13_cuts = {10: 'uniform'}  # one convolution a block
deeplab_r50_cuts = {2: ['layer3.2']}  # the middle of layer3, as InfoPro's of ResNet-101: not given anywhere
deeplab_r101_cuts = {2: ['layer3.12']}  # InfoPro's

# A network is a config that is trained end to end (`base`, relative to `_base_`), with `changes`; of rows from scratch also
# with `scratch`, and of rows with local heads with `local`.
resnet110 = dict(model=dict(backbone=dict(depth=110)))
networks = {
    'cifar10_resnet32': dict(base='cifar10_resnet32.py', cuts=resnet32_cuts, heads=cifar_heads),
    'cifar10_resnet110': dict(base='cifar10_resnet32.py', changes=resnet110, cuts=resnet110_cuts, heads=cifar_heads),
    'svhn_resnet32': dict(base='svhn_resnet32.py', cuts=resnet32_cuts, heads=cifar_heads),
    'svhn_resnet110': dict(base='svhn_resnet32.py', changes=resnet110, cuts=resnet110_cuts, heads=cifar_heads),
    'stl10_resnet32': dict(base='stl10_resnet32.py', cuts=resnet32_cuts, heads=cifar_heads),
    'stl10_resnet110': dict(base='stl10_resnet32.py', changes=resnet110, cuts=resnet110_cuts, heads=cifar_heads),
    'vgg13': dict(base='imagenet_vgg13.py', cuts=vgg13_cuts, heads=vgg_heads),
    'resnet101': dict(base='imagenet_resnet101.py', cuts=resnet101_cuts, heads=dict(infopro=infopro)),
    'resnet152': dict(
        base='imagenet_resnet101.py',
        changes=dict(model=dict(backbone=dict(depth=152))),
        cuts=resnet152_cuts,
        heads=dict(infopro=dict(infopro, lambda_task=1.0)),
    ),
    'resnext101': dict(base='imagenet_resnext101.py', cuts=resnet101_cuts, heads=dict(infopro=infopro)),
    'vit-tiny': dict(base='../../_base_/vit_imagenet_paper.py', heads=vit_heads),
    'vit-small': dict(
        base='../../_base_/vit_imagenet_paper.py',
        changes=dict(model=dict(backbone=dict(arch='deit-small'), head=dict(in_channels=384))),
        heads=vit_heads,
    ),
    'vit-base': dict(
        base='../../_base_/vit_imagenet_paper.py',
        changes=dict(model=dict(backbone=dict(arch='base'), head=dict(in_channels=768))),
        heads=vit_heads,
    ),
    'release_retinanet_r50': dict(
        base='release_retinanet_r50.py',
        scratch=dict(model=dict(backbone=dict(init_cfg=None))),
        local=dict(optim_wrapper=dict(clip_scope='global')),
        heads=release_heads,
    ),
}
for depth in (18, 34, 50, 101, 152):
    pretrained = dict(depth=depth, init_cfg=dict(checkpoint=f'torchvision://resnet{depth}'))
    channels = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
    networks[f'retinanet_r{depth}'] = dict(
        base='coco_retinanet_r50.py',
        changes=dict(model=dict(backbone=pretrained, neck=dict(in_channels=channels))),
        scratch=dict(model=dict(backbone=dict(norm_cfg=dict(type='SyncBN'), norm_eval=False, init_cfg=None))),
        heads=det_heads,
    )
for kind in ('deeplabv3', 'deeplabv3plus'):
    networks[f'{kind}_r50'] = dict(
        base=f'cityscapes_{kind}_r50.py',
        scratch=dict(model=dict(pretrained=None)),
        cuts=deeplab_r50_cuts,
        heads=seg_heads,
    )
    networks[f'{kind}_r101'] = dict(
        networks[f'{kind}_r50'],
        changes=dict(model=dict(pretrained='open-mmlab://resnet101_v1c', backbone=dict(depth=101))),
        cuts=deeplab_r101_cuts,
    )

# The rows, by the paper's table that has their numbers. K=1 is trained end to end. `-`: none, or not given. MLAAN's rows are a
# system that the paper cites and gives no numbers of.
tables = {
    'I': """
name                                       network            K heads   transfer error
table1/cifar10_resnet32_e2e                cifar10_resnet32   1 -       -         6.37
table1/cifar10_resnet32_k8_infopro         cifar10_resnet32   8 infopro none     11.51
table1/cifar10_resnet32_k8_infopro_man     cifar10_resnet32   8 infopro man       9.32
table1/cifar10_resnet32_k8_infopro_manpp   cifar10_resnet32   8 infopro manpp     7.97
table1/cifar10_resnet32_k8_dgl             cifar10_resnet32   8 dgl     none     11.63
table1/cifar10_resnet32_k8_dgl_man         cifar10_resnet32   8 dgl     man       8.42
table1/cifar10_resnet32_k8_dgl_manpp       cifar10_resnet32   8 dgl     manpp     8.06
table1/cifar10_resnet32_k16_infopro        cifar10_resnet32  16 infopro none     12.93
table1/cifar10_resnet32_k16_infopro_man    cifar10_resnet32  16 infopro man       9.65
table1/cifar10_resnet32_k16_infopro_manpp  cifar10_resnet32  16 infopro manpp     8.25
table1/cifar10_resnet32_k16_dgl            cifar10_resnet32  16 dgl     none     14.08
table1/cifar10_resnet32_k16_dgl_man        cifar10_resnet32  16 dgl     man       9.11
table1/cifar10_resnet32_k16_dgl_manpp      cifar10_resnet32  16 dgl     manpp     8.75
table1/cifar10_resnet110_e2e               cifar10_resnet110  1 -       -         5.42
table1/cifar10_resnet110_k32_infopro       cifar10_resnet110 32 infopro none     12.26
table1/cifar10_resnet110_k32_infopro_man   cifar10_resnet110 32 infopro man       9.06
table1/cifar10_resnet110_k32_infopro_manpp cifar10_resnet110 32 infopro manpp     7.75
table1/cifar10_resnet110_k32_dgl           cifar10_resnet110 32 dgl     none     12.51
table1/cifar10_resnet110_k32_dgl_man       cifar10_resnet110 32 dgl     man       9.65
table1/cifar10_resnet110_k32_dgl_manpp     cifar10_resnet110 32 dgl     manpp     9.05
table1/cifar10_resnet110_k55_infopro       cifar10_resnet110 55 infopro none     13.22
table1/cifar10_resnet110_k55_infopro_man   cifar10_resnet110 55 infopro man       9.77
table1/cifar10_resnet110_k55_infopro_manpp cifar10_resnet110 55 infopro manpp     8.67
table1/cifar10_resnet110_k55_dgl           cifar10_resnet110 55 dgl     none     14.45
table1/cifar10_resnet110_k55_dgl_man       cifar10_resnet110 55 dgl     man       9.73
table1/cifar10_resnet110_k55_dgl_manpp     cifar10_resnet110 55 dgl     manpp     9.51
table1/svhn_resnet32_e2e                   svhn_resnet32      1 -       -         2.99
table1/svhn_resnet32_k8_infopro            svhn_resnet32      8 infopro none      5.61
table1/svhn_resnet32_k8_infopro_man        svhn_resnet32      8 infopro man       4.49
table1/svhn_resnet32_k8_infopro_manpp      svhn_resnet32      8 infopro manpp     3.91
table1/svhn_resnet32_k8_dgl                svhn_resnet32      8 dgl     none      4.83
table1/svhn_resnet32_k8_dgl_man            svhn_resnet32      8 dgl     man       3.80
table1/svhn_resnet32_k8_dgl_manpp          svhn_resnet32      8 dgl     manpp     3.34
table1/svhn_resnet32_k16_infopro           svhn_resnet32     16 infopro none      5.97
table1/svhn_resnet32_k16_infopro_man       svhn_resnet32     16 infopro man       5.19
table1/svhn_resnet32_k16_infopro_manpp     svhn_resnet32     16 infopro manpp     4.37
table1/svhn_resnet32_k16_dgl               svhn_resnet32     16 dgl     none      5.05
table1/svhn_resnet32_k16_dgl_man           svhn_resnet32     16 dgl     man       4.04
table1/svhn_resnet32_k16_dgl_manpp         svhn_resnet32     16 dgl     manpp     3.83
table1/svhn_resnet110_e2e                  svhn_resnet110     1 -       -         2.92
table1/svhn_resnet110_k32_infopro          svhn_resnet110    32 infopro none      5.89
table1/svhn_resnet110_k32_infopro_man      svhn_resnet110    32 infopro man       4.85
table1/svhn_resnet110_k32_infopro_manpp    svhn_resnet110    32 infopro manpp     4.51
table1/svhn_resnet110_k32_dgl              svhn_resnet110    32 dgl     none      5.12
table1/svhn_resnet110_k32_dgl_man          svhn_resnet110    32 dgl     man       4.08
table1/svhn_resnet110_k32_dgl_manpp        svhn_resnet110    32 dgl     manpp     3.25
table1/svhn_resnet110_k55_infopro          svhn_resnet110    55 infopro none      6.11
table1/svhn_resnet110_k55_infopro_man      svhn_resnet110    55 infopro man       4.99
table1/svhn_resnet110_k55_infopro_manpp    svhn_resnet110    55 infopro manpp     4.27
table1/svhn_resnet110_k55_dgl              svhn_resnet110    55 dgl     none      5.36
table1/svhn_resnet110_k55_dgl_man          svhn_resnet110    55 dgl     man       4.52
table1/svhn_resnet110_k55_dgl_manpp        svhn_resnet110    55 dgl     manpp     2.72
table1/stl10_resnet32_e2e                  stl10_resnet32     1 -       -        19.35
table1/stl10_resnet32_k8_infopro           stl10_resnet32     8 infopro none     27.32
table1/stl10_resnet32_k8_infopro_man       stl10_resnet32     8 infopro man      23.17
table1/stl10_resnet32_k8_infopro_manpp     stl10_resnet32     8 infopro manpp    21.14
table1/stl10_resnet32_k8_dgl               stl10_resnet32     8 dgl     none     25.05
table1/stl10_resnet32_k8_dgl_man           stl10_resnet32     8 dgl     man      20.74
table1/stl10_resnet32_k8_dgl_manpp         stl10_resnet32     8 dgl     manpp    20.17
table1/stl10_resnet32_k16_infopro          stl10_resnet32    16 infopro none     29.28
table1/stl10_resnet32_k16_infopro_man      stl10_resnet32    16 infopro man      23.54
table1/stl10_resnet32_k16_infopro_manpp    stl10_resnet32    16 infopro manpp    20.81
table1/stl10_resnet32_k16_dgl              stl10_resnet32    16 dgl     none     27.14
table1/stl10_resnet32_k16_dgl_man          stl10_resnet32    16 dgl     man      21.37
table1/stl10_resnet32_k16_dgl_manpp        stl10_resnet32    16 dgl     manpp    21.08
table1/stl10_resnet110_e2e                 stl10_resnet110    1 -       -        19.67
table1/stl10_resnet110_k32_infopro         stl10_resnet110   32 infopro none     28.58
table1/stl10_resnet110_k32_infopro_man     stl10_resnet110   32 infopro man      24.08
table1/stl10_resnet110_k32_infopro_manpp   stl10_resnet110   32 infopro manpp    21.73
table1/stl10_resnet110_k32_dgl             stl10_resnet110   32 dgl     none     25.67
table1/stl10_resnet110_k32_dgl_man         stl10_resnet110   32 dgl     man      22.54
table1/stl10_resnet110_k32_dgl_manpp       stl10_resnet110   32 dgl     manpp    20.73
table1/stl10_resnet110_k55_infopro         stl10_resnet110   55 infopro none     29.20
table1/stl10_resnet110_k55_infopro_man     stl10_resnet110   55 infopro man      24.74
table1/stl10_resnet110_k55_infopro_manpp   stl10_resnet110   55 infopro manpp    23.77
table1/stl10_resnet110_k55_dgl             stl10_resnet110   55 dgl     none     28.16
table1/stl10_resnet110_k55_dgl_man         stl10_resnet110   55 dgl     man      22.69
table1/stl10_resnet110_k55_dgl_manpp       stl10_resnet110   55 dgl     manpp    21.57
""",
    'II': """
name                               network     K heads   transfer error error_top5
table2/vgg13_e2e                   vgg13       1 -       -        28.41       9.63
table2/vgg13_k10_dgl               vgg13      10 dgl     none     35.60      14.20
table2/vgg13_k10_dgl_man           vgg13      10 dgl     man      31.99      10.84
table2/vgg13_k10_dgl_manpp         vgg13      10 dgl     manpp    30.93      10.24
table2/resnet101_e2e               resnet101   1 -       -        22.03       5.93
table2/resnet101_k2_infopro        resnet101   2 infopro none     21.85       5.89
table2/resnet101_k2_infopro_man    resnet101   2 infopro man      21.65       5.49
table2/resnet101_k2_infopro_manpp  resnet101   2 infopro manpp    21.54       5.41
table2/resnet101_k4_infopro        resnet101   4 infopro none     22.81       6.54
table2/resnet101_k4_infopro_man    resnet101   4 infopro man      21.73       5.81
table2/resnet101_k4_infopro_manpp  resnet101   4 infopro manpp    21.66       5.72
table2/resnet152_e2e               resnet152   1 -       -        21.60       5.92
table2/resnet152_k2_infopro        resnet152   2 infopro none     21.45       5.84
table2/resnet152_k2_infopro_man    resnet152   2 infopro man      21.23       5.53
table2/resnet152_k2_infopro_manpp  resnet152   2 infopro manpp    20.81       5.41
table2/resnet152_k4_infopro        resnet152   4 infopro none     22.93       6.71
table2/resnet152_k4_infopro_man    resnet152   4 infopro man      21.59       5.89
table2/resnet152_k4_infopro_manpp  resnet152   4 infopro manpp    21.28       5.72
table2/resnext101_e2e              resnext101  1 -       -        20.64       5.40
table2/resnext101_k2_infopro       resnext101  2 infopro none     20.35       5.28
table2/resnext101_k2_infopro_man   resnext101  2 infopro man      20.11       5.18
table2/resnext101_k2_infopro_manpp resnext101  2 infopro manpp    19.84       5.01
table2/resnext101_k4_infopro       resnext101  4 infopro none     21.69       6.11
table2/resnext101_k4_infopro_man   resnext101  4 infopro man      20.37       5.34
table2/resnext101_k4_infopro_manpp resnext101  4 infopro manpp    20.16       5.17
table2/vit-tiny_e2e                vit-tiny    1 -       -        35.59      14.69
table2/vit-tiny_k4_manpp           vit-tiny    4 vit     manpp    35.43      14.61
table2/vit-tiny_k6_manpp           vit-tiny    6 vit     manpp    35.51      14.64
table2/vit-small_e2e               vit-small   1 -       -        37.38      17.32
table2/vit-small_k4_manpp          vit-small   4 vit     manpp    36.93      16.95
table2/vit-small_k6_manpp          vit-small   6 vit     manpp    37.15      17.19
table2/vit-base_e2e                vit-base    1 -       -        39.18      19.55
table2/vit-base_k4_manpp           vit-base    4 vit     manpp    38.90      19.29
table2/vit-base_k6_manpp           vit-base    6 vit     manpp    39.03      19.52
""",
    'IV': """
name                                      network        K heads transfer start
table4/retinanet_r18_e2e_pretrained       retinanet_r18  1 -     -        pretrained
table4/retinanet_r18_manpp_k4_pretrained  retinanet_r18  4 dense manpp    pretrained
table4/retinanet_r18_e2e_scratch          retinanet_r18  1 -     -        scratch
table4/retinanet_r18_manpp_k4_scratch     retinanet_r18  4 dense manpp    scratch
table4/retinanet_r34_e2e_pretrained       retinanet_r34  1 -     -        pretrained
table4/retinanet_r34_manpp_k4_pretrained  retinanet_r34  4 dense manpp    pretrained
table4/retinanet_r34_e2e_scratch          retinanet_r34  1 -     -        scratch
table4/retinanet_r34_manpp_k4_scratch     retinanet_r34  4 dense manpp    scratch
table4/retinanet_r50_e2e_pretrained       retinanet_r50  1 -     -        pretrained
table4/retinanet_r50_manpp_k4_pretrained  retinanet_r50  4 dense manpp    pretrained
table4/retinanet_r50_e2e_scratch          retinanet_r50  1 -     -        scratch
table4/retinanet_r50_manpp_k4_scratch     retinanet_r50  4 dense manpp    scratch
table4/retinanet_r101_e2e_pretrained      retinanet_r101 1 -     -        pretrained
table4/retinanet_r101_manpp_k4_pretrained retinanet_r101 4 dense manpp    pretrained
table4/retinanet_r101_e2e_scratch         retinanet_r101 1 -     -        scratch
table4/retinanet_r101_manpp_k4_scratch    retinanet_r101 4 dense manpp    scratch
table4/retinanet_r152_e2e_pretrained      retinanet_r152 1 -     -        pretrained
table4/retinanet_r152_manpp_k4_pretrained retinanet_r152 4 dense manpp    pretrained
table4/retinanet_r152_e2e_scratch         retinanet_r152 1 -     -        scratch
table4/retinanet_r152_manpp_k4_scratch    retinanet_r152 4 dense manpp    scratch
""",
    'V': """
name                                                  network            K heads   transfer start      mean_iou mean_acc overall_acc memory_gb
table5/deeplabv3_r50_e2e_pretrained                   deeplabv3_r50      1 -       -        pretrained    73.30    80.83       95.27     23.90
table5/deeplabv3_r50_k2_infopro_pretrained            deeplabv3_r50      2 infopro none     pretrained    72.48    80.15       94.91     20.71
table5/deeplabv3_r50_k2_infopro_manpp_pretrained      deeplabv3_r50      2 infopro manpp    pretrained    73.85    81.24       95.31         -
table5/deeplabv3_r50_e2e_scratch                      deeplabv3_r50      1 -       -        scratch       59.71    68.09       93.34     23.90
table5/deeplabv3_r50_k2_infopro_scratch               deeplabv3_r50      2 infopro none     scratch       59.07    68.02       93.26     20.71
table5/deeplabv3_r50_k2_infopro_manpp_scratch         deeplabv3_r50      2 infopro manpp    scratch       60.84    69.12       93.41         -
table5/deeplabv3_r101_e2e_pretrained                  deeplabv3_r101     1 -       -        pretrained    74.41    82.31       95.51     30.91
table5/deeplabv3_r101_k2_infopro_pretrained           deeplabv3_r101     2 infopro none     pretrained    70.94    79.79       95.19     25.02
table5/deeplabv3_r101_k2_infopro_manpp_pretrained     deeplabv3_r101     2 infopro manpp    pretrained    74.57    82.69       95.53         -
table5/deeplabv3_r101_e2e_scratch                     deeplabv3_r101     1 -       -        scratch       56.74    65.51       92.67     30.91
table5/deeplabv3_r101_k2_infopro_scratch              deeplabv3_r101     2 infopro none     scratch       55.23    64.23       92.39     25.02
table5/deeplabv3_r101_k2_infopro_manpp_scratch        deeplabv3_r101     2 infopro manpp    scratch       58.54    67.11       93.05         -
table5/deeplabv3plus_r50_e2e_pretrained               deeplabv3plus_r50  1 -       -        pretrained    74.61    81.89       95.66     26.81
table5/deeplabv3plus_r50_k2_infopro_pretrained        deeplabv3plus_r50  2 infopro none     pretrained    72.48    80.15       95.41     22.67
table5/deeplabv3plus_r50_k2_infopro_manpp_pretrained  deeplabv3plus_r50  2 infopro manpp    pretrained    75.34    82.19       95.69         -
table5/deeplabv3plus_r50_e2e_scratch                  deeplabv3plus_r50  1 -       -        scratch       58.89    67.38       93.06     26.81
table5/deeplabv3plus_r50_k2_infopro_scratch           deeplabv3plus_r50  2 infopro none     scratch       56.58    65.69       92.84     22.67
table5/deeplabv3plus_r50_k2_infopro_manpp_scratch     deeplabv3plus_r50  2 infopro manpp    scratch       60.04    68.25       93.18         -
table5/deeplabv3plus_r101_e2e_pretrained              deeplabv3plus_r101 1 -       -        pretrained    75.53    83.24       95.84     34.42
table5/deeplabv3plus_r101_k2_infopro_pretrained       deeplabv3plus_r101 2 infopro none     pretrained    71.28    79.30       94.93     27.55
table5/deeplabv3plus_r101_k2_infopro_manpp_pretrained deeplabv3plus_r101 2 infopro manpp    pretrained    76.77    84.01       95.89         -
table5/deeplabv3plus_r101_e2e_scratch                 deeplabv3plus_r101 1 -       -        scratch       58.23    66.51       93.14     34.42
table5/deeplabv3plus_r101_k2_infopro_scratch          deeplabv3plus_r101 2 infopro none     scratch       55.91    65.33       92.69     27.55
table5/deeplabv3plus_r101_k2_infopro_manpp_scratch    deeplabv3plus_r101 2 infopro manpp    scratch       59.31    67.12       93.21         -
""",  # noqa: E501
    'VI': """
name                                                network            K heads   transfer start      memory_gb
table5/deeplabv3_r50_k2_infopro_man_pretrained      deeplabv3_r50      2 infopro man      pretrained     20.95
table5/deeplabv3_r50_k2_infopro_man_scratch         deeplabv3_r50      2 infopro man      scratch        20.95
table5/deeplabv3_r101_k2_infopro_man_pretrained     deeplabv3_r101     2 infopro man      pretrained     25.41
table5/deeplabv3_r101_k2_infopro_man_scratch        deeplabv3_r101     2 infopro man      scratch        25.41
table5/deeplabv3plus_r50_k2_infopro_man_pretrained  deeplabv3plus_r50  2 infopro man      pretrained     23.29
table5/deeplabv3plus_r50_k2_infopro_man_scratch     deeplabv3plus_r50  2 infopro man      scratch        23.29
table5/deeplabv3plus_r101_k2_infopro_man_pretrained deeplabv3plus_r101 2 infopro man      pretrained     28.47
table5/deeplabv3plus_r101_k2_infopro_man_scratch    deeplabv3plus_r101 2 infopro man      scratch        28.47
""",
    'VII a': """
name                              network           K heads transfer error
table7/cifar10_resnet32_k16_dgl   cifar10_resnet32 16 dgl   none     14.08
table7/cifar10_resnet32_k16_ema   cifar10_resnet32 16 dgl   ema      11.07
table7/cifar10_resnet32_k16_man   cifar10_resnet32 16 dgl   man       9.11
table7/cifar10_resnet32_k16_manpp cifar10_resnet32 16 dgl   manpp     8.75
""",
    'VII b': """
name                                 network   K heads   transfer error error_top5
table7/imagenet_resnet101_k4_infopro resnet101 4 infopro none     22.81       6.54
table7/imagenet_resnet101_k4_ema     resnet101 4 infopro ema      22.09       6.07
table7/imagenet_resnet101_k4_man     resnet101 4 infopro man      21.73       5.81
table7/imagenet_resnet101_k4_manpp   resnet101 4 infopro manpp    21.66       5.72
""",
    'MLAAN': """
name                               network            K heads transfer window
mlaan/cifar10_resnet32_k8_mlaan    cifar10_resnet32   8 lam   leap          2
mlaan/cifar10_resnet32_k16_lam     cifar10_resnet32  16 lam   leap          1
mlaan/cifar10_resnet32_k16_mlaan   cifar10_resnet32  16 lam   leap          2
mlaan/cifar10_resnet110_k32_mlaan  cifar10_resnet110 32 lam   leap          2
mlaan/cifar10_resnet110_k55_mlaan  cifar10_resnet110 55 lam   leap          2
""",
    'release': """
name                                      network               K heads transfer start
release/retinanet_r50_e2e_pretrained      release_retinanet_r50 1 -     -        pretrained
release/retinanet_r50_manpp_k4_pretrained release_retinanet_r50 4 dense release  pretrained
release/retinanet_r50_e2e_scratch         release_retinanet_r50 1 -     -        scratch
release/retinanet_r50_manpp_k4_scratch    release_retinanet_r50 4 dense release  scratch
""",
}
