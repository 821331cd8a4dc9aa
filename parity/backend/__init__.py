"""The checking backend: ranks of one host over shared memory, every call among them checked.

Importing it registers the backend `parity` with torch.distributed.
"""

import torch.distributed as dist

from parity.backend.group import create
from parity.backend.ledger import Entry
from parity.backend.member import NAME, Place
from parity.backend.settings import Rule, Settings
from parity.backend.watch import Watch

__all__ = ["NAME", "Entry", "Rule", "Settings", "configure", "take_ledger"]


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


if NAME.upper() not in dist.Backend._plugins:
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
