"""Threads of our own: results in order, PyTorch alone in each, the first error raised, all as before at the end."""

import threading

import pytest
import torch

from bitwright.execute.local import ahead, own_threads, spread, torch_threads


def test_without_own_threads_the_caller_computes() -> None:
    assert spread(lambda n: (n, threading.current_thread()), [1]) == [(1, threading.current_thread())]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_from_threads_in_which_pytorch_is_alone(count: int) -> None:
    with torch_threads(2):
        with own_threads(count):
            found = spread(lambda n: (n, torch.get_num_threads(), threading.current_thread()), range(20))
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    assert [number for number, _, _ in found] == list(range(20))
    assert {threads for _, threads, _ in found} == {1}
    assert 1 <= len({thread for _, _, thread in found}) <= count
    assert spread(lambda _: threading.current_thread(), [0]) == [threading.current_thread()]


def test_work_within_work_stays_in_its_thread() -> None:
    with own_threads(2):
        found = spread(
            lambda _: {threading.current_thread(), *spread(lambda _: threading.current_thread(), [1, 2])}, [0]
        )
    assert len(found[0]) == 1


def test_the_first_error_is_raised_and_the_threads_end() -> None:
    def fail(number: int) -> int:
        raise ValueError(f"piece {number}")

    before = threading.active_count()
    with pytest.raises(ValueError, match="piece 0"), own_threads(2):
        spread(fail, range(4))
    assert threading.active_count() == before


def test_reading_ahead_keeps_order_and_raises_where_the_result_would_be() -> None:
    results = ahead(lambda n: 6 // n, [3, 2, 0])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
