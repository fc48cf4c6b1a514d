"""Checkpoints that were made to run code, to damage or to confuse: each a function that writes one file.

Every file begins as the honest checkpoint of a training run. A payload, where it runs, creates the file ``canary``.
"""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from tests.integration.hostile_pickles import CLEANED, NOT_RESUMED, REFUSED, Call, Case, Name, Naming, archive, claiming, legacy


def cases(honest: Path, canary: Path, folder: Path) -> Iterator[Case]:
    """All files: a name, what is expected of them, and the function that writes one."""
    content = torch.load(honest)
    command = f'touch {canary}'

    def saved(**changes: object) -> Callable[[Path], None]:
        return lambda path: torch.save({**content, **changes}, path, pickle_module=Naming)

    def placed(value: object, *place: str) -> Callable[[Path], None]:
        changed = copy.deepcopy(content)
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
        return lambda path: torch.save(changed, path, pickle_module=Naming)

    yield from code_in_pickles(content, saved, placed, command, canary)
    yield from code_in_texts(placed, command, folder)
    yield from damaged_files(honest, content, folder)
    yield from wrong_content(content, saved, placed)


def code_in_pickles(content, saved, placed, command, canary) -> Iterator[Case]:
    calls = {
        'os.system': Name('os', 'system', command),
        'posix.system': Name('posix', 'system', command),
        'nt.system': Name('nt', 'system', command),
        'subprocess': Name('subprocess', 'Popen', ['touch', str(canary)]),
        'eval': Name('builtins', 'eval', f'open({str(canary)!r}, "w")'),
        'eval, Python 2': Name('__builtin__', 'eval', f'open({str(canary)!r}, "w")'),
        'exec': Name('builtins', 'exec', f'open({str(canary)!r}, "w")'),
        'open': Name('builtins', 'open', str(canary), 'w'),
        'io.open': Name('io', 'open', str(canary), 'w'),
        '__import__': Name('builtins', '__import__', 'antigravity'),
        'import_module': Name('importlib', 'import_module', 'antigravity'),
        'getattr of a module': Name('builtins', 'getattr', Name('builtins', '__import__', 'os'), 'system'),
        'getattr of a class': Call(getattr, HistoryBuffer, '__init__'),
        'getattr of another class': Call(getattr, torch.nn.Module, '__init__'),
        'attrgetter': Name('operator', 'attrgetter', 'system'),
        'partial': Name('functools', 'partial', Name('os', 'system'), command),
        'copyreg': Name('copyreg', '_reconstructor', Name('builtins', 'object'), Name('builtins', 'object'), None),
        'copy_reg': Name('copy_reg', '__newobj__', Name('builtins', 'object')),
        'torch loads bytes': Name('torch.storage', '_load_from_bytes', pickle.dumps(Call(os.system, command))),
        'torch.load': Name('torch', 'load', str(canary), None, None, False),
        'torch.hub.load': Name('torch.hub', 'load', 'a/b', 'c'),
        'torch type': Name('torch._tensor', '_rebuild_from_type_v2', Name('torch', 'Size'), 1, (), {}),
        'torch wrapper': Name('torch._utils', '_rebuild_wrapper_subclass', 1, 2, 3, 4, 5, 6, 7),
        'numpy.load': Name('numpy', 'load', str(canary)),
        'numpy fromfile': Name('numpy', 'fromfile', '/dev/zero'),
        'path': Name('pathlib', 'Path', str(canary)),
        'mmengine.load': Name('mmengine', 'load', str(canary)),
        'mmengine config': Name('mmengine.config', 'Config.fromstring', 'import os', '.py'),
        'runpy': Name('runpy', 'run_path', str(canary)),
        'lambda': Name('types', 'FunctionType', Name('types', 'CodeType'), {}),
        'pickle in a pickle': Name('pickle', 'loads', pickle.dumps(Call(os.system, command))),
        'codec': Name('codecs', 'open', str(canary), 'w'),
    }
    places = [
        ('extra',),
        ('state_dict', 'extra'),
        ('meta', 'extra'),
        ('message_hub', 'runtime_info', 'extra'),
        ('optimizer', 'x'),
    ]
    for i, (name, call) in enumerate(calls.items()):
        place = places[i % len(places)]
        yield f'calls {name} in {".".join(place)}', REFUSED, placed(call, *place)
    table = {'mean': Name('os', 'system')}
    state = {'max_length': 9, '_log_history': np.ones(1), '_count_history': np.ones(1), 'statistics_methods': table}
    yield 'a log buffer of foreign statistics', REFUSED, placed(Call(HistoryBuffer, state=state), 'extra')
    body = pickle.dumps({'state_dict': Call(os.system, command)}, protocol=4)
    yield 'protocol 4', REFUSED, archive({'a/data.pkl': body, 'a/version': b'3'})
    yield 'INST', REFUSED, archive({'a/version': b'3\n', 'a/data.pkl': b"(S'" + command.encode() + b"'\nios\nsystem\n."})
    yield 'OBJ', REFUSED, archive({'a/version': b'3\n', 'a/data.pkl': b"(cos\nsystem\nS'" + command.encode() + b"'\no."})
    yield 'extension code', REFUSED, archive({'a/version': b'3\n', 'a/data.pkl': b'\x80\x02\x82\x01)R.'})
    yield 'a pickle alone', REFUSED, lambda path: path.write_bytes(pickle.dumps(Call(os.system, command), protocol=2))
    yield (
        'code, legacy',
        REFUSED,
        lambda path: torch.save({'a': Call(os.system, command)}, path, _use_new_zipfile_serialization=False),
    )


