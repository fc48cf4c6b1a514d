"""Reads checkpoints safely: those of mmman and, once mmman is imported, every checkpoint that mmengine loads.

``import mmman`` registers :func:`load_from_local` for local files, and loaders that use it for URLs, with mmengine's
``CheckpointLoader``. ``load_from``, resume, ``init_cfg=dict(type='Pretrained')``, ``init_detector`` and the inferencers of the
libraries then read every checkpoint with these loaders. Design: docs/design/checkpoints.md.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import print_log
from mmengine.runner import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch import Tensor

from mmman.errors import CheckpointError
from mmman.messages import one_line
from mmman.runtime.archive import check_archive, format_path
from mmman.runtime.checkpoint_content import plain_checkpoint

REMEDY = 'copy or download it again, or give another checkpoint'


def load_from_local(path: str | os.PathLike, map_location: Any = None) -> dict | Tensor:
    """Read a checkpoint from a local file, after checking its complete content.

    Args:
        path: A file written by ``torch.save``.
        map_location: Device of the tensors, as in ``torch.load``. None: the CPU.

    Returns:
        The weights and plain data of the file, in new containers and tensors, or a tensor if the file holds only one. What
        mmengine would execute is left out, and named in one line of the log.

    Raises:
        CheckpointError: The file doesn't exist, is damaged, holds no weights, or holds anything but weights and plain data. The
            message is one line: the file, what is wrong, and what to do.
    """
    path = os.path.expanduser(os.fspath(path))
    try:
        is_archive = check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns about old file formats
            loaded = torch.load(path, 'cpu' if map_location is None else map_location, weights_only=True, mmap=is_archive)
        checkpoint, left_out = plain_checkpoint(loaded, os.path.getsize(path))
    except CheckpointError as error:
        raise CheckpointError(one_line(f'{format_path(path)} {error}; {REMEDY}')) from None
    except Exception as error:  # a crafted file can make torch raise any error
        reason = str(error).partition('\n')[0]
        if isinstance(error, pickle.UnpicklingError) or 'weights_only' in reason:  # torch's message advises disabling the check
            reason = 'its pickle holds more than weights and plain data'
        raise CheckpointError(
            one_line(f'{format_path(path)} cannot be read: {type(error).__name__}: {reason}; {REMEDY}')
        ) from None
    if left_out:
        message = f'{format_path(path)}: ignored what mmengine would execute: {"; ".join(left_out)}. Pass the config as a file'
        print_log(one_line(message), logger='current', level=logging.WARNING)
    return checkpoint


def load_from_http(url: str, map_location: Any = None) -> dict | Tensor:
    """Download a checkpoint into torch's cache, unless it is cached, and read it with :func:`load_from_local`.

    Raises:
        CheckpointError: The checkpoint can't be downloaded or read.
    """
    name = os.path.basename(urlparse(url).path)
    if not name or name in ('.', '..') or not name.isprintable():
        raise CheckpointError(one_line(f'{url} does not name a file; give the URL of a .pth file'))
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
    rank, world_size = get_dist_info()
    if rank == 0:
        _download(url, path)
    if world_size > 1:
        torch.distributed.barrier()
        _download(url, path)  # on other machines, whose cache doesn't have the file yet
    try:
        return load_from_local(path, map_location)
    except CheckpointError as error:
        raise CheckpointError(one_line(f'{error}; it was downloaded from {url}: delete it to download it again')) from None


def _download(url: str, path: str) -> None:
    if os.path.exists(path):
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=os.isatty(0))
    except OSError as error:  # URLError is an OSError
        raise CheckpointError(one_line(f'{url} cannot be downloaded: {error}; give the path of a file')) from None


def load_from_torchvision(name: str, map_location: Any = None) -> dict | Tensor:
    """Read the weights of a torchvision model, such as ``torchvision://resnet50``."""
    return _named_model(name, get_torchvision_models(), map_location)


def load_from_openmmlab(name: str, map_location: Any = None) -> dict | Tensor:
    """Read weights by their name in mmengine's list, such as ``open-mmlab://resnet50_caffe``."""
    deprecated = get_deprecated_model_names()
    prefix, _, model = name.partition('://')
    return _named_model(f'{prefix}://{deprecated.get(model, model)}', get_external_models(), map_location)


def load_from_mmcls(name: str, map_location: Any = None) -> dict:
    """Read the backbone of a classifier by its name in mmengine's list, such as ``mmcls://resnet50``."""
    checkpoint = _named_model(name, get_mmcls_models(), map_location)
    state = checkpoint.get('state_dict', checkpoint)
    prefix = 'backbone.'
    return {'state_dict': {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}}


def load_from_storage(uri: str, map_location: Any = None) -> dict | Tensor:
    """Read a checkpoint from an object store that mmengine supports, ``s3://...`` or ``petrel://...``."""
    backend = get_file_backend(uri, backend_args={'backend': 'petrel'})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, os.path.basename(uri) or 'checkpoint')
        path.write_bytes(backend.get(uri))
        return load_from_local(path, map_location)


def _named_model(name: str, urls: dict[str, str], map_location: Any) -> dict | Tensor:
    model = name.partition('://')[2]
    if model not in urls:
        raise CheckpointError(one_line(f'{name} is not in the list of models; give the path or URL of a .pth file'))
    url = urls[model]
    if url.startswith(('http://', 'https://')):
        return load_from_http(url, map_location)
    home = os.getenv('MMENGINE_HOME', os.path.join(os.getenv('XDG_CACHE_HOME', '~/.cache'), 'mmengine'))
    return load_from_local(os.path.join(home, url), map_location)


def read_all_checkpoints() -> None:
    """Make mmengine read the checkpoints of all its sources with :func:`load_from_local`."""
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (('modelzoo://', 'torchvision://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls),
        ([r'(\S+\:)?s3://', r'(\S+\:)?petrel://'], load_from_storage),
    ):
        CheckpointLoader.register_scheme(prefixes, loader=loader, force=True)
