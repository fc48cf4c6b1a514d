"""The command ``mmman``: its subcommands, and one line for what it doesn't know."""

import pytest

from mmman import __main__ as command
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def tools_of_the_checkout(monkeypatch):
    monkeypatch.setattr(command, 'TOOLS', ROOT / 'tools')
    monkeypatch.setattr('sys.argv', ['mmman'])


def run(*args):
    with pytest.raises(SystemExit) as caught:
        command.main([*args])
    return caught.value.code


def test_help_names_every_command(capsys):
    assert run('--help') == 0
    text = capsys.readouterr().out
    assert text.startswith('usage: mmman COMMAND [arguments]')
    assert all(f'\n  {name} ' in text and about in text for name, (_, about) in command.COMMANDS.items())
    assert [*command.COMMANDS] == ['fit', 'train', 'test', 'measure', 'inspect', 'publish']


@pytest.mark.parametrize('name', command.COMMANDS)
def test_a_command_passes_its_arguments_to_the_tool(name, capsys):
    assert run(name, '--help') == 0
    assert capsys.readouterr().out.startswith(f'usage: mmman {name} ')


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'mmman: error: the following arguments are required: COMMAND'),
        (['tarin', 'config.py'], "invalid choice: 'tarin' (choose from"),
        (['train'], 'mmman train: error: the following arguments are required: config'),
        (['fit', 'config.py'], 'mmman fit: error: say what to look for'),
    ],
)
def test_what_is_missing_or_wrong_is_named(args, message, capsys):
    assert run(*args) == 2
    assert message in capsys.readouterr().err


def test_a_package_without_its_tools_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, 'TOOLS', tmp_path)
    assert run('train', 'config.py') == 2
    assert f'there is no {tmp_path / "train.py"}: install mmman' in capsys.readouterr().err
