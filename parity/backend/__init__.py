"""The checking backend: ranks of one host over shared memory, every call among them checked.

Importing it registers the backend `parity` with torch.distributed.
"""

import torch.distributed as dist

from parity.backend.group import create
from parity.backend.ledger import Entry
from parity.backend.member import NAME, Place
from parity.backend.mutation import Tally
from parity.backend.settings import Rule, Settings
from parity.backend.watch import Watch

__all__ = [
    "NAME",
    "Entry",
    "Rule",
    "Settings",
    "Tally",
    "configure",
    "take_ledger",
    "tally",
]


def configure(settings: Settings) -> Watch | None:
    """For the world to come: to be called before init_process_group. With `settings.watch`, what
    is returned must be entered as a context by the thread that runs the program.
    """
    Place.settings = settings
    Place.watch = Watch() if settings.watch else None
    return Place.watch


def take_ledger() -> list[Entry]:
    """The calls of this rank since the last time, the oldest first."""
    ledger = Place.ledger
    if ledger is None:
        return []
    entries = list(ledger.entries)
    ledger.entries.clear()
    return entries


def tally() -> Tally:
    """What the rules have done on this rank, in its last world."""
    return Place.mutation.tally if Place.mutation is not None else Tally()


if NAME.upper() not in dist.Backend._plugins:
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
