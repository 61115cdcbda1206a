"""The engine: requests for any mix of adapters, batched continuously on one model.

    with lorakit.Engine(model) as engine:
        handle = engine.submit(prompt_ids, adapter_id="sql", max_new_tokens=64)
        for token in handle: ...

A loop in a thread of its own runs transformers' continuous batching (`batching.py`); requests join between two steps,
their adapters are loaded while others run, and every tenant gets its turn. The weight side and the request side meet
here. Knows token ids; no text and no HTTP.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from lorakit.engine.admission import Admission
from lorakit.engine.batching import Batching, Chooser, blocks_in
from lorakit.engine.checks import shown
from lorakit.engine.config import EngineConfig
from lorakit.engine.handle import Completion, RequestHandle
from lorakit.engine.intake import Intake
from lorakit.engine.job import Job
from lorakit.engine.orders import Follower, Leader
from lorakit.engine.rate import Rate
from lorakit.engine.request import Request
from lorakit.engine.residency import Residency
from lorakit.engine.stats import EngineState, EngineStats, Ledger, Load, Loads, Tier
from lorakit.engine.stopping import Decode
from lorakit.engine.tenants import TenantPolicy, Tenants
from lorakit.engine.turned import turned
from lorakit.errors import (
    AdapterIdsError,
    ConfigError,
    EngineBusyError,
    EngineCrashedError,
    EngineError,
    EngineStoppedError,
    RequestError,
)
from lorakit.runtime.model import MultiLoraModel

_T = TypeVar("_T")

_CPU_CACHE = 1 << 30
_log = logging.getLogger(__name__)


class Engine:
    """Serves requests on one model until it is closed. All methods may be called from any thread.

    Attributes:
        model: the model; its `forward` and `generate` are refused while the engine has it, `load_adapter` and
            `unload_adapter` are not.
        config: the settings.
    """

    def __init__(
        self,
        model: MultiLoraModel,
        config: EngineConfig | None = None,
        *,
        decode: Decode | None = None,
        on_end: Callable[[RequestHandle], None] | None = None,
    ) -> None:
        """Takes nothing yet; `start`, or a `with` block, does.

        Args:
            model: the model to serve, in evaluation mode.
            config: the settings.
            decode: token ids → their text (a tokenizer's `decode`); needed for stop strings alone.
            on_end: called once with every request that has ended, however it did; while it runs the engine waits.
        """
        self.model = model
        self.config = config or EngineConfig()
        self._decode = decode
        self._lock = threading.RLock()
        self._state: EngineState = "new"
        self._on_end = on_end
        self._requests = Ledger()
        self._ids = itertools.count()
        self._restarts = 0
        self._cause: BaseException | None = None
        self._resources = ExitStack()
        self._batching: Batching | None = None
        self._policies = dict(self.config.tenants)
        self._tenants = Tenants(self._policies, self.config.default_tenant)
        self._residency: Residency | None = None
        self._chooser: Chooser | None = None
        self._restarting: threading.Thread | None = None
        self._done = Rate()
        self._intake = Intake(model.config, model.generation_config, model, lambda: self.capacity, decode)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.leads and self._batching is not None:
            self._batching.halt(self.config.stop_timeout)  # nor can the others go on
        self.close()

    @property
    def state(self) -> EngineState:
        """Whether it serves: "ready"; "restarting" after a crash; "dead" when it will not again."""
        return self._state

    @property
    def leads(self) -> bool:
        """Whether requests are submitted here: always, but in all processes but the first that share a base."""
        return self.model.is_first

    @property
    def capacity(self) -> int:
        """The most tokens that one sequence may have, its prompt included."""
        return self._running().capacity

    @property
    def batch(self) -> int:
        """The most sequences that run at once."""
        return min(self.config.max_requests or (256 if self.model.device.type == "cuda" else 32), self._batch_tokens)

    @property
    def _batch_tokens(self) -> int:
        return self.config.max_batch_tokens or (8192 if self.model.device.type == "cuda" else 512)

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the key-value cache."""
        return self.config.page_size or (256 if self.model.device.type == "cuda" else 32)

    def start(self) -> Self:
        """Takes the model and begins to serve.

        Raises:
            EngineStoppedError: it was started before; make a new one.
            ModelInUseError: another engine serves the model.
            MemoryError: the device has no room for the cache.
        """
        with self._lock:
            if self._state != "new":
                raise EngineStoppedError(f"the engine is {self._state}; an engine is started once, make a new one.")
            with ExitStack() as taken:
                taken.enter_context(self.model.lent())
                taken.enter_context(turned(self.model.model))
                self._start()
                self._resources = taken.pop_all()
            self._state = "ready"
        return self

    def close(self) -> None:
        """Ends the loop after the step under way, and gives the model back; requests still open fail.

        A step that takes longer than `stop_timeout` is not waited for: the model is given back when it has ended. To
        let the requests end first, wait for their handles, or `drain`.

        Where several processes share the base, the first closes the engine in all of them; the others wait for that.

        Raises:
            EngineCrashedError: in one of the others, whose loop has failed.
        """
        crash = None if self.leads else self._wait_for_first()
        self._close()
        if crash is not None:
            raise EngineCrashedError(f"the engine's loop failed in this process: {crash}") from crash

    def _wait_for_first(self) -> BaseException | None:
        """Waits until the first process closes the engine, or this one's loop fails: by what."""
        while self._state == "ready" and self._batching is not None and not self._batching.wait(0.5):
            pass
        return self._cause if self._state == "dead" else None

    def _close(self) -> None:
        with self._lock:
            if self._state in ("new", "closed"):
                self._state = "closed"
                return
            self._state = "closed"
            restarting = self._restarting
        if restarting is not None:
            restarting.join(self.config.stop_timeout)
        self._fail_open(EngineStoppedError("the engine was closed before the request was done; start another one."))
        if self._batching is None or self._batching.halt(self.config.stop_timeout):
            self._give_back()
            return
        # The step under way reads the base and its adapters.
        _log.warning("the step under way has not ended; the model is given back when it has")
        threading.Thread(target=self._give_back, name="lorakit-close", daemon=True).start()

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until no request is open.

        Args:
            timeout: seconds, or None for as long as it takes.

        Returns:
            Whether none is.
        """
        return self._requests.drain(timeout)

    def submit(
        self,
        prompt: Sequence[int],
        adapter_id: str | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        stop_token_ids: int | Iterable[int] | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        top_logprobs: int = 0,
        n: int = 1,
        deadline: float | None = None,
        tenant: str | None = None,
        cache_salt: str = "",
    ) -> RequestHandle:
        """Queues a request, and returns at once.

        Args:
            prompt: its token ids, or a tensor of one row of them.
            adapter_id: an adapter's name, or None for the base.
            max_new_tokens: the most tokens that are generated. None: 256, or fewer where no more fit.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among the k most likely tokens, and those that are as likely as the last of them; 0: all.
            top_p: sample among the fewest most likely tokens whose probabilities sum to so much.
            seed: makes sampling repeatable, whatever else is in the batch. None: a random one.
            stop: texts that end it, see `Engine`'s `decode`; the text generated then holds one.
            stop_token_ids: tokens that end it beside the base's end-of-sequence tokens.
            ignore_eos: do not end at the latter.
            logprobs: give each token's logarithmic probability.
            top_logprobs: give so many of the most likely tokens of each place, too; up to 20.
            n: sequences to draw.
            deadline: seconds from now after which it fails.
            tenant: whose turn it takes; None: the adapter's name, "" for the base.
            cache_salt: with one, only requests of the same salt share the cache's blocks with it, so that nobody else
                can tell by the time that an answer takes whether a prompt was asked before.

        Returns:
            What its tokens are read from.

        Raises:
            RequestError: a parameter cannot be, or the request cannot fit the cache.
            AdapterNotFoundError: the model does not serve this adapter.
            EngineBusyError: too much waits; with the seconds after which to try again.
            EngineError: this is another process than the first of those that share the base.
            EngineStoppedError, EngineCrashedError: the engine does not run.
        """
        request = self._request(
            prompt,
            adapter_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            n=n,
            deadline=deadline,
            tenant=tenant,
            cache_salt=cache_salt,
        )
        return self._queue(request)

    def take(self, request: Request) -> RequestHandle:
        """Queues a request that was checked elsewhere, for the same base, and may have begun there: see `streamed`.

        Returns:
            What its new tokens are read from.

        Raises:
            AdapterNotFoundError, EngineBusyError, EngineError: as `submit` raises them.
        """
        if not self.leads:
            raise EngineError("requests are submitted in the first of the processes alone; ask engine.leads before.")
        if request.adapter is not None:
            self.model.adapter(request.adapter)
        return self._queue(request)

    def generate(
        self,
        prompts: Iterable[Sequence[int]],
        adapter_ids: str | Sequence[str | None] | None = None,
        *,
        progress: bool = True,
        **settings: Any,
    ) -> list[Completion]:
        """Serves many prompts, and waits for all. Every one is checked before the first is queued.

        Args:
            prompts: token ids of each.
            adapter_ids: a name or None for each, or one for all.
            progress: show a bar.
            **settings: as `submit` takes them.

        Returns:
            The completions in the prompts' order; n of each if n sequences are drawn.

        Raises:
            AdapterIdsError: as many ids as prompts are needed.
            LorakitError: the first request that failed; the others are cancelled.
        """
        prompts = list(prompts)
        if adapter_ids is None or isinstance(adapter_ids, str):
            adapter_ids = [adapter_ids] * len(prompts)
        ids = list(adapter_ids)
        if len(ids) != len(prompts):
            raise AdapterIdsError(f"adapter_ids has {len(ids)} entries for {len(prompts)} prompts; give one a prompt.")
        settings = {**DEFAULTS, **settings}
        requests = [
            self._when_free(partial(self._request, prompt, name, **settings))
            for prompt, name in zip(prompts, ids, strict=True)
        ]
        handles: list[RequestHandle] = []
        try:
            with tqdm(total=len(prompts), disable=not progress, unit="request") as bar:
                for request in requests:
                    handles.append(self._when_free(partial(self._queue, request)))
                found = []
                for handle in handles:
                    found += handle.results()
                    bar.update()
                return found
        finally:
            for handle in handles:
                handle.cancel()

    def set_tenant(self, name: str, policy: TenantPolicy) -> None:
        """Gives a tenant another policy; what waits already keeps its place.

        Raises:
            ConfigError: it is none.
        """
        if not isinstance(name, str) or not isinstance(policy, TenantPolicy):
            raise ConfigError(f"{shown(policy)} for tenant {shown(name)}; give a TenantPolicy for a name.")
        self._policies[name] = policy
        self._tenants.change(name, policy)

    def load(self) -> Load:
        """How full it is now."""
        batching = self._batching
        if batching is None or self._state != "ready":
            return Load(0, 0, 0)
        blocks = batching.capacity // self.block_tokens
        running = sum(handle.running for handle in self._requests.handles)
        return Load(int(batching.free_share * blocks), running, batching.steps)

    def stats(self) -> EngineStats:
        """What it is doing now."""
        batching, residency = self._batching, self._residency
        with self.model.lock:
            pool, host = self.model.pool, self.model.pool.host
            device = Tier(len(pool.keys), pool.nbytes, pool.capacity)
            memory = Tier(len(host.keys), host.nbytes, host.limit)
            loads = Loads(
                reads=host.reads,
                read_seconds=host.read_seconds,
                copies=pool.loads,
                copied_bytes=pool.loaded_bytes,
                copy_seconds=0.0 if residency is None else residency.copy_seconds,
                evictions=pool.evictions,
            )
        return EngineStats(
            state=self._state,
            open=len(self._requests),
            running=self._requests.running(),
            waiting=self._requests.waiting(),
            device=device,
            host=memory,
            loads=loads,
            cache_free=1.0 if batching is None or self._state != "ready" else batching.free_share,
            steps=0 if batching is None else batching.steps,
            segments=0 if batching is None else batching.segments,
            tenants=self._requests.tenants(),
        )

    def _request(self, prompt: Sequence[int], adapter_id: str | None, **settings: Any) -> Request:
        """A request as `submit` takes it, checked against the model and the cache."""
        if not self.leads:
            raise EngineError("requests are submitted in the first of the processes alone; ask engine.leads before.")
        self._running()
        return self._intake.request(prompt, adapter_id, **settings)

    def _queue(self, request: Request) -> RequestHandle:
        self._check_may_ever_wait(request)
        with self._lock:
            batching = self._running()
            over = self._tenants.waiting + request.n > self.config.max_waiting
            if over or not self._tenants.may_wait(request.tenant, request.n):
                whose = "the engine" if over else f"tenant {request.tenant!r}"
                seconds = self._done.seconds_for(request.n)
                raise EngineBusyError(
                    f"{whose} has as many sequences waiting as it may; try again in {seconds:.0f} s.",
                    retry_after=seconds,
                )
            handle = RequestHandle(f"request-{next(self._ids)}", request, self._cancel, self._ended)
            shared = self.model.processes > 1
            jobs = [Job(handle, sequence, self._decode, shared=shared) for sequence in range(request.n)]
            handle.parts += jobs
            self._requests.open(handle)
            self._tenants.count(request.tenant, waiting=request.n)
            for job in jobs:
                batching.submit(job)
        return handle

    def _check_may_ever_wait(self, request: Request) -> None:
        limits = {
            "the engine's max_waiting": self.config.max_waiting,
            f"max_waiting of tenant {request.tenant!r}": self._tenants.policy(request.tenant).max_waiting,
        }
        for what, most in limits.items():
            if most is not None and request.n > most:
                raise RequestError(
                    f"n={request.n} sequences wait at once, and {what} is {most}; draw fewer, or raise it."
                )

    def _when_free(self, call: Callable[[], _T]) -> _T:
        while True:
            try:
                return call()
            except EngineBusyError:
                time.sleep(0.05)

    def _cancel(self, handle: RequestHandle) -> None:
        batching = self._batching
        for job in _jobs(handle):
            job.cancel()
            if batching is not None:
                batching.withdraw(job)

    def _ended(self, handle: RequestHandle) -> None:
        self._requests.close(handle)
        self._done.count(handle.request.n)
        if self._on_end is not None:
            try:
                self._on_end(handle)
            except Exception:  # noqa: BLE001 - the caller's, and no reason for the loop to fail
                _log.exception("on_end failed for %s", handle.id)

    def _running(self) -> Batching:
        if self._state == "dead":
            raise EngineCrashedError(f"the engine is down: {self._cause}. Make a new one.") from self._cause
        if self._state == "restarting":
            raise EngineBusyError(
                "the engine is starting anew after a crash; try again in a few seconds.", retry_after=5.0
            )
        if self._state != "ready" or self._batching is None:
            remedy = "call start(), or use it in a with block" if self._state == "new" else "make a new one"
            raise EngineStoppedError(f"the engine does not run; {remedy}.")
        return self._batching

    def _start(self) -> None:
        """Makes the loop and all that it works with anew, and starts it."""
        base = self.model.model
        assert isinstance(base, PreTrainedModel)
        gc.collect()  # What a loop before this one had is in cycles, and this one takes what memory is free.
        self._tenants = Tenants(self._policies, self.config.default_tenant)
        self._residency = Residency(self.model, readers=self.config.readers, wake=self._wake)
        self._chooser = self._new_chooser(self._residency)
        batching = Batching(self.model, self._chooser, self._settings(base), self._crashed)
        try:
            batching.prepare()
        except BaseException:
            batching.stop()
            self._chooser.close()
            self._residency.close()
            raise
        self._batching = batching
        batching.start()

    def _new_chooser(self, residency: Residency) -> Chooser:
        if not self.model.is_first:
            return Follower(self.model, residency)
        admission = Admission(
            self.model, residency, self._tenants, quantum=self.config.quantum, patience=self.config.patience
        )
        return admission if self.model.processes == 1 else Leader(self.model, residency, admission)

    def _settings(self, base: PreTrainedModel) -> ContinuousBatchingConfig:
        """transformers' settings."""
        config, cuda = self.config, self.model.device.type == "cuda"
        page_size = self.block_tokens
        max_batch_tokens, max_requests = self._batch_tokens, self.batch
        memory = config.cache_memory or (None if cuda else _CPU_CACHE)
        blocks = None if memory is None else blocks_in(memory, base, page_size, max_batch_tokens)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if blocks is not None and positions is not None:
            # More than all requests can fill is of no use.
            blocks = min(blocks, max_requests * -(-positions // page_size))
        return ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=blocks,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_requests,
            allow_block_sharing=config.prefix_cache,
            use_cuda_graph=config.cuda_graphs if cuda else False,
            # transformers looks for a GPU in the machine, and the model may be elsewhere.
            use_async_batching=None if cuda else False,
            auto_switch_to_flash=cuda and base.dtype in (torch.float16, torch.bfloat16),
            default_compile_level=config.compile_level,
            return_logprobs=True,
        )

    def _wake(self) -> None:
        batching = self._batching
        if batching is not None:
            batching.wake()

    def _stop(self) -> None:
        batching, self._batching = self._batching, None
        if batching is not None:
            batching.stop(hard_stop=True)
            batching.destroy()
        _clear_frames(self._cause)
        if self._chooser is not None:
            self._chooser.close()
        if self._residency is not None:
            self._residency.close()

    def _give_back(self) -> None:
        self._stop()
        self._resources.close()

    def _crashed(self, error: BaseException) -> None:
        """The loop has failed, in its own thread: nobody waits for it any longer."""
        with self._lock:
            if self._state == "closed":
                return
            self._cause = error
            # Several processes would have to begin anew at the same time.
            again = self._restarts < self.config.restarts and self.model.processes == 1
            self._state = "restarting" if again else "dead"
            self._restarts += 1
            # Known to `close` as soon as the state is. It waits for this thread's end first.
            if again:
                self._restarting = threading.Thread(target=self._restart, name="lorakit-restart", daemon=True)
                try:
                    self._restarting.start()
                except RuntimeError:  # the process may have no more threads
                    self._restarting, self._state, again = None, "dead", False
        # transformers has logged where.
        _log.error("the engine's loop failed (%s); it %s", error, "starts anew" if again else "stays down")
        crash = EngineCrashedError(f"the engine's loop failed: {type(error).__name__}: {error}")
        crash.__cause__ = error
        self._fail_open(crash)

    def _restart(self) -> None:
        """Starts a new loop in the place of one that failed."""
        try:
            self._stop()
            with self._lock:
                if self._state != "restarting":
                    return
                self._start()
                self._state = "ready"
        except Exception as error:  # noqa: BLE001 - whatever keeps it from starting, it is down
            with self._lock:
                if self._state != "closed":
                    self._state, self._cause = "dead", error

    def _fail_open(self, error: BaseException) -> None:
        for handle in self._requests.handles:
            for job in _jobs(handle):
                job.over = True
            handle.fail(error)


def _clear_frames(error: BaseException | None) -> None:
    """Lets go of what an error's frames hold: cache and graphs of a loop that has ended."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _jobs(handle: RequestHandle) -> list[Job]:
    return [part for part in handle.parts if isinstance(part, Job)]


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Engine.submit).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}
"""What `submit` takes if it is not told."""
