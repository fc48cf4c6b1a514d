"""The command ``mmman``, also ``python -m mmman``: runs the tools that are installed with the package.

Each command is a file of ``tools/``, which an installation keeps in ``mmman/.mim/tools``, where ``mim`` looks for it too.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parent / '.mim' / 'tools'
COMMANDS = {
    'fit': ('fit_memory.py', 'fit a config into the memory of a GPU: predict, choose, write the config'),
    'train': ('train.py', 'train a config, with local learning or without'),
    'test': ('test.py', 'test a checkpoint'),
    'measure': ('analysis_tools/measure_training.py', 'memory, FLOPs and seconds of a training step of configs, side by side'),
    'inspect': ('analysis_tools/inspect_blocks.py', 'loss, gradient, scale, momentum copy, dead channels of every block'),
    'publish': ('publish_model.py', 'make a checkpoint to share of a training checkpoint'),
}


def main(args: list[str] | None = None) -> None:
    """Run the tool that a command names.

    Args:
        args: The command and its arguments; by default those of the process.

    Raises:
        SystemExit: The command is unknown, the tools are not installed, or the tool ends the program.
    """
    parser = argparse.ArgumentParser(
        prog='mmman',
        usage='mmman COMMAND [arguments]',
        description='Train stock OpenMMLab models by supervised local learning (MAN++).',
        epilog='commands:\n'
        + '\n'.join(f'  {command:9}{about}' for command, (_, about) in COMMANDS.items())
        + '\n\n`mmman COMMAND --help` lists the arguments of a command. A CONFIG is a file, or library::path of one that an\n'
        'installed library brings: mmdet::retinanet/retinanet_r50_fpn_1x_coco.py, mmman::retinanet_r50_manpp_k4.py.\n\n'
        'Several GPUs:  torchrun --nproc-per-node GPUS -m mmman train CONFIG --launcher pytorch',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND', help=', '.join(COMMANDS))
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    tool = TOOLS / COMMANDS[given.command][0]
    if not tool.is_file():
        parser.error(f'there is no {tool}: install mmman (in a checkout: pip install -e .)')
    sys.argv = [f'mmman {given.command}', *given.arguments]  # argparse names the program by the first
    _load(tool).main()


def _load(tool: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'mmman_{tool.stem}', tool)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == '__main__':
    main()
