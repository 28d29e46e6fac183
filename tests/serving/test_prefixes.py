"""Prefixes that requests share: what is kept of one is not changed by another."""

import time

import mlx.core as mx
import numpy as np
import pytest
from test_engine import Collected, job

from mpi_mlx.serving.decoding import PromptCache, same_cache
from mpi_mlx.serving.engine import Engine
from mpi_mlx.serving.prefixes import PrefixCache


def counted(length, room=0, start=0):
    """A cache whose keys are start, start + 1, ... and whose values are their negatives."""
    cache = PromptCache()
    keys = start + mx.arange(length + room, dtype=mx.float32).reshape(1, 1, -1, 1)
    cache.keys, cache.values, cache.offset = keys, -keys, length
    return cache


def written(cache, *values):
    """Takes in one token for each value."""
    keys = mx.array(values, mx.float32).reshape(1, 1, -1, 1)
    return cache.update_and_fetch(keys, -keys)[0].flatten().tolist()


def test_a_cache_of_the_same_keys_is_written_to_alone():
    for first, second in ((0, 1), (1, 0)):
        pair = [counted(3, room=2)]
        pair.append(same_cache(pair[0]))
        assert written(pair[first], 8, 9) == [0, 1, 2, 8, 9]
        assert written(pair[second], 7) == [0, 1, 2, 7]
        assert pair[first].keys.flatten().tolist() == [0, 1, 2, 8, 9]
        assert pair[first].values.flatten().tolist() == [0, -1, -2, -8, -9]


def test_another_handle_takes_no_memory():
    cache = counted(1 << 18)
    mx.eval(cache.keys, cache.values)
    before = mx.get_active_memory()
    other = same_cache(cache)
    mx.eval(other.keys, other.values)
    assert mx.get_active_memory() - before < 4096


def test_what_is_kept_stays_when_a_fetched_beginning_is_continued():
    prefixes, codes = PrefixCache(1 << 20), np.arange(5)
    prompt = counted(5)
    prefixes.put("a", codes, [prompt])
    (fetched,), length = prefixes.fetch("a", np.array([0, 1, 2, 50, 51]))
    assert length == 3 and written(fetched, 50, 51) == [0, 1, 2, 50, 51]
    prompt.trim(1)
    assert written(prompt, 60) == [0, 1, 2, 3, 60]  # nor does the cache that was put write into the kept one
    (again,), length = prefixes.fetch("a", np.arange(6))
    assert length == 5 and written(again, 5) == [0, 1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def engine(tiny_folder):
    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), {"base": None})
    yield engine.start()
    engine.close()


def test_another_question_with_the_same_beginning_changes_no_answer(engine):
    long = "If any object is blue then refuse, otherwise say the colour of the largest cube and the number of spheres"
    short = "If any object is blue then say yes yes yes no no no red"

    def answer(question, most=40):
        emit = Collected()
        engine.submit(job(question, emit, max_tokens=most))
        assert emit.over.wait(60)
        while engine.active:  # its row is kept after it was told
            time.sleep(0.005)
        return emit

    first = answer(long)
    (entry,) = engine.prefixes._entries
    kept = [np.array(cache.keys) for cache in entry[2]]
    other = answer(short, 1)
    assert 0 < other.events[0][2] < other.events[0][1] - 1  # it began with a part of what was kept
    assert [np.array_equal(cache.keys, was) for cache, was in zip(entry[2], kept, strict=True)] == [True, True]
    assert answer(long).text == first.text
