"""A case as a test of a user's gets it, and what its baselines gave, for all tests of a file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import parity
from parity.subject.check import How, Kept, TestCase


@pytest.fixture(scope="module")
def kept() -> Kept:
    return Kept()


@pytest.fixture
def case(kept: Kept) -> Callable[..., TestCase]:
    def make(**axes: int) -> TestCase:
        torch.manual_seed(0)
        return TestCase(parity.Case(axes), How(again="pytest 'x[y]'"), kept)

    return make
