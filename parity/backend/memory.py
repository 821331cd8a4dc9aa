"""A piece of memory that the ranks of one host share, with a lock and a bell for each of them.

It has no name anywhere: an anonymous file that rank 0 makes and the others open through its entry
in /proc. When the last process that holds it has gone, however it went, so has the memory. Pages
that nobody has touched cost nothing, so the region is sized generously.

The lock is a robust mutex: if its holder is killed, the kernel hands it on. A bell is a counting
semaphore: rung before it is waited for, it is not lost. That a rank lives is seen from a lock on
one byte of the file, which the kernel drops with the process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import time
from contextlib import suppress

import torch

SIZE = 1 << 34  # of address space, in bytes; what is never written takes no memory
HEADER = 4096
_LOCK, _WORLD = 128, 0  # byte offsets in the header
_MAGIC = 0x7061726974790001
_OWNER_DIED = errno.EOWNERDEAD


class _Libc:
    """The functions of the C library that Python does not offer."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        pointer = ctypes.c_void_p
        for name, count in {
            "pthread_mutexattr_init": 1,
            "pthread_mutex_init": 2,
            "pthread_mutex_lock": 1,
            "pthread_mutex_unlock": 1,
            "pthread_mutex_consistent": 1,
            "sem_post": 1,
            "sem_timedwait": 2,
        }.items():
            getattr(libc, name).argtypes = [pointer] * count
        for name in ("pthread_mutexattr_setpshared", "pthread_mutexattr_setrobust"):
            getattr(libc, name).argtypes = [pointer, ctypes.c_int]
        libc.sem_init.argtypes = [pointer, ctypes.c_int, ctypes.c_uint]
        self.lib = libc

    def make_lock(self, address: int) -> None:
        kind = ctypes.create_string_buffer(64)
        self.lib.pthread_mutexattr_init(kind)
        self.lib.pthread_mutexattr_setpshared(kind, 1)
        self.lib.pthread_mutexattr_setrobust(kind, 1)
        assert self.lib.pthread_mutex_init(address, kind) == 0


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Region:
    """`words` sees the memory as 64-bit integers, `data` as a tensor of bytes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self.words = memoryview(self._map).cast("Q")
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = _Libc()
        self._lock, self._unlock = libc.lib.pthread_mutex_lock, libc.lib.pthread_mutex_unlock
        self._post, self._wait = libc.lib.sem_post, libc.lib.sem_timedwait
        self._libc = libc
        self._mutex = self.address + _LOCK

    @classmethod
    def create(cls, world: int) -> Region:
        fd = os.memfd_create("parity")
        os.ftruncate(fd, SIZE)
        region = cls(fd)
        region._libc.make_lock(region._mutex)
        for rank in range(world):
            assert region._libc.lib.sem_init(region._bell(rank), 1, 0) == 0
        region.words[1] = world
        region.words[_WORLD] = _MAGIC
        return region

    @property
    def path(self) -> str:
        """Where another process of this host and user can open it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @classmethod
    def attach(cls, path: str) -> Region:
        region = cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        assert region.words[_WORLD] == _MAGIC
        return region

    def acquire(self) -> None:
        code = self._lock(self._mutex)
        if code == _OWNER_DIED:
            # Whoever died inside had changed a few words at most; that it died is seen elsewhere.
            self._libc.lib.pthread_mutex_consistent(self._mutex)
        else:
            assert code == 0, os.strerror(code)

    def release(self) -> None:
        self._unlock(self._mutex)

    def ring(self, rank: int) -> None:
        self._post(self._bell(rank))

    def wait(self, rank: int, seconds: float) -> bool:
        """Sleep until the bell of `rank` rings; False if it did not. May return early."""
        until = time.time() + seconds
        spec = _Timespec(int(until), int(until % 1 * 1e9))
        return bool(self._wait(self._bell(rank), ctypes.addressof(spec)) == 0)

    def _bell(self, rank: int) -> int:
        return self.address + HEADER + 64 * rank

    def come_alive(self, rank: int) -> None:
        fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def is_alive(self, rank: int) -> bool:
        """Whether the process of another rank exists; of this process' own rank, True."""
        asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0)
        kind, *_ = struct.unpack("hhqqi", fcntl.fcntl(self.fd, fcntl.F_GETLK, asked)[:28])
        return bool(kind != fcntl.F_UNLCK)

    def memory(self) -> int:
        """Bytes of the region that are really held."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        with suppress(OSError):
            os.close(self.fd)
