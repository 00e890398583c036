import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from valm.training.order import TrainingOrder


def sequence(order, steps):
    """The rows that a training of so many steps reads, epoch by epoch."""
    done = 0
    rows = []
    order.step = lambda: done
    while done < steps:
        rows += list(order)[: (steps - done) * order.step_rows]
        done += order.epoch_steps
    return rows


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 20), st.integers(0, 5))
def test_every_row_is_read_equally_often_whatever_the_epochs(size, step_rows, steps, seed):
    rows = sequence(TrainingOrder(size, step_rows, seed, int), steps)
    assert len(rows) == steps * step_rows
    for start in range(0, len(rows) - size + 1, size):
        assert sorted(rows[start : start + size]) == list(range(size))
    # the order of the releases before, which wrote it as one list
    generator = np.random.default_rng(seed)
    expected = np.concatenate([generator.permutation(size) for _ in range(-(-len(rows) // size))])
    assert rows == expected[: len(rows)].tolist()


def test_an_epoch_is_whole_steps_and_nothing_is_read_after_the_last():
    order = TrainingOrder(10, 3, 0, lambda: 4, max_steps=5)
    assert len(order) == 9
    assert list(order) == list(order.rows(9, 15))  # step 3 begins the second epoch, in which two steps are left
    assert list(TrainingOrder(10, 3, 0, lambda: 6, max_steps=6)) == []
