"""No checkpoint runs code, writes or removes a file, or ends in a traceback: more than 100 files, five ways to use each."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmman.runtime.launch import check_checkpoint, end_on_error, set_resume
from mmman.runtime.weights_hook import WeightsHook
from tests.integration.hostile_files import cases
from tests.integration.hostile_pickles import CLEANED, NOT_RESUMED, REFUSED, Call, Case, Name, Naming
from tests.toy import toy_batches, toy_config
from tools import publish_model
from tools import test as test_tool

ADVICE = ('weights_only', 'add_safe_globals', 'safe_globals', 'Traceback')
MODEL = toy_config(num_blocks=2, net={'units': (1, 1, 1), 'width': 2}, partition=['layer1.0']) | {'channels': (4, 8)}
FORBIDDEN = ('os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'subprocess.Popen', 'os.remove', 'os.rename', 'os.rmdir')
WRITES = ('w', 'a', 'x', '+')


class Audit:
    """Notes what a process does that reading a checkpoint has no need of, while it is switched on."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.found: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event in FORBIDDEN:
            forbidden = str(arguments[0]).startswith(str(self.allowed)) is False
        else:
            mode = arguments[1] if event == 'open' else None
            forbidden = isinstance(mode, str) and any(flag in mode for flag in WRITES) and not self._is_allowed(arguments[0])
        if forbidden:
            self.found.append(f'{event}{arguments[:2]}')

    def _is_allowed(self, path: object) -> bool:
        return not isinstance(path, (str, Path)) or str(path).startswith((str(self.allowed), '/dev/'))


@pytest.fixture(scope='module')
def audit() -> Audit:
    return Audit()


def runner_of(folder: Path, model: dict = MODEL, **options: object) -> Runner:
    batches = [{**batch, 'inputs': batch['inputs'].float()} for batch in toy_batches(1, size=2, pixels=8)]
    runner = Runner(
        model=MODELS.build(model),
        work_dir=str(folder),
        train_dataloader=DataLoader(batches, collate_fn=lambda batch: batch[0]),
        train_cfg={'type': 'mmman.EpochBasedTrainLoop', 'max_epochs': 1},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9}},
        param_scheduler=[{'type': 'MultiStepLR', 'milestones': [1, 2]}],
        custom_hooks=[{'type': 'mmman.EMABiasHook'}, {'type': 'EMAHook'}],
        default_hooks={'logger': None, 'checkpoint': {'type': 'mmman.CheckpointHook', 'interval': 1}},
        log_level='ERROR',
        experiment_name=folder.name + str(len(options)),
        **options,
    )
    runner.register_hook(WeightsHook())
    return runner


@pytest.fixture(scope='module')
def honest(tmp_path_factory) -> Path:
    """The checkpoint of a short training run, with averaged weights, momentum, schedules and a log."""
    folder = tmp_path_factory.mktemp('honest')
    runner_of(folder).train()
    return folder / 'epoch_1.pth'


@pytest.fixture(scope='module')
def uses(honest, tmp_path_factory) -> dict[str, Callable[[Path], None]]:
    """What the tools do with a checkpoint, by functions of theirs; each ends by SystemExit where it is refused."""
    folder = tmp_path_factory.mktemp('uses')
    fresh = runner_of(folder / 'fresh')
    fresh.train()
    resumed = runner_of(folder / 'resumed', resume=True, load_from=str(honest))
    resumed.train()
    network = MODELS.build(MODEL)

    def resume(path: Path) -> None:
        cfg = Config({'work_dir': str(folder / 'resumed')})
        set_resume(cfg, str(path))
        with end_on_error(str(path)):
            resumed.resume(cfg.load_from)

    def load_from(path: Path) -> None:
        with end_on_error(str(path)):
            fresh.load_checkpoint(str(path))

    def test(path: Path) -> None:
        load_from(check_checkpoint(str(path), 'checkpoint'))

    def publish(path: Path) -> None:
        sys.argv[1:] = [str(path), str(folder / 'published' / 'model.pth'), '--force']
        publish_model.main()

    def pretrained(path: Path) -> None:
        with end_on_error(str(path)):
            PretrainedInit(str(path), prefix='backbone.')(network.backbone)

    return {use.__name__: use for use in (resume, load_from, test, publish, pretrained)}


