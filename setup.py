import os
import shutil
from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# mmcv: mmdet 3.3 and mmseg 1.2 refuse 2.2.
# mmdet: the losses of `images_per_chunk` are written for the dense heads of 3.3.
# mmseg, mmpretrain: local heads call the decode heads and classifiers of 1.2, the only ones tested; a 2.0 may change them.
# setuptools: 82 has no pkg_resources, which mmengine imports to read `mmdet::` configs.
# six, ftfy, regex, importlib_metadata: imported by these libraries, which don't declare them.
COMMON = ['mmcv>=2.0.0,<2.2.0', 'setuptools<82']
DET = [*COMMON, 'mmdet>=3.3.0,<3.4.0', 'pycocotools', 'six']
SEG = [*COMMON, 'mmsegmentation>=1.2.0,<2.0.0', 'ftfy', 'regex']
CLS = [*COMMON, 'mmpretrain>=1.2.0,<2.0.0', 'importlib_metadata']


class BuildWithMim(build_py):
    """Adds ``mmman/.mim``, where mim and ``mmman::`` look: configs, tools and model index. An editable install gets links."""

    def run(self) -> None:
        super().run()
        mim = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / 'mmman' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in ('configs', 'tools', 'model-index.yml'):
            source = ROOT / name
            if self.editable_mode:
                (mim / name).symlink_to(os.path.relpath(source, mim))
            elif source.is_dir():  # not the paper's configs: mim refuses a file name that two folders have
                shutil.copytree(source, mim / name, ignore=shutil.ignore_patterns('__pycache__', 'paper'))
            else:
                shutil.copy(source, mim)


setup(
    name='mmman',
    version=run_path(str(ROOT / 'mmman' / 'version.py'))['__version__'],
    description='Supervised local learning (MAN++) for stock OpenMMLab models',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmman', 'mmman.*']),
    cmdclass={'build_py': BuildWithMim},
    entry_points={'console_scripts': ['mmman = mmman.__main__:main']},
    python_requires='>=3.10,<3.13',
    # torch: since 2.6 names in a checkpoint can be bound to functions that check it, which reading training checkpoints needs.
    # mmengine: the checkpoint loaders that mmman replaces are those of 0.10.
    install_requires=['torch>=2.6', 'mmengine>=0.10.0,<0.11.0'],
    extras_require={'det': DET, 'seg': SEG, 'cls': CLS, 'all': sorted({*DET, *SEG, *CLS})},
    classifiers=['License :: OSI Approved :: Apache Software License', 'Programming Language :: Python :: 3'],
)
