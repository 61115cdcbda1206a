"""What `lorakit/engine/batching.py` takes for granted of transformers' continuous batching.

These fail first when transformers moves a seam, and say which.
"""

import inspect
import subprocess
import sys

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from packaging.version import Version
from transformers import GenerationConfig, modeling_flash_attention_utils
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.continuous_batching import input_outputs, model_runner, requests, scheduler
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from lorakit.engine import batching, sampling

SIGNATURES = {
    api.ContinuousBatchingManager.__init__: "model generation_config continuous_batching_config workload_hints",
    api.ContinuousBatchingManager.stop: "block timeout keep_for_next_session hard_stop",
    api.ContinuousBatchingManager.cancel_request: "request_id",
    api.ContinuousBatchingManager._create_batch_processor: "",
    api.ContinuousBatchingManager._handle_critical_error: "error batch_processor",
    api.ContinuousBatchingManager._run_generation_loop: "",
    api.ContinuousBatchProcessor.__init__: (
        "cache config generation_config continuous_batching_config logit_processor input_queue cancel_queue "
        "output_router background_thread_status model_device model_dtype scheduler distributed_helper"
    ),
    api.ContinuousBatchProcessor._update_tp_group_state: "",
    api.DistributedHelper.tp_all_reduce_state: "payload_size stop_status pause_requested",
    api.DistributedHelper.tp_all_reduce_min: "value on_cpu",
    api.DistributedHelper.tp_broadcast_object_from_rank_0: "obj",
    api.OutputRouter.deliver: "output",
    api.OutputRouter.deliver_batch: "outputs",
    api.OutputRouter.fail_and_deliver: "state error",
    cache_module.PagedAttentionCache.__init__: (
        "config continuous_batching_config device distributed_helper dtype model_supports_logits_to_keep"
    ),
    cache_module.PagedAttentionCache._infer_max_decode_fast_path_length: "",
    cache_module.PagedAttentionCache.search_prefix_match: "request_id prompt_ids",
    cache_module.PagedAttentionCache.mark_complete_blocks: "state complete_blocks",
    cache_allocator.CacheAllocator.match_prefix_blocks: "prompt_ids",
    cache_allocator.CacheAllocator.get_cache_for_block_table: "layer_idx",
    modeling_flash_attention_utils.lazy_import_flash_attention: "implementation attention_wrapper allow_all_kernels",
    cache_allocator.CacheAllocator.mark_complete_blocks: "request_id token_ids new_new_blocks",
    model_runner.ModelRunner.__init__: ("logit_processor cb_config inputs_and_outputs cache do_sample return_logprobs"),
    model_runner.ModelRunner.compute_batch: "model batch_data",
    model_runner.ModelRunner.maybe_pad_inputs: "num_q_tokens max_kv_read use_decode_fast_path",
    cache_module.PagedAttentionCache.fill_block_table: "request_id past_length query_length block_table",
    input_outputs.ContinuousBatchingIOs._get_graph_key: "",
    input_outputs.ContinuousBatchingIOs.get_cb_kwargs: "",
    model_runner.ModelRunner._get_forward_fn: "use_block_table",
    model_runner.ModelRunner._capture_graph: "forward_fn compute_stream args",
    model_runner.ModelRunner._forward_process_and_sample: (
        "model batch_data carry_over_ids prev_output_ids output_ids"
    ),
    model_runner.infer_max_single_request_tokens: "cache",
    requests.RequestState.update_and_check_completion: "token_id logprob",
    requests.RequestState.create_equivalent_initial_request: "",
    requests.FutureRequestState.__init__: "state has_new_token complete_blocks query_length",
    scheduler.FIFOScheduler.__init__: "cache safety_margin max_requests_per_batch",
    scheduler.Scheduler.add_waiting_request: "state",
    scheduler.Scheduler.clear_cancelled_requests: "",
    scheduler.Scheduler.finish_request: "request_id",
    scheduler.Scheduler.set_request_cancellation: "request_id",
    scheduler.Scheduler._get_waiting_candidates: "",
    scheduler.FIFOScheduler.schedule_batch: "token_budget cache_budget",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    assert " ".join(parameters) == SIGNATURES[function]


def test_the_installed_version_is_supported():
    assert Version(transformers.__version__) in batching.SUPPORTED


def test_another_version_is_refused_when_imported_and_says_which_to_install():
    code = "import transformers; transformers.__version__ = '5.99.0'; import lorakit.engine.batching"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingDependencyError" in found.stderr
    assert 'pip install "transformers<5.24,>=5.23"' in found.stderr and "5.99.0 is installed" in found.stderr


def state(tokens=(1, 2, 3, 4, 5), **options) -> RequestState:
    return RequestState(request_id="r", initial_tokens=list(tokens), **options)


def test_a_request_ends_by_its_tokens_and_its_length():
    one = state(max_new_tokens=3, eos_token_id=[9])
    one.status = RequestStatus.DECODING
    assert not one.update_and_check_completion(7, -0.5)
    assert one.generated_tokens == [7]
    assert one.update_and_check_completion(9, -0.5) and one.status == RequestStatus.FINISHED
    one = state(max_new_tokens=1)
    one.status = RequestStatus.DECODING
    assert one.update_and_check_completion(7, None)


def test_a_request_that_left_the_batch_keeps_what_it_has():
    one = state(max_new_tokens=10)
    one.generated_tokens = [7, 8]
    again = one.create_equivalent_initial_request()
    assert again.initial_tokens == [1, 2, 3, 4, 5, 7, 8] and again.max_new_tokens == 8
    assert again._true_initial_tokens == 5
    assert again.create_equivalent_initial_request()._true_initial_tokens == 5
    assert {"initial_tokens", "_true_initial_tokens", "_status", "_eos_token_ids"} <= vars(again).keys()


def test_blocks_are_hashed_by_slices_of_any_length():
    """The salt is given as more numbers of a block."""
    hashes = {
        cache_allocator.compute_block_hash(parent, list(tokens))
        for parent in (None, 3)
        for tokens in ([1, 2, 3, 4], [5, -6, 7, 8, 1, 2, 3, 4], [1, 2, 3, 4, 5, -6, 7, 8])
    }
    assert len(hashes) == 6


@pytest.fixture
def processor():
    model = ARCHITECTURES["llama"].build()
    manager = api.ContinuousBatchingManager(
        model,
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(
            page_size=4,
            num_blocks=16,
            max_batch_tokens=8,
            max_requests_per_batch=4,
            use_async_batching=False,
            auto_switch_to_flash=False,
        ),
    )
    manager.logit_processor = batching.Rows()
    return manager, manager._create_batch_processor()


def test_rows_lie_behind_the_static_inputs_and_reach_the_model(processor):
    _, made = processor
    io = made.inputs_and_outputs
    assert io._bulk_input_tensor.shape[0] == io.static_inputs + sampling.ROWS
    assert io._bulk_input_tensor.dtype == torch.int32
    assert "logits_processor_args" in input_outputs.PagedAttentionArgs.__annotations__


def test_positions_are_advanced_before_rows_are_written_and_chunks_keep_their_order(processor):
    manager, made = processor
    seen = []

    class Spy(batching.Rows):
        def prepare_tensor_args(self, requests_in_batch, arg_storage):
            seen.append([(one.state.position_offset, one.query_length, one.has_new_token) for one in requests_in_batch])

    made.logit_processor = Spy()
    manager.input_queue.put(state(range(1, 11), max_new_tokens=2))
    for _ in range(3):
        assert made.prepare_next_batch()
        made._generation_step(manager.model)
        assert [future.state.request_id for future in made.inputs_and_outputs.requests_in_batch] == ["r"]
        made.update_batch()
    assert seen == [[(8, 8, False)], [(10, 2, True)], [(11, 1, True)]]


def test_a_loop_that_fails_tells_its_manager(processor, monkeypatch):
    manager, _ = processor
    told = []
    monkeypatch.setattr(manager, "_create_batch_processor", lambda: 1 / 0)
    monkeypatch.setattr(manager, "_handle_critical_error", lambda error, processor: told.append(error))
    manager._run_generation_loop()
    assert [type(error) for error in told] == [ZeroDivisionError]


def test_the_loop_can_be_woken_and_its_queues_are_there(processor):
    manager, made = processor
    assert hasattr(manager._wake_up_loop, "set")
    assert made.input_queue is manager.input_queue and made.cancel_queue is manager.cancel_queue
    assert manager.output_router is made.output_router
    cache = made.cache
    assert all(allocator.ledger.cached_blocks == {} for allocator in cache.cache_allocators.values())
    assert cache.num_sectors * cache.bytes_per_sector == cache.compute_free_capacity(relative=False)
