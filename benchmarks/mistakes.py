"""What ranks hear of each planted protocol mistake, and after how long; gloo's behaviour beside it.

    python -m benchmarks.mistakes

Seconds are those from the mistake to the error on the last rank that hears it. gloo is given
`PATIENCE` seconds, after which parity ends it and says where its ranks stood.
"""

from __future__ import annotations

from tabulate import tabulate

from parity import Backend, RanksFailed, launch
from parity.backend import Settings
from tests.backend.mistakes import MISTAKES, Mistake, hear

PATIENCE = 5.0


def heard(mistake: Mistake, name: str) -> tuple[str, str]:
    """(what, seconds) on that backend."""
    backend = Backend(name, deadline=PATIENCE, settings=Settings(watch=mistake.watch))
    try:
        ranks = launch(hear, mistake.world, mistake.name, backend=backend)
    except RanksFailed as failed:
        lines = str(failed).splitlines()
        said = next((line for line in lines if "which has" in line), lines[0])
        return said.strip(), ""
    errors = [(error, text, s) for error, text, s in ranks if error]
    if not errors:
        return "no error", ""
    error, text, _ = errors[0]
    lines = text.splitlines()
    detail = next((line for line in lines[1:] if mistake.text and mistake.text in line), "")
    return f"{error}: {(detail or lines[0]).strip()}", f"{max(s for *_, s in errors):.2f}"


def main() -> None:
    rows = []
    for mistake in MISTAKES:
        ours, seconds = heard(mistake, "parity")
        theirs, _ = heard(mistake, "gloo")
        rows.append([mistake.name, _short(ours), seconds, _short(theirs)])
    print(tabulate(rows, ["mistake", "parity says", "s", "gloo"], tablefmt="github"))


def _short(text: str) -> str:
    return text.split(", at ")[0].split(", called at")[0][:150]


if __name__ == "__main__":
    main()
