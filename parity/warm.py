"""Preloaded by the fork server: imports only. It must not compute (a thread pool does not survive
a fork) and must not touch CUDA (a context does not either).
"""

import gc
import signal

import safetensors.torch
import torch
import torch._dynamo  # what the first optimizer of a process would import, in every rank
import torch.distributed
import torch.distributed.device_mesh
import torch.distributed.tensor

import parity.backend
import parity.subject.target
import parity.tracing  # with what it needs, a tenth of a second in every rank

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what was imported lives on: no rank need look through it, and copy its pages
# Ranks inherit it: on Ctrl-C the parent ends them, and they say nothing of their own.
signal.signal(signal.SIGINT, signal.SIG_IGN)
