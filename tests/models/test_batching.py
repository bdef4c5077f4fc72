"""The batcher: who waits for whom, who is computed with whom, and what happens to them when something fails."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from fakes import wait_until

from keras_server.models.batcher import Batcher, ModelDied, Overdue, QueueFull
from keras_server.ticket import TICKET, Ticket


class Engine:
    """Doubles its input when the test lets it, and remembers each batch by its rows' first numbers."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.passes = threading.Semaphore(0), threading.Semaphore(0)
        self.poison: type[BaseException] = ArithmeticError

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        rows = [int(row.flat[0]) for row in inputs[0]]
        self.batches.append(rows)
        self.entered.release()
        assert self.passes.acquire(timeout=30)
        if -1 in rows:
            raise self.poison
        return [inputs[0] * 2, inputs[0].sum(axis=tuple(range(1, inputs[0].ndim)))]


class Bench:
    """A batcher on that engine, and threads that ask it."""

    def __init__(self, max_batch: int = 4, queue_size: int = 200, lanes: int = 1) -> None:
        self.engine = Engine()
        self.batcher = Batcher(self.engine, max_batch, queue_size, lanes)
        self.threads = ThreadPoolExecutor(50)

    def ask(self, *rows: int, ticket: Ticket | None = None, width: int = 3) -> "Future[list[np.ndarray]]":
        """Have a thread ask for rows of these numbers, and wait until they are in the queue."""

        def run() -> list[np.ndarray]:
            TICKET.set(ticket)
            return self.batcher.compute([np.repeat(np.array(rows, np.float32)[:, np.newaxis], width, axis=1)])

        before = self.batcher.waiting, len(self.engine.batches)
        answer = self.threads.submit(run)
        wait_until(lambda: answer.done() or (self.batcher.waiting, len(self.engine.batches)) != before)
        return answer

    def busy(self, *rows: int) -> "Future[list[np.ndarray]]":
        """Ask, and wait until the engine computes the first batch of it."""
        answer = self.ask(*rows)
        assert self.engine.entered.acquire(timeout=60)
        return answer

    def go(self) -> None:
        """Let everything through."""
        self.engine.passes.release(10_000)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """One whose engine is not quick, however fast it is let through."""
    monkeypatch.setattr("keras_server.models.batcher.QUICK", 0)
    made = Bench()
    yield made
    made.go()
    made.threads.shutdown()


