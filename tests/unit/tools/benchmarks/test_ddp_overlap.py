"""The table of ``ddp_overlap.py``: ratios are taken within a round, also of a single one."""

import pytest

from tools.benchmarks.ddp_overlap import main, print_table


@pytest.mark.parametrize(
    ('rounds', 'expected'),
    [(1, '| ours / stock | 0.500 | 0.500 to 0.500 |'), (3, '| ours / stock | 0.500 | 0.250 to 1.000 |')],
)
def test_ratios_are_taken_within_a_round(rounds, expected, capsys):
    ours = [1.0, 1.0, 4.0][:rounds]
    stock = [2.0, 4.0, 4.0][:rounds]
    print_table([dict(ours=a, stock=b, unreduced=1.0) for a, b in zip(ours, stock, strict=True)])
    assert expected in capsys.readouterr().out


def test_no_round_is_refused(monkeypatch):
    config = 'configs/resnet32_manpp_k16_cifar10.py'
    monkeypatch.setattr('sys.argv', ['ddp_overlap.py', config, '--rounds', '0'])
    with pytest.raises(SystemExit, match='--rounds 0: give at least 1'):
        main()
