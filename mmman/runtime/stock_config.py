"""Finds and reads stock configs, and writes the lines by which a child config inherits from one."""

from __future__ import annotations

import difflib
import importlib.util
import keyword
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmman.errors import ConfigError

SUFFIXES = ('.py', '.json', '.yaml', '.yml')


@dataclass(frozen=True)
class StockConfig:
    """A config to inherit from.

    Attributes:
        name: The name as given: ``library::path``, or the path of a file.
        path: The path of the file.
        cfg: The content of the config.
        is_new_style: Whether it is a pure Python config that imports what it names (``with read_base()``). Only configs of
            the same kind can inherit from it.
    """

    name: str
    path: Path
    cfg: Config
    is_new_style: bool

    @classmethod
    def read(cls, name: str) -> StockConfig:
        """Find and read a config.

        Args:
            name: ``library::path`` of a library's config, or the path of a file.

        Raises:
            ConfigError: The config doesn't exist, or can't be read.
        """
        path = config_path(name)
        base = _library_base(name, path) if '::' in name else str(path)
        try:
            return cls(name, path, read_text(f'_base_ = {base!r}\n'), is_new_style=False)
        except RuntimeError as error:
            if 'lazy_import' not in str(error):
                raise unreadable_config(name, error) from error
        except Exception as error:  # a config is a program and can raise any error
            raise unreadable_config(name, error) from error
        try:
            return cls(name, path, Config.fromfile(path), is_new_style=True)
        except Exception as error:
            raise unreadable_config(name, error) from error

    def inheritance_lines(self, folder: Path | None) -> str:
        """Return the lines by which a child inherits from this config.

        Args:
            folder: The folder of the child. None: any folder on this machine.

        Raises:
            ConfigError: A child in this folder can't inherit from this config.
        """
        if not self.is_new_style:
            if '::' in self.name:
                return f'_base_ = {_library_base(self.name, self.path)!r}'
            base = self.path if folder is None else os.path.relpath(self.path, folder)  # valid if both files move together
            return f'_base_ = {str(base)!r}'
        if folder is None:
            raise ConfigError(
                f'{self.name} is a pure Python config, which is inherited by a relative import: set the path of the child (-o)'
            )
        *up, name = os.path.relpath(self.path.with_suffix(''), folder).split(os.sep)
        levels = up.count(os.pardir)
        modules = [*up[levels:], name]
        invalid = [module for module in modules if not module.isidentifier() or keyword.iskeyword(module)]
        if invalid:
            raise ConfigError(
                f'{self.name} is a pure Python config, which is inherited by a relative import, and {invalid[0]!r} in the '
                'path is not a Python name: write the child to another folder, e.g. that of the config itself, or rename it'
            )
        return (
            'from mmengine.config import read_base\n\n'
            f'with read_base():\n    from {"." * (levels + 1)}{".".join(modules)} import *  # noqa: F403'
        )


def config_path(name: str) -> Path:
    """Return the path of a config.

    Args:
        name: ``library::path`` of a library's config, or the path of a file.

    Raises:
        ConfigError: The config doesn't exist.
    """
    return _library_file(name) if '::' in name else _file(name)


def resolve_own_configs() -> None:
    """Let mmengine resolve ``_base_ = 'mmman::...'`` in this process: it does so for the packages of its table alone.

    mmengine looks for the distribution that the table names and, if there is none, for the module. The distribution of an
    editable install is in another folder than the package, so the table names a module.
    """
    MODULE2PACKAGE['mmman'] = 'mmman.version'


def read_text(text: str, folder: Path | None = None) -> Config:
    """Read a config from its text, through a temporary file in ``folder``, by default a temporary folder."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return read_text(text, Path(temporary))
    handle, name = tempfile.mkstemp(prefix='localized_', suffix='.py', dir=folder, text=True)
    try:
        with open(handle, 'w', encoding='utf-8') as file:
            file.write(text)
        return Config.fromfile(name)
    finally:
        Path(name).unlink()


def unreadable_config(name: str, error: Exception) -> ConfigError:
    """Return the error for a config that can't be read."""
    return ConfigError(f'{name} cannot be read as a config: {" ".join(f"{type(error).__name__}: {error}".split())}')


def _file(name: str) -> Path:
    path = Path(os.path.abspath(name))  # like mmengine, don't resolve links
    if not path.is_file():
        raise ConfigError(f'no config at {name}; give the path of a file, or library::path for one of a library')
    if path.suffix not in SUFFIXES:
        raise ConfigError(f'{name} is not a config: mmengine reads {", ".join(SUFFIXES)}')
    return path


def _library_file(name: str) -> Path:
    library, _, inside = name.partition('::')
    spec = importlib.util.find_spec(library) if library.isidentifier() else None
    folder = Path(spec.origin).parent / '.mim' / 'configs' if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ConfigError(
            f'{name}: there is no installed library {library!r} with configs; e.g. mmdet, mmseg and mmpretrain have configs'
        )
    path = next((path for path in (folder / inside, folder / f'{inside}.py') if path.is_file()), None)
    if path is None:
        known = [found.relative_to(folder).as_posix() for found in folder.rglob('*.py')]
        close = difflib.get_close_matches(inside, known, n=1, cutoff=0.6)
        hint = f'did you mean {library}::{close[0]}?' if close else f'its configs are below {folder}'
        raise ConfigError(f'{library} has no config {inside!r}; {hint}')
    return path


def _library_base(name: str, path: Path) -> str:
    """Return the name in the form that mmengine resolves, whose first folder has only letters, digits and underscores."""
    library, _, inside = name.partition('::')
    inside = inside if path.as_posix().endswith(inside) else f'{inside}.py'
    return f'{library}::{inside}' if re.match(r'\w+/', inside) else f'{library}::_base_/../{inside}'
