"""A server's engine as many: what replicas make in their own processes, and the cluster in front of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from lorakit.adapters import fingerprint
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import BaseModelNotFoundError, ConfigError
from lorakit.runtime.loading import load_base
from lorakit.runtime.model import MultiLoraModel
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.cluster import Cluster
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.policy import Policy, spare_of
from lorakit.server.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from lorakit.server.app import OnEnd


_MOST_GIVEN = 1 << 16  # sequences that a replica takes; the policy gives it no more than a batch


@dataclass(frozen=True)
class Replicas:
    """How many engines serve, and where.

    Attributes:
        policy: which of them serves which request, and how many there are.
        address: of a Ray cluster; None: RAY_ADDRESS's, or one on this machine alone.
        gpus: of each; None: one where the cluster has any.
    """

    policy: Policy
    address: str | None = None
    gpus: int | None = None


def numbers_of(text: str) -> tuple[int, int]:
    """How many replicas there are at least and at most, of N or LEAST:MOST.

    Raises:
        ConfigError: it is neither.
    """
    least, colon, most = text.partition(":")
    try:
        found = int(least), int(most if colon else least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(f"--replicas is {text!r}; give a number from 1 on, or two such as 1:8.")
    return found


def fleet_of(least: int, most: int) -> list[str]:
    """What a policy's defaults, chosen for 16 GPUs, become for another number of them, as `make_policy` takes it."""
    return [f"least={least}", f"spare={spare_of(most)}"]


def base_options(dtype: str, attention: str | None) -> dict[str, Any]:
    """How a base is loaded here, as transformers takes it."""
    options: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        options["attn_implementation"] = attention
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    return options


def make_engine(base: str, facts: dict[str, Any], dtype: str, attention: str | None, config: EngineConfig) -> Engine:
    """A replica's engine; its adapters come from the cluster.

    Args:
        base: a folder or a Hub id, which every machine can read.
        facts: the bank's fingerprint of it.
        dtype: the base's.
        attention: transformers' implementation; None: its default.
        config: the engine's settings.

    Raises:
        BaseModelNotFoundError: there is no such base here.
        BaseModelMismatchError: it is another here than the bank was made for.
    """
    tokenizer = read_tokenizer(base)
    options = base_options(dtype, attention)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:  # one of several that share the base
        from transformers.distributed import DistributedConfig

        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        options = {**options, "distributed_config": DistributedConfig(tp_size=processes)}
        options.pop("device_map", None)
    model = load_base(base, str(facts.get("architecture")), **options)
    fingerprint.check(BaseModel.of(model), facts, owner="the bank")
    return Engine(MultiLoraModel(model), config, decode=partial(tokenizer.decode, skip_special_tokens=True))


def start_cluster(
    base: str,
    bank: AdapterBank,
    tokenizer: PreTrainedTokenizerBase,
    replicas: Replicas,
    *,
    dtype: str,
    attention: str | None,
    config: EngineConfig,
    on_end: OnEnd,
) -> Cluster:
    """Starts engines on Ray, and gives the cluster in front of them.

    Raises:
        MissingDependencyError: Ray is not installed.
        BaseModelNotFoundError: there is no such base.
        EngineError: no replica could begin.
    """
    from lorakit.scheduler.ray_cluster import RayLinks, RaySettings

    catalog = Catalog(bank, base)
    make = partial(make_engine, base, dict(bank.fingerprint), dtype, attention, _of_replica(config))
    settings = RaySettings(gpus=replicas.gpus)
    cluster = Cluster(
        RayLinks(make, catalog.folders, settings),
        catalog,
        _config_of(base),
        replicas.policy,
        ClusterConfig(
            max_waiting=config.max_waiting, tenants=dict(config.tenants), default_tenant=config.default_tenant
        ),
        generation_config=_generation_config_of(base),
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        on_end=on_end,
    )
    return cluster.start()


def _of_replica(config: EngineConfig) -> EngineConfig:
    """A replica's settings: who waits, and whose turn it is, the cluster decides."""
    return replace(config, tenants={}, default_tenant=TenantPolicy(), max_waiting=_MOST_GIVEN)


def _config_of(base: str) -> Any:
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise BaseModelNotFoundError(f"the base model {base!r} cannot be read: {error}") from error


def _generation_config_of(base: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(base)
    except (OSError, ValueError):  # many bases have none
        return None
