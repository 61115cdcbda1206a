"""transformers' continuous batching with an adapter a request: the only file that knows its internals.

What is taken over, and by which of its seams:

    requests      `State` carries a job; a state that leaves the batch and is made anew keeps it
    scheduler     waiting requests come in the order of `Admission`, each with its adapter on the device
    cache         blocks are found by their tokens and by the content of the adapter that acts on them
    runner        every token is given its slot; every row is drawn by its own settings
    outputs       tokens go to the job as they come, and so does an error
    processes     of several that share a base, the first tells the others what to do before a step, by `Orders`

The paged cache, the batches' tensors, chunked prefill, asynchronous batches, CUDA graphs and tensor parallelism are
transformers' own. `tests/engine/test_contract.py` fails first when one of these seams moves.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from lorakit.engine import sampling
from lorakit.engine.admission import Admission
from lorakit.engine.graphs import Graphs, Group
from lorakit.engine.handle import Likely
from lorakit.engine.job import Job
from lorakit.engine.orders import Follower, Leader, Orders
from lorakit.errors import EngineError, MissingDependencyError
from lorakit.runtime.model import MultiLoraModel
from lorakit.runtime.standing import Standing

SUPPORTED = SpecifierSet(">=5.23,<5.24")
"""The versions of transformers whose internals these are."""

if Version(transformers.__version__) not in SUPPORTED:
    raise MissingDependencyError(
        f"the engine is built on the internals of transformers {SUPPORTED}, and {transformers.__version__} is "
        f'installed: pip install "transformers{SUPPORTED}". MultiLoraModel.generate works with either.'
    )

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner, infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler
from transformers.generation.continuous_batching.utils import (
    drain_queue,
    find_head_dim,
    find_num_key_value_heads,
    stream_context,
)
from transformers.utils.generic import is_flash_attention_requested

from lorakit.engine.attention import cached_rows
from lorakit.engine.in_place import may_read_in_place, operator_works, takes_wide_tables

Chooser: TypeAlias = Admission | Leader | Follower
"""What offers jobs: alone, or as one of several processes."""

_MOST_BLOCKS = 1024
"""Of a row, for all of which the batch's table of blocks has room, and goes to the device before each step."""

_MOST_REPLAYED = 1024
"""Tokens of a batch with prompts that is replayed. More keep the GPU busy while Python launches them."""

_MOST_GRAPHS = 256
"""Enough for all sizes of batches, for both pairs of tensors, the base and four modes of adapters."""


