"""Write the config that trains a stock config's model by MAN++: a child of it, of a dozen lines, to be kept and edited.

    python tools/localize_config.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py -k 4 -o retinanet_manpp_k4.py

It prints the blocks, the local head that it chose, what it keeps of the stock config, and why. The child is written if the
model trains a step with it, on a tiny random batch; what can't be localised is refused in one line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.logging import MMLogger

from mmman import LocalLearningError
from mmman.runtime.localized_child import localize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stock', help='library::path of a stock config, or the path of a config file')
    parser.add_argument('-k', '--num-blocks', type=int, default=4, help='number of gradient-isolated blocks K (default: 4)')
    parser.add_argument('--partition', nargs='+', default=['stage'], help="'stage', 'uniform', or the last units of K-1 blocks")
    parser.add_argument('-o', '--out', type=Path, help='file to write; default: print the config')
    parser.add_argument('--no-dry-run', action='store_true', help='write the child without a training step of the whole model')
    parser.add_argument('--no-trial', dest='no_dry_run', action='store_true', help=argparse.SUPPRESS)  # former name, until 0.2
    args = parser.parse_args()
    MMLogger.get_instance('localize_config', log_level='ERROR')

    partition = args.partition[0] if args.partition[0] in ('stage', 'uniform') else args.partition
    folder = None
    if args.out is not None:
        folder = args.out.absolute().parent
        if args.out.exists():
            raise SystemExit(f'{args.out} exists; choose another name or remove it')
        if args.out.suffix != '.py' or not folder.is_dir():
            raise SystemExit(f'-o {args.out}: give the name of a .py file in a folder that exists')
    try:
        child = localize(args.stock, args.num_blocks, partition, folder, dry_run=not args.no_dry_run)
    except LocalLearningError as error:
        message = ' '.join(str(error).split())
        raise SystemExit(message if args.stock in message else f'{args.stock}: {message}') from None
    if args.out is None:
        print(child.text)
    else:
        try:
            args.out.write_text(child.text, encoding='utf-8')
        except OSError as error:
            raise SystemExit(f'{args.out} cannot be written ({error})') from None
        print(f'{args.out} is written')
    for reason in child.reasons:
        print(f'- {reason}', file=sys.stderr)


if __name__ == '__main__':
    main()
