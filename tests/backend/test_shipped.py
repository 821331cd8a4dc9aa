"""torch's own tests of its collectives pass on the checking backend, but for those named here."""

from pathlib import Path

import pytest
import torch

from parity import Backend, launch
from tests.backend import shipped

LEFT_OUT = {
    "asks for the name or the words of gloo": """
        test_get_backend test_barrier_timeout_full_group test_barrier_timeout_group
        test_monitored_barrier_failure_order test_monitored_barrier_gloo
        test_monitored_barrier_gloo_rank_0_timeout test_monitored_barrier_gloo_subgroup
        test_monitored_barrier_wait_all_ranks""",
    "makes its default group anew, by the name of gloo": "test_barrier_timeout_global",
    "makes a group of NCCL or MPI": """
        test_average_parameters test_batch_isend_irecv_mixed_backend_err
        test_monitored_barrier_allreduce_hang test_monitored_barrier_allreduce_hang_wait_all_ranks
        test_nccl_high_priority_stream""",
    "needs a real GPU: SyncBatchNorm, streams, the compiler, or the number of a device": """
        test_DistributedDataParallel_SyncBatchNorm
        test_DistributedDataParallel_SyncBatchNorm_2D_Input
        test_DistributedDataParallel_SyncBatchNorm_Channels_Last
        test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value
        test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient
        test_DistributedDataParallel_SyncBatchNorm_No_Affine
        test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process
        test_DistributedDataParallel_SyncBatchNorm_half
        test_ddp_inference test_ddp_uneven_inputs_stop_iteration_sync_bn test_sync_bn_logged
        test_ddp_apply_optim_in_backward
        test_ddp_apply_optim_in_backward_grad_as_bucket_view_false
        test_ddp_apply_optim_in_backward_ignored_params
        test_ddp_native_mixed_precision_grad_as_bucket_view_no_set_grad_none
        test_ddp_native_mixed_precision_grad_as_bucket_view_set_grad_to_none
        test_ddp_native_mixed_precision_no_grad_as_bucket_view_no_set_grad_none
        test_ddp_native_mixed_precision_no_grad_as_bucket_view_set_grad_to_none
        test_ddp_compile_static_graph test_ddp_device test_ddp_logging_data_gpu""",
    "sleeps for seconds, and passes as its twin without GPUs": """
        test_barrier_cuda test_barrier_full_group_cuda test_barrier_group_cuda""",
    "takes minutes on a CPU": """
        test_ddp_grad_div_uneven_inputs test_ddp_profiling_autograd_profiler
        test_ddp_profiling_execution_trace test_ddp_profiling_torch_profiler
        test_ddp_uneven_inputs""",
    "counts the groups that its process has made: passes alone": """
        test_3_level_hierarchical_model_averager""",
    "reads what NCCL writes into a profile": "test_send_recv_nccl_torch_profiler",
}
NAMES = frozenset(" ".join(LEFT_OUT.values()).split())
ALL = shipped.ON_CPU + shipped.ON_GPU
CASES = [
    (2, shipped.ON_CPU, 94),
    (3, shipped.ON_CPU, 115),
    (4, ALL, 228),
]  # what passes in torch 2.13


@pytest.mark.parametrize(("world", "roles", "count"), CASES)
def test_passes(world: int, roles: tuple[shipped.Role, ...], count: int, tmp_path: Path) -> None:
    backend = Backend(deadline=120)
    ranks = launch(shipped.run, world, str(tmp_path), roles, NAMES, backend=backend)
    passed = [sorted(name for name, how in rank.items() if how == "passed") for rank in ranks]
    assert passed == [passed[0]] * world
    if torch.__version__.startswith("2.13."):
        assert len(passed[0]) == count
