"""What tests of the engine share."""

import pytest
from mmengine.logging import MessageHub


@pytest.fixture
def fresh_hub(request: pytest.FixtureRequest) -> MessageHub:
    """A current message hub that holds nothing of other tests."""
    return MessageHub.get_instance(f'{request.node.name}-{id(request)}')
