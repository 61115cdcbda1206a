"""The base model as the weight side sees it: places, single weights, and a fingerprint.

A conversion reads only the weights that it needs: from a live model's modules, or from a checkpoint's safetensors by
name, over a skeleton on the meta device. Knows transformers' checkpoints; knows no adapter.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.places import Place, base_modules, own_tensors, parameter_places, place_of, places
from lorakit.adapters.quantised import FULL_PRECISION, bias_of, dequantised, is_packed, is_weightless, quantisation
from lorakit.adapters.sharded import whole
from lorakit.errors import BaseModelMismatchError, BaseModelNotFoundError

# PEFT's task types and the class that each is trained on (peft.mapping.MODEL_TYPE_TO_PEFT_MODEL_MAPPING).
_AUTO_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


# Ways by which LoRA's factors begin that take their product out of the base's weights (peft.LoraConfig).
_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")


class _Weights(Protocol):
    """Gives a named parameter of the base, or None where it has none of that name."""

    def get(self, name: str) -> torch.Tensor | None:
        """What it stands for: dequantised, if it is packed."""
        ...

    def stored(self, name: str) -> torch.Tensor | None:
        """What is in memory or on disk; None also where that is packed, or offloaded."""
        ...


class BaseModel:
    """A base model's structure and weights, read on demand.

    Attributes:
        id: the Hub id or folder that the base was named by ("" for a live model that has none).
        architecture: its transformers class, for example "LlamaForCausalLM".
        is_encoder_decoder: whether it reads one text and writes another.
        places: module path → `Place`, for every module that can carry an adapter.
        parameter_places: parameter path → `Place`, for every parameter that can by itself: experts' and routers'.
        all_linear: the paths that PEFT means by target_modules="all-linear": every linear but the output's.
        classifier: the path of the head that it leaves out too for the task type "SEQ_CLS"; None where there is none.
        quantisation: how its weights were quantised, as `quantised.quantisation` names it.
        embedding: the path of the input embedding, or None where the model names none.
        output: the path of the output layer, or None where the model names none.
        tied: the paths of the other modules whose weight is the input embedding's, if the model's config ties them.
        targeted: the places that configurations target, as `methods.targets` found them: many adapters have the same.
    """

    def __init__(self, model: nn.Module, weights: _Weights, base_id: str) -> None:
        self.id = base_id
        self.architecture = type(model).__name__
        self.model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        self.is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.places: dict[str, Place] = places(model)
        self.parameter_places: Mapping[str, Place] = parameter_places(model)
        self.all_linear = _all_linear(model)
        self.classifier = _classifier(model)
        self.embedding, self.tied = _tied(model)
        self.output = _path_of(model, "get_output_embeddings")
        self.quantisation = quantisation(model)
        self.parameters = {name: tuple(p.shape) for name, p in _base_parameters(model)}
        self.targeted: dict[str, frozenset[str]] = {}
        self._weights = weights

    @classmethod
    def of(
        cls,
        source: str | os.PathLike[str] | nn.Module,
        *,
        task_type: str | None = None,
        architecture: str | None = None,
    ) -> BaseModel:
        """Opens a base model without loading its weights.

        Args:
            source: a live model, whose class is what it is; or a folder with a checkpoint, or a Hub id, whose class
                is decided by the first of these that is given.
            architecture: a class of transformers, by name.
            task_type: PEFT's task type of the adapters ("CAUSAL_LM", "SEQ_CLS", …), which decided it in training.
                Without either it is the class that the checkpoint's config names.

        Raises:
            BaseModelNotFoundError: no such folder or Hub model, or its class is unknown to transformers.
            BaseModelMismatchError: a live model with adapters merged into its weights.
        """
        if isinstance(source, nn.Module):
            model = _unwrap_peft(source)
            if any(getattr(module, "merged", False) is True for module in model.modules()):
                raise BaseModelMismatchError(
                    "the live base model has adapters merged into its weights; call unmerge_adapter first."
                )
            _refuse_changed(source)
            return cls(model, _LiveWeights(model), str(getattr(model, "name_or_path", "") or ""))
        folder = _locate(str(source))
        skeleton = _skeleton(folder, task_type, architecture)
        # A folder is recorded as found from anywhere; a Hub id as given.
        base_id = str(folder.resolve()) if Path(str(source)).is_dir() else str(source)
        return cls(skeleton, _CheckpointWeights(folder, skeleton), base_id)

    def weight(self, path: str) -> torch.Tensor:
        """W of a place in its own dtype (dequantised if quantised): (out, in); an embedding's as (out = D, in = V)."""
        weight = self._parameter(f"{path}.weight")
        return weight.T if self.places[path].transposed else weight

    def bias(self, path: str) -> torch.Tensor | None:
        """b (out,) of a place in its own dtype, or None where it has none."""
        return self._weights.get(f"{path}.bias")

    def with_parameters(self, parameters: Mapping[str, torch.Tensor]) -> BaseModel:
        """The same base with other tensors in the place of some of its parameters."""
        if not parameters:
            return self
        other = copy.copy(self)
        other._weights = _ReplacedWeights(self._weights, parameters)
        return other

    def with_rows(self, weights: Mapping[str, torch.Tensor]) -> BaseModel:
        """The same base with more rows at some modules.

        Args:
            weights: path of an embedding or an output layer → its weight (V + k, D).
        """
        other = self.with_parameters({f"{path}.weight": weight for path, weight in weights.items()})
        if weights:
            other.places, other.parameters = dict(self.places), dict(self.parameters)
        for path, weight in weights.items():
            place = self.places[path]
            rows = weight.shape[0]
            other.places[path] = (
                dataclasses.replace(place, in_features=rows)
                if place.kind == "embedding"
                else dataclasses.replace(place, out_features=rows)
            )
            other.parameters[f"{path}.weight"] = tuple(weight.shape)
        return other

    def parameter(self, name: str) -> torch.Tensor | None:
        """A parameter by its name in the model, exactly as the base stores it.

        Returns:
            The tensor in its own dtype; None where there is none of that name, where a quantiser has packed it (what
            it gives back is not what it was given), or where it is offloaded.
        """
        stored = self.stored(name)
        return None if stored is None else whole(stored)

    def stored(self, name: str) -> torch.Tensor | None:
        """The same without gathering it, where several processes share the base: a DTensor (`sharded.py`)."""
        return self._weights.stored(name)

    def _parameter(self, name: str) -> torch.Tensor:
        tensor = self._weights.get(name)
        if tensor is None:
            raise BaseModelNotFoundError(
                f"the base model {self.id or self.architecture!r} has no weight {name!r}; "
                "if it is loaded in a special way, pass the live model as base_model."
            )
        return tensor


