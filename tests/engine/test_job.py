"""Jobs: which adapter acts where, how each token is drawn, and the one end of a sequence."""

from dataclasses import replace
from types import SimpleNamespace

import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from lorakit.engine import sampling
from lorakit.engine.handle import RequestHandle
from lorakit.engine.job import Job
from lorakit.errors import DeadlineExceededError, EngineError
from lorakit.runtime.roster import Adapter

REQUEST = replace(plain.REQUEST, max_new_tokens=4, stop_token_ids=frozenset({9}))
SLOT = object()


def jobs_of(*, decode=None, **settings):
    request = replace(REQUEST, **settings)
    handle = RequestHandle("request-0", request, lambda handle: None, lambda handle: None)
    handle.parts += [Job(handle, sequence, decode) for sequence in range(request.n)]
    return handle.parts


def job_of(**settings):
    return jobs_of(**settings)[0]


def adapter_of(key="key", invocation=None):
    return Adapter("a", key, None, invocation, 0, False)


def spelled(tokens):
    return "".join(chr(token) for token in tokens)


def test_what_it_may_take():
    job = job_of(deadline=2.5)
    assert job.id == "request-0" and job.adapter == "a" and not job.over
    assert job.cost == 3 + 4 and job.unused == 4
    assert job.deadline == job.handle.submitted + 2.5
    job.take(5, None)
    assert job.cost == 7 and job.unused == 3
    assert job_of().deadline is None


def test_each_sequence_has_its_own_name():
    assert [job.id for job in jobs_of(n=3, temperature=1)] == ["request-0/0", "request-0/1", "request-0/2"]


def test_the_base_has_no_slot_and_no_salt():
    job = job_of(adapter=None)
    job.bind(None, None)
    assert job.bound and job.slot is None and job.salt is None and job.slot_at(5) is None


def test_an_adapter_acts_on_every_token():
    job = job_of()
    assert not job.bound
    job.bind(adapter_of(), SLOT)
    assert job.bound and job.start == 0 and job.slot_at(0) is SLOT and job.slot_at(10) is SLOT


def test_a_job_is_bound_once():
    job = job_of()
    job.bind(adapter_of(), SLOT)
    with pytest.raises(AssertionError):
        job.bind(adapter_of(), SLOT)


def test_an_activated_adapter_acts_from_its_invocation_on():
    job = job_of(prompt=(7, 8, 1, 7, 8, 2))
    job.bind(adapter_of(invocation=(7, 8)), SLOT)
    assert job.start == 3 and job.salt is not None
    assert [job.slot_at(position) for position in range(8)] == [None] * 3 + [SLOT] * 5


def test_an_activated_adapter_that_is_not_invoked_does_not_act():
    """As in PEFT; its blocks in the cache are the base's."""
    job = job_of(prompt=(7, 1, 8))
    job.bind(adapter_of(invocation=(7, 8)), SLOT)
    assert job.bound and job.slot is None and job.salt is None
    job.take(7, None)
    job.take(8, None)
    assert all(job.slot_at(position) is None for position in range(6))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_an_activated_adapter_begins_where_it_does_in_peft(prompt, invocation):
    config = {"a": SimpleNamespace(alora_invocation_tokens=invocation)}
    [offset] = calculate_alora_offsets(config, "a", torch.tensor([prompt]))
    job = job_of(prompt=tuple(prompt))
    job.bind(adapter_of(invocation=tuple(invocation)), SLOT)
    assert (job.slot is None) == (offset is None)
    assert offset is None or job.start == len(prompt) - offset


def test_salts_stand_for_the_content():
    def salt(key):
        job = job_of()
        job.bind(adapter_of(key), SLOT)
        return job.salt

    salts = [salt(f"key-{i}") for i in range(1000)]
    assert len(set(salts)) == 1000 and salt("key-0") == salts[0]
    assert all(len(one) == 4 and all(-(2**31) <= part < 2**31 for part in one) for one in salts)


def test_a_salt_is_the_same_in_every_process():
    job = job_of()
    job.bind(adapter_of("key"), SLOT)
    assert job.salt == (-849743780, 428755941, -167556665, -963304066)


def test_greedy_tokens_need_no_draw():
    job = job_of(seed=5, top_k=3)
    assert job.settings(0) == job.settings(7) == sampling.GREEDY


def test_sampled_tokens_have_the_requests_settings_and_a_draw_each():
    settings = [job_of(temperature=0.5, top_k=7, top_p=0.25, seed=3).settings(place) for place in range(100)]
    assert {one[:3] for one in settings} == {(0.5, 7, 0.25)}
    assert len({one.draw for one in settings}) == 100 and all(0 <= one.draw < 1 for one in settings)


