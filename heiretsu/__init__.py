"""A compact 3D-parallel GPT in plain PyTorch: data, tensor and pipeline parallelism, by hand.

Reading order: mesh, layout, comm, layers, model, schedule, pipeline, sync, train.
"""

from heiretsu.config import PRESETS, Model, Run, problems
from heiretsu.mesh import Mesh, Topology
from heiretsu.train import Batch, Trainer

__all__ = ["PRESETS", "Batch", "Mesh", "Model", "Run", "Topology", "Trainer", "problems"]
__version__ = "0.1.0"