def code_in_texts(placed, command, folder) -> Iterator[Case]:
    module = folder / 'hostile_module.py'
    module.write_text(f'import os\nos.system({command!r})\n')
    texts = {
        'a call': f"x = __import__('os').system({command!r})",
        'an import': f'import os\nos.system({command!r})\nmodel = dict()',
        'a lambda': f"model = dict(type=(lambda: __import__('os').system({command!r}))())",
        'a comprehension': f"model = dict(a=[__import__('os').system(c) for c in [{command!r}]])",
        'a decorator': '@exec\n@input\nclass X: pass',
        'an f-string': f'model = dict(a=f\'{{__import__("os").system({command!r})}}\')',
        'a default': f"def f(x=__import__('os').system({command!r})): pass\nmodel = dict()",
        'a base': f"_base_ = '{module}'\nmodel = dict(type='A')",
        'an environment variable': "model = dict(type='A', x='{{$HOME:}}')",
        'an import of a config': f"model = dict(type='A')\ncustom_imports = dict(imports=['{module.stem}'])",
        'read_base': f'from mmengine.config import read_base\nwith read_base():\n    from {module.stem} import *\n',
        'a function as type': f"model = dict(type='os.system', command={command!r})",
        'another function as type': f"model = dict(type='subprocess.getoutput', cmd={command!r})",
        'a constructor that evaluates': (
            f"model = dict(type='CameraMotionCompensation', warp_mode=\"__import__('os').system({command!r})\")"
        ),
        'a nested type': f"model = dict(type='A', b=dict(c=[dict(type='mmengine.load', file='{module}')]))",
        'a pickle to load': "model = dict(type='BaseDataset', ann_file='https://host/a.pkl')",
        'code of a hub': "model = dict(type='AutoModel', name='a/b', trust_remote_code=True)",
        'a scope': f"default_scope = '{module.stem}'\nmodel = dict(type='{module.stem}.A')",
        'no Python': 'model = dict(',
        'a null byte': "model = dict(type='A')\0import os",
        'a coding': '# -*- coding: utf-7 -*-\n+AGkAbQBwAG8AcgB0ACAAbwBz-\n',
        'deep nesting': f'model = {"[" * 5000}{"]" * 5000}',
    }
    places = [('meta', 'config'), ('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg')]
    for i, (name, text) in enumerate(texts.items()):
        for place in places if i < 3 else [places[i % 3]]:
            yield f'{name} in {".".join(place)}', CLEANED, placed(text, *place)
    yield 'a config that is no text', CLEANED, placed({'model': 1}, 'meta', 'cfg')


