"""Mistakes in the use of what is there already, each a change of some places in a user's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tests.subjects.code import Subject


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """In the code that a user writes for `subject`, each key of `changes`, there once, becomes its
    value. In `case` the first tensor that differs is `first`, by `status`; the only culprit is
    `culprit` (if it is not the same: it shows after one step already), and of it `words` are said.
    """

    name: str
    subject: str
    case: str
    changes: dict[str, str]
    first: str
    words: str
    status: str = "bug"
    culprit: str = ""

    def plant(self, subject: Subject) -> Callable[..., Any]:
        """The subject's check with the mistake in it."""
        source = subject.source
        for old, new in self.changes.items():
            places = [code for code in subject.code if old in code]
            assert len(places) == 1, f"{self.name}: {len(places)} functions have {old}"
            assert places[0].count(old) == 1, f"{self.name}: {old} is there more than once"
            code = next(code for code in subject.code if old in code)
            source = source.replace(code, code.replace(old, new))
            subject = Subject(subject.module, subject.name, source)
        planted = ModuleType(f"planted.{self.name}")
        exec(source, planted.__dict__)  # noqa: S102 (our own)
        check: Callable[..., Any] = getattr(planted, f"check_{subject.name}")
        return check


NO_AVERAGE = "an average over dp is missing"
NO_SUM = "a sum over tp (an all-reduce) is missing"

