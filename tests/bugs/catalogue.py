"""All planted bugs, by topic."""

from tests.bugs import (  # noqa: F401
    data,
    data_parallel,
    drift,
    loss,
    microbatches,
    norm_and_clip,
    optimizer,
    pipeline,
    replicas,
    tensor_parallel,
    tied,
    vocabulary,
)
from tests.bugs.bug import BUGS, Bug

__all__ = ["BUGS", "Bug"]
