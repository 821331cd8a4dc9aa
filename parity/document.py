"""A report as the versioned document of docs/report.md, for programs to read."""

from __future__ import annotations

from math import isfinite
from typing import Any

from parity.case import Case
from parity.culprit import Culprit
from parity.judge import Verdict
from parity.report import Cell, Report, cell, what_is_wrong
from parity.run import Result
from parity.trace import CHECKS

SCHEMA = 1  # raised when a reader of the old one would misread the new one


def as_json(report: Report) -> dict[str, Any]:
    """The versioned document of docs/report.md."""
    tensors, elements = report.compared
    document = {
        "schema": SCHEMA,
        "command": report.command,
        "device": report.plan.backend.device,
        "backend": report.plan.backend.name,
        "dtypes": list(report.plan.dtypes),
        "steps": report.plan.steps,
        "seed": report.plan.seed,
        "options": dict(report.plan.options),
        "overrides": [o._asdict() for o in report.plan.overrides],
        "cases": [case_json(result) for result in report.results],
        "skipped": [{**_id_json(s.case), "reason": s.reason} for s in report.skipped],
        "compared": {"tensors": tensors, "elements": elements},
        "seconds": report.seconds,
        "baseline_seconds": report.baseline_seconds,
        "exit_code": report.exit_code,
    }
    return {key: _finite(value) for key, value in document.items()}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _id_json(case: Case) -> dict[str, Any]:
    return {"id": case.id, "axes": dict(case.axes), "options": dict(case.options)}


def case_json(result: Result) -> dict[str, Any]:
    """One case of the document, whatever ran it."""
    found = {
        **_id_json(result.case),
        "status": result.status,
        "seconds": result.seconds,
        "diff": result.diff,
        "error": result.error,
        "coarse": result.coarse,
        "checks": {check: _cell_json(cell(result.judged, check)) for check in CHECKS},
        "culprits": [_culprit_json(culprit) for culprit in result.culprits or ()],
        "wrong": [
            {
                "dtype": j.run.dtype,
                "variant": dict(j.run.variant),
                "baseline": j.baseline,
                **_verdict_json(v),
            }
            for j in result.judged
            for v in j.verdicts
            if not v.good
        ],
    }
    return {key: _finite(value) for key, value in found.items()}


def _culprit_json(c: Culprit) -> dict[str, Any]:
    return {
        "dtype": c.run.dtype,
        "variant": dict(c.run.variant),
        **_verdict_json(c.verdict),
        "where": c.where,
        "diagnoses": [fit._asdict() for fit in c.fits],
        "alike": [str(key) for key in c.alike],
        "hint": c.hint,
        "backward": [_culprit_json(other) for other in c.backward],
    }


def _cell_json(c: Cell) -> dict[str, Any]:
    return {
        "error": c.error,
        "allowed": c.allowed,
        "rho": c.rho,
        "worst": None if c.worst is None else c.worst.key.name,
        "wrong": c.bad,
        "tensors": c.tensors,
        "elements": c.elements,
    }


def _verdict_json(v: Verdict) -> dict[str, Any]:
    return {
        "check": v.key.check,
        "tensor": v.key.name,
        "status": v.status,
        "text": v.text or what_is_wrong(v),
        "error": v.error,
        "allowed": v.allowed,
        "rho": v.rho,
        "excess": v.excess,
        "place": list(v.place),
    }
