"""Who can still go on? A rank that is blocked can if all whom its call lacks can come to it.

Every blocked rank has told which call it is in; who has made that call is in the words of its lane.
So the ranks that can go on are the least set that holds all ranks at work, and with them every
blocked one whose missing members are all in the set. The rest wait for ever, however long one
waits: no deadline is needed, and a slow rank is never taken for a lost one.
"""

from __future__ import annotations

from parity.backend import board as b
from parity.backend.board import Board, Wait
from parity.errors import Deadlock, Lost, ProtocolError


def verdict_on(board: Board) -> ProtocolError | None:
    """The sentence over this rank, if it waits for ever; all who do are told the same."""
    board.region.acquire()
    try:
        if board.verdict()[0]:  # by another rank, which may have left since
            return passed_verdict(board)
        gone = {r for r in range(board.world) if board.is_gone(r)}
        waits = {r: board.waits(r) for r in range(board.world) if r not in gone}
        stuck = _stuck(board, waits, gone)
        if board.rank not in stuck:
            return None
        lines, ends = _sentence(board, {r: waits[r] for r in sorted(stuck)}, gone)
        kind = b.LOST if ends else b.DEADLOCK
        board.pass_verdict(sorted(stuck), kind, "\n  ".join(lines))
        bells = board.rouse(sorted(stuck))
    finally:
        board.region.release()
    for rank in bells:
        board.region.ring(rank)
    return passed_verdict(board)


def passed_verdict(board: Board) -> ProtocolError | None:
    """What another rank has found about this one."""
    kind, text = board.verdict()
    return {b.DEADLOCK: Deadlock, b.LOST: Lost}[kind](text) if kind else None


def lost_member(board: Board, waits: list[Wait]) -> Lost | None:
    """A member that a call lacks and that has gone; of a choice, if none is left."""
    board.region.acquire()
    lost = [
        next(
            (r for r in _others(board, board.rank, w) if board.is_gone(r) or _left(board, w, r)),
            None,
        )
        for w in waits
    ]
    board.region.release()
    if None in lost:
        return None
    rank = lost[0]
    assert rank is not None
    return Lost(f"{_line(board, board.rank, waits[0], rank)}, {_how_gone(board, rank)}")


def _stuck(board: Board, waits: dict[int, list[Wait]], gone: set[int]) -> set[int]:
    stuck = {r for r, calls in waits.items() if calls}
    while True:
        freed = {
            r for r in stuck if any(_can_end(board, r, wait, stuck | gone) for wait in waits[r])
        }
        if not freed:
            return stuck
        stuck -= freed


def _can_end(board: Board, rank: int, wait: Wait, never: set[int]) -> bool:
    return not any(r in never or _left(board, wait, r) for r in _others(board, rank, wait))


def _others(board: Board, rank: int, wait: Wait) -> list[int]:
    """Whom the call of `rank` lacks. A receive from anyone joins a lane only when it has found its
    sender: that it has not made the call itself says nothing, but on a lane from itself to itself.
    """
    missing = _missing(board, wait)
    is_to_itself = len(set(_array(board, wait.lane, b.RANK))) == 1
    return missing if is_to_itself else [r for r in missing if r != rank]


def _array(board: Board, lane: int, which: int) -> list[int]:
    n = board.words[lane + b.MEMBERS]
    at = lane + b.HEAD + which * n
    return board.words[at : at + n].tolist()


def _missing(board: Board, wait: Wait) -> list[int]:
    """The ranks that have not made the call, by their seat, or have gone in its midst."""
    ranks, issued, posted = (_array(board, wait.lane, k) for k in (b.RANK, b.ISSUED, b.POSTED))
    is_open = board.words[wait.lane + b.COMPLETE] < wait.step
    # The last to post completes a step: where all have posted, it is whoever has gone.
    needed = wait.step + 1 if min(posted) >= wait.step else wait.step
    return [
        rank
        for rank, made, at in zip(ranks, issued, posted, strict=True)
        if made < wait.ordinal or (is_open and at < needed and board.is_gone(rank))
    ]


def _left(board: Board, wait: Wait, rank: int) -> bool:
    ranks, left = (_array(board, wait.lane, which) for which in (b.RANK, b.GONE))
    return any(left[i] for i, r in enumerate(ranks) if r == rank)


def _sentence(board: Board, waits: dict[int, list[Wait]], gone: set[int]) -> tuple[list[str], bool]:
    """The chain of waits from the first rank on, then the others; and whether its end is lost."""
    chain, rank, lines, ends = [], min(waits), [], False
    while rank not in chain:
        chain.append(rank)
        wait = waits[rank][0]
        missing = _others(board, rank, wait)
        never = [r for r in missing if r in gone or _left(board, wait, r)]
        blocked = [r for r in missing if r in waits]
        target = (never or blocked)[0]
        lines.append(_line(board, rank, wait, target))
        if never:
            lines[-1] += f", {_how_gone(board, target)}"
            ends = True
            break
        rank = target
    others = [r for r in waits if r not in chain]
    lines += [_line(board, r, waits[r][0], _others(board, r, waits[r][0])[0]) for r in others]
    head = "waits for a rank that will not come:" if ends else "ranks wait for each other for ever:"
    return [head, *lines], ends


def _line(board: Board, rank: int, wait: Wait, target: int) -> str:
    return f"rank {rank} waits for rank {target} in {board.read(wait.phrase)}"


def _how_gone(board: Board, rank: int) -> str:
    state = board.state(rank)
    if state == b.ENDED:
        return "which has ended"
    return "which has died" if board.is_gone(rank) else "which has left the group"
