"""`case.check(...)`: what a user writes in a test becomes a plan, is run, and is judged."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from parity.baseline import Baselines
from parity.case import DTYPES, Case, Run, Scalar
from parity.errors import PARITY_FAILURE, ParityError, UsageError
from parity.investigate import Investigator
from parity.launcher import Backend
from parity.plan import Baseline, Packed, Plan, Wish, backend_for, room_for
from parity.report import failure
from parity.run import Result, Session
from parity.scratch import Scratch
from parity.subject import target as sides
from parity.subject.data import entries
from parity.subject.layout import Layout, layout_of
from parity.subject.packing import pack
from parity.subject.placing import Cuts
from parity.subject.program import Inputs, Subject, leaves
from parity.trace import Trace

MOST = 8  # ranks, where there is no GPU and nobody says another number
DEADLINE = 120.0  # seconds for a launch of a case


class Differs(AssertionError):
    """A candidate is not the same function as its baseline. The text is the whole report."""

    code = PARITY_FAILURE


class CouldNotRun(ParityError):
    """A case did not come to its end, or compared nothing: nothing is known of it."""


@dataclass(frozen=True)
class How:
    """How cases are run, whatever they compare."""

    backend: Backend = field(default_factory=Backend)
    dtypes: Sequence[str] = ()  # instead of what the test says
    seed: int = 0
    again: str = ""  # what to type to run the case again


def how(wish: Wish) -> tuple[How, int]:
    """What a user asks for, and how many ranks there is room for. Raises UsageError."""
    device, room = room_for(wish, MOST)
    backend = backend_for(wish, device, wish.deadline or DEADLINE)
    return How(backend, wish.dtypes, wish.seed or 0), room


class Kept:
    """What baselines gave, for all cases that are held against the same one."""

    def __init__(self) -> None:
        self._scratch: Scratch | None = None
        self._sessions: dict[str, tuple[Baselines, Investigator]] = {}

    def folder(self, data: bytes) -> str:
        """One for each comparison, for what its baseline tells its candidates."""
        # Made when it is needed: a case that a candidate asks on its rank has none.
        self._scratch = self._scratch or Scratch()
        path = self._scratch.path / hashlib.blake2b(data, digest_size=16).hexdigest()
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def close(self) -> None:
        """Remove the folders: some processes end without cleaning up. No comparison comes after."""
        if self._scratch is not None:
            self._scratch.close()

    def session(self, plan: Plan) -> tuple[Session, Investigator]:
        baseline = plan.baselines[0].target
        assert isinstance(baseline, Packed)
        backend = replace(plan.backend, deadline=0.0)  # how long it may take changes no value
        what = (baseline.data, tuple(plan.dtypes), plan.steps, plan.seed, backend)
        key = hashlib.blake2b(repr(what).encode()).hexdigest()
        baselines, closer = self._sessions.setdefault(key, (Baselines(plan), Investigator(plan)))
        return Session(plan, baselines), closer.of(plan)


class TestCase:
    """One case of a test: its axes, and what it is asked to compare.

    `case["tp"]` is the size of an axis, or the value of an option.
    """

    __test__ = False  # pytest is not to collect it

    def __init__(self, case: Case, how: How | None = None, kept: Kept | None = None) -> None:
        self.case, self.how, self.kept = case, how or How(), kept or Kept()
        self.results: list[Result] = []

    def __getitem__(self, name: str) -> Any:
        return {**self.case.axes, **self.case.options}[name]

    def __reduce__(self) -> Any:  # a candidate may ask for `case["tp"]` on its rank
        return TestCase, (self.case,)

    @property
    def id(self) -> str:
        return self.case.id

    def check(
        self,
        baseline: Callable[[], nn.Module],
        candidate: Callable[..., Any],
        inputs: Inputs,
        *,
        targets: Sequence[Any] = (),
        loss: Callable[..., Tensor] | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        steps: int = 1,
        data: Mapping[str, int] | None = None,
        split: Mapping[str, int] | None = None,
        zigzag: Sequence[str] = (),
        whole: Sequence[int | str] = (),
        output: Mapping[Any, Any] | None = None,
        layout: Mapping[str, Cuts] | None = None,
        dtypes: Sequence[str] = ("float64", "float32"),
        generic: bool = True,
        input_gradients: bool | None = None,
    ) -> Result:
        """Hold a parallel module, or a step of training with it, against the one-device module.

        `baseline()` makes the module; `candidate(full, mesh)` is called on every rank with the
        baseline's state_dict and a DeviceMesh over the case's axes, and returns a module, or a
        parity.Program. Both are called with `inputs` (tensors, and structures of them), a list or
        a dict by name. Compared are what they put out, the gradients of all parameters, and with an
        `optimizer`, made by `optimizer(parameters)`, parameters and moments after `steps` steps.

        Without a `loss` each output is given a gradient without a pattern, and the gradients of the
        inputs are compared too (or as `input_gradients` says). `loss(output, *targets)` makes a
        training step of it.

        `data={"dp": 0}`: dim 0 of inputs and targets is cut over dp, and the candidate averages
        gradients over it (as DDP and FSDP do). `split={"cp": 1}`: dim 1 is cut over cp, and nothing
        is averaged; with `zigzag=["cp"]` rank r of n has parts r and 2n - 1 - r of 2n, as causal
        attention is balanced. Inputs named in `whole` (places in the list, or names) are given to
        every rank as they are.

        Where outputs lie is told by their shape; `output={-1: "tp"}` says it, and
        `layout={"*.up.weight": {0: "tp"}}` where parameters lie that are not loaded as they are.
        `generic=False` leaves zeros and ones in the parameters.

        Raises Differs, CouldNotRun, and UsageError for what cannot be compared.
        """
        floats = [getattr(torch, name) for name in DTYPES if name in dtypes]
        subject = Subject(
            baseline,
            candidate,
            inputs,
            targets,
            loss,
            optimizer,
            data or {},
            split or {},
            zigzag,
            whole,
            _by_name(output or {}),
            layout or {},
            generic,
            loss is None if input_gradients is None else input_gradients,
            max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32),
        )
        objections = [*_objections(subject, self.case, steps), *_wrong_dtypes(dtypes)]
        if objections:
            raise UsageError(*objections)
        own = replace(subject, candidate=None, output={}, layout={}, data={}, split={}, zigzag=())  # type: ignore[arg-type]
        folder = self.kept.folder(pack((own, steps), baseline, loss, optimizer))
        return self._result(
            pack(sides.Baseline(own, folder), baseline, loss, optimizer),
            pack(sides.Candidate(subject, folder), baseline, candidate, loss, optimizer),
            dtypes,
            steps,
        )

    def compare(
        self,
        baseline: Callable[[Run], Trace],
        candidate: Callable[[Run], Trace],
        *,
        steps: int = 1,
        options: Mapping[str, Scalar] | None = None,
        dtypes: Sequence[str] = ("float64", "float32"),
    ) -> Result:
        """Hold a whole program against another: both are targets, from a Run to a Trace."""
        if objections := _wrong_dtypes(dtypes):
            raise UsageError(*objections)
        return self._result(
            pack(baseline, baseline), pack(candidate, candidate), dtypes, steps, options or {}
        )

    def _result(
        self,
        baseline: bytes,
        candidate: bytes,
        dtypes: Sequence[str],
        steps: int,
        options: Mapping[str, Scalar] | None = None,
    ) -> Result:
        one = Case(dict.fromkeys(self.case.axes, 1))
        plan = Plan(
            target=Packed("the candidate", candidate),
            baselines=[Baseline("baseline", Packed("the baseline", baseline), one)],
            cases=[self.case],
            dtypes=list(self.how.dtypes or dtypes),
            variants={},
            options=options or {},
            steps=steps,
            seed=self.how.seed,
            backend=self.how.backend,
        )
        session, closer = self.kept.session(plan)
        result = closer.investigate(session.result(self.case))
        self.results.append(result)
        verdict(result, self.how.again)
        if result.idle:
            axes = ", ".join(result.idle)
            raise UsageError(
                f"{self.id}: no input, parameter or output is cut over {axes}: its ranks all do "
                "the same, and would without a word to each other; cut the inputs, as in "
                f"data={{'{result.idle[0]}': 0}}, or leave {axes} out"
            )
        return result


class LayoutCase(TestCase):
    """In the place of a case where nothing is to be compared: asks where parameters lie."""

    __test__ = False

    def __init__(self, case: Case, how: How | None = None, kept: Kept | None = None) -> None:
        super().__init__(case, how, kept)
        self.layouts: list[Layout] = []

    def _result(self, baseline: bytes, candidate: bytes, *_: Any) -> Result:
        if not isinstance(pickle.loads(candidate), sides.Candidate):  # noqa: S301 (our own)
            raise UsageError("case.compare: a whole program hands over its own places")
        self.layouts.append(layout_of(candidate, self.case.axes, self.how.backend))
        return Result(self.case, "pass", [], 0.0)


def verdict(result: Result, again: str) -> None:
    """Raises CouldNotRun or Differs unless the case passed."""
    if result.status == "error":
        raise CouldNotRun(failure(result, again))
    if result.status == "fail":
        raise Differs(failure(result, again))


def run(test: Callable[[Any], object], case: TestCase) -> Differs | ParityError | None:
    """Call a test with its case; what it found. Its random numbers are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.how.seed)
        try:
            test(case)
        except (Differs, ParityError) as found:
            return found
    if not isinstance(case, LayoutCase) and not sum(r.compared[0] for r in case.results):
        return CouldNotRun(f"{case.id}: it compared nothing; call case.check(...)")
    return None


