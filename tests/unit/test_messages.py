"""Messages on one line."""

import pytest

from mmman.messages import one_line


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
