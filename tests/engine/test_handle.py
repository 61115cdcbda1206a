"""Handles: every reader, in threads and in event loops, sees every token and then the end."""

import asyncio
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain import REQUEST

from lorakit.engine.handle import RequestHandle, Token
from lorakit.errors import DeadlineExceededError, EngineBusyError, EngineCrashedError, EngineStoppedError


def handle_of(n=1, *, logprobs=False, ended=None, cancel=None):
    request = replace(REQUEST, max_new_tokens=1000, temperature=1.0, logprobs=logprobs, n=n)
    ignore = lambda handle: None  # noqa: E731
    return RequestHandle("request-0", request, cancel or ignore, ended or ignore)


def write(handle, count, *, end=True, pause=None):
    for i in range(count):
        handle.add(0, i, None)
        if pause and not i % pause:
            time.sleep(0)
    if end:
        handle.finish(0, "length")


@contextmanager
def threads(*functions):
    """Runs functions beside what is inside, and hands on what they raise."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    running = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in running:
        thread.start()
    yield
    for thread in running:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def ids(tokens):
    return [token.id for token in tokens]


async def read(handle):
    return [token.id async for token in handle]


def test_tokens_come_in_order_and_then_the_end():
    handle = handle_of(logprobs=True)
    handle.add(0, 5, -0.5)
    assert not handle.done and handle.tokens() == [Token(5, -0.5, 0)]
    handle.add(0, 6, -0.25)
    handle.finish(0, "stop", 6, cached=3)
    assert handle.done and ids(handle) == [5, 6]
    completion = handle.result()
    assert completion.token_ids == (5, 6) and completion.logprobs == (-0.5, -0.25)
    assert (completion.finish_reason, completion.stop, completion.cached_tokens) == ("stop", 6, 3)
    assert 0 <= completion.time_to_first_token <= completion.seconds < 10
    assert len(completion.times) == len(completion.token_ids) and list(completion.times) == sorted(completion.times)
    assert completion.times[0] == completion.time_to_first_token


def test_logprobs_are_none_unless_they_were_asked_for():
    handle = handle_of()
    handle.add(0, 5, None)
    handle.finish(0, "length")
    assert handle.result().logprobs is None


def test_a_request_without_a_token_has_no_first_one():
    handle = handle_of()
    handle.finish(0, "cancelled")
    assert ids(handle) == [] and handle.result().time_to_first_token is None


def test_whoever_comes_after_the_end_reads_all_of_it_as_often_as_they_like():
    handle = handle_of()
    write(handle, 10)
    for _ in range(3):
        assert ids(handle) == list(range(10)) == asyncio.run(read(handle))
        assert handle.wait(0) and handle.result(0).token_ids == tuple(range(10))


def test_several_threads_and_event_loops_each_see_all_tokens():
    handle = handle_of()
    found = []

    async def tasks():
        found.extend(await asyncio.gather(*(read(handle) for _ in range(4))))

    readers = [lambda: found.append(ids(handle))] * 4 + [lambda: asyncio.run(tasks())] * 2
    with threads(*readers):
        write(handle, 3000, pause=50)
    assert len(found) == 12 and all(tokens == list(range(3000)) for tokens in found)


def test_readers_see_a_token_before_the_next_one_is_there():
    handle = handle_of()
    seen = threading.Semaphore(0)
    listening = [threading.Event(), threading.Event()]

    def in_thread():
        for _ in handle:
            listening[0].set()
            seen.release()

    async def in_loop():
        async for _ in handle:
            listening[1].set()
            seen.release()

    with threads(in_thread, lambda: asyncio.run(in_loop())):
        for i in range(200):
            handle.add(0, i, None)
            assert seen.acquire(timeout=10) and seen.acquire(timeout=10)
        handle.finish(0, "length")


def test_all_sequences_are_waited_for_and_come_in_their_order():
    calls = []
    handle = handle_of(3, ended=calls.append)
    for sequence in (2, 0, 1):
        handle.add(sequence, 10 * sequence, None)
    handle.finish(2, "length")
    handle.add(0, 1, None)
    handle.finish(0, "length")
    assert not handle.done and not handle.wait(0) and not calls
    with pytest.raises(TimeoutError, match="request-0 has not ended after 0.01 s; it goes on"):
        handle.results(0.01)
    handle.finish(1, "stop", 10)
    assert handle.done and calls == [handle]
    assert [completion.token_ids for completion in handle.results()] == [(0, 1), (10,), (20,)]
    assert handle.result().token_ids == (0, 1)
    assert [(token.sequence, token.id) for token in handle] == [(2, 20), (0, 0), (1, 10), (0, 1)]
    assert ids(handle.tokens(2)) == [20]

    async def first():
        return await handle

    assert asyncio.run(first()).token_ids == (0, 1)


def test_after_its_end_a_sequence_takes_nothing_more():
    handle = handle_of(2)
    handle.add(0, 1, None)
    handle.finish(0, "stop", 1)
    handle.add(0, 2, None)
    handle.finish(0, "length")
    handle.add(1, 3, None)
    handle.finish(1, "length")
    assert [c.token_ids for c in handle.results()] == [(1,), (3,)] and handle.results()[0].finish_reason == "stop"
    assert ids(handle) == [1, 3]


def test_a_failure_after_the_end_changes_nothing():
    calls = []
    handle = handle_of(ended=calls.append)
    write(handle, 2)
    handle.fail(EngineStoppedError("closed"))
    handle.fail(EngineStoppedError("closed"))
    assert handle.result().token_ids == (0, 1) and ids(handle) == [0, 1] and len(calls) == 1


def test_a_failure_comes_after_the_tokens_that_there_are():
    calls = []
    handle = handle_of(ended=calls.append)
    write(handle, 2, end=False)
    handle.fail(DeadlineExceededError("late"))
    handle.finish(0, "length")
    handle.add(0, 9, None)
    reader = iter(handle)
    assert [next(reader).id, next(reader).id] == [0, 1]
    with pytest.raises(DeadlineExceededError, match="late"):
        next(reader)

    async def in_loop():
        found = []
        with pytest.raises(DeadlineExceededError, match="late"):
            async for token in handle:
                found.append(token.id)
        with pytest.raises(DeadlineExceededError, match="late"):
            await handle
        return found

    assert asyncio.run(in_loop()) == [0, 1]
    assert handle.done and handle.wait() and ids(handle.tokens()) == [0, 1] and len(calls) == 1
    with pytest.raises(DeadlineExceededError, match="late"):
        handle.results()


def test_a_failure_ends_the_sequences_that_are_left():
    handle = handle_of(2)
    handle.add(0, 1, None)
    handle.finish(0, "length")
    handle.fail(EngineCrashedError("down"))
    assert handle.done
    with pytest.raises(EngineCrashedError):
        handle.results()


def raised_by(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def depth(error):
    trace, count = error.__traceback__, 0
    while trace is not None:
        trace, count = trace.tb_next, count + 1
    return count


def test_each_reader_raises_an_error_of_its_own_with_cause_and_attributes():
    cause = OSError("disk")
    error = EngineBusyError("full", retry_after=2.5)
    error.__cause__ = cause
    error.request = "request-0"
    handle = handle_of()
    handle.fail(error)
    found = [raised_by(handle.result) for _ in range(3)] + [raised_by(lambda: list(handle))]
    assert len({id(one) for one in [*found, error]}) == 5
    for one in found:
        assert type(one) is EngineBusyError and one.args == error.args and str(one) == "full"
        assert one.retry_after == 2.5 and one.request == "request-0" and one.__cause__ is cause
    assert depth(found[0]) == depth(found[1]) == depth(found[2])


def test_an_error_tells_where_it_came_from_in_the_engine():
    def deep_inside():
        raise EngineCrashedError("down")

    error = raised_by(deep_inside)
    handle = handle_of()
    handle.fail(error)
    names = []
    trace = raised_by(handle.result).__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-1] == "deep_inside"


class OddError(Exception):
    """As libraries have them: it cannot be made from its `args`."""

    def __init__(self, code):
        super().__init__(f"code {code}")


class OdderError(Exception):
    def __init__(self, *, code):
        super().__init__(f"code {code}")


@pytest.mark.parametrize("error", [OddError(5), OdderError(code=5)])
def test_an_error_that_cannot_be_copied_is_raised_itself(error):
    handle = handle_of()
    handle.fail(error)
    assert raised_by(handle.result) is error and str(error) == "code 5"


def test_errors_of_the_system_keep_what_they_are_about():
    handle = handle_of()
    handle.fail(FileNotFoundError(2, "No such file", "weights.bin"))
    found = raised_by(handle.result)
    assert type(found) is FileNotFoundError and found.filename == "weights.bin" and found.errno == 2


def test_cancelling_reaches_the_engine_until_the_end_only():
    asked = []
    handle = handle_of(cancel=asked.append)
    handle.cancel()
    handle.cancel()
    assert len(asked) == 2
    handle.finish(0, "cancelled")
    handle.cancel()
    assert len(asked) == 2 and handle.result().finish_reason == "cancelled" and ids(handle) == []


def test_waiting_readers_are_woken_by_the_end_alone():
    handle = handle_of()
    found = []

    async def in_loop():
        found.append(await read(handle))
        found.append((await handle).finish_reason)

    with threads(
        lambda: found.append(ids(handle)),
        lambda: found.append(handle.wait()),
        lambda: found.append(handle.result(10).token_ids),
        lambda: asyncio.run(in_loop()),
    ):
        time.sleep(0.05)
        handle.finish(0, "cancelled")
    assert sorted(map(str, found)) == sorted(["[]", "True", "()", "[]", "cancelled"])


def test_waiting_readers_are_woken_by_a_failure():
    handle = handle_of()
    found = []

    async def in_loop():
        await handle

    readers = [lambda: list(handle), handle.result, lambda: asyncio.run(in_loop()), lambda: asyncio.run(read(handle))]
    with threads(*(lambda call=call: found.append(type(raised_by(call))) for call in readers)):
        time.sleep(0.05)
        handle.fail(EngineStoppedError("closed"))
    assert found == [EngineStoppedError] * 4


def test_the_engine_knows_of_the_end_before_any_reader_does():
    order = []
    handle = handle_of(ended=lambda handle: (time.sleep(0.02), order.append("engine")))
    with threads(lambda: (handle.wait(), order.append("reader"))):
        write(handle, 1)
    assert order == ["engine", "reader"]


def test_a_cancelled_task_leaves_the_request_and_the_other_readers_alone():
    handle = handle_of()

    async def main():
        tasks = [asyncio.ensure_future(read(handle)) for _ in range(2)]
        waiting = asyncio.ensure_future(handle._completion())
        await asyncio.sleep(0)
        assert len(handle._listeners) == 3
        tasks[0].cancel()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(handle._listeners) == 1 and not handle.done
        write(handle, 3)
        assert await tasks[1] == [0, 1, 2]

    asyncio.run(main())
    assert not handle._listeners


def test_a_reader_that_stops_early_leaves_nothing_behind():
    handle = handle_of()
    write(handle, 5, end=False)

    async def main():
        async for token in handle:
            if token.id == 2:
                break
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not handle._listeners

    asyncio.run(main())
    for token in handle:
        if token.id == 2:
            break
    handle.finish(0, "length")
    assert ids(handle) == list(range(5))


def test_a_loop_that_was_closed_disturbs_nobody():
    handle = handle_of()
    loop = asyncio.new_event_loop()
    reader = handle.__aiter__()
    step = loop.create_task(reader.__anext__())
    loop.run_until_complete(asyncio.sleep(0))
    assert len(handle._listeners) == 1
    loop.close()
    found = []
    with threads(lambda: found.append(ids(handle)), lambda: found.append(asyncio.run(read(handle)))):
        write(handle, 100)
    assert found == [list(range(100))] * 2 and handle.done
    step._log_destroy_pending = False  # that it never ends is the point


def test_a_loop_is_told_once_until_it_looks():
    handle = handle_of()
    told = []

    async def main():
        loop = asyncio.get_running_loop()
        call, loop.call_soon_threadsafe = loop.call_soon_threadsafe, lambda *args: (told.append(1), call(*args))
        readers = [asyncio.ensure_future(read(handle)) for _ in range(3)]
        waiting = [asyncio.ensure_future(handle._completion()) for _ in range(3)]
        await asyncio.sleep(0)
        told.clear()
        write(handle, 1000, end=False)
        assert len(told) == 3
        await asyncio.sleep(0.01)
        write(handle, 1000, end=False)
        assert len(told) == 6
        handle.finish(0, "length")
        assert len(told) == 12
        assert all(len(tokens) == 2000 for tokens in await asyncio.gather(*readers))
        assert all(len(completion.token_ids) == 2000 for completion in await asyncio.gather(*waiting))

    asyncio.run(main())


def test_many_long_sequences_end_with_their_own_tokens():
    handle = handle_of(128)
    for i in range(500):
        for sequence in range(128):
            handle.add(sequence, i, None)
    for sequence in range(128):
        handle.finish(sequence, "length")
    assert all(completion.token_ids == tuple(range(500)) for completion in handle.results())


WHAT = st.sampled_from(["add", "add", "add", "finish", "look", "fail"])
WRITES = st.lists(st.tuples(st.integers(0, 2), WHAT), max_size=40)


@given(WRITES)
def test_any_order_of_tokens_and_ends_is_what_readers_see(writes):
    """Against a plain model: tokens until each sequence's end, and one end of all."""
    ended = []
    handle = handle_of(3, ended=ended.append)
    tokens, ends, failed = [], {}, False
    for number, (sequence, what) in enumerate(writes):
        if what == "add":
            handle.add(sequence, number, None)
            if sequence not in ends:
                tokens.append((sequence, number))
        elif what == "finish":
            handle.finish(sequence, "length")
            ends.setdefault(sequence, "finished")
        elif what == "fail":
            handle.fail(EngineStoppedError("closed"))
            for left in range(3):
                failed = failed or left not in ends
                ends.setdefault(left, "failed")
        assert handle.done == (len(ends) == 3) == bool(ended)
        for each in range(3):
            assert [token.id for token in handle.tokens(each)] == [i for owner, i in tokens if owner == each]
    for left in range(3):
        handle.finish(left, "cancelled")
    assert len(ended) == 1
    found, error = [], None
    try:
        for token in handle:
            found.append((token.sequence, token.id))
    except EngineStoppedError as caught:
        error = caught
    assert found == tokens and (error is not None) == failed
    if not failed:
        assert [c.token_ids for c in handle.results()] == [tuple(i for o, i in tokens if o == s) for s in range(3)]
