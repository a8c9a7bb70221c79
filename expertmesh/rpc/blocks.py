"""Which parts of an arena are lent, and which are free. Pure: offsets, no memory."""

from __future__ import annotations

from bisect import bisect_left


class FreeList:
    """Spans of low .. high - 1, taken from the lowest free place on, so that little is touched."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high
        self._starts, self._ends = [low], [high]  # of the free spans, ascending, none adjacent
        self._taken: dict[int, int] = {}  # end of each span that is taken, by its start
        self.used = 0  # bytes taken
        self.top = low  # nothing from here on was ever taken

    def take(self, size: int) -> int | None:
        """Where a free span of `size` > 0 bytes begins, now taken; None when there is none."""
        for index, start in enumerate(self._starts):
            end = start + size
            if end <= self._ends[index]:
                if end == self._ends[index]:
                    del self._starts[index], self._ends[index]
                else:
                    self._starts[index] = end
                self._taken[start] = end
                self.used += size
                self.top = max(self.top, end)
                return start
        return None

    def give(self, start: int) -> None:
        """Frees what begins there. Raises KeyError when nothing taken does."""
        end = self._taken.pop(start)
        self.used -= end - start
        index = bisect_left(self._starts, start)
        joins_next = index < len(self._starts) and self._starts[index] == end
        joins_last = index > 0 and self._ends[index - 1] == start
        if joins_last and joins_next:
            self._ends[index - 1] = self._ends.pop(index)
            del self._starts[index]
        elif joins_last:
            self._ends[index - 1] = end
        elif joins_next:
            self._starts[index] = start
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)

    def forget(self) -> int:
        """Where what was ever taken ends, and from now on nothing was. Nothing may be taken."""
        assert not self._taken, "spans are still taken"
        top, self.top = self.top, self._low
        return top