class _ReplacedWeights:
    """Weights of which some are others."""

    def __init__(self, weights: _Weights, parameters: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._parameters = parameters

    def get(self, name: str) -> torch.Tensor | None:
        return self._parameters[name] if name in self._parameters else self._weights.get(name)

    def stored(self, name: str) -> torch.Tensor | None:
        return self._parameters[name] if name in self._parameters else self._weights.stored(name)


class _LiveWeights:
    """Weights of a model in memory, dequantised one at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(base_modules(model))

    def get(self, name: str) -> torch.Tensor | None:
        module, item = self._at(name)
        if module is None:
            return None
        tensor = getattr(module, item, None)
        packed = _is_packed(module, item) and (item == "weight" or tensor is not None)
        read = own_tensors(module) if packed else [tensor]
        if any(tensor.is_meta for tensor in read if tensor is not None):
            raise BaseModelNotFoundError(
                f"the live base model's {name} is not in memory (offloaded, or on the meta device); "
                "give the base as its folder or Hub id."
            )
        if not packed:
            return None if tensor is None else whole(tensor.detach())
        try:
            return dequantised(module) if item == "weight" else bias_of(module)
        except Exception as error:  # each quantiser raises its own
            raise BaseModelNotFoundError(
                f"the live base model's {name} cannot be dequantised ({type(error).__name__}: {error}). Put the model "
                "on a device that its quantiser has kernels for, or give the base as it was before."
            ) from error

    def stored(self, name: str) -> torch.Tensor | None:
        module, item = self._at(name)
        tensor = getattr(module, item, None)
        if module is None or tensor is None or tensor.is_meta or _is_packed(module, item):
            return None
        return tensor.detach()

    def _at(self, name: str) -> tuple[nn.Module | None, str]:
        path, _, item = name.rpartition(".")
        return self._modules.get(path), item


class _CheckpointWeights:
    """Weights of a checkpoint folder, read by name from its safetensors.

    Names on disk can differ from those in the model (tied weights, a prefix, transformers' own renamings). What a
    lookup with ties and prefixes does not find is found by loading the model once, as transformers itself maps it. So
    is the weight of a linear in a quantised checkpoint: packed as it is, and dequantised one at a time.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel) -> None:
        self._folder = folder
        self._class = type(skeleton)
        self._shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}
        self._prefix = str(getattr(skeleton, "base_model_prefix", "") or "")
        self._aliases = _aliases(skeleton)
        quantised = quantisation(skeleton) != FULL_PRECISION
        linears = [path for path, place in places(skeleton).items() if quantised and place.kind == "linear"]
        self._packed = frozenset(f"{path}.weight" for path in linears)

    @cached_property
    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            if path.name.startswith("adapter_"):
                continue
            with _opened(path) as shard:
                files.update(dict.fromkeys(shard.keys(), path))
        return files

    @cached_property
    def _loaded(self) -> tuple[_LiveWeights, frozenset[str]]:
        """The model's weights, and the names that the checkpoint lacks: what stands there is random."""
        try:
            model, report = self._class.from_pretrained(self._folder, dtype="auto", output_loading_info=True)
        except Exception as error:  # transformers, a quantiser or damaged files raise nearly anything
            raise BaseModelNotFoundError(
                f"the weights of the base model in {self._folder} cannot be read: {error}. "
                "If it is loaded in a special way, do so and pass the live model as base_model."
            ) from error
        return _LiveWeights(model), frozenset(report["missing_keys"])

    def get(self, name: str) -> torch.Tensor | None:
        if name not in self._aliases:
            return None
        for alias in self._aliases[name] if name not in self._packed else ():
            for key in (alias, f"{self._prefix}.{alias}", alias.removeprefix(f"{self._prefix}.")):
                if key in self._files:
                    with _opened(self._files[key]) as shard:
                        tensor = shard.get_tensor(key)
                    if tuple(tensor.shape) == self._shapes[name]:
                        return tensor
        weights, missing = self._loaded
        return None if name in missing else weights.get(name)

    def stored(self, name: str) -> torch.Tensor | None:
        return None if name in self._packed else self.get(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise BaseModelNotFoundError(
            f"the base model's {path} is damaged or cannot be read: {error}. Download it again."
        ) from error


def _is_packed_place(module: nn.Module) -> bool:
    return is_packed(module) and place_of(module) is not None


def _is_packed(module: nn.Module, item: str) -> bool:
    """Whether a module keeps its weight, or its bias, in a form of its own."""
    return _is_packed_place(module) if item == "weight" else item == "bias" and is_weightless(module)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name → all names of that parameter: tied weights are stored under one of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: [name, *(other for other in names if other != name)] for names in groups.values() for name in names}


