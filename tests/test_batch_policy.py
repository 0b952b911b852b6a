"""Batch times that are learnt, the sizes that they favour, and what that does to waiting."""

import math
import random
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.engine.batch_policy import BatchPolicy, LaneOptions
from app.engine.batch_time import BatchSizes, BatchTime
from app.engine.item_queue import Answer, Item, ItemQueue

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Milliseconds as seconds: (start, per row) of a graphics card and of a processor.
CARD, PROCESSOR = (0.002, 0.00005), (0.002, 0.009)


def measured(start_s: float, per_row_s: float, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> BatchTime:
    time = BatchTime()
    for size in sizes:
        for _ in range(2):
            time.add(size, start_s + per_row_s * size, now=0.0)
    return time


def policy_of(
    start_s: float, per_row_s: float, options: LaneOptions, device: torch.device = CPU
) -> BatchPolicy:
    policy = BatchPolicy(options, device)
    for size in policy.sizes.sizes:
        for _ in range(3):
            policy.learn(size, start_s + per_row_s * size, now=0.0)
    return policy


# Times


def test_the_line_is_found_and_the_first_batch_of_a_size_is_not_counted() -> None:
    time = BatchTime()
    for size in (1, 2, 4, 8, 16):
        time.add(size, 20.0, now=0.0)  # compiling
        time.add(size, 0.002 + 0.001 * size, now=0.0)
    assert time.seconds(1) == pytest.approx(0.003)
    assert time.seconds(32) == pytest.approx(0.034)
    assert time.rows_within(0.0101) == 8
    assert time.rows_within(0.001) <= 0


def test_noise_is_averaged_and_a_pause_is_no_trend() -> None:
    time, noise = BatchTime(), random.Random(1)
    for number in range(300):
        size = noise.choice((1, 2, 4, 8))
        seconds = (0.002 + 0.001 * size) * noise.uniform(0.8, 1.2)
        time.add(size, 5.0 if number == 250 else seconds, now=0.0)
    assert time.seconds(4) == pytest.approx(0.006, rel=0.2)


def test_a_device_that_became_slower_is_believed_after_a_while() -> None:
    time = measured(0.0, 0.001)
    for _ in range(400):
        for size in (1, 8):
            time.add(size, 0.01 * size, now=0.0)
    assert time.seconds(8) == pytest.approx(0.08, rel=0.05)


def test_nothing_is_known_at_first_and_little_from_one_size() -> None:
    time = BatchTime()
    assert time.seconds(100) == 0.0
    assert time.rows_within(0.0) > 1000
    time.add(4, 1.0, now=0.0)
    time.add(4, 0.04, now=0.0)
    assert time.seconds(8) == pytest.approx(0.08)
    assert not time.is_fitted


def test_pauses_count_for_the_fastest_and_not_for_the_line() -> None:
    time = BatchTime()
    for _ in range(5):
        time.add(1, 0.001, now=0.0, elapsed_s=0.005)
    assert time.seconds(1) == pytest.approx(0.001)
    assert time.fastest_recent_s() == 0.005


def test_old_times_are_trusted_no_more() -> None:
    time = measured(0.0, 0.001)
    assert time.is_trusted(now=4.0)
    assert not time.is_trusted(now=6.0)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 100.0)), max_size=200))
def test_no_time_is_negative_and_none_falls_with_the_rows(batches: list[tuple[int, float]]) -> None:
    time = BatchTime()
    for size, seconds in batches:
        time.add(size, seconds, now=0.0)
    assert 0.0 <= time.seconds(1) <= time.seconds(2) <= time.seconds(64) < math.inf


# Sizes


def test_sizes_double_up_to_the_largest() -> None:
    assert BatchSizes.doubling(8).sizes == (1, 2, 4, 8)
    assert BatchSizes.doubling(6).sizes == (1, 2, 4, 6)
    assert BatchSizes.doubling(1).sizes == (1,)
    assert BatchSizes([4, 16]).up_to(2).sizes == (4,)
    with pytest.raises(ValueError, match="at least 1"):
        BatchSizes([0, 1])


@given(st.integers(1, 64), st.integers(1, 64))
def test_padding_holds_the_rows_and_is_a_size(largest: int, num_rows: int) -> None:
    sizes = BatchSizes.doubling(largest)
    num_rows = min(num_rows, largest)
    assert sizes.padded(num_rows) in sizes.sizes
    assert sizes.at_most(num_rows) <= num_rows <= sizes.padded(num_rows) < 2 * num_rows + 1


