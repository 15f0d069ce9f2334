"""Local search on a timetable: small changes to what one rank does in a few ticks, judged in the executor's time.

A timetable is a graph of cells, each waiting for its rank's cell a tick before and its neighbours' cells `exchange`
ticks before. With `head` the time from the start of the step to the end of a cell and `tail` from its start to the end
of the step, both over the longest path, a change of a few cells is judged without running the rest: the longest path
through the changed cells takes their new heads and tails (Taillard 1994, "Parallel taboo search techniques for the job
shop scheduling problem"). Changes start at cells on a longest path, for others alone can't help. Worse
ones are taken now and then, ever more rarely (simulated annealing).
"""

import math
import random
from collections.abc import Callable, Iterable

from jaxpar.schedule.problem import SearchProblem, Step, strip_microbatches
from jaxpar.schedule.timetable import Timetable

_REACH, _FAR_REACH = 6, 24  # ticks over which a cell is moved, mostly and at times
_SPARE = 4  # idle ticks at the end, to move into
_PATH_LIFE = 24  # tries before another longest path is looked for
_IDLE = -1
_TRY, _MEASURE = 7e-6, 7e-7  # seconds of a change that is tried, and of a cell that is measured anew, about
Change = list[tuple[int, int]]  # the new content of some ticks of a rank, in order


