"""Plan and combine: which server computes which (row, expert) pair, and the sum of what returns.

T rows, K experts a row (the shared expert among them), S servers, E experts of the layer.
Everything is vectorised over rows: no loop over tokens or experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int32]
#: A partial sum [R, H], and its rows, ascending; None for every row.
Contribution = tuple[npt.NDArray[np.int64] | None, torch.Tensor]

#: A server that most rows visit is sent every row: the others cost less on the wire than it takes
#: to pick rows out of a large tensor, and their part of the answer is zero.
_MOST_ROWS = 0.9
#: From so many pairs a server on, a batch asks every server anyway, and evenness counts.
_LARGE_PAIRS = 64
#: A large batch's pairs are divided anew until the largest time is this near the mean, or so often;
#: each time lateness moves a server's odds by this power, so that it nears and then settles.
_EVEN = 1.02
_DIVISION_STEPS = (4, 4, 3, 2, 2, 1, 1, 1)
#: By how much the odds of a server rise that gets the row anyway: a row sent twice costs its bytes,
#: a server that is late costs everybody.
_VISITED_ODDS = 64.0
_NO_EXPERT = np.int32(-1)
_NOBODY, _LONELY = -1, -2  # in place of a server: no expert, and one that nobody holds
#: Rows whose float32 sum stays in a core's cache while the next partial sums are added.
_COMBINE_ROWS = 128


#: What the partial sums of rows in these types are, where not of the rows' own type.
_PARTIAL_DTYPES = {torch.float16: torch.float32}


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which servers return partial sums of rows of `dtype`.

    float32 for float16: parts beyond 65504, float16's largest, may add up to a sum within it.
    bfloat16 has float32's range and stays: that each part is rounded moves an element by at most
    2^-8 of the parts' magnitudes, as much as the rounding of experts' outputs to bfloat16 does.
    """
    return _PARTIAL_DTYPES.get(dtype, dtype)


class Holders:
    """Who can be asked for each expert of one layer: made once, used until a server changes."""

    def __init__(self, holds_SE: npt.NDArray[np.bool_], rate_S: npt.NDArray[np.float64]) -> None:
        """`holds_SE` has only servers that can be asked set; `rate_S` is their relative speed."""
        self.holds_ES = np.ascontiguousarray(holds_SE.T)
        self.count_E = holds_SE.sum(0)
        # The holder, where there is just one: the sum of the holders' rows then is its row.
        self.only_E = self.holds_ES.astype(np.int64) @ np.arange(len(rate_S))
        self.rate_S = np.maximum(rate_S, 1e-9)
        self.any_replicas = bool((self.count_E > 1).any())
        # Where every expert has one holder, that says it all; with one more entry, for id -1.
        self.sole_E: npt.NDArray[np.int64] | None = None
        if bool((self.count_E == 1).all()):
            self.sole_E = np.append(self.only_E, _NOBODY)
        # For a row alone, whose few elements Python gets at sooner.
        self.counts: list[int] = self.count_E.tolist()
        self.only: list[int] = self.only_E.tolist()


@dataclass(slots=True)
class Part:
    """What one server is asked for: each row once, whatever number of its experts is there."""

    server: int  # row of the Holders
    rows: npt.NDArray[np.int64] | None  # [R], ascending; None for every row
    expert_ids: Ids  # [R, K], -1 where the pair is not this part's

    @property
    def pairs(self) -> int:
        """(row, expert) pairs in this part."""
        return int((self.expert_ids >= 0).sum())

    def ids_among(self, total_rows: int) -> Ids:
        """This part's pairs as an [T, K] table, -1 elsewhere."""
        if self.rows is None:
            return self.expert_ids
        table = np.full((total_rows, self.expert_ids.shape[1]), -1, np.int32)
        table[self.rows] = self.expert_ids
        return table


def plan(ids_TK: Ids, holders: Holders, salt: int = 0) -> tuple[list[Part], Ids | None]:
    """Gives every pair to one server that holds its expert.

    An expert with one holder goes there. Of several holders, in a small batch, one that already
    gets the row is preferred (among those, the one with the fewest pairs of the row): fewer
    servers are asked. A large batch asks all of them anyway; there each expert's rows are divided
    so that the largest time is least. The rest is drawn in proportion by weighted rendezvous
    hashing of (row + salt), which also tends to keep a row's experts on one server.

    Returns the parts, by ascending server, and the pairs that nobody can be asked for as an
    [T, K] table (-1 elsewhere), None where there are none.
    """
    if len(ids_TK) == 1 and 0 < ids_TK.size < _LARGE_PAIRS:
        return _plan_row(ids_TK[0].tolist(), holders, salt)
    return _plan_rows(ids_TK, holders, salt)


