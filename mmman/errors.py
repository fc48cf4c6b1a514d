"""The exceptions that mmman raises. Every message says what to change."""


class LocalLearningError(Exception):
    """Base class of all exceptions that mmman raises."""


class UnsupportedBackboneError(LocalLearningError, TypeError):
    """The backbone is not supported: its forward pass is not known as a chain of units."""


class PartitionError(LocalLearningError, ValueError):
    """The requested cuts don't fit the backbone's units."""


class MisuseError(LocalLearningError, RuntimeError):
    """Deprecated: the former name of :class:`ConfigError`. It is a base class until release 0.2, so existing handlers work."""


class ConfigError(MisuseError):
    """An option, or a combination of components, is invalid and would train the model incorrectly."""


class NonFiniteLossError(LocalLearningError, FloatingPointError):
    """A local loss is NaN or infinite."""


class CheckpointError(LocalLearningError, ValueError):
    """A checkpoint can't be read, can't be published as requested, or a run can't resume from it."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint, or a file that belongs to it, can't be written. The message names the path, the reason and the remedy."""


class ScalingError(LocalLearningError, ValueError):
    """A plan for several GPUs is inconsistent, or a number in it can't be parsed."""


class CostError(LocalLearningError, ValueError):
    """The input of the cost model is invalid, or the model has no result for it."""


class PeerError(LocalLearningError, ConnectionError):
    """Another process of the job has failed. The message names the process and the reason."""
