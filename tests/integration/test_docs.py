"""The code blocks of README and docs: commands run at small sizes, configs are built, scripts run.

A comment in front of a block says what the test does with it; without one, it runs as it stands::

    <!-- run: ARGUMENTS -->         the commands get these arguments too; they make them small
    <!-- base: LIBRARY::PATH -->    the block is part of a config that inherits from this one
    <!-- not run: REASON -->        only the names of tools, options, make's targets and configs are checked
    <!-- commands not run: REASON --> the same for all commands of the page from here on
"""

import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

import pytest
from markdown_it import MarkdownIt
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmman.datasets import write_shapes_dataset
from mmman.engine.config_check import check_config
from tests.conftest import ROOT

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')
pytestmark = pytest.mark.whole_models

FOLDERS = ('docs', 'docs/howto', 'docs/design', 'docs/reference')
PAGES = ['README.md', *sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob('*.md'))]
WITHOUT = {
    'docs/results.md': 'its commands measured for hours, on the commits and data that the page names',
    'docs/howto/pretrained_backbones.md': 'test_transfer.py builds its configs, and publishes',
}
TOOLS = {
    'fit': 'tools/fit_memory.py',
    'train': 'tools/train.py',
    'test': 'tools/test.py',
    'measure': 'tools/analysis_tools/measure_training.py',
    'inspect': 'tools/analysis_tools/inspect_blocks.py',
    'publish': 'tools/publish_model.py',
}
"""The files that the subcommands of ``mmman`` run."""


@dataclass
class Block:
    """A code block: its language, its text, the file name that the text before it gives, and the comment in front of it."""

    language: str
    text: str
    name: str
    mark: str
    value: str

    @property
    def is_command(self):
        return self.language == 'bash' or re.match(r'(python|mmman|make|pip|tools/\S+\.sh)\s', self.text) is not None


def blocks_of(page):
    """The code blocks of a page, in order."""
    found, before, mark, commands_mark = [], '', ('', ''), ('', '')
    for token in MarkdownIt('commonmark').parse((ROOT / page).read_text()):
        if token.type == 'html_block' and (comment := re.match(r'<!-- ([a-z ]+): (.*?) -->', token.content)):
            mark = comment.groups()
            if mark[0] == 'commands not run':
                mark, commands_mark = ('', ''), ('not run', mark[1])
        elif token.type in ('fence', 'code_block'):
            names = re.findall(r'`(\w+\.py)`', before)
            block = Block(token.info.strip(), token.content, names[0] if names else f'block_{len(found)}.py', *mark)
            if block.is_command and not block.mark:
                block.mark, block.value = commands_mark
            found.append(block)
            before, mark = '', ('', '')
        elif token.type == 'inline':
            before += token.content
    return found


def commands_of(text):
    """The words of every command of a block, without variables in front."""
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r'[A-Z_]+=', words[0]):
            del words[0]
        if words and re.match(r'(python|mmman|make)$|tools/', words[0]):
            yield words


def tool_of(words):
    """The file that a command runs and its arguments. A module (``python -m``) or a page's own script is None."""
    if words[0] == 'mmman':
        return TOOLS[words[1]], words[2:]
    if words[0] == 'python':
        return (words[1], words[2:]) if words[1].startswith('tools/') else (None, words[1:])
    return words[0], words[1:]


@pytest.fixture(scope='module')
def help_of():
    """What a tool's ``--help`` prints, by the tool's path."""
    texts = {}

    def call(tool):
        if tool not in texts:
            text = io.StringIO()
            with redirect_stdout(text):
                run_tool(tool, ['--help'])
            texts[tool] = text.getvalue()
        return texts[tool]

    return call


def run_command(words, extra, folder):
    """Run a command from ``folder``; one that trains in a process of its own."""
    tool, arguments = tool_of(words)
    arguments = [*arguments, *shlex.split(extra)]
    if tool != TOOLS['train']:
        run_tool(tool, arguments)
        return
    done = subprocess.run([sys.executable, ROOT / tool, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f'{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}'


def run_tool(tool, arguments):
    """Run a tool in this process, which has imported the libraries already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [tool, *arguments])
        try:
            runpy.run_path(str(ROOT / tool), run_name='__main__')
        except SystemExit as ended:
            assert not ended.code, f'{tool} {shlex.join(arguments)}: {ended.code}'


def build(path):
    """Read a config, check its options and build its model."""
    cfg = Config.fromfile(path)
    check_config(cfg)
    init_default_scope(cfg.default_scope)
    MODELS.build(cfg.model)


@pytest.mark.parametrize('page', [page for page in PAGES if page not in WITHOUT])
def test_blocks(page, tmp_path, monkeypatch):
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('PYTHONPATH', f'{ROOT}:{tmp_path}')
    for block in blocks_of(page):
        if block.mark == 'not run':
            continue
        if block.is_command:
            if 'configs/demo' in block.text:
                write_shapes_dataset(tmp_path / 'data' / 'demo', train_images=4, val_images=2, size=64)
            for words in commands_of(block.text):
                run_command(words, block.value if block.mark == 'run' else '', tmp_path)
        elif block.language in ('python', 'diff'):
            run_python(block, tmp_path)


def run_python(block, folder):
    """Build the model of a config, run a script, or only write a module that a later block imports."""
    text, path = block.text, folder / block.name
    if block.language == 'diff':
        text = ''.join(line[1:] for line in text.splitlines(keepends=True) if not line.startswith('-'))
    if block.mark == 'base':
        text = f"_base_ = '{block.value}'\n{text}"
    path.write_text(text)
    if '__main__' in text:
        arguments = shlex.split(block.value)
        done = subprocess.run([sys.executable, block.name, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif text.startswith('_base_'):
        build(path)
    elif 'import ' in text and 'class ' not in text:
        runpy.run_path(str(path))
    elif 'import ' in text:
        compile(text, path, 'exec')
    else:
        Config.fromfile(path)


@pytest.mark.parametrize('page', [page for page in PAGES if page not in WITHOUT])
def test_commands_name_what_there_is(page, help_of):
    """Also those that are not run: tools, their options, make's targets, and configs."""
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    for block in blocks_of(page):
        if not block.is_command:
            continue
        for words in commands_of(block.text):
            if words[0] == 'make':
                assert [word for word in words[1:] if '=' not in word and word not in targets] == []
                continue
            tool, arguments = tool_of(words)
            if tool is None:
                continue
            assert (ROOT / tool).is_file(), tool
            files = [word for word in arguments if re.fullmatch(r'configs/[\w/.*-]+\.py', word)]
            assert [name for name in files if not any(ROOT.glob(name))] == []
            if tool.endswith('.py'):
                options = [word.partition('=')[0] for word in arguments if re.match(r'--[a-z]', word)]
                known = re.findall(r'--[a-z][\w-]*', help_of(tool))
                assert [option for option in options if option not in known] == [], tool


def test_readme_is_one_page_with_links_that_work():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 120
    links = re.findall(r'\]\(([^)#]+)[^)]*\)', text)
    assert len(links) > 15
    assert [link for link in links if '://' not in link and not (ROOT / link).exists()] == []
