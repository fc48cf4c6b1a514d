"""Messages on one line."""

import pytest

from mmman.errors import ConfigError
from mmman.messages import errors_end_the_program, one_line


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('a  b\n\tc', 'a b c'),
        ('\x1b[31mred\x1b[0m', '[31mred [0m'),
        ('é 語', 'é 語'),
        (ValueError('a\r\nb'), 'a b'),
        ('', ''),
    ],
)
def test_line_ends_and_control_characters_become_spaces(text, line):
    assert one_line(text) == line


def test_a_long_text_is_cut_to_the_length():
    assert one_line('a' * 10, 10) == 'a' * 10
    assert one_line('a' * 11, 10) == 'aaaaaa ...'
    assert len(one_line('a b ' * 999)) == 400


def test_an_error_of_mmman_ends_the_program_in_one_line():
    with pytest.raises(SystemExit) as ended, errors_end_the_program():
        raise ConfigError('set window=1')
    assert ended.value.code == 'ConfigError: set window=1'
    with pytest.raises(ZeroDivisionError), errors_end_the_program():
        _ = 1 / 0