def _by_name(output: Mapping[Any, Any]) -> Mapping[str, Cuts]:
    """`{0: "dp"}` is said of all outputs; `{"output.logits": {0: "dp"}}` of one."""
    if all(isinstance(value, Mapping) for value in output.values()):
        return output
    return {"": output}


def _objections(subject: Subject, case: Case, steps: int) -> list[str]:
    """What is wrong with a comparison, before a rank starts."""
    if wrong := _malformed(subject):
        return [wrong]
    said = []
    given = dict(entries(subject.inputs))
    said += [
        f"whole: there is no input {at!r} (there are: {', '.join(map(repr, given))})"
        for at in subject.whole
        if at not in given
    ]
    for name, axes in (("data", subject.data), ("split", subject.split)):
        said += [
            f"{name}={{'{axis}': {dim}}}: the case has no axis '{axis}' (it has "
            f"{', '.join(case.axes)})"
            for axis, dim in axes.items()
            if axis not in case.axes
        ]
    said += [
        f"zigzag=['{axis}']: nothing is cut over '{axis}'; say along which dim, as in "
        f"split={{'{axis}': 1}}"
        for axis in subject.zigzag
        if axis not in {**subject.data, **subject.split}
    ]
    if steps > 1 and subject.optimizer is None:
        said.append(f"steps={steps}: without an optimizer all steps are the same; give one")
    if said:
        return said
    cut = {at: x for at, x in given.items() if at not in subject.whole}
    for where, x in leaves(
        cut if isinstance(subject.inputs, Mapping) else [*cut.values()], "inputs"
    ):
        said += _uneven(subject, case, where, x)
    return said