class LocalSearch:
    """Improves a timetable; `best` is the least makespan so far, `best_steps` its cells.

    A job is `3 (s M + m) + kind` with kinds F, B or I, and W; `whole[s M + m]` says whether the second is a B, and then
    there is no third. `at[job]` is its tick. `work` is about the seconds that it took, counted and not measured,
    so that a search that is bounded by it is the same on every machine.
    """

    def __init__(self, problem: SearchProblem, timetable: Timetable, seed: int):
        self.problem, self.exchange, self.random = problem, timetable.exchange, random.Random(seed)
        self.work = 0.0
        self._read(strip_microbatches(timetable))
        self._connect_jobs()
        self._connect_rows()
        self.head = [[0.0] * self.ticks for _ in self.cells]
        self.tail = [[0.0] * self.ticks for _ in self.cells]
        self.held = [[0.0] * self.ticks for _ in self._ranks]
        self._refresh(range(len(self.cells)), 0, self.ticks - 1)
        for rank in self._ranks:
            self._write_held(rank, 0, self.ticks - 1)
        self.makespan = self.best = self._measure()
        self.best_steps = self._steps()
        self.unit = max(sum(problem.work), 1e-300) / max(1, sum(job >= 0 for row in self.cells for job in row))
        self.path: list[tuple[int, int]] = []
        self.path_age = 0

    def run(self, enough: float, going: Callable[[], bool], work: float, *, heat: float) -> None:
        """Try changes for so much `work`, until `best` is `enough` or `going()` is false.

        A change for the worse is taken now and then, by `heat` mean actions at first and by none in the end.
        """
        turn, most = 0, self.work + work
        while self.work < most and self.best > enough and (turn % 64 or going()):
            self._try(heat * self.unit * ((most - self.work) / work) ** 2)
            self.work += _TRY
            turn += 1

    # -- reading and writing ---------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> range:
        return range(self.problem.dag.num_ranks)

    def _read(self, steps: list[list[Step]]) -> None:
        problem = self.problem
        count, stages = problem.num_microbatches, problem.dag.num_stages
        self.ticks = len(steps) + _SPARE
        self.cells = [[_IDLE] * self.ticks for _ in self._ranks]
        self.at = [_IDLE] * (3 * stages * count)
        self.whole = [True] * (stages * count)
        done = [[0, 0] for _ in range(stages)]
        pending: list[list[int]] = [[] for _ in range(stages)]
        for tick, cells in enumerate(steps):
            for rank, step in enumerate(cells):
                if step is None:
                    continue
                kind, stage = step
                if kind == "W":
                    job = 3 * pending[stage].pop(0) + 2
                else:
                    back = kind != "F"
                    batch = stage * count + done[stage][back]
                    done[stage][back] += 1
                    job = 3 * batch + back
                    if kind == "I":
                        self.whole[batch] = False
                        pending[stage].append(batch)
                self.cells[rank][tick] = job
                self.at[job] = tick

    def _steps(self) -> list[list[Step]]:
        return [[self._step(self.cells[rank][tick]) for rank in self._ranks] for tick in range(self.ticks)]

    def _step(self, job: int) -> Step:
        if job < 0:
            return None
        batch, kind = divmod(job, 3)
        name = "F" if kind == 0 else "W" if kind == 2 else "B" if self.whole[batch] else "I"
        return name, batch // self.problem.num_microbatches  # type: ignore[return-value]  # the names are kinds

    def _connect_jobs(self) -> None:
        """`needs[job]` and `feeds[job]`: jobs, with the ticks between; each stage keeps its micro-batches in order."""
        problem, dag, count = self.problem, self.problem.dag, self.problem.num_microbatches
        self.needs: list[list[tuple[int, int]]] = [[] for _ in self.at]
        for stage in range(dag.num_stages):
            for m in range(count):
                f = 3 * (stage * count + m)
                for kind, sources in enumerate((dag.forward_sources, dag.backward_sources)):
                    for p in sources[stage]:
                        lag = dag.lag(p, stage, self.exchange)
                        self.needs[f + kind].append((3 * (p * count + m) + kind, lag))
                    if m:
                        self.needs[f + kind].append((f - 3 + kind, 1))
                self.needs[f + 1].append((f, 1))
                self.needs[f + 2].append((f + 1, 1))
        self.feeds: list[list[tuple[int, int]]] = [[] for _ in self.at]
        for job, needs in enumerate(self.needs):
            for need, lag in needs:
                self.feeds[need].append((job, lag))
        s = problem.seconds
        stages = [job // 3 // count for job in range(len(self.at))]
        self.seconds = [
            (s["F"], s["B"] if self.whole[job // 3] else s["I"], s["W"])[job % 3][stage]
            for job, stage in enumerate(stages)
        ] + [0.0]  # the last is that of an idle cell, -1
        memory = problem.memory
        self.memory = memory if dag.has_backward else None
        self.frees = [0.0] * len(self.seconds)  # what is free when a job is done
        if memory is not None:
            for job, stage in enumerate(stages):
                kept = 0.0 if self.whole[job // 3] else memory.kept[stage]
                self.frees[job] = (-memory.held[stage], memory.held[stage] - kept, kept)[job % 3]

    def _connect_rows(self) -> None:
        """Add a row of cells for each link that is kept busy; `before[row]` and `after[row]` are (row, ticks, seconds).

        A cell starts after the cell before it in its row, and after those of `before[row]` so many ticks earlier and
        with so many seconds between. A link's cells are idle, and take its occupancy all the same.
        """
        self.before: list[list[tuple[int, int, float]]] = [[] for _ in self._ranks]
        self.busy = [0.0 for _ in self._ranks]
        for rank, links in enumerate(self.problem.links):
            for q, occupancy, latency in links:
                if occupancy:
                    self.before[rank].append((len(self.cells), self.exchange, latency))
                    self.before.append([(q, 0, 0.0)])
                    self.cells.append([_IDLE] * self.ticks)
                    self.busy.append(occupancy)
                else:
                    self.before[rank].append((q, self.exchange, latency))
        self.after: list[list[tuple[int, int, float]]] = [[] for _ in self.cells]
        for row, before in enumerate(self.before):
            for other, ticks, delay in before:
                self.after[other].append((row, ticks, delay))

    # -- heads and tails -------------------------------------------------------------------------------------------

    def _head(self, row: int, tick: int, previous: float, job: int) -> float:
        start = previous
        for other, ticks, delay in self.before[row]:
            if tick >= ticks:
                arrives = self.head[other][tick - ticks] + delay
                if arrives > start:
                    start = arrives
        return start + self.seconds[job] + self.busy[row]

    def _tail(self, row: int, tick: int, following: float, job: int) -> float:
        rest = 0.0 if job >= 0 and following < 0.0 else following
        for other, ticks, delay in self.after[row]:
            if tick + ticks < self.ticks:
                after = self.tail[other][tick + ticks] + delay
                if after > rest:
                    rest = after
        return rest + self.seconds[job] + self.busy[row]

    def _measure(self) -> float:
        return max(tail[0] for tail in self.tail)

    def _refresh(self, rows: Iterable[int], first: int, last: int) -> None:
        """Run heads forwards and tails backwards from the changed ticks of some rows, until nothing changes."""
        rows = list(rows)
        self._spread(self.head, self._head, {tick: set(rows) for tick in range(first, last + 1)}, first, 1)
        self._spread(self.tail, self._tail, {tick: set(rows) for tick in range(first, last + 1)}, last, -1)

    def _spread(
        self,
        values: list[list[float]],
        measure: Callable[[int, int, float, int], float],
        todo: dict[int, set[int]],
        tick: int,
        step: int,
    ) -> None:
        """Measure the rows of `todo[tick]` anew, and all that follows from those that change."""
        onward = self.after if step > 0 else self.before
        outside = 0.0 if step > 0 else -math.inf
        while todo and 0 <= tick < self.ticks:
            rows = todo.pop(tick, set())
            following = todo.setdefault(tick + step, set())
            while rows:  # links come after their ranks in a tick, and have the higher numbers
                row = min(rows) if step > 0 else max(rows)
                rows.remove(row)
                line = values[row]
                before = line[tick - step] if 0 <= tick - step < self.ticks else outside
                self.work += _MEASURE
                value = measure(row, tick, before, self.cells[row][tick])
                if value != line[tick]:
                    line[tick] = value
                    following.add(row)
                    for other, ticks, _ in onward[row]:
                        (todo.setdefault(tick + step * ticks, set()) if ticks else rows).add(other)
            tick += step
            if not following:
                del todo[tick]

    def _estimate(self, rank: int, change: Change) -> float:
        """The longest path through the changed ticks; exact if they span few, for paths that come back are not seen."""
        a, b = change[0][0], change[-1][0]
        jobs = self.cells[rank][a : b + 1]
        for tick, job in change:
            jobs[tick - a] = job
        heads, head = [], self.head[rank][a - 1] if a else 0.0
        for tick, job in enumerate(jobs, a):
            head = self._head(rank, tick, head, job)
            heads.append(head)
        longest, tail = 0.0, self.tail[rank][b + 1] if b + 1 < self.ticks else -math.inf
        for tick in range(b, a - 1, -1):
            job = jobs[tick - a]
            tail = self._tail(rank, tick, tail, job)
            longest = max(longest, heads[tick - a] + tail - self.seconds[job])
        return longest

    # -- memory ----------------------------------------------------------------------------------------------------

    def _write_held(self, rank: int, a: int, b: int) -> None:
        if self.memory is not None:
            row, held = self.held[rank], self.held[rank][a - 1] if a else 0.0
            for tick in range(a, b + 1):
                held -= self.frees[self.cells[rank][tick]]
                row[tick] = held

    def _fits(self, rank: int, change: Change) -> bool:
        if self.memory is None:
            return True
        a, b = change[0][0], change[-1][0]
        new, limit = dict(change), self.memory.per_rank[rank] * (1 + 1e-9)
        held = self.held[rank][a - 1] if a else 0.0
        for tick in range(a, b + 1):
            job = new.get(tick, self.cells[rank][tick])
            held -= self.frees[job]  # an F takes, and all others only free: the peak is after an F
            if held > limit:
                return False
        return True

    # -- changes ---------------------------------------------------------------------------------------------------

    def _try(self, heat: float) -> None:
        """Propose one change and take it if it is valid and good enough."""
        if self.path_age <= 0:
            self.path, self.path_age = self._find_longest_path(), _PATH_LIFE
            self.work += 2 * _MEASURE * len(self.path)
        self.path_age -= 1
        rank, tick = self.random.choice(self.path)
        if self.random.random() < 0.1:
            tick = max(0, min(self.ticks - 1, tick + self.random.randint(-3, 3)))
            rank = self.random.choice([rank, *self.problem.dag.neighbours(rank)])
        kind = self.random.random()
        if kind < 0.15 and self.problem.split_backward:
            self._try_split(rank, tick, heat)
            return
        change = self._propose(rank, tick, kind)
        if change is not None and self._is_valid(rank, change) and self._fits(rank, change):
            self._take(rank, change, heat)

    def _propose(self, rank: int, tick: int, kind: float) -> Change | None:
        """Swap two cells that are near, or move one and shift those between."""
        row = self.cells[rank]
        reach = _REACH if self.random.random() < 0.8 else _FAR_REACH
        other = tick + self.random.choice([-1, 1]) * (1 if kind < 0.5 else self.random.randint(2, reach))
        if not 0 <= other < self.ticks or row[tick] == row[other] == _IDLE:
            return None
        if kind < 0.75:
            return sorted([(tick, row[other]), (other, row[tick])])
        a, b = min(tick, other), max(tick, other)
        jobs = row[a : b + 1]
        jobs = [*jobs[1:], jobs[0]] if tick < other else [jobs[-1], *jobs[:-1]]
        return list(enumerate(jobs, a))

    def _is_valid(self, rank: int, change: Change) -> bool:
        """Whether each moved job comes after what it needs and before what it feeds."""
        at, moved = self.at, [(tick, job) for tick, job in change if job >= 0]
        before = [at[job] for _, job in moved]
        for tick, job in moved:
            at[job] = tick
        valid = all(
            all(at[need] + lag <= at[job] for need, lag in self.needs[job])
            and all(at[job] + lag <= at[fed] for fed, lag in self.feeds[job] if at[fed] >= 0)
            for _, job in moved
        )
        for (_, job), tick in zip(moved, before, strict=True):
            at[job] = tick
        return valid

    def _take(self, rank: int, change: Change, heat: float) -> bool:
        """Make a valid change if its makespan is good enough."""
        most = self.makespan - heat * math.log(max(self.random.random(), 1e-12)) + 1e-9 * self.makespan
        if self._estimate(rank, change) > most:
            return False
        old = [(tick, self.cells[rank][tick]) for tick, _ in change]
        self._write(rank, change)
        makespan = self._measure()
        if makespan > most:
            self._write(rank, old)
            return False
        self.makespan, self.path_age = makespan, 0
        if makespan < self.best * (1 - 1e-9):
            self.best, self.best_steps = makespan, self._steps()
        return True

    def _write(self, rank: int, change: Change) -> None:
        for tick, job in change:
            self.cells[rank][tick] = job
            if job >= 0:
                self.at[job] = tick
        self._write_held(rank, change[0][0], change[-1][0])
        self._refresh([rank], change[0][0], change[-1][0])

    def _try_split(self, rank: int, tick: int, heat: float) -> None:
        """Make an I and a later W of a B, or a B of an I and its W; or move a W far."""
        job = self.cells[rank][tick]
        if job < 0 or job % 3 == 0:
            return
        batch = job // 3
        back, weight = 3 * batch + 1, 3 * batch + 2
        if not self.whole[batch]:
            if self.random.random() < 0.5:
                self._switch(rank, batch, [(self.at[back], back), (self.at[weight], _IDLE)], heat)
                return
            if (idle := self._find_idle(rank, self.at[back])) is not None:
                change = sorted([(self.at[weight], _IDLE), (idle, weight)])
                if self._fits(rank, change):
                    self._take(rank, change, heat)
        elif (idle := self._find_idle(rank, self.at[back])) is not None:
            self._switch(rank, batch, [(self.at[back], back), (idle, weight)], heat)

    def _find_idle(self, rank: int, after: int) -> int | None:
        """One of the next idle ticks, near ones more often."""
        wanted = 1 + int(self.random.expovariate(0.4))
        found = None
        for tick in range(after + 1, self.ticks):
            if self.cells[rank][tick] < 0:
                found, wanted = tick, wanted - 1
                if not wanted:
                    break
        return found

    def _switch(self, rank: int, batch: int, change: Change, heat: float) -> None:
        """Change a backward from whole to split or back, with its cells."""
        self._set_whole(batch, not self.whole[batch])
        if not (self._fits(rank, change) and self._take(rank, change, heat)):
            self._set_whole(batch, not self.whole[batch])
        if self.whole[batch]:
            self.at[3 * batch + 2] = _IDLE

    def _set_whole(self, batch: int, whole: bool) -> None:
        self.whole[batch] = whole
        stage = batch // self.problem.num_microbatches
        self.seconds[3 * batch + 1] = self.problem.seconds["B" if whole else "I"][stage]
        if self.memory is not None:
            kept = 0.0 if whole else self.memory.kept[stage]
            self.frees[3 * batch + 1] = self.memory.held[stage] - kept
            self.frees[3 * batch + 2] = kept

    def _find_longest_path(self) -> list[tuple[int, int]]:
        """The cells of one longest path; among several ways on, any."""
        slack = 1e-9 * self.makespan
        row = self.random.choice([r for r in self._ranks if self.tail[r][0] >= self.makespan - slack])
        tick, path = 0, []
        while True:
            if row in self._ranks:
                path.append((row, tick))
            rest = self.tail[row][tick] - self.seconds[self.cells[row][tick]] - self.busy[row]
            if rest <= slack:
                return path
            ways = [(row, 1, 0.0), *self.after[row]]
            ends = [(other, tick + ticks, delay) for other, ticks, delay in ways if tick + ticks < self.ticks]
            row, tick, _ = self.random.choice(
                [(other, at, delay) for other, at, delay in ends if self.tail[other][at] + delay >= rest - slack]
            )
