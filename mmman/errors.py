"""What can go wrong, in types that a caller can tell apart. Every message says what to change."""


class LocalLearningError(Exception):
    """Base of all errors that mmman raises on purpose."""


class UnsupportedBackboneError(LocalLearningError, TypeError):
    """The backbone's forward pass is not known as a chain of units."""


class PartitionError(LocalLearningError, ValueError):
    """The asked cuts don't fit the backbone's units."""


class MisuseError(LocalLearningError, RuntimeError):
    """Parts of local learning were combined in a way that would train something else than asked."""


class NonFiniteLossError(LocalLearningError, FloatingPointError):
    """A local loss is NaN or infinite."""


class CheckpointError(LocalLearningError, ValueError):
    """A checkpoint can't be published as asked, or a run can't go on from it."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint, or what belongs to it, can't be written; the message names the path, the reason and the remedy."""


class ScalingError(LocalLearningError, ValueError):
    """A plan for several GPUs doesn't fit together, or a number in it can't be read."""


class CostError(LocalLearningError, ValueError):
    """A question to the cost model that has no meaning, or no answer."""


class PeerError(LocalLearningError, ConnectionError):
    """Another process of the job has failed; the message says which and why."""
