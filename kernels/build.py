"""Assembles what the Hub serves: build/torch-<backend>/, for every backend in build.toml.

Knows the layout that Hugging Face's `kernels` loads. kernel-builder makes the same from the same folder, but needs Nix;
where nothing is compiled a copy of the sources and a metadata.json do. The kernel's id, the name under which it is
imported, follows from its files: different versions can be loaded side by side.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def build(into: Path) -> list[Path]:
    """Writes one folder for each backend, over what is there.

    Args:
        into: where to.

    Returns:
        The folders.
    """
    config = tomllib.loads((ROOT / "build.toml").read_text(encoding="utf-8"))
    general = config["general"]
    module = general["name"].replace("-", "_")
    package = ROOT / "torch-ext" / module
    sources = {
        path.relative_to(package).as_posix(): path.read_bytes()
        for extension in config["torch-noarch"]["pyext"]
        for path in package.rglob(f"*.{extension}")
    }
    sources = dict(sorted(sources.items()))
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sources.items()}
    unique = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:7]

    folders = []
    for backend in general["backends"]:
        folder = into / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in sources.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        metadata = {
            "name": general["name"],
            "id": f"_{module}_{backend}_{unique}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        folders.append(folder)
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Assembles what the Hub serves.")
    parser.add_argument("--into", type=Path, default=ROOT / "build", help="where to (kernels/build)")
    build(parser.parse_args().into)
