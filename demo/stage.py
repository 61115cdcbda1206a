"""What the page stands on: one engine that is shared by all visitors, and the tenants that answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from lorakit.adapters.bank import AdapterBank
from lorakit.chat import encode
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.engine.handle import RequestHandle
from lorakit.errors import AdapterNotFoundError, PoolFullError
from lorakit.runtime.model import MultiLoraModel
from lorakit.server.tokenizer import read_tokenizer

BASE = "base"
"""How visitors know the base without an adapter."""

MOST_TENANTS = 64
"""Tenants of a stage: whoever opens the page can add some, and they stay until it ends."""

_CACHE = 256 << 20


class Stage:
    """An engine and its tenants. Callable from any thread.

    Attributes:
        base: the base, a folder or a Hub id.
        engine: serves it.
        tokenizer: the base's.
        prompts: what visitors may begin with.
    """

    def __init__(
        self, base: str, model: MultiLoraModel, tokenizer: PreTrainedTokenizerBase, *, prompts: Sequence[str] = ()
    ) -> None:
        """Serves nothing yet; a `with` block does.

        Args:
            base: where the base comes from; what is trained here is trained on it.
            model: the base and its tenants.
            tokenizer: the base's.
            prompts: what visitors may begin with.
        """
        self.base, self.tokenizer, self.prompts = base, tokenizer, list(prompts)
        memory = None if model.device.type == "cuda" else _CACHE
        config = EngineConfig(cache_memory=memory)
        self.engine = Engine(model, config, decode=partial(tokenizer.decode, skip_special_tokens=True))

    @classmethod
    def open(cls, base: str, bank: AdapterBank | str | Path, *, prompts: Sequence[str] = ()) -> Self:
        """Loads the base, and opens the bank.

        Raises:
            BaseModelNotFoundError: there is no such base, or it has no tokenizer.
            BankError: the folder holds no bank.
            BaseModelMismatchError: the bank was made for another base.
        """
        tokenizer = read_tokenizer(base)
        cuda = torch.cuda.is_available()
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cuda"} if cuda else {"dtype": torch.float32}
        return cls(base, MultiLoraModel.from_pretrained(base, bank, **options), tokenizer, prompts=prompts)

    def __enter__(self) -> Self:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    @property
    def model(self) -> MultiLoraModel:
        """The base and its tenants."""
        return self.engine.model

    @property
    def tenants(self) -> list[str]:
        """Who can answer, the base first."""
        return [BASE, *self.model.adapters]

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        """Token ids → text."""
        return lambda ids: str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def ask(self, prompt: str, tenants: Sequence[str], max_new_tokens: int) -> dict[str, RequestHandle]:
        """Asks several tenants at once: their requests share forwards.

        Raises:
            AdapterNotFoundError: one of them is not there any more; nobody is asked.
            RequestError: the prompt is too long.
            EngineBusyError: too much waits.
        """
        for name in tenants:
            if name != BASE and not self.model.has_adapter(name):
                raise AdapterNotFoundError(f"tenant {name!r} is not here any more; choose others.")
        ids = encode(self.tokenizer, [prompt])["input_ids"][0].tolist()
        handles: dict[str, RequestHandle] = {}
        try:
            for name in tenants:
                adapter = None if name == BASE else name
                handles[name] = self.engine.submit(ids, adapter, max_new_tokens=max_new_tokens, tenant=name)
        except BaseException:
            for handle in handles.values():
                handle.cancel()
            raise
        return handles

    def add(self, name: str, folder: Path) -> None:
        """Adds a tenant from a PEFT checkpoint; it can be asked at once.

        Raises:
            PoolFullError: the stage is full.
            AdapterExistsError: the name is taken.
            CheckpointError, UnsupportedMethodError, …: the checkpoint cannot be served on this base.
        """
        if len(self.model.adapters) >= MOST_TENANTS:
            raise PoolFullError(f"{MOST_TENANTS} tenants are here already; end the demo and begin anew.")
        self.model.load_adapter(name, str(folder))
