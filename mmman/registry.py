"""mmman's registries, which are children of mmengine's, so that ``type='mmman.X'`` works in the config of any library.

mmengine imports this module by name the first time a config names the scope ``mmman``.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOG_PROCESSORS as MMENGINE_LOG_PROCESSORS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmman',
    locations=['mmman.builder', 'mmman.heads', 'mmman.backbones', 'mmman.datasets'],
)
MODEL_WRAPPERS = Registry('model_wrapper', parent=MMENGINE_MODEL_WRAPPERS, scope='mmman', locations=['mmman.parallel'])
OPTIM_WRAPPERS = Registry('optimizer wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmman', locations=['mmman.engine'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmman', locations=['mmman.engine', 'mmman.runtime', 'mmman.watchdog'])
RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, scope='mmman', locations=['mmman.parallel'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='mmman', locations=['mmman.datasets'])
LOG_PROCESSORS = Registry('log_processor', parent=MMENGINE_LOG_PROCESSORS, scope='mmman', locations=['mmman.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='mmman', locations=['mmman.runtime'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmman', locations=['mmman.datasets'])


def resolve_type(kind: str | type | None) -> type | None:
    """Return the class or function that the ``type`` of a model's part refers to; None if it is None or not registered."""
    if not isinstance(kind, str):
        return kind
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(kind)
