"""Who may wait: refused at once is who would not be ready in time, and who finds too many."""

import math

from app.engine.batch_policy import LaneOptions
from app.engine.schedule import NORMAL, Key
from app.engine.turns import Turns
from app.errors import DeadlineUnreachable, QueueFull, QueueTooSlow


class Admission:
    """The door of one lane; every call needs the lock."""

    def __init__(self, turns: Turns, options: LaneOptions) -> None:
        self._turns = turns
        self._max_rows = options.max_queue_items
        self._max_wait_s = math.inf if options.max_wait_ms is None else options.max_wait_ms / 1000

    def admit(self, num_rows: int, key: Key, deadline: float, now: float) -> None:
        """Return where `num_rows` rows, whose turn `key` says, may wait.

        Raises:
            QueueFull: too many rows wait, or for too long.
            DeadlineUnreachable: its time is up, or would be before its answer.
            QueueTooSlow: it would be, because of what waits before it; or it would cut its batch
                short, and enough others come in time to fill that.
        """
        turns = self._turns
        if turns.items.num_rows + num_rows > self._max_rows:
            self._refuse_full(num_rows, key, now)
        left_s = deadline - now
        at_most_s = turns.home.backlog_s + max(0.0, turns.home.running_until - now)
        own_at_most_s = turns.policy.at_most_s(num_rows)
        margin = turns.policy.margin
        if at_most_s > self._max_wait_s or margin * (at_most_s + own_at_most_s) > left_s:
            self._look_closely(num_rows, key, left_s, now)

    def _look_closely(self, num_rows: int, key: Key, left_s: float, now: float) -> None:
        """What waits may be too much; see what really has its turn before `key`."""
        turns = self._turns
        wait_s = turns.home.before_s(key, now)
        if wait_s > self._max_wait_s:
            self._refuse_full(num_rows, key, now)
        before = turns.items.rows_before(key)
        own_s = turns.policy.seconds(before + num_rows) - turns.policy.seconds(before)
        needed_s = turns.policy.margin * (wait_s + own_s)
        if left_s <= 0.0 or (needed_s > left_s and self._is_sure(now)):
            self._refuse_late(num_rows, key, needed_s, left_s, now)
        if key[0] < NORMAL:
            return  # others, who are less urgent, do not stand in for it
        needed_s = self._until_full_batch_s(left_s, wait_s, before, now)
        if needed_s > left_s:
            self._refuse_late(num_rows, key, needed_s, left_s, now)

    def _until_full_batch_s(self, left_s: float, wait_s: float, before: int, now: float) -> float:
        """How long until the batch has run that would fill up without a row that is asked for now.

        0 where it would not, or where `before` rows fill it already.
        """
        turns = self._turns
        policy, head = turns.policy, turns.items.head()
        filled = policy.rows_filled(turns.arrivals.per_s, left_s)
        if before >= filled:
            return 0.0
        batch_s = policy.seconds(filled)
        # What runs, and what waits for other lanes: who waits here already shares the batch …
        needed_s = policy.margin * (wait_s - policy.seconds(before) + batch_s)
        if before and head is not None and head.deadline - now < needed_s:
            # … unless the first of them cannot wait for all of it, and will be taken before.
            needed_s = policy.margin * (wait_s + batch_s)
        return needed_s

    def _is_sure(self, now: float) -> bool:
        """Not when the lane idles and its times are old: letting one through renews them."""
        turns = self._turns
        return bool(turns.policy.time.is_trusted(now) or turns.items.num_rows or turns.num_out)

    def _refuse_full(self, num_rows: int, key: Key, now: float) -> None:
        turns = self._turns
        turns.count_arrival(num_rows, key, now)
        turns.turned_away_at = now
        turns.statistics.num_refused_full += 1
        num_waiting, retry_after_s = turns.items.num_rows, turns.retry_after_s
        raise QueueFull(
            f"{num_waiting} inputs wait for {turns.name}; ask again in {retry_after_s:.1f} s",
            retry_after_s=retry_after_s,
        )

    def _refuse_late(
        self, num_rows: int, key: Key, needed_s: float, left_s: float, now: float
    ) -> None:
        turns = self._turns
        turns.count_arrival(num_rows, key, now)
        turns.statistics.num_refused_late += 1
        sentence = (
            f"{turns.name} needs about {needed_s * 1000:.0f} ms from now, "
            f"and {max(0.0, left_s) * 1000:.0f} ms are left"
        )
        if turns.policy.seconds(num_rows) < left_s:
            turns.turned_away_at = now
            raise QueueTooSlow(sentence, retry_after_s=turns.retry_after_s)
        raise DeadlineUnreachable(sentence)
