"""Streams on the device and in host memory: the same values by either way, in spans by tokens or by bytes."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2jax.stream import chunks
from exl2jax.stream.chunks import Span, row_spans
from exl2jax.stream.later import working_behind
from exl2jax.stream.streams import Rows, Stream, added, device_budget, fold, read, whole
from exl2jax.testing.counting import reads

SPANS = (Span(0, 2, 2), Span(2, 4, 2), Span(4, 5, 2))


def program(total: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return total + jnp.sum(x), (x + y, jnp.max(x, axis=(1, 2)))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_fold_gives_the_sums_and_values_of_all_rows(resident: bool, in_place: bool) -> None:
    x, y = np.random.default_rng(0).random((2, 5, 3, 4), dtype=np.float32)
    streams = [Stream.of(values.copy(), SPANS, resident=resident) for values in (x, y)]
    out, largest = streams[0] if in_place else streams[0].like(3, 4), Stream.empty(SPANS, (), resident=True)
    total = fold(jax.jit(program), jnp.float32(0), streams, (out, largest))
    np.testing.assert_allclose(total, x.sum(dtype=np.float64), rtol=1e-6)
    assert np.array_equal(out.array(), x + y)
    assert np.array_equal(whole(SPANS, read(largest.parts())), x.max(axis=(1, 2)))
    assert np.array_equal(streams[1].array(), y)
    assert np.array_equal(streams[0].array(), x + y if in_place else x)
    assert out.resident == resident and out.count == 5 and out.shape == (3, 4)
    assert np.array_equal(np.stack(out.rows(3)), (x + y)[:3]) and np.array_equal(out.array(3), (x + y)[:3])


def test_streams_of_pieces_add_up() -> None:
    x, y = np.random.default_rng(1).random((2, 5, 3, 4), dtype=np.float32)
    for resident in (True, False):
        first, then = (Stream.of(values.copy(), SPANS, resident=resident) for values in (x, y))
        assert np.array_equal(added(first, then).array(), x + y)


def test_a_stream_in_host_memory_asks_for_the_next_chunk_before_it_waits_for_a_result() -> None:
    told: list[tuple[str, int]] = []

    class Noting(Stream):
        def take(self, index: int) -> jax.Array:
            told.append(("up", index))
            return super().take(index)

        def settle(self) -> Any:
            if self._late is not None:
                told.append(("down", self._late[0]))
            return super().settle()

    stream = Noting.of(np.zeros((5, 3, 4), np.float32), SPANS, resident=False)
    fold(lambda total, x: (total, (x + 1,)), None, (stream,), (stream,))
    assert told == [("up", 0), ("up", 1), ("up", 2), ("down", 0), ("down", 1), ("down", 2)]
    assert (stream.array() == 1).all()


ARRAYS = st.sampled_from([np.float32, np.int32, np.uint8, np.float16, np.bool_])


@settings(max_examples=10, deadline=None)
@given(dtypes=st.lists(ARRAYS, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_arrays_are_read_bit_for_bit_at_once(dtypes: list[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {str(i): (rng.random((2, i + 1)) * 9).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays["nan"] = np.asarray([np.nan, -0.0, 1e-45], np.float32)
    tree = {name: jax.device_put(value) for name, value in arrays.items()}
    with reads() as seen:
        found = read(tree)
    assert len(seen) == 1
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes()
    assert read([]) == []


def test_chunks_go_by_tokens_on_the_cpu_and_by_bytes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [span.rows for span in row_spans(16, 1024, 4096)] == [2] * 8
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 << 20)
    assert [span.rows for span in row_spans(16, 1024, 4096)] == [4] * 4
    assert [span.rows for span in row_spans(16, 1024, 1024)] == [16]
    assert [span.rows for span in row_spans(3, 1024, 1 << 22)] == [2, 2]


def test_the_budget_is_that_asked_for_or_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_budget(None) is None, "the CPU's memory is the host's"
    assert device_budget(1.5) == 1_500_000_000

    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000, "bytes_in_use": 200}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert device_budget(None) == 400


def test_rows_place_their_own_streams_and_shorter_ones() -> None:
    mask = np.ones((5, 3), np.int32)
    mask[4, 1:] = 0
    rows = Rows.of(mask, 4, single=True)
    assert len(rows.spans) == 5 and np.array_equal(rows.mask.array(), mask.astype(np.float32))
    assert rows.place(np.zeros((5, 3, 4), np.float32)).spans == rows.spans
    assert rows.place(np.ones((2, 3, 4), np.float32)).count == 2


def test_work_behind_keeps_its_order_and_raises_its_errors() -> None:
    done, gate = list[int](), threading.Event()

    def fail() -> None:
        raise OSError("disk full")

    with working_behind() as behind:
        behind(lambda: (gate.wait(5), done.append(1))[1])
        assert done == []
        gate.set()
        behind(lambda: done.append(2))
        behind.settle()
        assert done == [1, 2]
    with pytest.raises(OSError, match="disk full"), working_behind() as behind:
        behind(fail)
        behind(lambda: done.append(3))
    assert done == [1, 2]