@dataclass(eq=False, repr=False)
class State(RequestState):
    """A request as transformers sees it, with its job."""

    job: Job = field(kw_only=True)
    likely: Sequence[Likely] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, job: Job) -> State:
        """A job that has not begun."""
        request = job.request
        return cls(
            request_id=job.id,
            initial_tokens=[*request.prompt, *request.streamed],
            max_new_tokens=request.max_new_tokens - len(request.streamed),
            eos_token_id=sorted(request.stop_token_ids),
            _true_initial_tokens=len(request.prompt) if request.streamed else 0,
            job=job,
        )

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt as it was submitted; those generated before a new beginning are none of them."""
        return self._true_initial_tokens or len(self.initial_tokens)

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        """Gives the token to the job, which knows of more ends than transformers does."""
        finished = super().update_and_check_completion(token_id, logprob)
        if self.job.take(token_id, logprob, self.likely) and not finished:
            self.status = RequestStatus.FINISHED
        return self.status == RequestStatus.FINISHED

    def create_equivalent_initial_request(self) -> State:
        """The state of the same job after it had to leave the batch."""
        fresh = super().create_equivalent_initial_request()
        return State(**{**vars(fresh), "job": self.job})


class _Salted(Sequence[int]):
    """Tokens as the cache hashes them, a block at a time: those that an adapter acts on come with its salt.

    The others come with the salt of their request, if it has one.
    """

    def __init__(self, tokens: list[int], job: Job, block: int) -> None:
        self._tokens = tokens
        self._job = job
        self._block = block

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, item: Any) -> Any:
        found = self._tokens[item]
        if not isinstance(item, slice) or len(found) < self._block:
            return found
        salt = self._job.base_salt if item.stop <= self._job.start else self._job.salt
        return found if salt is None else [*salt, *found]


class Cache(PagedAttentionCache):
    """The paged cache, its blocks shared among requests of the same adapter content only.

    A block before an adapter begins to act is the base's, and shared with it.

    Attributes:
        owners: the jobs of its requests.
        in_place: whether batches in which prompts begin read it where it is; before the runner has tried: may read it.
    """

    owners: dict[str, Job]
    in_place: bool

    def make_room(self, tokens: int, most_blocks: int) -> None:
        """Has a batch's table of blocks have room for rows of so many tokens; transformers' is the same for any base.

        Args:
            tokens: that a row may have.
            most_blocks: for which there is room.
        """
        # A row that is warmed up has a block full of tokens, and one more token.
        needed = max(2, *(-(-tokens // allocator.tokens_per_page) for allocator in self.cache_allocators.values()))
        self.max_blocks_per_request = min(needed, most_blocks)
        self.max_decode_fast_path_length = self._infer_max_decode_fast_path_length()

    def table_of(self, futures: Sequence[FutureRequestState], rows: int, width: int) -> torch.Tensor:
        """(kinds of layer, rows, width) int32, the blocks of a batch's rows; -1 where a row has none."""
        table = torch.full((len(self.cache_allocators), rows, width), -1, dtype=torch.int32)
        for row, future in enumerate(futures):
            self.fill_block_table(future.state.request_id, 0, 0, table[:, row])
        return table

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """The number of tokens at the prompt's beginning that some request of the same content has computed."""
        job = self.owners[request_id]
        found: int = super().search_prefix_match(request_id, self._salted(prompt_ids, job))
        if not job.begun:  # one that left the batch may find its own
            job.cached = found
        return found

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Lets others find the blocks that a request has filled."""
        assert isinstance(state, State)
        if not self.use_prefix_sharing or not complete_blocks:
            return
        tokens = self._salted(state.initial_tokens + state.generated_tokens, state.job)
        for name, count in complete_blocks.items():
            allocator = self.cache_allocators[name]
            # A job that was cancelled while its batch ran has no blocks any more.
            if state.request_id in allocator.block_table:
                allocator.mark_complete_blocks(state.request_id, tokens, count)

    def _salted(self, tokens: list[int], job: Job) -> _Salted:
        # Only layers of full attention share blocks, and theirs are all of one size.
        allocator = next(iter(self.cache_allocators.values()))
        return _Salted(tokens, job, allocator.tokens_per_page)


class _Owning(FIFOScheduler):
    """transformers' scheduler, whose cache knows the jobs of its requests."""

    cache: Cache

    def reset(self) -> None:
        """Forgets all requests."""
        super().reset()
        self.cache.owners = {}

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        """Chooses the requests of the next batch, and has nothing of the cache copied for it, if that can be."""
        futures, decodes, tokens, reads = super().schedule_batch(token_budget, cache_budget)
        if futures and not decodes and self.cache.in_place:
            longest = max(future.state.position_offset + future.query_length for future in futures)
            reads = reads if longest > self.cache.max_decode_fast_path_length else 0
        return futures, decodes, tokens, reads

    def add_waiting_request(self, state: RequestState) -> None:
        """Takes a request that is new, or that had to leave the batch."""
        assert isinstance(state, State)
        # Without transformers' order of them, which costs every step more the more wait: ours is `Admission`'s.
        self.waiting_requests[state.request_id] = state
        self.cache.owners[state.request_id] = state.job

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Takes those out that are to be cancelled."""
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if cancelled:
            # Set when running requests filled the cache, until one of them ends; transformers forgets this way to end.
            self.block_new_requests = False
        for state in cancelled:
            # Its batch may still run: what comes of it is not looked at.
            state._status = RequestStatus.FINISHED
            self.cache.owners.pop(state.request_id, None)
        return cancelled

    def finish_request(self, request_id: str) -> None:
        """Takes a request out of the batch."""
        super().finish_request(request_id)
        self.cache.owners.pop(request_id, None)

    def _cleanup_waiting_queue(self, request_ids_to_remove_from_waiting: set[str]) -> None:
        """There is no such queue."""


class Scheduler(_Owning):
    """transformers' scheduler, which admits what `Admission` offers."""

    admission: Admission

    def add_waiting_request(self, state: RequestState) -> None:
        """Takes a request that is new, or that had to leave the batch."""
        assert isinstance(state, State)
        if state.job.over:
            self.admission.forget(state.job)
            return
        super().add_waiting_request(state)
        self.admission.wait(state.job)

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Runs at the beginning of every step: what has ended goes."""
        for job in (*self.admission.overdue(), *self.admission.failed()):
            self.set_request_cancellation(job.id)
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            assert isinstance(state, State)
            self.admission.forget(state.job)
        self.admission.let_go(lambda key: key in self.active_requests or key in self.waiting_requests)
        return cancelled

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        """Chooses the requests, and their tokens, of the next batch."""
        scheduled = super().schedule_batch(token_budget, cache_budget)
        self.admission.admitted(self.active_requests)
        return scheduled

    def _get_waiting_candidates(self) -> list[RequestState]:
        places = self.max_requests_per_batch - len(self.active_requests)
        jobs = self.admission.candidates(places, idle=not self.active_requests)
        return [self.waiting_requests[job.id] for job in jobs]


class SharedScheduler(_Owning):
    """The scheduler of one of several processes: it has the jobs that were offered to all, and treats them alike."""

    def reset(self) -> None:
        """Forgets all requests."""
        super().reset()
        self._ended: list[RequestState] = []

    def end(self, jobs: Sequence[str]) -> None:
        """Takes jobs out, each in its turn: transformers would have them in the order of a set, which differs."""
        for job in jobs:
            self.set_request_cancellation(job)
            self._ended += super().clear_cancelled_requests()

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Those that were taken out since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def jobs(self) -> tuple[dict[str, Job], dict[str, Job]]:
        """The jobs in the batch, and those that wait to join it."""
        running, waiting = ({key: state.job for key, state in some.items()} for some in self._requests())
        return running, waiting

    def _requests(self) -> tuple[dict[str, State], dict[str, State]]:
        return self.active_requests, self.waiting_requests

    def _get_waiting_candidates(self) -> list[RequestState]:
        places = max(0, self.max_requests_per_batch - len(self.active_requests))
        # Those that had to leave the batch come first.
        return sorted(self.waiting_requests.values(), key=lambda state: not state.job.begun)[:places]


class Rows:
    """Each row's settings, where transformers has its processors of logits.

    Attributes:
        is_sampled: whether some row of the batch that was prepared last is not greedy.
        is_cut: whether some row of it is drawn from a part of the vocabulary.
        has_logprobs: whether some row of it wants logarithmic probabilities.
        has_likely: whether some row of it wants the most likely tokens, too.
    """

    tensors_required = sampling.ROWS
    do_processing = False

    def __init__(self) -> None:
        self.is_sampled = self.is_cut = self.has_logprobs = self.has_likely = False

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """There are none."""
        assert not kwargs

    def fill_defaults(self, tensor: torch.Tensor) -> None:
        """Rows that nobody reads are greedy."""
        tensor.copy_(sampling.rows_of([sampling.GREEDY]))

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor) -> None:
        """Writes the settings of the rows that get a new token."""
        rows = [future.state for future in requests_in_batch if future.has_new_token]
        # transformers' own requests, to warm up, have no job.
        requests = [state.job.request for state in rows if isinstance(state, State)]
        self.is_sampled = any(request.temperature for request in requests)
        self.is_cut = any(request.temperature and (request.top_k or request.top_p < 1) for request in requests)
        self.has_logprobs = any(request.logprobs for request in requests)
        self.has_likely = any(request.top_logprobs for request in requests)
        if self.is_sampled:
            # The position was advanced already: the new token's place after the prompt.
            settings = [state.job.settings(state.position_offset - state.prompt_length) for state in rows]
            arg_storage[: sampling.ROWS, : len(rows)] = sampling.rows_of(settings)
            arg_storage[0, len(rows) :] = 0  # rows that pad are greedy, whatever was there


class _LikelyOf:
    """The most likely tokens of a batch: on the device, and on the host, where requests find theirs."""

    def __init__(self, io: Any, rows: int, device: torch.device) -> None:
        """Has itself asked before the batch's tokens are handed out.

        Args:
            io: the host's tensors of the batch.
            rows: the most.
            device: where they come from.
        """
        self._device = torch.zeros(2, sampling.MOST_LIKELY, rows, dtype=torch.int32, device=device)
        self._host = torch.zeros_like(self._device, device="cpu", pin_memory=device.type == "cuda")
        self._count, self._is_new = 0, False
        told = io.prepare_batch_update

        def tell() -> Any:
            futures, *rest = told()  # waits for the batch, and so for `fetch`
            self._hand_out(futures)
            return futures, *rest

        io.prepare_batch_update = tell

    def take(self, found: torch.Tensor) -> None:
        """Takes them from `sampling.most_likely`, and begins to copy them to the host."""
        self._count = found.shape[1]  # fewer in a vocabulary of few; the same in each batch
        self._device[:, : self._count, : found.shape[2]].copy_(found)
        self._host.copy_(self._device, non_blocking=True)
        self._is_new = True

    def _hand_out(self, futures: Sequence[FutureRequestState]) -> None:
        if not self._is_new:
            return
        self._is_new = False
        rows = [future.state for future in futures if future.has_new_token]
        found = self._host[:, : self._count, : len(rows)]
        ids, logprobs = found[0].T.tolist(), found[1].view(torch.float32).T.tolist()
        for place, state in enumerate(rows):
            if isinstance(state, State):
                state.likely = [*map(Likely, ids[place], logprobs[place])]


class Runner(ModelRunner):
    """Runs the base with every token's adapter, and draws every row by its own settings.

    Attributes:
        steps: the forwards that were run.
        segments: how many adapters they had, the base being one, summed.
    """

    def __init__(
        self, *args: Any, model: MultiLoraModel, chooser: Chooser, agree: Callable[[bool], bool], **kwargs: Any
    ) -> None:
        """Has captured nothing yet.

        Args:
            *args: as transformers' runner.
            model: whose adapters.
            chooser: brings them to the device.
            agree: says whether something is so in all processes that share the base.
            **kwargs: as transformers' runner.
        """
        super().__init__(*args, **kwargs)
        self.model, self.chooser, self._agree = model, chooser, agree
        self._positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        self.steps = self.segments = 0
        self._stand_in: Standing | None = None
        self._can_replay = True
        self._serving: Callable[[], AbstractContextManager[None]] = nullcontext
        # The base alone is compiled: transformers would compile it anew for each way of drawing tokens.
        self._bases = [
            torch.compile(_forward, **config.to_dict()) if config is not None else _forward
            for config in (self.cb_config.varlen_compile_config, self.cb_config.decode_compile_config)
        ]
        self._compiled_varlen = self._compiled_decode = None
        self._graphs = Graphs(_MOST_GRAPHS)
        for io in self._ios():
            io.graphs = self._graphs
        self._logits: torch.Tensor | None = None  # of the last forward, if it was no captured one
        self._captured: torch.Tensor | None = None  # those of all captured ones: they run one after the other
        self._table: torch.Tensor | None = None
        self._plain: set[bool] | None = None
        self._warms = False
        self._size_to_warm: int | None = None
        self._likely: dict[int, _LikelyOf] = {}
        self._version: tuple[int, int, int] | None = None

    def maybe_pad_inputs(self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        """The tokens that a batch has and copies from the cache, with padding where it is replayed or compiled."""
        if self._size_to_warm is not None:
            return self._size_to_warm, 0
        # Nor is warming to copy what later is not copied: transformers has a page before the new tokens.
        longest = num_q_tokens + self.cb_config.page_size
        if self._warms and self.cache.in_place and longest <= self.cache.max_decode_fast_path_length:
            max_kv_read = 0
        if not use_decode_fast_path and self.cb_config.varlen_compile_config is None and num_q_tokens > _MOST_REPLAYED:
            return num_q_tokens, max_kv_read
        tokens, reads = super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)
        return tokens, reads if max_kv_read else 0  # transformers pads also no copy

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        """Runs a batch that was prepared, and draws its tokens, which no graph keeps: rows are drawn in many ways."""
        tokens = batch_data["input_ids"].shape[1]
        slots = [slot for future in self._futures() for slot in _slots(future)]
        self.steps += 1
        self.segments += len(set(slots))
        slots += [None] * (tokens - len(slots))  # padding
        kept = self._kept(batch_data["logits_indices"].shape[0]) if self.supports_logits_to_keep(model) else None
        is_short = self._io("device_io").use_block_table or tokens <= _MOST_REPLAYED
        with self._stream():
            if self._warms and self._positions is not None:
                batch_data["position_ids"].clamp_(max=self._positions - 1)  # transformers looks at no base's positions
            self._table = self._read_in_place(batch_data, is_short)
            self.model.pool.wait(self.chooser.fresh())
            standing = self._stand_in or self.model.standing(slots, **self._most())
            if standing is not None:
                standing.set(slots, kept)
        # What is made for one batch cannot be replayed, and the first forward only sees who are siblings.
        made_once = standing is not None and all(routing.served for routing in standing.routings)
        self._can_replay = (made_once or (standing is None and not any(slots))) and is_short and self._plain is None
        self._choose_graphs(standing)
        # Entered by each forward, not by a replay, which knows all that it needs.
        self._serving = (
            partial(self.model.serving, slots, kept) if standing is None else partial(self.model.standing_by, standing)
        )
        super().compute_batch(model, batch_data)
        with self._stream():
            self._draw(batch_data)

    def _draw(self, batch_data: dict[str, Any]) -> None:
        """A token for each row, by the logits of the forward before."""
        logits, self._logits = self._logits, None
        if logits is None:
            assert self._captured is not None
            logits = self._captured[: len(batch_data["logits_indices"])]
        *_, output_ids = self.inputs_and_outputs.get_cb_kwargs()
        rows, settings = self.logit_processor, batch_data["logits_processor_args"]
        for cuts in (False, True) if self._warms else ():  # so that the kernels are compiled
            sampling.sample(logits, settings, cuts=cuts)
        tokens = sampling.sample(logits, settings, cuts=rows.is_cut) if rows.is_sampled else sampling.greedy(logits)
        output_ids[0, : len(tokens)].copy_(tokens)
        if rows.has_logprobs:
            # Bits of fp32, as transformers keeps them.
            output_ids[1, : len(tokens)].copy_(sampling.logprobs_of(logits, tokens).view(torch.int32))
        if rows.has_likely:
            self._likely_of_batch().take(sampling.most_likely(logits))

    def _read_in_place(self, batch_data: dict[str, Any], is_short: bool) -> torch.Tensor | None:
        """Has a batch with prompts read the cache where it is.

        Args:
            batch_data: of the batch.
            is_short: whether there may be a graph of its size. One is enough, if also prompts that have nothing in the
                cache, and could do without, are read there.

        Returns:
            The rows' blocks, on the device; None for other batches, and where transformers copies what the rows have.
        """
        io, futures = self._io("device_io"), self._futures()
        if not self.cache.in_place or io.use_block_table or io.max_kv_read:
            return None
        if not any(future.state.position_offset > future.query_length for future in futures):
            has_room = max(future.query_length for future in futures) <= self.cache.max_decode_fast_path_length
            if not (has_room and is_short and self.use_cuda_graph_varlen):
                return None
        # Nobody asks for it, and one graph is enough for each size of a batch, whatever its rows have in the cache.
        batch_data["max_length_k"] = io.max_length_k = dict.fromkeys(io.max_length_k, 1)
        table: torch.Tensor = io.block_table[:, : batch_data["cu_seq_lens_q"].shape[0] - 1]
        found = self.cache.table_of(futures, *table.shape[1:])
        table.copy_(found.pin_memory() if table.is_cuda else found, non_blocking=True)
        return table

    def _likely_of_batch(self) -> _LikelyOf:
        """Where the batch's most likely tokens go; each pair of tensors has its own, as one waits beside the other."""
        io = self._io("host_io")
        if id(io) not in self._likely:
            self._likely[id(io)] = _LikelyOf(io, self.cb_config.max_requests_per_batch, self.model.device)
        return self._likely[id(io)]

    def _get_forward_fn(self, use_block_table: bool) -> tuple[Callable[..., None], bool]:
        _, has_graphs = super()._get_forward_fn(use_block_table)
        replays = has_graphs and self._can_replay
        return self._run_to_be_captured if replays else self._run, replays

    @torch.no_grad()
    def warm_up(self, model: nn.Module) -> None:
        """Captures graphs for the adapters that the model serves now, beside those without any."""
        self._warms = True
        try:
            self._warm_up(model)
        finally:
            self._warms = False
            self.steps = self.segments = 0

    def _warm_up(self, model: nn.Module) -> None:
        if self.cache.in_place:
            config = self.model.model.config.get_text_config()
            works = self._is_plain(model) and operator_works(self.cache, _group_of(config), config._attn_implementation)
            self.cache.in_place = self._agree(works)
        has_graphs = self.use_cuda_graph_varlen or self.use_cuda_graph_decode
        standings = self.model.standings(**self._most()) if has_graphs else []
        for standing in standings:
            with self._warming(standing):
                self.run_one_warmup(model, num_q_tokens=1, max_kv_read=None)  # shows who are siblings
        for other in (None, *standings):
            with self._warming(other):
                self.warmup(model)
        # Prompts come in more sizes, and mostly in batches of several adapters.
        for other in (None, *standings[-1:]):
            with self._warming(other):
                self._warm_up_in_place(model)

    def _is_plain(self, model: nn.Module) -> bool:
        """Whether all layers' attention is what the operators compute: none knows before it is called."""
        self._plain = set()
        try:
            self.run_one_warmup(model, num_q_tokens=2, max_kv_read=0)
            return self._plain == {True}
        finally:
            self._plain = None
            self.cache.reset()

    def _warm_up_in_place(self, model: nn.Module) -> None:
        """Batches with prompts beside rows that have something in the cache: each size, for each pair of tensors."""
        if not (self.pad_inputs and self.cache.in_place):
            return
        io, interval = self.inputs_and_outputs, self.cb_config.q_padding_interval_size
        longest = _MOST_REPLAYED if self.use_cuda_graph_varlen else interval  # what is compiled is so for any size
        sizes = {min(size, self.cache.max_batch_tokens) for size in range(interval, longest + 1, interval)}
        try:
            for _ in self._ios():
                for size in sorted(sizes, reverse=True):  # smaller ones share what the largest takes
                    self._size_to_warm = size
                    self.run_one_warmup(model, num_q_tokens=2, max_kv_read=self.cb_config.page_size)
                if isinstance(io, ContinuousBatchingAsyncIOs):
                    io.swap_io_pairs()
        finally:
            self._size_to_warm = None
            self.cache.reset()

    @contextmanager
    def _warming(self, standing: Standing | None) -> Iterator[None]:
        """Batches inside are served by this one, as if their tokens had adapters."""
        self._stand_in = standing
        try:
            yield
        finally:
            self._stand_in = None

    def _capture_graph(self, *args: Any) -> None:
        self._settle()
        with _no_collection():
            super()._capture_graph(*args)

    def _most(self) -> dict[str, int]:
        return {"tokens": self.cache.max_batch_tokens, "segments": self.cb_config.max_requests_per_batch}

    def _choose_graphs(self, standing: Standing | None) -> None:
        """Says which graphs are for batches like this one; each pair of tensors has its own."""
        pair = getattr(self.inputs_and_outputs, "current_pair", 0)
        version = None if standing is None else self.model.standing_version
        if version is not None and version != self._version:
            self._graphs.forget(lambda group: group.mode is not None)
            self._version = version
        self._graphs.group = Group(None if standing is None else standing.mode, pair, self._table is not None)

    def _stream(self) -> AbstractContextManager[Any]:
        stream = self.inputs_and_outputs.compute_stream
        context: AbstractContextManager[Any] = stream_context(stream) if stream is not None else nullcontext()
        return context

    def _kept(self, rows: int) -> list[int]:
        """The places of the tokens whose logits are computed; rows that get no new token look at the first."""
        kept, end = [], 0
        for future in self._futures():
            end += future.query_length
            if future.has_new_token:
                kept.append(end - 1)
        return kept + [0] * (rows - len(kept))

    def _futures(self) -> list[FutureRequestState]:
        found: list[FutureRequestState] = self._io("host_io").requests_in_batch
        return found

    def _io(self, side: Literal["host_io", "device_io"]) -> Any:
        """The tensors of the batch that was prepared; asynchronous batches take turns with two pairs of them."""
        io = self.inputs_and_outputs
        return getattr(io.io_pairs[io.current_pair], side) if isinstance(io, ContinuousBatchingAsyncIOs) else io

    def _ios(self) -> list[Any]:
        """All tensors of batches on the device."""
        io = self.inputs_and_outputs
        return [pair.device_io for pair in io.io_pairs] if isinstance(io, ContinuousBatchingAsyncIOs) else [io]

    def _run(self, *args: Any) -> None:
        self._settle()
        self._logits = self._logits_of(*args).float()

    def _settle(self) -> None:
        """Waits for replays, before a forward that is none, where processes share the base.

        With NCCL_GRAPH_MIXING_SUPPORT=0, as transformers sets it, NCCL may not have both under way.
        """
        stream = self.inputs_and_outputs.compute_stream
        if stream is not None and self.model.processes > 1 and len(self._graphs):
            stream.synchronize()

    def _run_to_be_captured(self, *args: Any) -> None:
        logits = self._logits_of(*args)
        if self._captured is None:
            shape = self.cb_config.max_requests_per_batch, logits.shape[1]
            self._captured = torch.empty(shape, dtype=torch.float32, device=logits.device)
        self._captured[: len(logits)].copy_(logits)

    def _logits_of(
        self,
        model: nn.Module,
        batch_data: dict[str, Any],
        carry_over_ids: torch.Tensor,
        prev_output_ids: torch.Tensor,
        output_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The logits of each row's last token, (rows, vocabulary)."""
        self.inputs_and_outputs.carry_over_tokens(batch_data["input_ids"], carry_over_ids, prev_output_ids)
        decodes = batch_data["block_table"] is not None
        cached = cached_rows(batch_data, self._table) if self._plain is None else self._plain
        inputs = batch_data if cached is None else {**batch_data, "cached_rows": cached}
        with self._serving():
            logits = (self._bases[decodes] if self._plain is None else _forward)(model, inputs)
        return logits[0] if "logits_to_keep" in batch_data else logits[0, batch_data["logits_indices"]]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector rests: graphs of an engine that was closed must not be freed while one is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        # Asked for by whatever is compiled meanwhile.
        with torch._dynamo.config.patch(run_gc_after_compile=False):
            yield
    finally:
        if was_enabled:
            gc.enable()


def _group_of(config: Any) -> int:
    """How many heads of queries share one of keys and values, in the base of this config."""
    heads: int = config.num_attention_heads
    return heads // find_num_key_value_heads(config)


def _forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs).logits
    return logits