def test_draws_are_those_of_seed_sequence_and_place_alone():
    def draws(**settings):
        return [[job.settings(place).draw for place in range(20)] for job in jobs_of(temperature=1.0, **settings)]

    same = draws(seed=3, n=3)
    assert draws(seed=3, n=3, prompt=(5,), adapter=None, tenant="b", max_new_tokens=90) == same
    assert draws(seed=3, n=2) == same[:2] and draws(seed=3) == same[:1]
    assert len({draw for sequence in same + draws(seed=4, n=3) for draw in sequence}) == 120
    # Neither 1 and 12 nor 11 and 2 make the same text.
    assert draws(seed=1, n=13)[12] != draws(seed=11, n=3)[2]


def test_a_stop_token_ends_it():
    job = job_of()
    assert [job.take(token, None) for token in (5, 6, 9)] == [False, False, True]
    assert job.over and job.generated == [5, 6, 9]
    completion = job.handle.result()
    assert (completion.token_ids, completion.finish_reason, completion.stop) == ((5, 6, 9), "stop", 9)


def test_the_limit_ends_it():
    job = job_of()
    assert [job.take(token, None) for token in (5, 6, 7, 8)] == [False, False, False, True]
    completion = job.handle.result()
    assert (completion.finish_reason, completion.stop, job.unused) == ("length", None, 0)


def test_a_stop_token_in_the_last_place_is_a_stop():
    job = job_of(max_new_tokens=1)
    assert job.take(9, None) and job.handle.result().finish_reason == "stop"


def test_a_stop_string_ends_it():
    job = job_of(decode=spelled, stop_strings=("no", "yes"), max_new_tokens=10)
    assert [job.take(ord(character), None) for character in "oyes"] == [False, False, False, True]
    completion = job.handle.result()
    assert (completion.finish_reason, completion.stop) == ("stop", "yes") and len(completion.token_ids) == 4


def test_a_stop_string_in_the_last_place_is_a_stop():
    job = job_of(decode=spelled, stop_strings=("ab",), max_new_tokens=2)
    assert [job.take(ord(character), None) for character in "ab"] == [False, True]
    assert job.handle.result().stop == "ab"


def test_nothing_is_decoded_without_stop_strings_or_for_a_stop_token():
    def decode(tokens):
        raise AssertionError

    job = job_of(decode=decode)
    assert [job.take(token, None) for token in (5, 9)] == [False, True]
    job = job_of(decode=decode, stop_strings=("x",))
    assert job.take(9, None) and job.handle.result().stop == 9


def test_a_decode_that_fails_fails_its_own_request_alone():
    def decode(tokens):
        raise OverflowError("out of range")

    job = job_of(decode=decode, stop_strings=("x",))
    assert job.take(5, None) and job.over
    with pytest.raises(EngineError, match="OverflowError: out of range"):
        job.handle.result()
    assert [token.id for token in job.handle.tokens()] == [5]


def test_cancelling_ends_it_where_it_stands():
    job = job_of()
    job.take(5, None)
    job.cancel()
    assert job.over and job.handle.done
    completion = job.handle.result()
    assert (completion.token_ids, completion.finish_reason) == ((5,), "cancelled")
    job.cancel()
    assert job.handle.result() == completion


def test_a_job_that_is_over_takes_nothing_more():
    for end in (lambda job: job.cancel(), lambda job: job.take(9, None), lambda job: job.fail(EngineError("x"))):
        job = job_of()
        job.take(5, None)
        end(job)
        generated = list(job.generated)
        assert job.take(6, None) and job.take(9, None)
        assert job.generated == generated == [token.id for token in job.handle.tokens()]


def test_an_end_changes_none_that_was_before():
    job = job_of()
    job.take(9, None)
    job.cancel()
    job.fail(EngineError("x"))
    assert job.handle.result().finish_reason == "stop"


def test_a_failure_ends_the_request_and_its_other_sequences_with_the_next_token():
    first, second, third = jobs_of(n=3, temperature=1.0, max_new_tokens=10)
    first.take(9, None)
    second.take(5, None)
    third.fail(DeadlineExceededError("late"))
    assert first.handle.done and third.over
    assert second.take(6, None) and second.over and second.generated == [5]
    with pytest.raises(DeadlineExceededError, match="late"):
        first.handle.results()


def test_sequences_end_by_themselves():
    first, second = jobs_of(n=2, temperature=1.0)
    assert first.take(9, None) and not second.over and not first.handle.done
    assert [second.take(token, None) for token in (5, 9)] == [False, True]
    assert [completion.token_ids for completion in first.handle.results()] == [(9,), (5, 9)]


@pytest.mark.parametrize("logprobs", [True, False])
def test_logprobs_are_kept_where_they_were_asked_for(logprobs):
    job = job_of(logprobs=logprobs)
    job.take(5, -1.5)
    job.take(9, -0.5)
    assert job.handle.result().logprobs == ((-1.5, -0.5) if logprobs else None)
    assert [token.logprob for token in job.handle] == ([-1.5, -0.5] if logprobs else [None, None])


def test_what_the_prefix_cache_had_is_told():
    job = job_of()
    job.cached = 2
    job.take(9, None)
    assert job.handle.result().cached_tokens == 2
