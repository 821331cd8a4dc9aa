"""torch's parallel code runs on the checking backend unmodified, and is right; no false alarm."""

import pytest

from parity import Backend, launch
from tests.backend import torchs_own

NAMES = [f.__name__ for f in torchs_own.EVERYWHERE] + list(torchs_own.SCHEDULES)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(name: str, world: int) -> None:
    if world % 2 and name in ("hsdp", "redistribution"):
        pytest.skip("needs two axes")
    errors = launch(torchs_own.run, world, name, backend=Backend(deadline=120))
    assert max(errors) < 1e-12