def _base_parameters(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in base_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _all_linear(model: nn.Module) -> frozenset[str]:
    output = _output(model)
    inner = getattr(output, "get_base_layer", None)
    output = inner() if callable(inner) else output
    return frozenset(
        path for path, module in base_modules(model) if isinstance(module, nn.Linear | Conv1D) and module is not output
    )


def _classifier(model: nn.Module) -> str | None:
    """As peft.tuners.tuners_utils._maybe_include_all_linear_layers finds it: where a model has no output embedding."""
    heads = SEQ_CLS_HEAD_NAMES if _output(model) is None else ()
    return next((name for name in heads if getattr(model, name, None) is not None), None)


def _output(model: nn.Module) -> nn.Module | None:
    get_output = getattr(model, "get_output_embeddings", None)
    output: nn.Module | None = get_output() if callable(get_output) else None
    return output


def _tied(model: nn.Module) -> tuple[str | None, frozenset[str]]:
    """`BaseModel.embedding` and `BaseModel.tied` (peft.utils.other._get_module_names_tied_with_embedding)."""
    path = _path_of(model, "get_input_embeddings")
    if path is None:
        return None, frozenset()
    modules = dict(base_modules(model))
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False) is not True:
        return path, frozenset()
    weight = getattr(modules[path], "weight", None)
    same = {other for other, module in modules.items() if getattr(module, "weight", None) is weight}
    return path, frozenset(same - {path}) if weight is not None else frozenset()