def _slots(future: FutureRequestState) -> Iterator[Any]:
    """The slot of each of a request's tokens in a batch that was prepared."""
    state, end = future.state, future.state.position_offset
    if not isinstance(state, State):  # transformers' own, to warm up
        return iter([None] * future.query_length)
    return (state.job.slot_at(position) for position in range(end - future.query_length, end))


class Router(OutputRouter):
    """Outputs: tokens have gone to their jobs already, so only errors are left to be told."""

    def deliver(self, output: object) -> None:
        """Does nothing."""

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Does nothing."""

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        """Tells a job of an error."""
        assert isinstance(state, State)
        state.status = RequestStatus.FAILED
        state.job.fail(error)


class Processor(ContinuousBatchProcessor):
    """transformers' batch processor, with our runner."""

    model_runner: Runner

    def serve(self, model: MultiLoraModel, chooser: Chooser) -> None:
        """Puts our parts in."""
        runner = Runner(
            logit_processor=self.logit_processor,
            cb_config=self.cb_config,
            cache=self.cache,
            inputs_and_outputs=self.inputs_and_outputs,
            do_sample=False,
            return_logprobs=True,
            model=model,
            chooser=chooser,
            agree=self._agree,
        )
        self.model_runner = runner

    def _agree(self, is_so: bool) -> bool:
        found = self.distributed_helper.tp_all_reduce_min(torch.tensor(int(is_so)), on_cpu=True)
        return bool(found.item())


