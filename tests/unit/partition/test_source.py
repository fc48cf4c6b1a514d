import pytest

from mmman.errors import ConfigError
from mmman.partition import Unit, find_source

UNITS = [Unit.single(f'layer{stage + 1}.{i}', stage) for stage in range(3) for i in range(2)]


@pytest.mark.parametrize(
    ('source_unit', 'sources'),
    [
        ('next', [1, 2, 3, 4, 5]),
        ('next_stage', [2, 2, 4, 4, 5]),
        (['layer2.1', 'layer3.1'], [3, 3, 3, 5, 5]),
        (['layer3.1'], [5, 5, 5, 5, 5]),
    ],
)
def test_the_unit_that_is_copied(source_unit, sources):
    assert [find_source(UNITS, cut, source_unit) for cut in range(5)] == sources


@pytest.mark.parametrize(
    ('source_unit', 'message'),
    [
        (['layer2.1', 'layer9.0'], r"source_unit names \['layer9.0'\]: choose from the units layer1.0, "),
        (['layer2.0'], r"source_unit=\['layer2.0'\] names no unit after layer2.0, the end of a block: add one of layer2.1, "),
    ],
)
def test_names_of_units_that_do_not_fit(source_unit, message):
    with pytest.raises(ConfigError, match=message):
        find_source(UNITS, 2, source_unit)
