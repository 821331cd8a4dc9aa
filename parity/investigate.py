"""After a failure: the run again with everything recorded, until each mistake in it has a name.

One loud mistake must not hide a quiet one. So what the first culprit gets wrong is replaced by the
baseline's value, in all layers of its kind, and the run is repeated: what still differs is another
mistake. Only what a first step shows is masked; later steps begin where that one ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from parity.baseline import Baselines
from parity.case import Case, Run
from parity.consequences import with_another
from parity.culprit import Culprit, pattern
from parity.errors import RanksFailed
from parity.ledger import SIZE
from parity.plan import Plan
from parity.run import Result, Session
from parity.scratch import Scratch
from parity.trace import CHECKS, Key, save_masks

MOST = 4  # culprits that are told apart in one failure
LOOKS = 6 * MOST  # some find what is no culprit
MATTERS = 1.25  # times an error: less may be chance, where it has several causes
NEXT = 3  # so many of those that it has changed tell whether for the worse: two may cancel
MASKED = ("activation", "backward", "gradient")  # what the program computes on from
FORWARD = ("activation", "forward")
WRONG = ("bug", "split", "drift", "nan")  # what a right value can take the place of


class _Look(NamedTuple):
    """What one run with everything recorded shows."""

    culprit: Culprit | None  # the first one
    order: Sequence[Key]  # of all that was judged, as the program made it
    off: Mapping[Key, float]  # what differs, overwritten or not, and by how much
    bad: Set[Key]  # what does, and is not overwritten
    wrong: Set[Key]  # of what the verdict was on


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
        run, decided = first[0].run, {v.key for j in result.judged for v in j.verdicts}
        session = self._session(run, 1)
        # What the first step shows is told by it: later ones mix it with what it leads to.
        look = self._look(session, case, decided, {}, set())
        others: Set[Key] = set()
        if not look.wrong and self.plan.steps > 1:
            session, others = self._session(run, self.plan.steps), look.bad
            look = self._look(session, case, decided, {}, others)
        return self._one_by_one(session, case, decided, look, others)

    def _one_by_one(
        self, session: Session, case: Case, decided: Set[Key], look: _Look, others: Set[Key]
    ) -> list[Culprit]:
        """What a look finds, what the next one finds with that put right, and so on, until all that
        the verdict was on agrees. `others` differ within modules, and are no mistakes.
        """
        culprits: list[Culprit] = []
        masks: dict[Key, Tensor] = {}
        first = look.culprit
        for _ in range(LOOKS):
            # A record of a module is decided on where a second call shows what is kept; what the
            # first call gets wrong, it does too.
            wrong = {key for key in look.wrong if not culprits or key.check in CHECKS}
            found = look.culprit
            if found is None or not wrong or len(culprits) == MOST:
                break
            if not _can_be_put_right(found):
                return with_another(culprits, found, look.order, look.off)
            values, check = self._values(session, case, found, others), found.verdict.key.check
            after = self._look(session, case, decided, masks | values, others)
            if found.verdict.key not in decided and _is_harm(look, after, check, values.keys()):
                # Put "right", it makes wrong what was right: a part of a sum that is made later.
                same = {k for k in values if _kind(k) in _kinds(found)}
                others = others | (({found.verdict.key} | same) - decided)
                look = self._look(session, case, decided, masks, others)
            else:
                culprits = with_another(culprits, found, look.order, look.off)
                masks, look = masks | values, after
        left = look.culprit or first  # it differs, whatever comes of putting it right
        return culprits or ([left] if look.wrong and left is not None else [])

    def _look(
        self,
        session: Session,
        case: Case,
        decided: Set[Key],
        masks: Mapping[Key, Tensor],
        others: Set[Key],
    ) -> _Look:
        """The first culprit besides those that are masked, and what is wrong of `decided`."""
        known = masks.keys() | others
        with Scratch() as folder:
            path = folder / "masks.safetensors"
            if masks:
                save_masks(masks, path)
            result = session.result(case, str(path) if masks else "", known)
        if result.status == "error":  # silence would read as if it had agreed this time
            raise RanksFailed(result.error, ())
        verdicts = [v for j in result.judged for v in j.verdicts]
        # What is on no rank stays on none, whatever is overwritten.
        off = {v.key: v.error * (v.status in WRONG) for v in verdicts if not v.good}
        bad = off.keys() - known
        return _Look(result.culprit, [v.key for v in verdicts], off, bad, bad & decided)

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

    def _values(
        self, session: Session, case: Case, culprit: Culprit, others: Set[Key]
    ) -> dict[Key, Tensor]:
        """What is right for all records in which the same mistake is seen."""
        session.baselines.prepare(case)
        expected = session.baselines.expected(session.plan.baselines[0], culprit.run.dtype, case)
        alike = {k for k in expected if _kind(k) in _kinds(culprit) or k in culprit.alike}
        return {k: e.exact for k, e in expected.items() if k in alike - others}


def _can_be_put_right(c: Culprit) -> bool:
    v = c.verdict
    return c.run.steps == 1 and v.key.check in MASKED and v.status in WRONG


def _is_harm(before: _Look, after: _Look, check: str, masked: Set[Key]) -> bool:
    """Whether most of the first records for which overwriting `masked`, of `check`, matters are
    further off with it. Of a forward they are in the forward: the rest may be wrong for reasons of
    its own. What was overwritten before is recorded before it is, and tells it too.
    """
    worse = []
    for key in after.order:
        was, now = before.off.get(key, 0.0), after.off.get(key, 0.0)
        is_next = check != "activation" or key.check in FORWARD
        if is_next and key not in masked and not max(was, now) <= MATTERS * min(was, now):
            worse.append(now > was)
    return sum(worse[:NEXT]) > len(worse[:NEXT]) / 2


def _kind(key: Key) -> tuple[str, str]:
    return key.check, pattern(key)


def _kinds(culprit: Culprit) -> set[tuple[str, str]]:
    return {_kind(key) for key in culprit.names}