class SharedProcessor(Processor):
    """The batch processor of one of several processes, which are told by the first what happens before every step.

    Attributes:
        has_told: whether it, or another, has failed, and all of them know.
    """

    scheduler: SharedScheduler
    chooser: Leader | Follower
    has_told = False

    def serve(self, model: MultiLoraModel, chooser: Chooser) -> None:
        """Puts our parts in."""
        assert isinstance(chooser, Leader | Follower)
        super().serve(model, chooser)
        self.chooser = chooser

    def _update_tp_group_state(self) -> bool:
        """Tells, or is told, and does it; gives whether some process wants all of them to stop."""
        chooser, helper, status = self.chooser, self.distributed_helper, self.background_thread_status
        orders = self._orders(chooser) if isinstance(chooser, Leader) else Orders()
        size, stop, _ = helper.tp_all_reduce_state(payload_size=orders.size, stop_status=status.local_status)
        status.update_with_tp_status(stop)
        if stop == BackgroundThreadStatus.HARD_STOP:
            return True
        if not size:
            return False
        orders, failed = helper.tp_broadcast_object_from_rank_0(orders), None
        try:
            self._carry_out(orders)
        # An adapter may be missing in one process alone.
        except Exception as error:  # noqa: BLE001 - raised below, when all know of it
            failed = error
        # No process may begin a forward that another does not: it would wait for it without end.
        anywhere, stop, _ = helper.tp_all_reduce_state(
            payload_size=int(failed is not None), stop_status=status.local_status
        )
        status.update_with_tp_status(stop)
        if anywhere:
            self.has_told = True
            raise failed or _other_failed()
        hard: bool = stop == BackgroundThreadStatus.HARD_STOP
        return hard

    def _carry_out(self, orders: Orders) -> None:
        if isinstance(self.chooser, Follower):
            self.scheduler.end(orders.ended)
        for job in self.chooser.carry_out(orders):
            self.scheduler.add_waiting_request(State.of(job))

    def _orders(self, leader: Leader) -> Orders:
        assert self.input_queue is not None and self.cancel_queue is not None
        new = [state.job for state in drain_queue(self.input_queue)]
        running, joining = self.scheduler.jobs()
        ended = leader.ended(new, drain_queue(self.cancel_queue), [*running.values(), *joining.values()])
        self.scheduler.end(ended)
        return leader.orders(ended, *self.scheduler.jobs(), self.scheduler.max_requests_per_batch)


