"""Which texts are read together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.engine.encoding.queue import Queue


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), max_size=6), st.integers(1, 200), st.data())
def test_every_text_is_read_once_within_the_room(requests: list[list[int]], room: int, data: st.DataObject) -> None:
    queue = Queue()
    for id_, lengths in enumerate(requests):
        queue.add(id_, lengths)
    dropped = data.draw(st.sets(st.integers(0, 5), max_size=2))
    for id_ in dropped:
        queue.drop(id_)
    left = {(id_, at) for id_, lengths in enumerate(requests) if id_ not in dropped for at in range(len(lengths))}
    waited: dict[int, int] = {id_: 0 for id_, _ in left}
    while left:
        assert len(queue) == len(left)
        chosen = queue.next(room)
        sizes = [requests[id_][at] for id_, at in chosen]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == 1 or len(sizes) * sizes[0] <= room
        left -= set(chosen)
        here, waiting = {id_ for id_, _ in chosen}, {id_ for id_, _ in left}
        waited = {id_: 0 if id_ in here else waited[id_] + 1 for id_ in waiting}
        assert all(passes < len(requests) for passes in waited.values()), (
            "a request waits for more than each other once"
        )
    assert not queue.next(room)


def test_texts_of_about_the_same_length_go_together() -> None:
    queue = Queue()
    queue.add(1, [10, 2, 9, 3, 10])
    assert queue.next(30) == [(1, 4), (1, 0), (1, 2)]
    assert queue.next(30) == [(1, 3), (1, 1)]