def test_five_rows_are_padded_on_a_card_and_cut_on_a_processor() -> None:
    sizes = BatchSizes.doubling(8)
    assert sizes.favoured(5, measured(*CARD)) == 5
    assert sizes.favoured(5, measured(*PROCESSOR)) == 4
    assert sizes.favoured(7, measured(0.020, 0.009)) == 7  # 4 and 4 is no gain
    assert sizes.favoured(5, BatchTime()) == 5
    assert sizes.favoured(100, measured(*PROCESSOR)) == 8


def seen(**seconds: float) -> BatchTime:
    """Batches of some sizes, each seen a few times."""
    time = BatchTime()
    for _ in range(4):
        for size, taken in seconds.items():
            time.add(int(size[1:]), taken, now=0.0)
    return time


def test_a_batch_is_no_larger_than_it_is_good_for() -> None:
    sizes = BatchSizes.doubling(16)
    falls_off = seen(_1=0.027, _2=0.048, _4=0.086, _8=0.164, _16=0.440)
    assert [sizes.favoured(rows, falls_off) for rows in (1, 9, 15, 16, 40)] == [1, 8, 8, 8, 8]
    card = seen(_1=0.0050, _2=0.0051, _4=0.0052, _8=0.0055, _16=0.0061)
    assert [sizes.favoured(rows, card) for rows in (1, 5, 15, 16)] == [1, 5, 15, 16]
    tiny = seen(_1=0.00004, _2=0.00005, _4=0.00006, _8=0.00008, _16=0.0004)
    assert [sizes.favoured(rows, tiny) for rows in (2, 16)] == [2, 16]


def test_a_size_that_was_once_slow_is_tried_again() -> None:
    sizes = BatchSizes.doubling(16)
    time = seen(_8=0.080, _16=0.500)
    assert sizes.favoured(16, time) == 8
    for _ in range(500):
        time.add(8, 0.080, now=0.0)
    assert sizes.favoured(16, time) == 16


def test_a_pause_makes_no_size_worse() -> None:
    sizes = BatchSizes.doubling(16)
    time = seen(_1=0.022, _8=0.104, _16=0.220)
    assert sizes.favoured(16, time) == 8
    for _ in range(2):  # stopped by a signal, with a batch under way
        time.add(8, 10.0, now=0.0)
        assert sizes.favoured(16, time) == 8
        time.add(8, 0.104, now=0.0)


def test_a_smaller_size_that_had_a_bad_hour_is_tried_again() -> None:
    sizes = BatchSizes.doubling(16)
    time = seen(_8=0.300, _16=0.220)
    assert sizes.favoured(16, time) == 16
    for _ in range(500):
        time.add(16, 0.220, now=0.0)
    assert sizes.favoured(7, time) == 7
    assert sizes.favoured(15, time) == 8
    for _ in range(5):
        time.add(8, 0.104, now=0.0)
    assert sizes.favoured(16, time) == 8


def test_the_less_a_trial_costs_the_sooner_it_comes() -> None:
    sizes = BatchSizes.doubling(16)
    time = seen(_8=0.226, _16=0.408)  # 8 in a bad minute; it takes 0.180
    assert sizes.favoured(15, time) == 15
    for _ in range(16):
        time.add(16, 0.408, now=0.0)
    assert sizes.favoured(15, time) == 8
    time.add(8, 0.226, now=0.0)
    assert sizes.favoured(15, time) == 15
    for _ in range(16):
        time.add(16, 0.408, now=0.0)
    time.add(8, 0.180, now=0.0)
    assert sizes.favoured(15, time) == 8
    for _ in range(100):
        time.add(8, 0.180, now=0.0)
        assert sizes.favoured(9, time) == 8  # a trial would cost as much as nine more


def test_trials_of_many_sizes_are_no_more_than_those_of_two() -> None:
    """Each of twelve would be tried after sixteen batches, and most batches would be trials."""
    sizes, time = BatchSizes.doubling(1 << 14), BatchTime()
    taken = []
    for _ in range(1600):
        taken.append(sizes.favoured(1 << 14, time))
        time.add(taken[-1], 0.0001 + 0.000002 * taken[-1], now=0.0)
    usual = max(set(taken), key=taken.count)
    num_trials = len(taken) - taken.count(usual)
    assert len(set(taken)) == 12, "every size is tried"
    assert num_trials <= 1600 / 8 + 24


def test_a_size_is_tried_with_rows_for_all_of_it() -> None:
    sizes = BatchSizes.doubling(32)
    time = seen(_8=0.104, _16=0.220)
    assert sizes.favoured(17, time) == 16
    assert sizes.favoured(32, time) == 32


def test_what_waits_takes_full_batches_and_a_padded_one() -> None:
    time = measured(0.001, 0.001)
    assert BatchSizes.doubling(8).seconds(19, time) == pytest.approx(2 * 0.009 + 0.005)


