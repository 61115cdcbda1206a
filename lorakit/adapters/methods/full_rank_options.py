"""How checkpoints of methods of full rank are read: their keys, their options, and what their layers need of the base.

Knows PEFT's names; knows no tensor. What is done with them is full_rank.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lorakit.adapters.methods.options import (
    RANK_PATTERN,
    Option,
    flag,
    is_number,
    is_rank,
    is_whole,
    maps_to,
    number,
    rank,
)
from lorakit.adapters.methods.seeded import seed


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method's checkpoints are read.

    Attributes:
        items: what a module's keys can end with.
        options: what the method reads of the configuration, beside the targets.
        harmless: more options that do not change what a trained adapter computes, separated by spaces.
        reads_base: the change depends on the base's weight.
        needs_plain: PEFT takes the base's weight apart, so it must be there as it is, not packed.
        conv1d: PEFT has it for transformers' Conv1D too.
        size: the option that alone bounds PEFT's tensors, for one number more or less an input and output of a module.
        sizes: the same set by patterns.
    """

    items: tuple[str, ...]
    options: tuple[Option, ...]
    harmless: str = ""
    reads_base: bool = False
    needs_plain: bool = False
    conv1d: bool = False
    size: str = ""
    sizes: str = ""


def _whole(name: str) -> Option:
    return Option(name, is_whole, "a whole number")


def _ranks(name: str) -> Option:
    return Option(name, lambda value: maps_to(value, is_rank), "a mapping from patterns to whole numbers")


METHODS: Mapping[str, Method] = {
    "BOFT": Method(
        ("boft_R", "boft_s"),
        (_whole("boft_block_size"), _whole("boft_block_num"), rank("boft_n_butterfly_factor")),
        "boft_dropout init_weights",
        reads_base=True,
    ),
    "C3A": Method(("c3a_kernel",), (rank("block_size"), _ranks("block_size_pattern")), "init_weights"),
    "FOURIERFT": Method(
        ("fourierft_spectrum",),
        (rank("n_frequency"), number("scaling"), seed("random_loc_seed"), _ranks("n_frequency_pattern")),
        "init_weights",
        conv1d=True,
    ),
    "FROD": Method(
        ("frod_lambda_l", "frod_lambda_s_values"),
        (number("sparse_rate"), number("regularization_alpha"), flag("save_projection"), seed("projection_prng_key")),
        "frod_dropout progressbar runtime_offload_base_weight init_weights",
        reads_base=True,
        needs_plain=True,
        conv1d=True,
    ),
    "HIRA": Method(
        ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        (rank("r"), RANK_PATTERN),
        "hira_dropout init_weights",
        reads_base=True,
        conv1d=True,
        size="r",
        sizes="rank_pattern",
    ),
    "OFT": Method(
        ("oft_R.weight", "oft_embedding_R.weight"),
        (
            _whole("r"),
            _whole("oft_block_size"),
            flag("coft"),
            Option("eps", is_number, "a number that fp32 can hold"),
            flag("block_share"),
            flag("use_cayley_neumann"),
            # PEFT multiplies so often.
            Option("num_cayley_neumann_terms", lambda value: is_whole(value) and value <= 100, "0 to 100"),
        ),
        "module_dropout init_weights",
        reads_base=True,
    ),
    "OSF": Method(
        tuple(f"osf_svd_params.{item}" for item in ("U_low", "S_low", "V_low")),
        (
            Option("effective_rank", is_number, "a number"),
            Option("rank_pattern", lambda value: maps_to(value, is_number), "a mapping from patterns to numbers"),
        ),
        "init_weights target_svd_config",
        reads_base=True,
        needs_plain=True,
    ),
    "RANDLORA": Method(
        ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        (rank("r"), number("randlora_alpha"), flag("save_projection")),
        "projection_prng_key sparse very_sparse randlora_dropout init_weights",
        conv1d=True,
        size="r",
    ),
    "ROAD": Method(
        ("road_theta", "road_alpha"),
        (Option("variant", lambda value: isinstance(value, str), "a name", needed=True), rank("group_size")),
        "init_weights",
        reads_base=True,
    ),
    "SHIRA": Method(("shira_weight", "shira_indices"), (rank("r"),), "mask_type random_seed init_weights"),
    "SUPERTUNING": Method(
        (
            "supertuning_values",
            "supertuning_indices",
            *(f"supertuning_lora_{factor}.weight" for factor in "AB"),
        ),
        (
            number("sparsity"),
            flag("select_top"),
            Option("r", is_rank, "a whole number of at least 1"),
            Option("lora_alpha", is_number, "a number that fp32 can hold"),
            flag("save_precomputed_indices"),
        ),
        "lora_dropout init_weights",
        size="r",
    ),
    "WAVEFT": Method(
        ("waveft_spectrum",),
        (
            rank("n_frequency"),
            number("scaling"),
            Option("wavelet_family", lambda value: isinstance(value, str), "a name", needed=True),
            flag("use_idwt"),
            seed("random_loc_seed"),
            _ranks("n_frequency_pattern"),
            flag("proportional_parameters"),
        ),
        "init_weights",
        conv1d=True,
    ),
}
"""PEFT type → how its checkpoints are read."""