@pytest.fixture(autouse=True)
def arguments(monkeypatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['tool'])


def snapshot(folder: Path) -> dict[str, object]:
    """All files below a folder, their contents' checksums and times."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size, path.is_symlink()) for path in sorted(folder.rglob('*'))
    }


def fault_of(name: str, expected: str, use: str, run: Callable[[Path], None], path: Path) -> str | None:
    """What went wrong when a checkpoint was used, if anything."""
    try:
        run(path)
    except SystemExit as error:
        line = str(error)
        if '\n' in line or path.name not in line or any(advice in line for advice in ADVICE):
            return f'{name}, {use}: not one line that names the file: {line}'
        if ';' not in line:
            return f'{name}, {use}: does not say what to do: {line}'
        if expected == CLEANED or (expected == NOT_RESUMED and use != 'resume'):
            return f'{name}, {use}: refused: {line}'
    except BaseException as error:
        return f'{name}, {use}: {type(error).__name__}: {error}'
    else:
        if expected == REFUSED or (expected == NOT_RESUMED and use == 'resume'):
            return f'{name}, {use}: accepted'
    return None


def test_no_file_runs_code_or_changes_another(honest, uses, audit, tmp_path, capfd):
    canary, outside, files = (tmp_path / name for name in ('canary', 'outside', 'files'))
    outside.mkdir()
    files.mkdir()
    written = [*written_files(cases(honest, canary, outside), files)]
    kinds = Counter(expected for _, expected, _ in written)
    assert len(written) >= 150 and kinds[REFUSED] >= 100
    table, before = dict(HistoryBuffer._statistics_methods), (snapshot(outside), snapshot(files), snapshot(honest.parent))

    faults = []
    work = honest.parent.parent / 'uses0'
    assert work.is_dir()
    audit.allowed = work
    for name, expected, path in written:
        for use, run in uses.items():
            faults.append(fault_of(name, expected, use, run, path))
            if canary.exists():
                faults.append(f'{name}, {use}: ran code')
                canary.unlink()
    audit.allowed = None

    assert [fault for fault in faults if fault] + audit.found == []
    assert (snapshot(outside), snapshot(files), snapshot(honest.parent)) == before
    assert dict(HistoryBuffer._statistics_methods) == table
    assert not any(advice in ''.join(capfd.readouterr()) for advice in ADVICE)


def written_files(all_cases: Iterator[Case], folder: Path) -> Iterator[tuple[str, str, Path]]:
    for number, (name, expected, write) in enumerate(all_cases):
        path = folder / f'case{number}.pth'
        write(path)
        yield name, expected, path


def test_the_files_are_dangerous(honest, tmp_path):
    """What payloads do without the checks: else the test above would pass on files that do nothing."""
    canary = tmp_path / 'canary'
    dangerous = ('calls os.system', 'calls eval in', 'calls open', 'INST', 'a call in', 'a comprehension', 'a decorator')
    ran = {}
    for name, _, write in cases(honest, canary, tmp_path):
        if name.startswith(dangerous) and 'decorator' not in name:
            path = tmp_path / 'file.pth'
            write(path)
            process = os.fork()
            if process == 0:
                try:
                    run_all_of(path)
                finally:
                    os._exit(0)
            os.waitpid(process, 0)
            ran[name] = canary.exists()
            canary.unlink(missing_ok=True)
            path.unlink()
    assert len(ran) >= 8 and all(ran.values()), ran


def run_all_of(path: Path) -> None:
    """Load a checkpoint and run its configs, as mmengine does."""
    loaded = torch.load(path, weights_only=False)
    meta, hub = loaded['meta'], loaded['message_hub']['runtime_info']
    for text in (meta.get('config'), meta.get('cfg'), hub.get('cfg')):
        if text:
            Config.fromstring(text, '.py')


def test_honest_checkpoints_of_each_kind_pass(honest, uses, tmp_path):
    content = torch.load(honest)
    weights = content['state_dict']
    kinds = {
        'raw': content,
        'best': {name: content[name] for name in ('meta', 'state_dict', 'message_hub')},
        'plain': dict(weights),
        'wrapped': {'state_dict': {f'module.{name}': value for name, value in weights.items()}},
        'half': {'state_dict': {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}},
    }
    for name, kind in kinds.items():
        for is_new in (True, False):
            path = tmp_path / f'{name}{is_new}.pth'
            torch.save(kind, path, _use_new_zipfile_serialization=is_new)
            uses['load_from'](path)
            uses['test'](path)
            if name not in ('plain', 'wrapped'):
                uses['publish'](path)
                uses['pretrained'](path)
    uses['resume'](honest)
    for published in (honest.parent.parent / 'uses0' / 'published').glob('*.pth'):
        uses['load_from'](published)
        uses['pretrained'](published)


def test_other_local_heads_end_with_one_line_that_names_the_file(honest, tmp_path):
    model = {**MODEL, 'backbone': {**MODEL['backbone'], 'partition': ['layer2.0']}}
    runner = runner_of(tmp_path, model, resume=True, load_from=str(honest))
    with (
        pytest.raises(
            SystemExit, match='epoch_1.pth: cannot resume: .* has local heads on .*: load_from without resume'
        ) as error,
        end_on_error(str(honest)),
    ):
        runner.train()
    assert '\n' not in str(error.value)


def test_the_train_tool_ends_with_one_line(honest, tmp_path):
    canary, config, file = tmp_path / 'canary', tmp_path / 'config.py', tmp_path / 'file.pth'
    torch.save({**torch.load(honest), 'x': Name('os', 'system', f'touch {canary}')}, file, pickle_module=Naming)
    config.write_text('model = dict()\n')
    command = [sys.executable, 'tools/train.py', config, '--resume', file, '--work-dir', tmp_path / 'work']
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1 and not canary.exists()
    assert done.stderr.startswith(f'--resume: {file} contains os.system, which is not needed for weights or logs')
    assert done.stderr.count('\n') == 1


def test_the_test_tool_ends_with_one_line(tmp_path, monkeypatch):
    config, file = tmp_path / 'config.py', tmp_path / 'file.pth'
    config.write_text(
        "custom_imports = dict(imports=['tests.toy'])\n"
        "model = dict(type='mmman.ToyClassifier', backbone=dict(type='mmman.ToyNet'))\n"
        "test_dataloader = dict(dataset=[0], batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False))\n"
        "test_evaluator = []\ntest_cfg = dict()\nlog_level = 'ERROR'\n"
    )
    monkeypatch.setattr(sys, 'argv', ['test.py', str(config), str(file), '--work-dir', str(tmp_path / 'work')])
    for content, line in (
        ({'state_dict': {}}, 'file.pth has no weights: its state_dict has no tensor; '),
        (
            {'state_dict': {'other.weight': torch.ones(1)}},
            'file.pth has no weights of this model: its tensors are other.weight',
        ),
        ({'model': {'stem.weight': torch.ones(1)}}, 'file.pth has no weights of this model: its tensors are none'),
        (torch.ones(1), 'file.pth holds a tensor, not the weights of a model'),
    ):
        torch.save(content, file)
        with pytest.raises(SystemExit, match=line) as error:
            test_tool.main()
        assert '\n' not in str(error.value) and ';' in str(error.value)


def test_a_bare_torch_load_does_not_change_what_log_buffers_compute(tmp_path):
    table = dict(HistoryBuffer._statistics_methods)
    methods = {'mean': HistoryBuffer.max, 'own': HistoryBuffer.min}
    state = {**HistoryBuffer([1.0, 3.0], [1, 1]).__dict__, 'statistics_methods': methods}
    torch.save({'buffer': Call(HistoryBuffer, state=state)}, tmp_path / 'a.pth')
    buffer = torch.load(tmp_path / 'a.pth')['buffer']
    assert type(buffer) is HistoryBuffer and buffer.statistics('mean') == 2
    assert dict(HistoryBuffer._statistics_methods) == table and not any(map(callable, vars(buffer).values()))