def _plan_row(ids: list[int], holders: Holders, salt: int) -> tuple[list[Part], Ids | None]:
    """`plan` for one row, the same to the last draw: a few steps in Python take a fifth of the time
    of some twenty numpy calls."""
    pairs: dict[int, int] = {}  # by server: how many of the row's
    choice = [_NOBODY if expert < 0 else holders.only[expert] for expert in ids]
    count = [1 if expert < 0 else holders.counts[expert] for expert in ids]
    for server, holding in zip(choice, count, strict=True):
        if server != _NOBODY and holding == 1:
            pairs[server] = pairs.get(server, 0) + 1
    if max(count) > 1:
        draw = _rendezvous(1, salt, holders.rate_S)[0].tolist()
        for k, expert in enumerate(ids):
            if count[k] > 1:
                can = np.flatnonzero(holders.holds_ES[expert]).tolist()
                choice[k] = max(can, key=lambda s: _score(draw[s], pairs.get(s, 0), len(ids)))
                pairs[choice[k]] = pairs.get(choice[k], 0) + 1
    if lonely := min(count) == 0:
        choice = [
            server if holding else _LONELY for server, holding in zip(choice, count, strict=True)
        ]
    parts = [Part(server, None, _only(ids, choice, server)) for server in sorted(pairs)]
    return parts, _only(ids, choice, _LONELY) if lonely else None


def _score(draw: float, seen: int, columns: int) -> float:
    """See `_choose_replicas`."""
    return draw + (1.0 + columns - seen if seen else 0.0)


def _only(ids: list[int], choice: list[int], server: int) -> Ids:
    """[1, K]: the row's ids for which that is the choice, -1 elsewhere."""
    mine = [expert if s == server else -1 for expert, s in zip(ids, choice, strict=True)]
    return np.array([mine], np.int32)


def _plan_rows(ids_TK: Ids, holders: Holders, salt: int) -> tuple[list[Part], Ids | None]:
    if holders.sole_E is not None:
        return _parts(holders.sole_E[ids_TK], ids_TK), None
    valid = ids_TK >= 0
    count = np.where(valid, holders.count_E[ids_TK], 1)
    choice = np.where(valid & (count == 1), holders.only_E[ids_TK], -1)
    if holders.any_replicas:
        flexible = valid & (count > 1)
        if flexible.any():
            large = ids_TK.size >= _LARGE_PAIRS * len(holders.rate_S)
            choose = _divide if large else _choose_replicas
            choose(choice, ids_TK, flexible, holders, salt)
    lonely = count == 0
    unplaced = np.where(lonely, ids_TK, np.int32(-1)) if lonely.any() else None
    return _parts(choice, ids_TK), unplaced


def _choose_replicas(
    choice: npt.NDArray[np.int64],
    ids_TK: Ids,
    flexible: npt.NDArray[np.bool_],
    holders: Holders,
    salt: int,
) -> None:
    """Fills `choice` where `flexible`, column by column, so that each sees the ones before."""
    (rows, columns), servers = ids_TK.shape, len(holders.rate_S)
    at, column = np.nonzero(choice >= 0)
    visits = np.bincount(at * servers + choice[at, column], minlength=rows * servers)
    visits_TS = visits.reshape(rows, servers).astype(np.float64)
    draw_TS = _rendezvous(rows, salt, holders.rate_S)  # in (0, 1)
    for k in range(columns):
        here = np.flatnonzero(flexible[:, k])
        if len(here) == 0:
            continue
        can = holders.holds_ES[ids_TK[here, k]]
        seen = visits_TS[here]
        # Visited servers first, of those the ones with the fewest pairs, and then the draw: without
        # it the first server would get every tie, and with it more than its share.
        score = draw_TS[here] + np.where(seen > 0, 1.0 + columns - seen, 0.0)
        chosen = np.where(can, score, -1.0).argmax(1)
        choice[here, k] = chosen
        visits_TS[here, chosen] += 1.0


def _divide(
    choice: npt.NDArray[np.int64],
    ids_TK: Ids,
    flexible: npt.NDArray[np.bool_],
    holders: Holders,
    salt: int,
) -> None:
    """Fills `choice` where `flexible`, so that no server has much more to do than another.

    Draws all pairs at once, and again with the odds of servers that came out late lowered and of
    early ones raised, until they are about even.
    """
    rows, servers = len(ids_TK), len(holders.rate_S)
    at, column = np.nonzero(choice >= 0)
    visits = np.bincount(at * servers + choice[at, column], minlength=rows * servers)
    fixed_S = visits.reshape(rows, servers).sum(0)
    pair_rows, _ = np.nonzero(flexible)
    odds_PS = np.where(holders.holds_ES[ids_TK[flexible]], holders.rate_S, 0.0)
    odds_PS = odds_PS * np.where(visits.reshape(rows, servers)[pair_rows] > 0, _VISITED_ODDS, 1.0)
    # The same draw for all pairs of a row: they tend to one server.
    odds_PS /= -np.log(_uniform(rows, salt, servers))[pair_rows]
    least = np.inf
    for step in _DIVISION_STEPS:
        drawn = odds_PS.argmax(1)
        time_S = (fixed_S + np.bincount(drawn, minlength=servers)) / holders.rate_S
        late = float(time_S.max() / time_S.mean())
        if late < least:
            least, choice[flexible] = late, drawn
        if late < _EVEN:
            return
        odds_PS *= (time_S.mean() / np.maximum(time_S, 1.0)) ** step