def _path_of(model: nn.Module, getter: str) -> str | None:
    """The path of the module that one of transformers' getters gives."""
    get = getattr(model, getter, None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:
        return None
    inner = getattr(found, "get_base_layer", None)
    found = inner() if callable(inner) else found
    return None if found is None else next((path for path, one in base_modules(model) if one is found), None)


def _refuse_changed(model: nn.Module) -> None:
    """Refuses a base whose weights PEFT changed to begin a training: factors are found from the original ones."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        init = str(getattr(config, "init_lora_weights", "")).lower()
        if init.startswith(_CHANGING_INITS) or getattr(config, "kasa_config", None) is not None:
            raise BaseModelMismatchError(
                f"PEFT changed the live base model's weights when it added its adapter {name!r} (PiSSA, OLoRA, CorDA, "
                "LoRA-GA or KaSA); give the base as it was before."
            )


def _unwrap_peft(model: nn.Module) -> nn.Module:
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _locate(source: str) -> Path:
    """A folder for a path or a Hub id (downloaded or taken from the cache by huggingface_hub's own rules)."""
    try:
        if Path(source).is_dir():
            return Path(source)
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelNotFoundError(
            f"the base model {source!r} is neither a folder here nor a model that the Hub gave "
            f"({type(error).__name__}). Name a folder or a Hub id with base_model, or pass the live model."
        ) from error


def _skeleton(folder: Path, task_type: str | None, architecture: str | None) -> PreTrainedModel:
    """The model's modules on the meta device: shapes without weights."""
    try:
        # Never code that came with the model: without this transformers asks a terminal's user whether to run it.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = _model_class(config, task_type, architecture)
        with torch.device("meta"):
            model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    except Exception as error:  # a configuration of wrong values makes transformers raise nearly anything
        raise BaseModelNotFoundError(
            f"the base model in {folder} cannot be opened: {error}. "
            "If its code is not part of transformers, load it yourself and pass the live model as base_model."
        ) from error
    model.tie_weights()
    return model


def _model_class(config: PretrainedConfig, task_type: str | None, architecture: str | None) -> Any:
    if architecture is None and isinstance(task_type, str) and task_type in _AUTO_CLASSES:
        return _AUTO_CLASSES[task_type]
    names = [architecture] if architecture else config.architectures or []
    if not names:
        raise ValueError("its config.json names no architecture")
    return architecture_class(names[0])


def architecture_class(name: str) -> type[PreTrainedModel]:
    """A model class of transformers by its name, which may come from a bank that somebody else made.

    Raises:
        BaseModelNotFoundError: transformers has no such model.
    """
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise BaseModelNotFoundError(
        f"transformers {transformers.__version__} has no model {name!r}; if its code is your own, load it yourself and "
        "pass the live model."
    )
