from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DET = ['mmcv>=2.0.0,<2.2.0', 'mmdet>=3.0.0', 'pycocotools']
SEG = ['mmcv>=2.0.0,<2.2.0', 'mmsegmentation>=1.0.0']
CLS = ['mmcv>=2.0.0,<2.2.0', 'mmpretrain>=1.0.0']

setup(
    name='mmman',
    version='0.1.0',
    description='Supervised local learning (MAN++) for stock OpenMMLab models',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmman', 'mmman.*']),
    python_requires='>=3.10,<3.13',
    install_requires=['torch>=2.1', 'mmengine>=0.10.0'],
    extras_require={'det': DET, 'seg': SEG, 'cls': CLS, 'all': sorted({*DET, *SEG, *CLS})},
    classifiers=['License :: OSI Approved :: Apache Software License', 'Programming Language :: Python :: 3'],
)
