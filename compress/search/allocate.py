"""A byte budget becomes a choice for every bucket of every table: pure functions of bytes and predicted losses.

`allocate` is for tiers: within a table the options may only fall with rank, so that every tier is one prefix cut. Under
one Lagrange multiplier a dynamic program solves each table exactly; bisection finds the multiplier that meets the
budget, and what the lower convex hull leaves unspent goes to the best single moves. `knapsack` is for one option a
table: there the hull misses the budget by whole tables, so it is solved exactly.

Legend: T tables, E buckets in order of rank, B options in order of rising bits, S states of the knapsack;
F menus of all tables, R of them that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from compress.errors import PlanError

MAX_STATES = 1 << 18
_SECTIONS, _ROUNDS = 9, 20
_RANGE = 1e-24  # of the dearest multiplier: below it a byte is worth nothing
_ROUNDING = 1e-9  # of what a table costs: sums differ by less
_CLOSE = 3e-4  # of a multiplier, or of the budget: what is left is given out move by move


@dataclass(frozen=True)
class Options:
    """What the buckets of a table may become.

    bytes_EB, loss_EB (E, B): of each bucket under each option; an infinite loss marks an option that a table cannot
    have (a dim that does not pack). Buckets come in order of rank, options in order of rising bits; option 0 may read
    the centroid. fixed_B (B,): bytes that an option costs once where any bucket takes it (a tier, the id map).

    price_B (B,): predicted loss that a plan must gain for an option to be worth taking at all (the time of a tier);
    opening_B (B,): more of it where the option is the first bucket's.
    """

    name: str
    bytes_EB: np.ndarray
    loss_EB: np.ndarray
    fixed_B: np.ndarray | None = None
    price_B: np.ndarray | None = None
    opening_B: np.ndarray | None = None


@dataclass(frozen=True)
class Allocation:
    """choices: of each table the option (E,) int64 of each bucket, non-increasing. bytes and loss (T,): of each table.

    price (T,): what the options taken were to gain, in predicted loss; not part of `loss`.
    multiplier: predicted loss that one more byte would save, 0 where the budget does not bind.
    """

    choices: list[np.ndarray]
    bytes: np.ndarray
    loss: np.ndarray
    price: np.ndarray
    multiplier: float

    @property
    def cost(self) -> float:
        """What was made least: predicted loss and prices of all tables."""
        return float((self.loss + self.price).sum())


@dataclass(frozen=True)
class Choice:
    """choices: the option of each table. exact: False when more than MAX_STATES states had to be thinned out."""

    choices: list[int]
    bytes: int
    loss: float
    exact: bool


def allocate(tables: Sequence[Options], budget_bytes: int) -> Allocation:
    """The options of least predicted loss, prices included, within a budget; see the top of this file.

    That sum is within the last move of the optimum: no byte count on the lower convex hull is missed.
    Raises: PlanError for arrays that do not fit together, and for a budget below the floor, with what holds that up.
    """
    return Menus([[table] for table in tables]).allocate(budget_bytes)[1]


@dataclass(frozen=True)
class _Solved:
    """The best at one multiplier: which menu (T,) of all, its options (T, E), bytes and cost of all tables.

    bytes_T: of each table; own_F: cost + multiplier * bytes of each of the menus, infinite where it was not looked at.
    """

    picks_T: np.ndarray
    choice_TE: np.ndarray
    bytes: int
    cost: float
    bytes_T: np.ndarray
    own_F: np.ndarray


class Menus:
    """Tables that have several menus of options each, of which one is taken: the best at a multiplier.

    What is found at a multiplier is remembered: another budget begins between two of those.
    """

    def __init__(self, menus: Sequence[Sequence[Options]]) -> None:
        """Raises: PlanError for arrays that do not fit together."""
        self.tables = [several[0] for several in menus]
        self.grid = _Grid([options for several in menus for options in several])
        self.ends = np.cumsum([len(several) for several in menus], dtype=np.int64)
        self.first_T = self.ends - np.array([len(several) for several in menus], dtype=np.int64)
        self.table_F = np.repeat(np.arange(len(menus)), [len(several) for several in menus])
        self.known: dict[float, _Solved] = {}
        loss_TEB, grid = self.grid.loss_TEB, self.grid
        finite = np.where(np.isfinite(loss_TEB), loss_TEB, np.nan)
        # at the dearest a byte outweighs all losses and prices
        span = (np.nanmax(finite, axis=2) - np.nanmin(finite, axis=2)).sum()
        self.dearest = float(span + grid.price_TB.sum() + grid.opening_TB.sum()) or 1.0

    def allocate(self, budget_bytes: int) -> tuple[list[int], Allocation]:
        """The menu of each table, and the options of least loss and prices, within a budget.

        Raises: PlanError for a budget below the floor, with what holds that up.
        """
        smallest = self.grid.pick(self.first_T)
        _check_floor(self.tables, smallest.table_bytes(smallest.floor_TE), budget_bytes)
        self._solve([m for m in (0.0, self.dearest) if m not in self.known], np.arange(len(self.table_F)))
        found: _Solved | None = self.known[0.0]
        multiplier = 0.0
        if self.known[0.0].bytes > budget_bytes:
            self._narrow(budget_bytes)
            fits = {m: solved for m, solved in self.known.items() if solved.bytes <= budget_bytes}
            multiplier = min(fits, key=lambda m: fits[m].cost, default=self.dearest)
            found = fits.get(multiplier)
        picks_T, choice_TE = (
            (self.first_T, smallest.floor_TE.copy()) if found is None else (found.picks_T, found.choice_TE.copy())
        )
        grid = self.grid.pick(picks_T)
        if multiplier:
            grid.fill(choice_TE, budget_bytes)
        return (picks_T - self.first_T).tolist(), grid.allocation(choice_TE, multiplier)

    def _narrow(self, budget_bytes: int) -> None:
        """Look at multipliers until the two around the budget are neighbours, or one meets it closely."""
        for _ in range(_ROUNDS):
            low = max((m for m, s in self.known.items() if s.bytes > budget_bytes), default=0.0)
            above = [m for m, s in self.known.items() if s.bytes <= budget_bytes and m > low]
            high = min(above, default=self.dearest)
            if low and high / low < 1 + _CLOSE:
                return
            if above and self.known[high].bytes >= (1 - _CLOSE) * budget_bytes:
                return
            between = np.geomspace(low or self.dearest * _RANGE, high, _SECTIONS + 1)[1:-1].tolist()
            self._solve(between, self._rivals(low, high))

    def _rivals(self, low: float, high: float) -> np.ndarray:
        """The menus (R,) that may be a table's best between two known multipliers.

        What a menu costs at its best is concave in the multiplier: it lies above its chord, and below its tangents. One
        whose chord is nowhere below the tangents of the best ones at both ends is no better than these between.
        """
        one, two = self.known[low], self.known[high]
        best_T, other_T = one.own_F[one.picks_T], two.own_F[two.picks_T]
        rivals_F = np.zeros(len(self.table_F), dtype=bool)
        with np.errstate(invalid="ignore", divide="ignore"):
            meet_T = (other_T - two.bytes_T * high - best_T + one.bytes_T * low) / (one.bytes_T - two.bytes_T)
            meet_T = np.clip(np.where(np.isfinite(meet_T), meet_T, low), low, high)
            for at_T in (np.full_like(meet_T, low), meet_T, np.full_like(meet_T, high)):
                bound_T = np.minimum(best_T + one.bytes_T * (at_T - low), other_T + two.bytes_T * (at_T - high))
                share_F = ((at_T - low) / (high - low))[self.table_F]
                chord_F = (1 - share_F) * one.own_F + share_F * two.own_F
                rivals_F |= chord_F < (bound_T - _ROUNDING * np.maximum(best_T, other_T))[self.table_F]
        rivals_F[one.picks_T] = rivals_F[two.picks_T] = True
        return np.flatnonzero(rivals_F)

    def _solve(self, multipliers: list[float], rivals_R: np.ndarray) -> None:
        """Remember the best at some multipliers, among some of the menus."""
        if not multipliers:
            return
        grid = self.grid.pick(rivals_R)
        for multiplier, choice_RE in zip(multipliers, grid.lagrange_each(np.array(multipliers)), strict=True):
            bytes_R, cost_R = grid.table_bytes(choice_RE), grid.table_cost(choice_RE)
            own_F = np.full(len(self.table_F), np.inf)
            own_F[rivals_R] = cost_R + multiplier * bytes_R
            several = zip(self.first_T.tolist(), self.ends.tolist(), strict=True)
            picks_T = np.array([first + int(own_F[first:end].argmin()) for first, end in several], dtype=np.int64)
            place_T = np.searchsorted(rivals_R, picks_T)
            bytes_T = bytes_R[place_T]
            self.known[multiplier] = _Solved(
                picks_T, choice_RE[place_T], int(bytes_T.sum()), float(cost_R[place_T].sum()), bytes_T, own_F
            )


def floor_bytes(tables: Sequence[Options]) -> np.ndarray:
    """Fewest bytes (T,) int64 that each table can have. Raises: PlanError for arrays that do not fit together."""
    grid = _Grid(tables)
    return grid.table_bytes(grid.floor_TE)


def knapsack(tables: Sequence[Options], budget_bytes: int) -> Choice:
    """One option a table (each with a single bucket, E = 1, and no prices), of least loss within a budget.

    Tables are merged one by one into the set of (bytes, loss) that no other beats in both; states that the Lagrange
    bound rules out are dropped, which keeps the result exact. Should more than MAX_STATES remain, they are thinned out
    evenly by bytes, and `exact` says so.
    Raises: PlanError as `allocate`, and for a table of several buckets.
    """
    for table in tables:
        if len(table.bytes_EB) != 1:
            raise PlanError(f"table {table.name}: {len(table.bytes_EB)} buckets, the knapsack takes one: use allocate")
    relaxed = allocate(tables, budget_bytes)
    bytes_of = [_once(table)[0] for table in tables]
    loss_of = [_once(table)[1] for table in tables]
    least = [b[np.isfinite(v)].min() for b, v in zip(bytes_of, loss_of, strict=True)]
    bound = [(v + relaxed.multiplier * b).min() for b, v in zip(bytes_of, loss_of, strict=True)]
    # a little above the loss of a plan at hand, which must itself survive its rounding
    limit = float(relaxed.loss.sum()) + 1e-9 * (abs(float(relaxed.loss.sum())) + 1e-300)
    bytes_S, loss_S = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    exact = True
    for index, (own_bytes, own_loss) in enumerate(zip(bytes_of, loss_of, strict=True)):
        total = (bytes_S[:, None] + own_bytes).ravel()
        loss = (loss_S[:, None] + own_loss).ravel()
        reach = loss + relaxed.multiplier * (total - budget_bytes) + sum(bound[index + 1 :])
        kept = np.flatnonzero((total + sum(least[index + 1 :]) <= budget_bytes) & (reach <= limit))
        kept = kept[_pareto(total[kept], loss[kept])]
        if len(kept) > MAX_STATES:
            kept, exact = kept[np.linspace(0, len(kept) - 1, MAX_STATES).astype(np.int64)], False
        bytes_S, loss_S = total[kept], loss[kept]
        trail.append((kept // len(own_bytes), kept % len(own_bytes)))
    if not exact and (not len(loss_S) or loss_S[-1] > relaxed.loss.sum()):
        found = [int(choice[0]) for choice in relaxed.choices]
        return Choice(found, int(relaxed.bytes.sum()), float(relaxed.loss.sum()), exact)
    state, choices = len(loss_S) - 1, []  # the last of a Pareto set has the least loss
    final = int(bytes_S[state]), float(loss_S[state])
    for parents, options in reversed(trail):
        choices.append(int(options[state]))
        state = int(parents[state])
    return Choice(choices[::-1], *final, exact)


def _once(table: Options) -> tuple[np.ndarray, np.ndarray]:
    """Bytes, fixed ones included, and loss (B,) of a table of one bucket."""
    fixed = 0 if table.fixed_B is None else table.fixed_B
    return (table.bytes_EB[0] + fixed).astype(np.int64), table.loss_EB[0].astype(np.float64)


def _pareto(bytes_S: np.ndarray, loss_S: np.ndarray) -> np.ndarray:
    """Indices of the states that no other beats in both, by rising bytes."""
    order = np.lexsort((loss_S, bytes_S))
    sorted_loss = loss_S[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_loss)[:-1]])
    return order[sorted_loss < before]


def _check_floor(tables: Sequence[Options], bytes_T: np.ndarray, budget_bytes: int) -> None:
    floor = int(bytes_T.sum())
    if floor <= budget_bytes:
        return
    largest = np.argsort(-bytes_T, kind="stable")[:3]
    parts = ", ".join(f"{tables[i].name} {int(bytes_T[i]):,}" for i in largest)
    raise PlanError(
        f"budget {budget_bytes:,} bytes: the tables need {floor:,} at least, of which {parts}: raise the budget, "
        f"or allow these tables fewer bits, a smaller share of rows or a lower rank"
    )


class _Grid:
    """All tables in arrays of one size. Buckets that only pad a table cost nothing, options that pad are infinite."""

    def __init__(self, tables: Sequence[Options]) -> None:
        for table in tables:
            _check(table)
        buckets = max((len(t.bytes_EB) for t in tables), default=1)
        options = max((t.bytes_EB.shape[1] for t in tables), default=1)
        self.bytes_TEB = np.zeros((len(tables), buckets, options), dtype=np.int64)
        self.loss_TEB = np.zeros((len(tables), buckets, options))
        self.fixed_TB = np.zeros((len(tables), options), dtype=np.int64)
        self.price_TB = np.zeros((len(tables), options))
        self.opening_TB = np.zeros((len(tables), options))
        self.lengths_T = np.array([len(t.bytes_EB) for t in tables], dtype=np.int64)
        self.real_TE = np.arange(buckets) < self.lengths_T[:, None]
        for index, table in enumerate(tables):
            own_buckets, own_options = table.bytes_EB.shape
            self.bytes_TEB[index, :own_buckets, :own_options] = table.bytes_EB
            self.loss_TEB[index, :own_buckets, :own_options] = table.loss_EB
            self.loss_TEB[index, :, own_options:] = np.inf
            for padded, own in (
                (self.fixed_TB, table.fixed_B),
                (self.price_TB, table.price_B),
                (self.opening_TB, table.opening_B),
            ):
                if own is not None:
                    padded[index, :own_options] = own

        self.slots_TE = np.where(self.real_TE, options * np.arange(len(tables))[:, None], options * len(tables))
        self.floor_TE = self._floor()
        unplanned = ~np.isfinite(self.table_loss(self.floor_TE))
        if unplanned.any():
            name = tables[int(unplanned.argmax())].name
            raise PlanError(f"table {name}: no options that fall with rank cover all buckets: allow it more bits")

    def pick(self, which_T: np.ndarray) -> _Grid:
        """Some of the tables."""
        grid = object.__new__(_Grid)
        for name, own in vars(self).items():
            setattr(grid, name, own[which_T])
        options = self.bytes_TEB.shape[2]
        grid.slots_TE = np.where(grid.real_TE, options * np.arange(len(which_T))[:, None], options * len(which_T))
        return grid

    def _floor(self) -> np.ndarray:
        """The options (T, E) of fewest bytes."""
        costs_TEB = np.where(np.isfinite(self.loss_TEB), self.bytes_TEB, np.inf)
        backward_EBT = costs_TEB.transpose(1, 2, 0)[::-1]
        return self.plan(backward_EBT, self.fixed_TB.T, np.zeros_like(self.opening_TB.T))

    def lagrange_each(self, multipliers_M: np.ndarray) -> np.ndarray:
        """The options (M, T, E) of least loss, prices included, + multiplier * bytes, for each of some multipliers.

        Several take little longer than one.
        """
        tables, buckets, options = self.loss_TEB.shape
        weight_M1 = multipliers_M[:, None]
        loss_EBT, bytes_EBT = (np.ascontiguousarray(own.transpose(1, 2, 0)) for own in (self.loss_TEB, self.bytes_TEB))
        entry = weight_M1 * self.fixed_TB.T[:, None] + self.price_TB.T[:, None]
        opening = np.tile(self.opening_TB.T, (1, len(multipliers_M)))
        backward = (
            (loss_EBT[bucket][:, None] + weight_M1 * bytes_EBT[bucket][:, None]).reshape(options, -1)
            for bucket in reversed(range(buckets))
        )
        chosen = self.plan(backward, entry.reshape(options, -1), opening)
        return chosen.reshape(len(multipliers_M), tables, buckets)

    def plan(self, backward_EBT: Iterable[np.ndarray], entry_BT: np.ndarray, opening_BT: np.ndarray) -> np.ndarray:
        """The options (T, E), non-increasing along E, of least cost; costs come from the last bucket to the first.

        The first bucket of an option pays entry, that of a table opening as well. Tables lie side by side in memory:
        there are many of them, and few options.
        """
        costs = iter(backward_EBT)
        value_BT = np.array(next(costs), dtype=np.float64)
        options, tables = value_BT.shape
        later = []  # of each bucket but the first, from the last on: its value, and that with the price of entry
        for costs_BT in costs:
            entered_BT = value_BT + entry_BT
            later.append((value_BT, entered_BT))
            least_T = entered_BT[0].copy()
            best_BT = value_BT.copy()
            for option in range(1, options):
                np.minimum(value_BT[option], least_T, out=best_BT[option])
                np.minimum(least_T, entered_BT[option], out=least_T)
            best_BT += costs_BT
            value_BT = best_BT
        chosen_ET = np.empty((len(later) + 1, tables), dtype=np.int64)
        chosen_ET[0] = (value_BT + entry_BT + opening_BT).argmin(0)
        each_T, own_B1 = np.arange(tables), np.arange(options)[:, None]
        for bucket, (value_BT, entered_BT) in enumerate(reversed(later)):
            now_T = chosen_ET[bucket]
            lower_BT = np.where(own_B1 < now_T, entered_BT, np.inf)
            lower_T = lower_BT.argmin(0)
            stays_T = value_BT[now_T, each_T] < lower_BT[lower_T, each_T]  # at a tie fewer bits
            chosen_ET[bucket + 1] = np.where(stays_T, now_T, lower_T)
        return np.ascontiguousarray(chosen_ET.T)

    def table_bytes(self, choice_TE: np.ndarray) -> np.ndarray:
        """Bytes (T,) int64 of a plan."""
        own = _chosen(self.bytes_TEB, choice_TE).sum(1)
        used = self._taken(choice_TE) > 0
        return own + (self.fixed_TB * used).sum(1)

    def table_loss(self, choice_TE: np.ndarray) -> np.ndarray:
        """Loss (T,) of a plan."""
        return np.asarray(_chosen(self.loss_TEB, choice_TE).sum(1))

    def table_price(self, choice_TE: np.ndarray) -> np.ndarray:
        """Prices (T,) of the options that a plan takes."""
        opened = np.take_along_axis(self.opening_TB, choice_TE[:, :1], axis=1)[:, 0]
        return (self.price_TB * (self._taken(choice_TE) > 0)).sum(1) + opened

    def table_cost(self, choice_TE: np.ndarray) -> np.ndarray:
        """Loss and prices (T,) of a plan."""
        return self.table_loss(choice_TE) + self.table_price(choice_TE)

    def allocation(self, choice_TE: np.ndarray, multiplier: float) -> Allocation:
        """A plan with what it takes and costs."""
        choices = [row[:length] for row, length in zip(choice_TE, self.lengths_T, strict=True)]
        sums = self.table_bytes(choice_TE), self.table_loss(choice_TE), self.table_price(choice_TE)
        return Allocation(choices, *sums, multiplier)

    def fill(self, choice_TE: np.ndarray, budget_bytes: int) -> None:
        """Spend what is left of the budget, in place: the bucket that gains most a byte takes more bits, repeatedly."""
        left = budget_bytes - int(self.table_bytes(choice_TE).sum())
        options = np.arange(self.bytes_TEB.shape[2])
        while left >= 0:
            now = choice_TE[:, :, None]
            bytes_now, loss_now = (_chosen(own, choice_TE)[:, :, None] for own in (self.bytes_TEB, self.loss_TEB))
            ceiling = np.concatenate([np.full((len(choice_TE), 1), options[-1]), choice_TE[:, :-1]], axis=1)
            taken = self._taken(choice_TE)
            more = self.bytes_TEB - bytes_now + _once_more(self.fixed_TB, choice_TE, taken)
            gain = loss_now - self.loss_TEB - _once_more(self.price_TB, choice_TE, taken)
            gain[:, 0] -= self.opening_TB - np.take_along_axis(self.opening_TB, choice_TE[:, :1], axis=1)
            able = (options > now) & (options <= ceiling[:, :, None]) & (more <= left) & (gain > 0)
            if not able.any():
                return
            rate = np.where(able, gain / np.maximum(more, 1e-9), -1.0)
            table, bucket, option = np.unravel_index(int(rate.argmax()), rate.shape)
            choice_TE[table, bucket] = option
            left -= int(more[table, bucket, option])

    def _taken(self, choice_TE: np.ndarray) -> np.ndarray:
        """How many buckets (T, B) take each option."""
        tables, _, options = self.bytes_TEB.shape
        counts = np.bincount((self.slots_TE + choice_TE).ravel(), minlength=(tables + 1) * options)
        return counts[: tables * options].reshape(tables, options)


def _chosen(own_TEB: np.ndarray, choice_TE: np.ndarray) -> np.ndarray:
    """What each bucket (T, E) has of its options."""
    first_TE = np.arange(choice_TE.size).reshape(choice_TE.shape) * own_TEB.shape[2]
    return own_TEB.ravel()[first_TE + choice_TE]


def _once_more(own_TB: np.ndarray, choice_TE: np.ndarray, taken_TB: np.ndarray) -> np.ndarray:
    """What (T, E, B) is paid once an option, more than now, if one bucket took another option."""
    vacated_TE = (np.take_along_axis(taken_TB, choice_TE, 1) == 1) * np.take_along_axis(own_TB, choice_TE, 1)
    return ((taken_TB == 0) * own_TB)[:, None, :] - vacated_TE[:, :, None]


def _check(table: Options) -> None:
    shape = table.bytes_EB.shape
    if len(shape) != 2 or 0 in shape or table.loss_EB.shape != shape:
        raise PlanError(
            f"table {table.name}: bytes of shape {shape}, losses of {table.loss_EB.shape}: both are (buckets, options)"
        )
    for what, own in (("fixed bytes", table.fixed_B), ("prices", table.price_B), ("opening prices", table.opening_B)):
        if own is not None and own.shape != shape[1:]:
            raise PlanError(f"table {table.name}: {what} of shape {own.shape}, options are {shape[1]}")
        if own is not None and not (own >= 0).all():
            raise PlanError(f"table {table.name}: {what} are {own.tolist()}, none may be negative or NaN")
    if np.isnan(table.loss_EB).any() or (table.loss_EB == -np.inf).any() or (table.bytes_EB < 0).any():
        raise PlanError(f"table {table.name}: a loss is NaN, or bytes are negative: profile the table again")
