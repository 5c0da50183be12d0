"""LoKO: a low-rank Kalman optimizer for parameter-efficient fine-tuning on a stream."""

from loko.jacobian import JacobianError
from loko.optimizer import PAPER, LoKO, NonFiniteError, parameter_groups

__version__ = "0.2.0"

__all__ = ["PAPER", "JacobianError", "LoKO", "NonFiniteError", "parameter_groups"]
