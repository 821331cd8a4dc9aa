"""Every planted mistake is heard by the ranks it concerns, in words that name it.

How soon is what benchmarks/mistakes.py says.
"""

import pytest

from parity import Backend, launch
from parity.backend.settings import Settings
from parity.errors import RanksFailed
from tests.backend.mistakes import MISTAKES, Mistake, hear


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_is_heard(mistake: Mistake) -> None:
    backend = Backend(deadline=20, settings=Settings(watch=mistake.watch))
    if mistake.dies:
        with pytest.raises(RanksFailed, match=f"rank {mistake.dies[0]} ended with exit code 9"):
            launch(hear, mistake.world, mistake.name, backend=backend)
        return
    heard = launch(hear, mistake.world, mistake.name, backend=backend)
    for rank, (error, text, _) in enumerate(heard):
        if mistake.expected is None:
            assert not error, text
        elif rank in mistake.hears:
            assert error == mistake.expected.__name__, text
            assert mistake.text in text
            assert mistake.name in text or "<lambda>" in text  # the function of the call site