@pytest.fixture
def quick(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine is quick all the same."""
    monkeypatch.setattr("keras_server.models.batcher.QUICK", 0.001)


def doubled(*rows: int) -> list[list[float]]:
    return [[2.0 * row] * 3 for row in rows]


def test_a_lone_row_is_computed_at_once(bench: Bench) -> None:
    answer = bench.busy(7)  # nothing else is needed for it to reach the engine
    assert bench.engine.batches == [[7]]
    bench.go()
    first, second = answer.result(20)
    assert first.tolist() == doubled(7)
    assert second.tolist() == [21]


def test_what_has_queued_while_the_engine_was_busy_is_the_next_batch(bench: Bench) -> None:
    answers = [bench.busy(0), *(bench.ask(n) for n in range(1, 8))]
    bench.go()
    assert [answer.result(20)[0].tolist() for answer in answers] == [doubled(n) for n in range(8)]
    assert bench.engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_a_long_request_starves_nobody(bench: Bench) -> None:
    long = bench.busy(*range(100, 200))
    short = [bench.ask(n) for n in range(3)]
    bench.go()
    assert [answer.result(20)[0].tolist() for answer in short] == [doubled(n) for n in range(3)]
    assert long.result(20)[0].tolist() == doubled(*range(100, 200))
    assert bench.engine.batches[:2] == [[100, 101, 102, 103], [104, 0, 1, 2]]
    assert len(bench.engine.batches) == 26  # every one of them full but the last


def test_long_requests_share_the_batches_equally(bench: Bench) -> None:
    first = bench.busy(0)
    long = [bench.ask(*range(n, n + 6)) for n in (10, 20)]
    bench.go()
    assert first.result(20)
    assert [answer.result(20)[0].tolist() for answer in long] == [doubled(*range(n, n + 6)) for n in (10, 20)]
    assert bench.engine.batches[1:] == [[10, 11, 20, 21], [12, 13, 22, 23], [14, 15, 24, 25]]


def test_only_equal_kinds_share_a_batch(bench: Bench) -> None:
    answers = [bench.busy(0), *(bench.ask(n, width=2 + n % 2) for n in range(1, 6))]
    bench.go()
    assert [answer.result(20)[0].shape for answer in answers] == [(1, 3), (1, 3), (1, 2), (1, 3), (1, 2), (1, 3)]
    assert bench.engine.batches == [[0], [1, 3, 5], [2, 4]]


def test_a_row_that_fails_does_not_fail_its_neighbours(bench: Bench) -> None:
    answers = [bench.busy(0), bench.ask(1), bench.ask(-1), bench.ask(2)]
    bench.go()
    assert isinstance(answers[2].exception(20), ArithmeticError)
    assert [answers[n].result(20)[0].tolist() for n in (0, 1, 3)] == [doubled(n) for n in (0, 1, 2)]
    assert bench.ask(5).result(20)[0].tolist() == doubled(5)


def test_a_long_request_that_fails_leaves_the_queue(bench: Bench) -> None:
    long = bench.busy(-1, *range(20))
    assert bench.batcher.waiting == 17
    bench.go()
    assert isinstance(long.exception(20), ArithmeticError)
    wait_until(lambda: bench.batcher.waiting == 0)
    assert bench.engine.batches == [[-1, 0, 1, 2]]


def test_nobody_waits_past_the_deadline_and_nothing_is_computed_for_it(bench: Bench) -> None:
    first, last = bench.busy(0), Ticket(0.2)
    late = bench.ask(1, ticket=last)
    assert isinstance(late.exception(20), Overdue)
    assert last.left <= 0
    bench.go()
    assert first.result(20)
    assert bench.ask(2).result(20)[0].tolist() == doubled(2)
    assert bench.engine.batches == [[0], [2]]
    assert bench.batcher.waiting == 0


def test_nothing_is_computed_for_a_client_that_has_gone(bench: Bench) -> None:
    first, ticket = bench.busy(0), Ticket(60)
    gone, other = bench.ask(1, ticket=ticket), bench.ask(2)
    ticket.gone = True
    bench.go()
    assert isinstance(gone.exception(20), Overdue)
    assert first.result(20)
    assert other.result(20)
    assert bench.engine.batches == [[0], [2]]
    assert bench.batcher.waiting == 0


def test_the_rest_of_a_long_request_is_dropped_when_its_client_goes(bench: Bench) -> None:
    ticket = Ticket(60)
    long = bench.ask(*range(20), ticket=ticket)
    assert bench.engine.entered.acquire(timeout=60)
    ticket.gone = True
    bench.go()
    assert isinstance(long.exception(20), Overdue)
    assert bench.engine.batches == [[0, 1, 2, 3]]
    assert bench.batcher.waiting == 0


def test_the_queue_is_counted_in_rows() -> None:
    bench = Bench(max_batch=2, queue_size=5)
    answers = [bench.busy(0), bench.ask(1, 2, 3)]
    with pytest.raises(QueueFull):
        bench.batcher.compute([np.zeros((3, 3), np.float32)])
    answers.append(bench.ask(4, 5))
    assert bench.batcher.waiting == 5
    with pytest.raises(QueueFull):
        bench.batcher.compute([np.zeros((1, 3), np.float32)])
    bench.go()
    assert all(answer.result(20) for answer in answers)
    assert bench.batcher.waiting == 0
    bench.threads.shutdown()


@pytest.mark.parametrize(
    ("least", "pace", "most"),
    [(0.0002, 0.00001, 80), (0.0002, 0.0001, 8), (0.0002, 0.0002, 4), (0.001, 0.00001, 4), (0.0002, 0, 4)],
)
def test_a_batch_of_a_quick_model_has_as_many_rows_as_take_a_millisecond(
    monkeypatch: pytest.MonkeyPatch, least: float, pace: float, most: int
) -> None:
    """Others have max_batch."""
    sizes = list[int]()

    def compute(inputs: list[np.ndarray]) -> list[np.ndarray]:
        sizes.append(len(inputs[0]))
        return [inputs[0] * 2]

    batcher = Batcher(compute, max_batch=4, queue_size=200)
    monkeypatch.setattr(batcher, "learn", lambda *_: None)
    batcher.least, batcher.pace = least, pace
    assert batcher.compute([np.arange(100.0)])[0].tolist() == [*range(0, 200, 2)]
    assert sizes[:-1] == [most] * (len(sizes) - 1)
    assert sum(sizes) == 100
    batcher.close()


def test_where_short_requests_come_long_ones_take_a_stretch_of_each_batch(bench: Bench) -> None:
    bench.batcher.pace = 0.009  # two rows of it are in a stretch of 0.02 s, three are not
    long = bench.busy(*range(100, 110))
    short = [bench.ask(1), bench.ask(2, 3)]
    bench.go()
    assert [answer.result(20)[0].tolist() for answer in short] == [doubled(1), doubled(2, 3)]
    assert long.result(20)[0].tolist() == doubled(*range(100, 110))
    assert bench.engine.batches[0] == [100, 101, 102, 103]  # when nobody else had come
    assert sorted(bench.engine.batches[1]) == [1, 2, 104, 105]


def test_one_long_row_is_computed_in_each_batch_however_slow_the_model(bench: Bench) -> None:
    bench.batcher.pace = 5
    held = [bench.busy(0), *(bench.ask(*range(n, n + 3)) for n in (10, 20)), bench.ask(1)]
    bench.engine.passes.release()
    assert bench.engine.entered.acquire(timeout=60)
    assert bench.engine.batches[1] == [10, 1]
    bench.go()
    assert all(answer.result(20) for answer in held)


def test_once_no_short_ones_have_come_lately_long_ones_fill_their_batches(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keras_server.models.batcher.LATELY", 0)
    bench.batcher.pace = 5
    answers = [bench.busy(0), bench.ask(*range(10, 16))]
    bench.go()
    assert all(answer.result(20) for answer in answers)
    assert bench.engine.batches == [[0], [10, 11, 12, 13], [14, 15]]


def test_the_pace_is_what_further_rows_take() -> None:
    batcher = Batcher(lambda inputs: inputs, 8, 8)
    batcher.learn(0.03, 1)
    assert (batcher.pace, batcher.is_long(8)) == (0, False)  # nobody knows yet
    batcher.learn(0.03, 4)  # however many they are: none of them holds up others
    assert (batcher.pace, batcher.is_long(8)) == (0, False)
    batcher.learn(0.06, 4)
    assert batcher.pace == pytest.approx(0.01)
    batcher.learn(0.09, 4)
    assert batcher.pace == pytest.approx(0.01 + 0.2 * 0.01)
    assert [batcher.is_long(rows) for rows in (1, 2)] == [False, True]
    for _ in range(20):
        batcher.learn(0.03, 8)
    assert not batcher.is_long(8)
    batcher.close()


def test_a_model_whose_batches_take_equally_long_has_full_ones_beside_short_requests(bench: Bench) -> None:
    for rows in (1, 4):
        bench.batcher.learn(0.5, rows)
    answers = [bench.busy(0), bench.ask(*range(10, 14)), bench.ask(1)]
    bench.go()
    assert all(answer.result(20) for answer in answers)
    assert bench.engine.batches[1:] == [[10, 11, 1, 12], [13]]


def test_no_rows_at_all_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="no rows"):
        bench.batcher.compute([np.zeros((0, 3), np.float32)])


def test_long_requests_leave_short_ones_their_place_in_the_queue() -> None:
    bench = Bench(max_batch=2, queue_size=5)
    bench.batcher.pace = 5
    answers = [bench.busy(0), bench.ask(1, 2, 3, 4, 5)]
    for rows in (2, 5):
        with pytest.raises(QueueFull):
            bench.batcher.check_room(rows)
    answers += [bench.ask(n) for n in range(6, 11)]
    with pytest.raises(QueueFull):
        bench.batcher.check_room(1)
    assert bench.batcher.waiting == 10
    bench.go()
    assert all(answer.result(20) for answer in answers)
    assert (bench.batcher.waiting, bench.batcher.waiting_long) == (0, 0)
    bench.threads.shutdown()


def test_a_long_request_that_is_given_up_leaves_its_place(bench: Bench) -> None:
    bench.batcher.pace = 5
    ticket = Ticket(60)
    answers = [bench.busy(0), bench.ask(1, 2, 3, ticket=ticket)]
    ticket.gone = True
    bench.go()
    assert answers[0].result(20)
    assert isinstance(answers[1].exception(20), Overdue)
    assert (bench.batcher.waiting, bench.batcher.waiting_long) == (0, 0)


def test_what_nobody_waits_for_leaves_its_place_where_another_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(max_batch=2, queue_size=5)
    ticket = Ticket(60)
    answers = [bench.busy(0), bench.ask(1, 2), bench.ask(3, 4, 5, ticket=ticket)]
    with pytest.raises(QueueFull):
        bench.batcher.check_room(1)
    ticket.gone = True
    monkeypatch.setattr("keras_server.models.batcher.LOOK_SECONDS", 3600)
    with pytest.raises(QueueFull):  # it was looked just now
        bench.batcher.check_room(1)
    monkeypatch.setattr("keras_server.models.batcher.LOOK_SECONDS", 0)
    with pytest.raises(QueueFull):
        bench.batcher.check_room(4)
    bench.batcher.check_room(3)
    assert isinstance(answers[2].exception(20), Overdue)
    assert bench.batcher.waiting == 2
    answers.append(bench.ask(6, 7, 8))
    bench.go()
    assert [answer.result(20)[0][:, 0].tolist() for answer in answers if answer is not answers[2]] == [
        [0], [2, 4], [12, 14, 16],
    ]  # fmt: skip
    bench.threads.shutdown()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_its_thread_dies_those_who_wait_are_told_and_so_is_the_server(bench: Bench) -> None:
    class Unexpected(BaseException):
        pass

    died = threading.Event()
    bench.batcher.on_death = died.set
    bench.engine.poison = Unexpected
    answers = [bench.busy(-1), bench.ask(1, 2, 3, 4, 5), bench.ask(6)]
    bench.go()
    assert [type(answer.exception(20)) for answer in answers] == [ModelDied] * 3
    assert died.wait(20)
    bench.batcher.threads[0].join(20)  # its exception is to be reported in this test and not in the next
    assert bench.batcher.dead
    with pytest.raises(ModelDied):
        bench.batcher.compute([np.zeros((1, 3), np.float32)])


@pytest.mark.parametrize(("least", "pace", "led"), [(0, 0, True), (0.0009, 0.00002, True), (0.0009, 0.0001, False)])
def test_a_quick_model_computes_on_the_thread_that_asks(
    monkeypatch: pytest.MonkeyPatch, least: float, pace: float, led: bool
) -> None:
    """Two rows are expected to take `least`, and twice `pace`; a millisecond is the limit."""
    callers = list[threading.Thread]()

    def compute(inputs: list[np.ndarray]) -> list[np.ndarray]:
        callers.append(threading.current_thread())
        return [inputs[0] * 2]

    batcher = Batcher(compute, max_batch=4, queue_size=20)
    monkeypatch.setattr(batcher, "least", least)
    monkeypatch.setattr(batcher, "pace", pace)
    assert batcher.compute([np.ones((2, 1))])[0].tolist() == [[2], [2]]
    assert callers == [threading.current_thread() if led else batcher.threads[0]]
    batcher.close()
    batcher.threads[0].join(20)
    assert not batcher.threads[0].is_alive()


def test_what_comes_while_a_thread_computes_its_own_rows_is_the_next_batch(bench: Bench, quick: None) -> None:
    bench.batcher.least = 0
    answers = [bench.busy(0, 1, 2, 3, 4), bench.ask(5), bench.ask(6)]  # four rows, and one that waits with the others
    bench.batcher.close()
    bench.go()
    assert [answer.result(20)[0].tolist() for answer in answers] == [doubled(0, 1, 2, 3, 4), doubled(5), doubled(6)]
    assert sorted(bench.engine.batches) == [[0, 1, 2, 3], [4, 5, 6]]
    bench.batcher.threads[0].join(20)
    assert not bench.batcher.threads[0].is_alive()


def test_a_thread_that_dies_of_its_own_rows_ends_the_model(bench: Bench, quick: None) -> None:
    class Unexpected(BaseException):
        pass

    died = threading.Event()
    bench.batcher.on_death, bench.batcher.least = died.set, 0
    bench.engine.poison = Unexpected
    answers = [bench.busy(-1), bench.ask(1)]
    bench.go()
    assert [type(answer.exception(20)) for answer in answers] == [ModelDied, ModelDied]
    assert died.is_set()
    assert bench.batcher.dead
    assert not bench.batcher.busy


def test_it_says_since_when_it_is_busy(bench: Bench) -> None:
    assert not bench.batcher.busy
    before = time.monotonic()
    answer = bench.busy(0)
    (since,) = bench.batcher.busy.values()
    assert before <= since <= time.monotonic()
    bench.go()
    answer.result(20)
    wait_until(lambda: not bench.batcher.busy)


def test_lanes_compute_side_by_side_and_share_what_waits() -> None:
    bench = Bench(max_batch=8, lanes=2)
    answers = [bench.busy(0), bench.busy(1)]  # each at once
    answers += [bench.ask(2, 3, 4, 5, 6, 7), bench.ask(8, 9)]
    assert len(bench.batcher.busy) == 2
    assert bench.batcher.waiting == 8
    bench.go()
    assert [answer.result(20)[1].tolist() for answer in answers] == [[0], [3], [6, 9, 12, 15, 18, 21], [24, 27]]
    assert max(map(len, bench.engine.batches)) <= 4  # together at most max_batch
    bench.threads.shutdown()


def test_idle_lanes_share_one_request() -> None:
    bench = Bench(max_batch=8, lanes=2)
    answer = bench.ask(1, 2, 3, 4, 5)
    for _ in range(2):
        assert bench.engine.entered.acquire(timeout=60)
    assert sorted(map(len, bench.engine.batches)) == [2, 3]
    bench.go()
    assert answer.result(20)[0].tolist() == doubled(1, 2, 3, 4, 5)
    bench.threads.shutdown()


@pytest.mark.parametrize("lanes", [1, 3])
def test_many_threads_get_each_their_own_rows(lanes: int) -> None:
    batcher = Batcher(lambda inputs: [inputs[0] + 1], max_batch=8, queue_size=10_000, lanes=lanes)
    random = np.random.default_rng(0)
    batches = [random.normal(size=(int(n), 2)) for n in random.integers(1, 30, 300)]
    with ThreadPoolExecutor(32) as threads:
        for batch, answer in zip(batches, threads.map(lambda rows: batcher.compute([rows])[0], batches), strict=True):
            np.testing.assert_array_equal(answer, batch + 1)
    assert batcher.waiting == 0