def damaged_files(honest, content, folder) -> Iterator[Case]:
    data = honest.read_bytes()
    with zipfile.ZipFile(honest) as file:
        records = {record.filename: file.read(record) for record in file.infolist()}
        places = [record.header_offset + 100 + record.file_size // 2 for record in file.infolist() if record.file_size > 200]
        size = len(file.read(file.namelist()[0]))
    root = next(iter(records)).split('/')[0]

    def flipped(place: int) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])

    def rewritten(pickled: bytes) -> Callable[[Path], None]:
        return archive({**records, f'{root}/data.pkl': pickled})

    for place in places[:: max(1, len(places) // 8)]:
        yield f'a flipped bit at {place}', REFUSED, flipped(place)
    yield 'a flipped bit in the pickle', REFUSED, flipped(size // 2)
    for share in (0.0, 0.01, 0.3, 0.7, 0.99, 0.9999):
        yield f'cut to {share}', REFUSED, lambda path, share=share: path.write_bytes(data[: int(len(data) * share)])
    yield 'with an end', REFUSED, lambda path: path.write_bytes(data + b'PK' + bytes(70000))
    yield 'with a beginning', REFUSED, lambda path: path.write_bytes(b'\x80\x02.' + data)
    yield 'twice', REFUSED, lambda path: path.write_bytes(data + data)
    yield 'a text', REFUSED, lambda path: path.write_text('import os')
    yield 'zeros', REFUSED, lambda path: path.write_bytes(bytes(5000))
    yield 'a picture', REFUSED, lambda path: path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100))
    yield 'nothing there', REFUSED, lambda path: None
    yield 'a folder', REFUSED, lambda path: path.mkdir()
    yield 'a dangling link', REFUSED, lambda path: path.symlink_to(folder / 'gone')
    yield 'a link to a device', REFUSED, lambda path: path.symlink_to('/dev/zero')
    yield 'a pipe', REFUSED, os.mkfifo
    yield 'an empty archive', REFUSED, archive({})
    yield 'a document', REFUSED, archive({'word/document.xml': b'<w/>', '[Content_Types].xml': b'<t/>'})
    yield 'TorchScript', REFUSED, archive({'a/data.pkl': b'', 'a/constants.pkl': b'', 'a/version': b'3'})
    yield 'a path out of the archive', REFUSED, archive({**records, f'{root}/../../evil': b'x'})
    yield 'an absolute path', REFUSED, archive({'/a/data.pkl': records[f'{root}/data.pkl']})
    yield 'two roots', REFUSED, archive({**records, 'b/data.pkl': b'x'})
    yield 'a second pickle', REFUSED, archive({**records, f'{root}/DATA.pkl': b'x'})
    yield 'compressed', REFUSED, archive({**records, f'{root}/data/999': bytes(10**7)}, zipfile.ZIP_DEFLATED)
    yield 'without its tensors', REFUSED, archive({f'{root}/data.pkl': records[f'{root}/data.pkl']})
    yield 'an empty pickle', REFUSED, rewritten(b'')
    yield 'a pickle that never ends', REFUSED, rewritten(records[f'{root}/data.pkl'][:-1])
    yield 'garbage as pickle', REFUSED, rewritten(bytes(range(256)))
    yield 'a memo that is not there', REFUSED, rewritten(b'\x80\x02h\x07.')
    yield 'legacy, cut', REFUSED, lambda path: legacy(content, path, 0.6)
    yield 'legacy, cut early', REFUSED, lambda path: legacy(content, path, 0.001)
    for claim in (10**4, 10**12, -1, 2**62):
        yield f'a storage of {claim} claimed values', REFUSED, archive(claiming(claim, (claim,)))
    yield 'a view out of its storage', REFUSED, archive(claiming(4, (10**9,)))
    yield 'a view from outside its storage', REFUSED, archive(claiming(4, (4,), offset=10**6))


def wrong_content(content, saved, placed) -> Iterator[Case]:
    weights, one = content['state_dict'], torch.ones(1)
    yield 'an empty dict', REFUSED, lambda path: torch.save({}, path)
    yield 'a list', REFUSED, lambda path: torch.save([one], path)
    yield 'a number', REFUSED, lambda path: torch.save(3, path)
    yield 'no weights', REFUSED, lambda path: torch.save({'meta': content['meta']}, path)
    for name, state in {
        'empty': {},
        'a list': [one],
        'nothing': None,
        'texts': dict.fromkeys(weights, 'a'),
        'one text': {**weights, 'x': 'a'},
        'numbers as names': dict(enumerate(weights.values())),
        'one number as name': {**weights, 7: one},
        'a null in a name': {**weights, 'a\0b': one},
        'a line break in a name': {**weights, 'a\nb': one},
        'a terminal command in a name': {**weights, 'a\x1b[2J': one},
        'bytes as names': {b'a': one},
        'a sparse tensor': {**weights, 's': torch.eye(3).to_sparse()},
        'a tensor without data': {**weights, 'm': torch.ones(3, device='meta')},
        'a tensor that is expanded': {**weights, 'e': one.expand(10**10)},
        'a tensor many times': {**weights, **{f't{i}': torch.ones(64, 64).expand(999, 64, 64) for i in range(40)}},
        'NumPy arrays': {name: value.numpy() for name, value in weights.items()},
    }.items():
        yield f'weights: {name}', REFUSED, saved(state_dict=state)
    shadowed, versioned, foreign = (OrderedDict(weights) for _ in range(3))
    shadowed.copy = shadowed.get = 'no method'
    versioned._metadata = {'': {'version': 'two'}}
    foreign._metadata = [1]
    yield 'weights whose methods are hidden', CLEANED, saved(state_dict=shadowed)
    yield 'a version that is a text', REFUSED, saved(state_dict=versioned)
    yield 'versions that are a list', REFUSED, saved(state_dict=foreign)
    yield 'averaged weights of another model', REFUSED, saved(ema_state_dict={'module.x': one})
    yield 'averaged weights: a list', REFUSED, saved(ema_state_dict=[one])
    yield 'meta: a list', REFUSED, saved(meta=[1])
    yield 'meta: numbers as names', REFUSED, saved(meta={1: 2})
    yield 'log: a list', REFUSED, saved(message_hub=[1])
    yield 'log: its scalars are a list', REFUSED, saved(message_hub={**content['message_hub'], 'log_scalars': [1]})
    yield 'log: without its parts', NOT_RESUMED, saved(message_hub={})
    for name, value in {'epoch': -1, 'iter': 'three', 'seed': 'three'}.items():
        yield f'meta: {name} {value}', NOT_RESUMED, placed(value, 'meta', name)
    yield 'without an epoch', NOT_RESUMED, saved(meta={'iter': 1})
    yield 'names of names', REFUSED, placed({(1, (2,)): 3}, 'meta', 'x')

    cycle: list = []
    cycle.append(cycle)
    yield 'a list in itself', REFUSED, placed(cycle, 'meta', 'x')
    bomb: list = []
    for _ in range(40):
        bomb = [bomb, bomb]
    yield 'a list of 2^40 lists', REFUSED, placed(bomb, 'meta', 'x')
    deep: object = 1
    for _ in range(120):
        deep = [deep]
    yield 'a deep list', REFUSED, placed(deep, 'meta', 'x')

    yield 'an array of objects', REFUSED, placed(np.array([{}, None]), 'meta', 'x')
    yield 'a structured array', REFUSED, placed(np.zeros(2, [('a', 'O'), ('b', 'f8')]), 'meta', 'x')
    yield 'an array of times', REFUSED, placed(np.zeros(2, 'M8[s]'), 'meta', 'x')
    dtype = Call(np.dtype, 'f8', False, True, state=(3, '<', None, ('a',), {'a': (np.dtype('O'), 0)}, 8, 8, 63))
    yield 'a number of a crafted dtype', REFUSED, placed(Call(np.float64(0).__reduce__()[0], dtype, bytes(8)), 'meta', 'x')
    build, _, state = np.ones(2).__reduce__()
    for name, change in {
        'shape': (1, (10**12,), state[2], False, bytes(16)),
        'negative shape': (1, (-2,), state[2], False, bytes(16)),
        'dtype': (1, (2,), 'O', False, bytes(16)),
        'bytes': (1, (2,), state[2], False, [1, 2]),
    }.items():
        yield f'an array of a crafted {name}', REFUSED, placed(Call(build, np.ndarray, (0,), b'b', state=change), 'meta', 'x')
    yield 'a huge empty array', CLEANED, placed(Call(build, np.ndarray, (10**13,), 'f8'), 'meta', 'x')
    yield 'an array by its class', REFUSED, placed(Call(np.ndarray, (10**13,), 'f8'), 'meta', 'x')
    yield 'a large count', CLEANED, placed(Counter({2: 10**9}), 'meta', 'x')
    for name, changes in {
        'texts': {'_log_history': np.array(['a'])},
        'a list': {'_log_history': [1.0]},
        'another length': {'_count_history': np.ones(3)},
        'a negative length': {'max_length': -1},
    }.items():
        buffer = HistoryBuffer([1.0], [1])
        buffer.__dict__.update(changes)
        yield f'a log buffer of {name}', REFUSED, placed(buffer, 'message_hub', 'log_scalars', 'x')