def _malformed(subject: Subject) -> str:
    """What is of another type than it must be."""
    inputs, example = subject.inputs, "as in [torch.randn(4)]"
    if not isinstance(inputs, list | tuple | Mapping) or not inputs:
        return f"inputs: expected a list of what the module is called with, {example}, or a dict"
    if isinstance(inputs, Mapping) and not all(isinstance(key, str) for key in inputs):
        return "inputs: the keys of a dict are the names that the module takes them by"
    if not isinstance(subject.targets, list | tuple):
        return f"targets: expected a list of what the loss is called with, {example}"
    if not isinstance(subject.whole, list | tuple | set):
        return f"whole={subject.whole!r}: expected a list of places or names of inputs, as in [0]"
    if not isinstance(subject.zigzag, list | tuple | set):
        return f"zigzag={subject.zigzag!r}: expected a list of axes, as in ['cp']"
    return ""


def _uneven(subject: Subject, case: Case, where: str, x: Tensor) -> list[str]:
    said = []
    for dim, axes in subject.cuts.items():
        if x.ndim and not -x.ndim <= dim < x.ndim:
            said.append(f"{where} has {x.ndim} dims, and no dim {dim} to cut")
            continue
        names = [f"2 x {axis}" if axis in subject.zigzag else axis for axis in axes]
        twice = sum(axis in subject.zigzag for axis in axes)
        parts = torch.Size([case.axes[axis] for axis in axes]).numel() * 2**twice
        if x.ndim and subject.loss is not None and x.shape[dim] % parts:
            said.append(
                f"{where}: {x.shape[dim]} in dim {dim} cannot be shared evenly by "
                f"{' x '.join(names)} = {parts}: a mean of the ranks' means is not the mean"
            )
    return said


def _wrong_dtypes(dtypes: Sequence[str]) -> list[str]:
    known = ", ".join(DTYPES)
    wrong = [f"dtypes: '{name}' is none (known: {known})" for name in dtypes if name not in DTYPES]
    return wrong or ([] if dtypes else [f"dtypes: expected at least one of {known}"])
