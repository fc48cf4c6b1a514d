"""Set up the tested environment in a virtual environment: ``python3 tools/setup_env.py .venv``.

Standard library only, because it runs before anything is installed. PyPI ships mmcv as source, so its compiled operators are
built once into a wheel folder of the user's cache. The folder's name holds all that such a wheel depends on; pip's own cache
knows mmcv's version alone and would hand out operators that were built for another torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'requirements.txt'
SUPPORTED = ((3, 10), (3, 12))

# What the environment's own Python says of the build's target: torch's version, and cpu or the CUDA version and GPU generation.
TARGET = """
import sys, torch
if torch.cuda.is_available():
    device = 'cu' + torch.version.cuda.replace('.', '') + '-sm' + ''.join(map(str, torch.cuda.get_device_capability()))
else:
    device = 'cpu'
print(f'torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{device}')
"""


def pinned(package: str) -> str:
    """The requirement line of ``package`` without its comment, for example ``mmcv==2.1.0``."""
    for line in REQUIREMENTS.read_text().splitlines():
        requirement = line.split('#')[0].strip()
        if re.match(rf'{package}\b', requirement):
            return requirement
    raise SystemExit(f'{REQUIREMENTS} does not pin {package}')


def run(*command: str | Path) -> None:
    print('+', *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def imports_ops(python: Path) -> bool:
    return subprocess.run([python, '-c', 'import mmcv.ops'], capture_output=True).returncode == 0


def build_mmcv(python: Path, folder: Path) -> None:
    """Build mmcv's wheel into ``folder``, showing how far the compiler is; a failed build leaves its log and no wheel."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    log = folder.parent / f'{folder.name}.log'
    flags = {'MMCV_WITH_OPS': '1', 'CFLAGS': '-g0', 'CXXFLAGS': '-g0', 'PYTHONUNBUFFERED': '1'}  # -g doubles the time
    command = [python, '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-build-isolation', '--no-cache-dir']
    print(f'building {pinned("mmcv")} with its operators, once for {folder.name} (5 to 15 minutes; log: {log})', flush=True)
    start, shown = time.time(), ''
    with (
        log.open('w') as out,
        subprocess.Popen(
            [*command, '--wheel-dir', work, pinned('mmcv')],
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        for line in process.stdout:
            out.write(line)
            step = re.search(r'\[(\d+)/(\d+)\]', line)
            if step and step[0] != shown:
                shown, (done, total) = step[0], map(int, step.groups())
                spent = time.time() - start
                print(f'  {shown} {spent / 60:.1f} min, about {spent / done * (total - done) / 60:.1f} min left', flush=True)
    if process.returncode:
        shutil.rmtree(work)
        raise SystemExit(f'mmcv did not build (a C++ compiler is needed, and nvcc on a GPU machine). The log: {log}')
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('venv', type=Path, help='folder of the virtual environment, made if absent')
    venv = parser.parse_args().venv.resolve()
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        raise SystemExit(f'Python 3.10 to 3.12 is needed, this is {sys.version.split()[0]}; try `make setup PYTHON=python3.11`')

    python = venv / 'bin' / 'python'
    if not python.exists():
        run(sys.executable, '-m', 'venv', venv)
    pip = (python, '-m', 'pip', '--disable-pip-version-check')
    run(*pip, 'install', '-q', pinned('setuptools'), 'wheel', 'ninja', 'psutil')
    run(*pip, 'install', pinned('torch'), pinned('torchvision'))

    target = subprocess.run([python, '-c', TARGET], check=True, capture_output=True, text=True).stdout.strip()
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'mmman' / 'wheels'
    folder = cache / f'{pinned("mmcv").replace("==", "")}-{target}'
    if not any(folder.glob('mmcv-*.whl')):
        build_mmcv(python, folder)
    run(*pip, 'install', '--find-links', folder, '--only-binary', 'mmcv', '-r', REQUIREMENTS)
    if not imports_ops(python):  # another build of the same version was there before
        run(*pip, 'install', '--no-index', '--find-links', folder, '--no-deps', '--force-reinstall', pinned('mmcv'))
    run(*pip, 'install', '-q', '--no-deps', '--no-build-isolation', '-e', ROOT)
    run(python, '-c', 'import mmcv.ops, mmdet, mmseg, mmpretrain, mmman')


if __name__ == '__main__':
    main()
