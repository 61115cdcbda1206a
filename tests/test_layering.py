"""Imports run downward only. This file reads them, with `ast`, and holds the table that says what "down" is.

Every import counts: absolute or relative, at the top, inside a function, under TYPE_CHECKING, or by
`importlib.import_module("…")` with a literal name.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Bottom first. A module imports from itself and from the rows below its own. Modules of one row do not import each
# other. A module is what follows `lorakit.`: a file or a folder.
LAYERS = (
    ("errors",),
    ("adapters", "workloads"),
    ("runtime",),
    ("engine",),
    ("scheduler",),
    ("server",),
    ("chat", "console", "embedded"),
    ("recipes",),
    ("bench", "quickstart"),
    ("demo", "tenants"),
    ("cli",),
    ("__main__",),
)
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}

# `import lorakit` and the names it gives away are the public face: they stand above the server. lorakit/__init__.py
# itself may import whatever it shows.
FACE = "lorakit"
FACE_RANK = RANK["server"] + 0.5

# Outside names that only one file may import. A name covers what is below it: "ray" covers "ray.serve".
ONLY_IMPORTER = {
    "lorakit_kernels": "lorakit/runtime/ops.py",
    "ray": "lorakit/scheduler/ray_cluster.py",
    "transformers.generation.continuous_batching": "lorakit/engine/batching.py",
    "transformers.generation.ContinuousBatchingManager": "lorakit/engine/batching.py",
    "transformers.ContinuousBatchingManager": "lorakit/engine/batching.py",
}

HTTP = ("aiohttp", "fastapi", "flask", "http", "httpx", "requests", "starlette", "urllib.request", "urllib3", "uvicorn")

# Outside names that a file, or a folder's files, may not import.
FORBIDDEN = {
    "lorakit/adapters": ("torch.cuda", *HTTP),
    "lorakit/runtime": HTTP,
    "lorakit/engine": (*HTTP, "tokenizers", "transformers.AutoTokenizer"),
    "kernels/torch-ext/lorakit_kernels": ("lorakit",),
}

# Files that may not even reach these names through other modules of ours.
PURE = {
    "lorakit/scheduler/policy.py": ("torch", "transformers", "ray"),
    "lorakit/scheduler/simulator.py": ("torch", "transformers", "ray"),
}

# Folders of the repository that are no packages: imported by these names they would be another copy, or nothing.
NOT_IMPORTABLE = ("recipes", "demo")

SOURCES = (("lorakit", "lorakit"), ("kernels/torch-ext/lorakit_kernels", "lorakit_kernels"), ("demo", "lorakit.demo"))


def covers(name: str, imported: str) -> bool:
    return imported == name or imported.startswith(name + ".")


def files(root: Path) -> dict[str, str]:
    """Path, relative to the root → dotted name, for every Python file. Links are followed: lorakit/recipes is one."""
    found = {}
    for folder, package in SOURCES:
        # Not rglob: before Python 3.13 it does not enter linked folders.
        folders = [root / folder] if (root / folder).is_dir() else []
        while folders:
            for path in sorted(folders.pop().iterdir()):
                if path.is_dir() and path.name != "__pycache__":
                    folders.append(path)
                elif path.suffix == ".py":
                    parts = path.relative_to(root / folder).with_suffix("").parts
                    parts = parts[:-1] if parts[-1] == "__init__" else parts
                    found[path.relative_to(root).as_posix()] = ".".join((package, *parts))
    return found


def imports(source: str, name: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module imports, and of `torch.cuda` where it is used."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, base if alias.name == "*" else f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
            yield node.lineno, "torch.cuda"


def rank_of(dotted: str) -> tuple[str, float]:
    """The module of ours that a dotted name under `lorakit` belongs to, and how high it stands."""
    parts = dotted.split(".")
    if len(parts) > 1 and parts[1] in RANK:
        return parts[1], RANK[parts[1]]
    return FACE, FACE_RANK


def reached(start: str, imported: dict[str, list[tuple[int, str]]], names: dict[str, str]) -> dict[str, str]:
    """Files that a file reaches through our own modules → the path of imports that leads there."""
    by_name = {name: path for path, name in names.items()}
    paths, open_ends = {start: start}, [start]
    while open_ends:
        path = open_ends.pop()
        for _, dotted in imported[path]:
            # `lorakit.engine.engine.Engine` is found as `lorakit.engine.engine`.
            target = by_name.get(dotted) or by_name.get(dotted.rpartition(".")[0])
            if target and target not in paths and target != "lorakit/__init__.py":
                paths[target] = f"{paths[path]} → {target}"
                open_ends.append(target)
    return paths


def violations(root: Path) -> list[str]:
    names = files(root)
    imported = {
        path: list(imports((root / path).read_text(encoding="utf-8"), name, path.endswith("__init__.py")))
        for path, name in names.items()
    }
    found = []
    for path, name in names.items():
        top = name.split(".")[0]
        module, rank = rank_of(name)
        if top == "lorakit" and module == FACE and name != FACE:
            found.append(
                f"{path}: the module {'.'.join(name.split('.')[:2])!r} has no layer. Give it a row in LAYERS "
                "(tests/test_layering.py), above all that it imports, and tell CONTRIBUTING.md and docs/structure.md."
            )
            continue
        for line, dotted in imported[path]:
            where = f"{path}:{line}: imports {dotted}"
            if covers("lorakit", dotted) and top == "lorakit" and name != FACE:
                # `from lorakit import __version__` looks at nothing above.
                target, target_rank = rank_of(dotted)
                if target != module and target_rank >= rank and not dotted.startswith("lorakit.__"):
                    found.append(f"{where}, but {module} stands below or beside {target}: imports run downward only")
            for outside, importer in ONLY_IMPORTER.items():
                if covers(outside, dotted) and path != importer and top != outside:
                    found.append(f"{where}, but only {importer} may import {outside}")
            for place, forbidden in FORBIDDEN.items():
                if path == place or path.startswith(place + "/"):
                    found += [f"{where}, which {place} may not" for bad in forbidden if covers(bad, dotted)]
            for folder in NOT_IMPORTABLE:
                if covers(folder, dotted):
                    found.append(f"{where}: write lorakit.{folder}")
    for start in PURE.keys() & names.keys():
        for path, route in reached(start, imported, names).items():
            for line, dotted in imported[path]:
                if any(covers(bad, dotted) for bad in PURE[start]):
                    found.append(f"{path}:{line}: imports {dotted}, but {start} is pure Python (by {route})")
    return sorted(set(found))


def test_imports_run_downward_only():
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


def test_the_checker_reads_this_repository():
    names = files(ROOT)
    assert {"lorakit/__init__.py", "lorakit/errors.py"} <= names.keys()
    assert any(name.startswith("lorakit.recipes") for name in names.values()) == (ROOT / "recipes").is_dir()


def plant(root: Path, sources: dict[str, str]) -> None:
    for path, source in sources.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source, encoding="utf-8")


CLEAN = {
    "lorakit/__init__.py": "from lorakit.engine.engine import Engine\nfrom .adapters.bank import AdapterBank\n",
    "lorakit/__main__.py": "from lorakit.cli import main\n",
    "lorakit/errors.py": "import math\n",
    "lorakit/adapters/__init__.py": "from .bank import AdapterBank\n",
    "lorakit/adapters/bank.py": "from lorakit import __version__, errors\nfrom ..errors import BankError\n",
    "lorakit/runtime/ops.py": "import lorakit_kernels\nfrom lorakit_kernels.sgmv import shrink\nimport torch.cuda\n",
    "lorakit/engine/engine.py": "from ..runtime import ops\nfrom .batching import Batch\n",
    "lorakit/engine/batching.py": "from transformers.generation.continuous_batching import cache\n",
    "lorakit/scheduler/policy.py": "import math\nfrom ..errors import LorakitError\n",
    "lorakit/scheduler/ray_cluster.py": "import ray.serve\nfrom .policy import place\nfrom ..engine import engine\n",
    "lorakit/recipes/train.py": "import lorakit\nfrom lorakit import export\n",
    "lorakit/bench.py": "import lorakit.embedded\nfrom lorakit import workloads\n",
    "lorakit/cli.py": "def main():\n    from lorakit import bench\n    from lorakit.server import app\n",
    "kernels/torch-ext/lorakit_kernels/__init__.py": "from .sgmv import shrink\nfrom lorakit_kernels import sgmv\n",
    "demo/app.py": "from lorakit.server import app\nimport gradio\n",
}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("lorakit/adapters/bank.py", "from lorakit.runtime import ops", "bank.py:1: imports lorakit.runtime.ops"),
        ("lorakit/adapters/bank.py", "from ..runtime.ops import shrink", "imports lorakit.runtime.ops.shrink"),
        ("lorakit/adapters/bank.py", "from .. import engine", "imports lorakit.engine,"),
        ("lorakit/adapters/__init__.py", "from ..engine import engine", "imports lorakit.engine.engine"),
        ("lorakit/adapters/methods/lora.py", "from ...server import app", "imports lorakit.server.app"),
        ("lorakit/adapters/bank.py", "def f():\n    import lorakit.engine.engine", "bank.py:2: imports lorakit.engine"),
        ("lorakit/errors.py", "if TYPE_CHECKING:\n    from .adapters import bank", "imports lorakit.adapters.bank"),
        ("lorakit/engine/engine.py", "import importlib\nimportlib.import_module('lorakit.cli')", "imports lorakit.cli"),
        ("lorakit/engine/engine.py", "import lorakit", "engine stands below or beside lorakit"),
        ("lorakit/engine/engine.py", "from lorakit import AdapterBank", "imports lorakit.AdapterBank"),
        ("lorakit/workloads.py", "from lorakit import adapters", "workloads stands below or beside adapters"),
        ("lorakit/workloads.py", "from lorakit import bench", "workloads stands below or beside bench"),
        ("demo/app.py", "from lorakit import cli", "demo stands below or beside cli"),
        ("lorakit/misc.py", "", "the module 'lorakit.misc' has no layer. Give it a row in LAYERS"),
        ("lorakit/misc/thing.py", "", "the module 'lorakit.misc' has no layer"),
        ("lorakit/runtime/layers.py", "import lorakit_kernels", "only lorakit/runtime/ops.py may import"),
        ("lorakit/server/app.py", "from ray import serve", "only lorakit/scheduler/ray_cluster.py may import ray"),
        (
            "lorakit/engine/engine.py",
            "from transformers.generation.continuous_batching.cache import PagedAttentionCache",
            "only lorakit/engine/batching.py may import",
        ),
        ("lorakit/engine/engine.py", "from transformers import ContinuousBatchingManager", "only lorakit/engine/batch"),
        ("lorakit/adapters/hub.py", "import requests", "which lorakit/adapters may not"),
        ("lorakit/adapters/bank.py", "import torch.cuda", "imports torch.cuda, which lorakit/adapters may not"),
        ("lorakit/adapters/bank.py", "import torch\ntorch.cuda.synchronize()", "bank.py:2: imports torch.cuda"),
        ("lorakit/engine/engine.py", "from http import client", "which lorakit/engine may not"),
        ("kernels/torch-ext/lorakit_kernels/sgmv.py", "from lorakit import errors", "lorakit_kernels may not"),
        ("lorakit/scheduler/policy.py", "import torch.nn", "policy.py is pure Python"),
        ("lorakit/scheduler/policy.py", "from ..runtime import pool", "policy.py → lorakit/runtime/pool.py"),
        ("lorakit/cli.py", "import recipes.sft", "write lorakit.recipes"),
    ],
)
def test_the_checker_finds_a_planted_violation(tmp_path, path, source, complaint):
    plant(tmp_path, {**CLEAN, "lorakit/runtime/pool.py": "import torch"})
    assert violations(tmp_path) == []
    plant(tmp_path, {path: source})
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert complaint in found[0]