def _rendezvous(rows: int, salt: int, rate_S: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[T, S] draws: server s has row t's largest with probability rate_s / sum of rates.

    -rate / ln(u), u uniform in (0, 1), has that property (weighted rendezvous hashing); it is
    mapped into (0, 1) without changing the order.
    """
    draw: npt.NDArray[np.float64] = rate_S / (rate_S - np.log(_uniform(rows, salt, len(rate_S))))
    return draw


def _uniform(rows: int, salt: int, servers: int) -> npt.NDArray[np.float64]:
    """[T, S] in (0, 1), by row + salt and server: the finaliser of splitmix64 over both."""
    keys = (np.arange(rows, dtype=np.uint64) + np.uint64(salt & 0xFFFFFFFF))[:, None]
    mixed = keys * np.uint64(0x9E3779B97F4A7C15)
    mixed = mixed + (np.arange(1, servers + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) / float(1 << 52)


def _parts(choice: npt.NDArray[np.int64], ids_TK: Ids) -> list[Part]:
    parts = []
    # The least of numpy's calls: np.unique alone takes as long as all of this for one server.
    for server in np.bincount(choice.ravel() + 1)[1:].nonzero()[0].tolist():
        mine = choice == server
        here = np.logical_or.reduce(mine, 1)
        ids = np.where(mine, ids_TK, _NO_EXPERT)
        if np.count_nonzero(here) >= _MOST_ROWS * len(ids_TK):
            parts.append(Part(server, None, ids))
        else:
            rows = here.nonzero()[0]
            parts.append(Part(server, rows, ids[rows]))
    return parts


def rows_of(tensor_TX: torch.Tensor, rows: npt.NDArray[np.int64] | None) -> torch.Tensor:
    """The part's rows of a tensor; the tensor itself when the part has all of them."""
    return tensor_TX if rows is None else tensor_TX.index_select(0, torch.from_numpy(rows))


def reusable(
    hidden_TH: torch.Tensor,
    contributions: Sequence[Contribution],
) -> torch.Tensor | None:
    """A partial sum in whose place the sum of all may be written, as `combine`'s room.

    One for every row, in hidden's dtype, in memory that torch allocated for it: what views received
    bytes or memory shared with a peer is never overwritten.
    """
    for rows, partial in contributions:
        whole = rows is None and partial.dtype == hidden_TH.dtype and partial.is_contiguous()
        if whole and partial.untyped_storage().resizable():
            return partial
    return None


class SumKernel(Protocol):
    """Adds up partial sums in one pass."""

    def takes(self, out_TH: torch.Tensor, contributions: Sequence[Contribution]) -> bool:
        """Whether it can add these up."""
        ...

    def add(self, out_TH: torch.Tensor, contributions: Sequence[Contribution]) -> None:
        """Writes what `combine` says into `out_TH`."""
        ...


def combine(
    hidden_TH: torch.Tensor,
    contributions: Sequence[Contribution],
    room_TH: torch.Tensor | None = None,
    kernel: SumKernel | None = None,
) -> torch.Tensor:
    """Adds up partial sums in float32; rounds once, to hidden's dtype.

    The order of the sum is that of `contributions`. Rows without any are zero. The sum may be
    written into `room_TH`, of hidden's shape and dtype, and is that tensor then; one of the partial
    sums may be the room. `kernel` is code of our own, where there is some.
    """
    dtype = hidden_TH.dtype
    partials = [partial for rows, partial in contributions if rows is None]
    if len(partials) == len(contributions):
        if len(partials) == 1:
            return partials[0].to(dtype)
        if len(partials) == 2 and partials[0].dtype == partials[1].dtype == dtype:
            # Of 16-bit types, too, torch adds two in float32, and in one pass.
            return torch.add(partials[0], partials[1], out=room_TH)
    total = torch.empty(hidden_TH.shape, dtype=dtype, device="cpu") if room_TH is None else room_TH
    if kernel is not None and kernel.takes(total, contributions):
        kernel.add(total, contributions)
        return total
    # In blocks that stay in the cache: the float32 sums of a large batch would be twice its size.
    for start in range(0, len(total), _COMBINE_ROWS):
        block = total[start : start + _COMBINE_ROWS]
        summed = torch.zeros(block.shape, dtype=torch.float32, device="cpu")
        for rows, partial in contributions:
            _add(summed, start, rows, partial)
        block.copy_(summed)
    return total


def _add(
    summed: torch.Tensor, start: int, rows: npt.NDArray[np.int64] | None, partial: torch.Tensor
) -> None:
    """Adds to the sums of rows `start` and on what one partial sum has for them."""
    stop = start + len(summed)
    if rows is None:
        summed += partial[start:stop]
        return
    if start or (len(rows) and rows[-1] >= stop):
        first, last = np.searchsorted(rows, (start, stop))
        rows, partial = rows[first:last] - start, partial[first:last]
    summed.index_add_(0, torch.from_numpy(rows), partial.float())
