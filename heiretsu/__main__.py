"""python -m heiretsu train: on one process, or on every rank of a torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from heiretsu import data
from heiretsu.config import DTYPES, OPTIMIZERS, PRESETS, Run, problems
from heiretsu.mesh import Mesh, Topology
from heiretsu.schedule import SCHEDULES
from heiretsu.train import Trainer


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="heiretsu", description="A compact 3D-parallel GPT.")
    train = top.add_subparsers(required=True, metavar="train").add_parser(
        "train",
        help="train a preset, on one process or under torchrun",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = train.add_argument
    add("--preset", choices=PRESETS, default="matrix", help="the sizes of the model")
    add("--untied", action="store_true", help="give the LM head a weight of its own")
    for axis, what in (("dp", "data"), ("tp", "tensor"), ("pp", "pipeline")):
        add(f"--{axis}", type=int, default=1, help=f"ranks along the {what} parallel axis")
    add("--steps", type=int, default=20, help="optimizer steps")
    add("--batch", type=int, default=64, help="sequences per step, over all ranks")
    add("--sequence", type=int, default=16, help="tokens per sequence")
    add("--micro-batches", type=int, default=8, help="microbatches per dp rank and step")
    add("--schedule", choices=SCHEDULES, default="1f1b", help="pipeline schedule")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--weight-decay", type=float, default=0.1, help="of matrices and embeddings")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=DTYPES, default="float32", help="of everything")
    add("--data", default="topics", help="a text file, a .bin of GPT-2 tokens, or 'topics'")
    add("--seed", type=int, default=0, help="of initialisation and data")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return top


def make_run(args: argparse.Namespace) -> Run:
    preset = PRESETS[args.preset]
    return Run(
        model=type(preset)(**{**vars(preset), "tied": not args.untied}),
        topology=Topology(dp=args.dp, tp=args.tp, pp=args.pp),
        batch=args.batch,
        sequence=args.sequence,
        microbatches=args.micro_batches,
        schedule=args.schedule,
        optimizer=args.optimizer,
        lr=args.lr,
        weight_decay=args.weight_decay,
        max_norm=args.clip,
        dtype=args.dtype,
        seed=args.seed,
    )


def objections(args: argparse.Namespace, world: int) -> list[str]:
    """Everything that is wrong with the command, before a group is made or a file is drawn from."""
    found = [
        f"--{axis} {size} must be 1 or more"
        for axis in ("dp", "tp", "pp", "steps")
        if (size := getattr(args, axis)) < 1
    ]
    if found:
        return found
    run = make_run(args)
    found = problems(run)
    if run.topology.world != world:
        found.append(
            f"{run.topology} has {run.topology.world} ranks and {world} were started; run it with "
            f"torchrun --standalone --nproc_per_node={run.topology.world} -m heiretsu train ..."
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        found.append("--device cuda: no CUDA device is visible")
    return found


def join_group(device: str, rank: int, world: int) -> torch.device:
    """This rank's device; with more ranks than one, the group of all of them is initialised."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local)
    if world > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    return torch.device(device, local) if device == "cuda" else torch.device("cpu")


def train(args: argparse.Namespace, corpus: data.Corpus, rank: int, world: int) -> None:
    run = make_run(args)
    trainer = Trainer(run, Mesh(run.topology, rank, join_group(args.device, rank, world)))
    for step in range(args.steps):
        start = time.perf_counter()
        loss = trainer.gradients(corpus.batch(run.seed, step, run.batch, run.sequence))
        norm = trainer.update()
        # .item() waits for the device, so it stands before the clock is read.
        line = f"step {step:4d}  loss {loss.item():.4f}  grad norm {norm.item():.4f}"
        speed = run.batch * run.sequence / (time.perf_counter() - start)
        if rank == 0:
            print(f"{line}  {speed:,.0f} tokens/s", flush=True)
    if world > 1:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = objections(args, world)
    try:
        corpus = data.load(args.data)
        if not found:
            corpus.check(PRESETS[args.preset].vocab, args.sequence)
    except data.DataError as error:
        found.append(str(error))
    if found:
        if rank == 0:
            print("\n".join(f"heiretsu: {problem}" for problem in found), file=sys.stderr)
        return 2
    train(args, corpus, rank, world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
