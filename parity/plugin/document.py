"""All cases of a session as one versioned document (docs/report.md)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from parity.plugin.row import Row
from parity.plugin.shared import Shared

SCHEMA = 1  # raised when a reader of the old one would misread the new one
LEFT_OUT = ("error", "rho", "allowed", "size", "document")  # comparisons say it in full


def text(shared: Shared, rows: Mapping[str, Row], exit_code: int) -> str:
    options = shared.options
    document = {
        "schema": SCHEMA,
        "command": shlex.join(["pytest", *map(str, shared.config.invocation_params.args)]),
        "device": shared.device,
        "backend": shared.backend,
        "seed": options.seed or 0,
        "items": [{"id": name, **_item(row)} for name, row in rows.items()],
        "compared": {
            "tensors": sum(row.tensors for row in rows.values()),
            "elements": sum(row.elements for row in rows.values()),
        },
        "exit_code": exit_code,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _item(row: Row) -> dict[str, Any]:
    known = {key: value for key, value in asdict(row).items() if key not in LEFT_OUT}
    return {**known, **(row.document or {"comparisons": []})}
