"""lorakit: many PEFT adapters on one base model, any mix of them in one batch.

    bank = lorakit.export({"sql": "runs/sql"}, "bank/", base_model="org/base")
    model = lorakit.MultiLoraModel.from_pretrained("org/base", bank)
    model.generate(**inputs, adapter_ids=["sql", None], max_new_tokens=64)

The names below are imported when first used: `lorakit --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapters.bank import AdapterBank
    from lorakit.adapters.export import export
    from lorakit.engine.engine import Engine
    from lorakit.errors import LorakitError
    from lorakit.runtime.model import MultiLoraModel

_HOMES = {
    "AdapterBank": "lorakit.adapters.bank",
    "Engine": "lorakit.engine.engine",
    "LorakitError": "lorakit.errors",
    "MultiLoraModel": "lorakit.runtime.model",
    "export": "lorakit.adapters.export",
}

__all__ = ["AdapterBank", "Engine", "LorakitError", "MultiLoraModel", "export"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("lorakit")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
