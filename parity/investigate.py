"""After a failure: the run again with everything recorded, until each mistake in it has a name.

One loud mistake must not hide a quiet one. So what the first culprit gets wrong is replaced by the
baseline's value, in all layers of its kind, and the run is repeated: what still differs is another
mistake. Only what a first step shows is masked; later steps begin where that one ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from parity.baseline import Baselines
from parity.case import Case, Run
from parity.culprit import Culprit, pattern
from parity.errors import RanksFailed
from parity.ledger import SIZE
from parity.plan import Plan
from parity.run import Result, Session
from parity.trace import Key, save_masks

MOST = 4  # culprits that are told apart in one failure
MASKED = ("activation", "backward", "gradient")  # what the program computes on from
WRONG = ("bug", "split", "drift", "nan")  # what a right value can take the place of


class Investigator:
    """Looks closer at failed cases; what baselines gave is kept for all of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict[tuple[str, int], Baselines] = {}

    def of(self, plan: Plan) -> Investigator:
        """For another target with the same baselines: what they gave is used again."""
        other = Investigator(plan)
        other._kept = self._kept
        return other

    def investigate(self, result: Result) -> Result:
        """The same result, with its culprits if it failed."""
        if result.status != "fail":
            return result
        try:
            return replace(result, culprits=self.culprits(result.case, result))
        except Exception as error:  # the verdict stands, whatever a closer look meets
            said = str(error).partition("\n")[0]
            return replace(result, unexplained=f"{type(error).__name__}: {said}")

    def culprits(self, case: Case, result: Result) -> list[Culprit]:
        """Of a failure, in the order of the program; empty if it did not happen again."""
        first = result.first_divergence
        if first is None:
            return []
        run = first[0].run
        culprits: list[Culprit] = []
        masks: dict[Key, Tensor] = {}
        session = self._session(run, 1)
        # What the first step shows is told by it: later ones mix it with what it leads to.
        found = self._first(session, case, masks)
        if found is None and self.plan.steps > 1:
            found = self._first(self._session(run, self.plan.steps), case, masks)
        while found is not None:
            culprits.append(found)
            v = found.verdict
            if found.run.steps != 1:
                break
            if len(culprits) == MOST or v.key.check not in MASKED or v.status not in WRONG:
                break
            masks |= self._values(session, case, found)
            found = self._first(session, case, masks)
        return culprits

    def _first(self, session: Session, case: Case, masks: Mapping[Key, Tensor]) -> Culprit | None:
        with TemporaryDirectory(prefix="parity-") as folder:
            path = Path(folder) / "masks.safetensors"
            if masks:
                save_masks(masks, path)
            result = session.result(case, str(path) if masks else "", masks)
        if result.status == "error":  # silence would read as if it had agreed this time
            raise RanksFailed(result.error, ())
        return result.culprit

    def _session(self, run: Run, steps: int) -> Session:
        """One way of computing, everything recorded, against the first baseline."""
        settings = replace(self.plan.backend.settings, ledger=SIZE)
        plan = replace(
            self.plan,
            detail=True,
            steps=steps,
            dtypes=[run.dtype],
            variants={name: [value] for name, value in run.variant.items()},
            baselines=self.plan.baselines[:1],
            backend=replace(self.plan.backend, settings=settings),
        )
        return Session(plan, self._kept.setdefault((run.label, steps), Baselines(plan)))

    def _values(self, session: Session, case: Case, culprit: Culprit) -> dict[Key, Tensor]:
        """What is right for all records in which the same mistake is seen."""
        session.baselines.prepare(case)
        expected = session.baselines.expected(session.plan.baselines[0], culprit.run.dtype, case)
        kinds = {(key.check, pattern(key.name)) for key in culprit.names}
        keys = [k for k in expected if (k.check, pattern(k.name)) in kinds or k in culprit.alike]
        return {k: expected[k].exact for k in keys}