# Decisions


def test_a_deadline_makes_the_batch_smaller() -> None:
    policy = policy_of(*PROCESSOR, LaneOptions(max_batch_items=8))
    assert policy.rows_to_take(8, math.inf, is_inline=False) == 8
    assert policy.rows_to_take(8, 0.050, is_inline=False) == 4
    assert policy.rows_to_take(8, 0.001, is_inline=False) == 8  # too late for any size


def test_a_deadline_never_costs_much_of_the_throughput() -> None:
    policy = policy_of(*CARD, LaneOptions(max_batch_items=64))
    assert policy.rows_to_take(64, 0.0021, is_inline=False) == 64
    policy = policy_of(0.010, 0.0005, LaneOptions(max_batch_items=32))
    assert policy.rows_to_take(32, 0.020, is_inline=False) == 32  # 16 at 0.7 of the throughput


def test_tiny_forwards_move_to_the_event_loop_and_back_with_hysteresis() -> None:
    options = LaneOptions(max_batch_items=1, inline_below_ms=0.3)
    for seconds, from_thread, from_loop in (
        (1e-4, True, True),
        (4e-4, False, True),
        (1e-3, False, False),
    ):
        policy = policy_of(seconds, 0.0, options)
        policy.learn(1, seconds, now=0.0)
        policy.learn(1, seconds, now=0.0)
        assert policy.prefers_inline(is_inline=False) is from_thread
        assert policy.prefers_inline(is_inline=True) is from_loop


def test_nothing_runs_on_the_event_loop_that_waits_or_has_a_device_of_its_own() -> None:
    tiny = (1e-5, 1e-6)
    assert policy_of(*tiny, LaneOptions()).prefers_inline(is_inline=False)
    assert not policy_of(*tiny, LaneOptions(), CUDA).prefers_inline(is_inline=False)
    assert not policy_of(*tiny, LaneOptions(max_delay_ms=1)).prefers_inline(is_inline=False)
    assert not policy_of(*tiny, LaneOptions(inline_below_ms=0)).prefers_inline(is_inline=False)


def test_the_event_loop_is_never_held_for_a_large_batch() -> None:
    policy = policy_of(1e-4, 1e-5, LaneOptions(max_batch_items=256, inline_below_ms=0.3))
    assert policy.rows_to_take(256, math.inf, is_inline=True) == 32
    assert policy.rows_to_take(256, math.inf, is_inline=False) == 256


def test_memory_that_ran_out_lowers_the_largest_batch() -> None:
    policy = policy_of(*CARD, LaneOptions(max_batch_items=32))
    policy.lower(8)
    assert policy.rows_to_take(100, math.inf, is_inline=False) == 8


# Waiting, on a clock of our own


def mean_latency(start_s: float, per_row_s: float, load: float, largest: int) -> float:
    """Mean time from arrival to answer, for Poisson arrivals of single rows."""
    policy = policy_of(start_s, per_row_s, LaneOptions(max_batch_items=largest))
    policy.sizes = BatchSizes(range(1, largest + 1))
    queue, arrivals, row = ItemQueue(), random.Random(7), torch.zeros(1, 1)
    now = arrival = total = 0.0
    num_rows = 20_000
    for number in range(num_rows):
        arrival += arrivals.expovariate(load / per_row_s)
        while queue.num_rows and now < arrival:
            now = max(now, queue.head().submitted_at)
            if now >= arrival:
                break
            limit = policy.rows_to_take(queue.num_rows, math.inf, is_inline=False)
            parts, taken, _ = queue.take(limit, policy.sizes.padded, -math.inf)
            now += start_s + per_row_s * taken
            total += sum(now - part.item.submitted_at for part in parts)
        future: Future[Answer] = Future()
        queue.push(Item(row, future, arrival, None, 0, number))
    return total / (num_rows - queue.num_rows)


@pytest.mark.parametrize(("start_s", "per_row_s"), [CARD, PROCESSOR])
@pytest.mark.parametrize("load", [0.1, 0.5, 0.8])
def test_waiting_stays_below_its_closed_bound(
    start_s: float, per_row_s: float, load: float
) -> None:
    """Y. Inoue, Queueing analysis of GPU-based inference servers with dynamic batching (2019)."""
    rate = load / per_row_s
    first = (per_row_s + start_s) / (2 * (1 - load))
    first *= 1 + 2 * rate * start_s + (1 - rate * start_s) / (1 + load)
    second = 1.5 * start_s / (1 - load) + per_row_s * (load + 2) / (2 * (1 - load**2))
    assert mean_latency(start_s, per_row_s, load, largest=512) <= 1.1 * min(first, second)