def _other_failed() -> EngineError:
    return EngineError("another of the processes that share the base has failed; its log says why.")


class _Awake(threading.Event):
    """Always set: who waits for the first process need not sleep beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.set()

    def clear(self) -> None:
        """Does nothing."""


def blocks_in(nbytes: int, model: PreTrainedModel, page_size: int, max_batch_tokens: int) -> int:
    """How many blocks of the paged cache so many bytes hold, with what attention needs beside them; at least one."""
    config = model.config.get_text_config()
    heads = find_num_key_value_heads(config) // _shared_by(model)
    page = FullAttentionCacheAllocator.get_bytes_per_page(heads, find_head_dim(config), model.dtype, page_size)
    # Without FlashAttention there is a mask of (batch tokens, cache tokens).
    mask = 0 if is_flash_attention_requested(config) else max_batch_tokens * page_size * model.dtype.itemsize
    return max(1, nbytes // (page * config.num_hidden_layers + mask))


def _shared_by(model: PreTrainedModel) -> int:
    """How many processes share the heads of keys and values, as `DistributedHelper.are_kv_heads_tp_ed` has it."""
    plan = getattr(model, "tp_plan", None) or {}
    heads = (f"layers.*.self_attn.{name}" for name in ("k_proj", "v_proj"))
    shared = all(head in plan or f"model.{head}" in plan for head in heads)
    size: int = getattr(model, "_tp_size", None) or 1
    return size if shared else 1


class Batching(ContinuousBatchingManager):
    """The loop of one engine, in a thread of its own. It is started once.

    Attributes:
        capacity: the tokens that one request may have, prompt and all, if it is alone.
    """

    capacity: int

    def __init__(
        self,
        model: MultiLoraModel,
        chooser: Chooser,
        config: ContinuousBatchingConfig,
        crashed: Callable[[BaseException], None],
    ) -> None:
        """Takes the base over; `stop` gives it back.

        Args:
            model: lent to the engine.
            chooser: offers jobs.
            config: of transformers' continuous batching.
            crashed: called in the loop's thread with what ended it.
        """
        base = model.model
        assert isinstance(base, PreTrainedModel)
        # What a request ends by, and how it is drawn, its job knows.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        super().__init__(base, generation, config)
        self.logit_processor = Rows()
        self.output_router = Router()
        self._served = model
        self._chooser = chooser
        self._halted = False
        if isinstance(chooser, Follower):
            self._wake_up_loop = _Awake()
        self._crashed: Callable[[BaseException], None] | None = crashed

    def start(self) -> None:
        """Starts the loop."""
        self.background_thread_status.clear()
        # Should a forward never return, the process can still end.
        self._generation_thread = threading.Thread(target=self._run_generation_loop, name="lorakit-engine", daemon=True)
        self._generation_thread.start()

    def submit(self, job: Job) -> None:
        """Adds a job. Callable from any thread."""
        self.input_queue.put(State.of(job))
        self.wake()

    def withdraw(self, job: Job) -> None:
        """Takes out a job that has ended for its caller. Callable from any thread."""
        self.cancel_request(job.id)

    def wake(self) -> None:
        """Has the loop look for work now. Callable from any thread."""
        self._wake_up_loop.set()

    def halt(self, timeout: float) -> bool:
        """Ends the loop after the step under way.

        Args:
            timeout: seconds to wait for it.

        Returns:
            Whether it has ended; it has not, if the loop's own thread asks.
        """
        self._halted = True
        self.background_thread_status.request_stop(
            BackgroundThreadStatus.HARD_STOP, self.distributed_helper.global_rank
        )
        self.wake()
        thread = self._generation_thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        return not self.is_running()

    def wait(self, seconds: float) -> bool:
        """Waits so long for the loop's end; gives whether it has ended."""
        thread = self._generation_thread
        if thread is not None:
            thread.join(seconds)
        return not self.is_running()

    def prepare(self) -> None:
        """Makes the cache, and captures graphs where there are any."""
        self.batch_processor = processor = self._create_batch_processor()
        processor.model_runner.warm_up(self.model)
        self.warmed_up = True
        # While it is empty: later this would be what is left.
        self.capacity = infer_max_single_request_tokens(processor.cache)

    @property
    def steps(self) -> int:
        """The forwards that were run."""
        return 0 if self.batch_processor is None else self.batch_processor.model_runner.steps

    @property
    def segments(self) -> int:
        """How many adapters these had, the base being one, summed."""
        return 0 if self.batch_processor is None else self.batch_processor.model_runner.segments

    @property
    def free_share(self) -> float:
        """The share of the cache that is free, or kept only because its prefix may be asked for again."""
        processor = self.batch_processor
        if processor is None:  # it was stopped just now
            return 1.0
        cache = processor.cache
        kept = sum(len(ca.ledger.cached_blocks) * ca.bytes_per_block for ca in cache.cache_allocators.values())
        free: float = cache.compute_free_capacity(relative=False) + kept
        return free / (cache.num_sectors * cache.bytes_per_sector)

    def _create_batch_processor(self) -> Processor:
        if isinstance(self.batch_processor, Processor):
            return self.batch_processor
        config, base = self.continuous_batching_config, self.model.config.get_text_config()
        cache = Cache(
            config=base,
            continuous_batching_config=config,
            device=self.model.device,
            distributed_helper=self.distributed_helper,
            dtype=self.model.dtype,
            model_supports_logits_to_keep=self.model._supports_logits_to_keep(),
        )
        cache.owners = {}
        positions = getattr(base, "max_position_embeddings", None)
        if cache.max_decode_fast_path_length and positions is not None:
            is_wide = takes_wide_tables(cache, _group_of(base), base._attn_implementation)
            cache.make_room(positions, _MOST_BLOCKS if is_wide else cache.max_blocks_per_request)
        cache.in_place = may_read_in_place(base, cache)
        self._use_prefix_sharing = cache.use_prefix_sharing
        update_cb_config_after_cache_creation(
            cb_config=config, num_blocks=cache.num_blocks, max_batch_tokens=cache.max_batch_tokens
        )
        if not cache.max_decode_fast_path_length:
            config.max_blocks_per_request = 0
        scheduler: Scheduler | SharedScheduler
        if isinstance(self._chooser, Admission):
            scheduler = Scheduler(cache, config.safety_margin, config.max_requests_per_batch)
            scheduler.admission = self._chooser
        else:
            scheduler = SharedScheduler(cache, config.safety_margin, config.max_requests_per_batch)
        processor = (Processor if isinstance(self._chooser, Admission) else SharedProcessor)(
            cache=cache,
            config=base,
            generation_config=self.generation_config,
            continuous_batching_config=config,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue if self.is_tp_driver else None,
            cancel_queue=self.cancel_queue if self.is_tp_driver else None,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=self.model.device,
            model_dtype=self.model.dtype,
            scheduler=scheduler,
            distributed_helper=self.distributed_helper,
        )
        processor.serve(self._served, self._chooser)
        return processor

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        # SystemExit, asyncio's CancelledError, or an error of the handling of one: callers wait for a word of it.
        except BaseException as error:  # noqa: BLE001
            self._tell(error)
        if isinstance(self._chooser, Leader) and not self._halted:
            self._tell(_other_failed())

    def _tell(self, error: BaseException) -> None:
        crashed, self._crashed = self._crashed, None
        if crashed is not None:
            crashed(error)

    def _handle_critical_error(self, error: Exception, batch_processor: ContinuousBatchProcessor | None) -> None:
        self._tell(error)
        if isinstance(batch_processor, SharedProcessor) and batch_processor.has_told:
            # All but the telling, for which nobody waits any more.
            self._fail_all_remaining_requests(error, batch_processor)
            self.background_thread_status.record_fatal_error(error)
            return
        super()._handle_critical_error(error, batch_processor)