MISTAKES = [
    Mistake(
        name="only_a_part_is_wrapped",
        subject="ddp",
        case="dp2",
        changes={
            "    model = DistributedDataParallel(mlp(), process_group=mesh.get_group())\n"
            "    model.module.load_state_dict(full)\n": "    model = mlp()\n"
            "    model.load_state_dict(full)\n"
            "    model[2] = DistributedDataParallel(model[2], process_group=mesh.get_group())\n"
        },
        status="split",
        first="gradient of 7.bias",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="the_module_inside_is_called",
        subject="ddp",
        case="dp3",
        changes={"return model": "return model.module"},
        status="split",
        first="gradient of 7.bias",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="a_parameter_that_ddp_ignores",
        subject="ddp",
        case="dp2",
        changes={
            "    model = DistributedDataParallel(mlp()": "    ddp, inner = "
            "DistributedDataParallel, mlp()\n"
            '    ddp._set_params_and_buffers_to_ignore_for_model(inner, ["4.weight"])\n'
            "    model = ddp(inner"
        },
        status="split",
        first="gradient of 4.weight",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="no_sync_is_left_on",
        subject="ddp_no_sync",
        case="dp2",
        changes={"        mean_square(late": "            mean_square(late"},
        status="split",
        first="gradient of 7.bias",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="sync_is_switched_on_for_the_backward_only",  # karpathy/build-nanogpt#30
        subject="ddp_no_sync",
        case="dp2",
        changes={
            "        mean_square(late := model(x[2:])": "            late = model(x[2:])\n"
            "        mean_square(late"
        },
        status="split",
        first="gradient of 7.bias",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="no_microbatch_is_weighted",
        subject="ddp_no_sync",
        case="dp3",
        changes={
            "x[:2])).div(2)": "x[:2]))",
            "x[2:])).div(2)": "x[2:]))",
        },
        first="gradient of 7.bias",
        culprit="backward of output of 7",
        words="it is 2 times the baseline",
    ),
    Mistake(
        name="every_rank_has_the_same_rows",
        subject="ddp_own_share",
        case="dp2",
        changes={"[mesh.get_local_rank()]": "[0]"},
        first="forward of output",
        words="of 2 parts of the batch (dp, from 0), part 1 is 0",
    ),
    Mistake(
        name="a_parameter_that_fsdp_ignores",
        subject="fsdp",
        case="dp2",
        changes={
            "return fully_shard(model, mesh=mesh)": "return fully_shard(model, mesh=mesh, "
            "ignored_params={model[7].weight})"
        },
        status="split",
        first="gradient of 7.weight",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="the_root_is_not_sharded",
        subject="fsdp",
        case="dp2",
        changes={"return fully_shard(model, mesh=mesh)": "return model"},
        status="split",
        first="gradient of 7.bias",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="gradient_sync_is_left_off",
        subject="fsdp",
        case="dp2",
        changes={
            "    return fully_shard(model, mesh=mesh)": "    fully_shard(model, mesh=mesh)\n"
            "    model.set_requires_gradient_sync(False)\n"
            "    return model"
        },
        first="gradient of 7.bias",
        words="it is zero everywhere",
    ),
    Mistake(
        name="gradients_are_summed",
        subject="fsdp",
        case="dp2",
        changes={
            "    return fully_shard(model, mesh=mesh)": "    fully_shard(model, mesh=mesh)\n"
            "    model.set_gradient_divide_factor(1.0)\n"
            "    return model"
        },
        first="gradient of 7.bias",
        words="it is 2 (dp) times the baseline",
    ),
    Mistake(
        name="the_optimizer_is_made_before_the_model_is_sharded",
        subject="fsdp",
        case="dp2",
        changes={
            "    for layer": "    optimizer = adamw(model.parameters())\n    for layer",
            "return fully_shard(model, mesh=mesh)": "return parity.Program("
            "fully_shard(model, mesh=mesh), optimizer=optimizer)",
        },
        first="state of 0.weight",
        words="never updated",
    ),
    Mistake(
        name="replicas_are_forgotten_in_the_root",
        subject="hsdp",
        case="replicate2-shard2",
        changes={
            "return fully_shard(model, mesh=mesh)": 'return fully_shard(model, mesh=mesh["shard"])'
        },
        status="split",
        first="gradient of 7.bias",
        words="an average over replicate is missing",
    ),
    Mistake(
        name="parameters_that_the_optimizer_does_not_have",
        subject="zero",
        case="dp2",
        changes={"optimizer(model.parameters()": "optimizer(model.module[:7].parameters()"},
        first="state of 7.weight",
        words="never updated",
    ),
    Mistake(
        name="shares_are_not_sent_round",
        subject="zero",
        case="dp2",
        changes={"optimizer=adamw)": "optimizer=adamw.optim)"},
        status="split",
        first="state of 0.weight",
        words="never updated",
    ),
    Mistake(
        name="another_learning_rate",
        subject="zero",
        case="dp2",
        changes={"lr=1e-2": "lr=1e-3"},
        first="state of 0.weight",
        words="its step is 0.1 times the baseline's",
    ),
    Mistake(
        name="adam_in_place_of_adamw",
        subject="zero",
        case="dp2",
        changes={"torch.optim.AdamW": "torch.optim.Adam"},
        first="state of 0.weight",
        words="decayed too little",
    ),
    Mistake(
        name="an_output_that_stays_partial",
        subject="tp",
        case="tp2",
        changes={
            '"mlp.down": RowwiseParallel()': '"mlp.down": RowwiseParallel(output_layouts=Partial())'
        },
        status="split",
        first="forward of output",
        culprit="activation of output of mlp.down",
        words=NO_SUM,
    ),
    Mistake(
        name="a_whole_input_is_called_partial",
        subject="tp",
        case="tp2",
        changes={
            "    return": "    plan['mlp'] = PrepareModuleInput(input_layouts=Partial(), "
            "desired_input_layouts=Replicate())\n    return"
        },
        first="forward of output",
        culprit="activation of input of mlp",
        words="it is 2 (tp) times the baseline",
    ),
    Mistake(
        name="the_head_takes_whole_for_partial",
        subject="vocabulary",
        case="tp3",
        changes={"ColwiseParallel(": "ColwiseParallel(input_layouts=Partial(), "},
        first="forward of output",
        culprit="activation of input of head",
        words="it is 3 (tp) times the baseline",
    ),
    Mistake(
        name="logits_that_stay_partial",
        subject="vocabulary",
        case="tp2",
        changes={
            "ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)": "RowwiseParallel("
            "input_layouts=Replicate(), output_layouts=Partial())"
        },
        status="split",
        first="forward of output",
        culprit="activation of output of head",
        words=NO_SUM,
    ),
    Mistake(
        name="norms_of_blocks_are_not_in_the_plan",
        subject="sequence",
        case="tp2",
        changes={'"blocks.*.norm*": SequenceParallel(), ': ""},
        status="split",
        first="gradient of blocks.1.norm2.bias",
        words=NO_SUM,
    ),
    Mistake(
        name="the_last_norm_is_not_in_the_plan",  # NVIDIA/Megatron-LM#1446
        subject="sequence",
        case="tp2",
        changes={
            ', "norm": SequenceParallel()': "",
            '"head": ColwiseParallel(': '"head": ColwiseParallel(input_layouts=cut, ',
        },
        status="split",
        first="gradient of norm.bias",
        words=NO_SUM,
    ),
    Mistake(
        name="only_attention_is_sharded",
        subject="fsdp_tp",
        case="dp2-tp2",
        changes={'return fully_shard(model, mesh=mesh["dp"])': "return model"},
        status="split",
        first="gradient of mlp.down.bias",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="gradients_are_not_scaled",
        subject="pipeline",
        case="pp2-schedule=GPipe",
        changes={"loss_fn=mse_loss": "loss_fn=mse_loss, scale_grads=False"},
        first="gradient of 7.bias",
        words="it is 4 times the baseline",
    ),
    Mistake(
        name="a_loss_that_sums",
        subject="pipeline",
        case="pp2-schedule=1F1B",
        changes={"loss_fn=mse_loss": "loss_fn=lambda y, t: mse_loss(y, t, reduction='sum')"},
        first="gradient of 7.bias",
        words="it is 18 times the baseline",
    ),
    Mistake(
        name="targets_of_other_rows",
        subject="pipeline",
        case="pp2-schedule=1F1B",
        changes={"target=t)": "target=t.roll(3, 0))"},
        first="gradient of 7.weight",
        words="",
    ),
    Mistake(
        name="gradients_of_two_stages_are_not_scaled",
        subject="interleaved",
        case="pp2-schedule=InterleavedZeroBubble",
        changes={"loss_fn=mse_loss": "loss_fn=mse_loss, scale_grads=False"},
        first="gradient of 7.bias",
        words="it is 4 times the baseline",
    ),
    Mistake(
        name="stages_are_not_sharded",
        subject="fsdp_pp",
        case="dp2-pp2",
        changes={
            'fully_shard(model[8 * rank // n : 8 * (rank + 1) // n], mesh=mesh["dp"])': "model["
            "8 * rank // n : 8 * (rank + 1) // n]"
        },
        status="split",
        first="gradient of 7.bias",
        words=NO_AVERAGE,
    ),
    Mistake(
        name="stages_are_averaged_over_themselves",
        subject="ddp_pp",
        case="dp2-pp2",
        changes={'mesh["dp"].get_group()': "torch.distributed.new_subgroups(1)[0]"},
        status="split",
        first="gradient of 7.bias",
        words="",
    ),
    Mistake(
        name="a_norm_whose_gradient_is_whole_is_summed",
        subject="llama",
        case="tp2",
        changes={
            "tp_size=mesh.size()": "tp_size=mesh.size(), "
            'tp_plan={"model.norm": "replicated_with_grad_allreduce"}'
        },
        first="gradient of model.norm.weight",
        words="it is 2 (tp) times the baseline",
    ),
]
