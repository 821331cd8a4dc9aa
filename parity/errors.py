"""What can go wrong around a comparison, by whose fault it is: each class has its exit code."""

from __future__ import annotations

PASSED, PARITY_FAILURE, USAGE, COULD_NOT_RUN = 0, 1, 2, 3


class ParityError(Exception):
    """The base of all errors that parity raises on purpose; `code` is the exit status."""

    code = COULD_NOT_RUN


class UsageError(ParityError):
    """The user's mistake. Carries every objection at once, one line each.

    Remedy: each line says what is wrong, what was expected, and what to write instead.
    """

    code = USAGE

    def __init__(self, *objections: str) -> None:
        super().__init__("\n".join(objections))


class TraceError(ParityError):
    """A trace that says nothing, or that contradicts itself: a mistake of the traced program's
    own description (a piece outside of its whole, a name used twice), not a difference.
    """


class RanksFailed(ParityError):
    """One or more ranks did not return: the text says which, why, and what the others did."""

    def __init__(self, text: str, ranks: tuple[int, ...]) -> None:
        super().__init__(text)
        self.ranks = ranks


class ProtocolError(ParityError, RuntimeError):
    """Ranks do not agree on what they say to each other: the code under test is wrong."""


class Mismatch(ProtocolError):
    """Members of a group call different things at the same place of its sequence.

    Remedy: compare the call sites that the text names; all members must make the same calls, of the
    same sizes and types, in the same order.
    """


class Deadlock(ProtocolError):
    """Ranks wait for each other, or for one that has ended: none of them can ever go on."""


class Lost(ProtocolError):
    """A rank that was waited for has died or left."""


class Race(ProtocolError):
    """A tensor was used while a call had it, or nobody waited for the call at all."""
