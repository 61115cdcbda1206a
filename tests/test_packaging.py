"""What is built and installed: both packages, the recipes with their data, and nothing named `kernels`."""

import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(*arguments: str, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """The output of a fresh interpreter that sees `path` before anything else, then the environment."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# ---- the folder `kernels`


def test_no_package_named_kernels():
    """transformers looks for Hugging Face's `kernels`; a package of ours of that name would be taken for it."""
    outside = {".git", ".venv", "build", "node_modules", "site"}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in outside and not (Path(folder) / name / "bin").is_dir()]
        in_package = (Path(folder) / "__init__.py").exists()
        assert in_package or "kernels.py" not in names, f"{folder}/kernels.py can be imported as `kernels`"
        assert in_package or not (Path(folder) / "kernels/__init__.py").exists(), (
            f"{folder}/kernels/__init__.py makes a package `kernels`: remove it"
        )


def test_the_real_kernels_package_wins_at_the_root(tmp_path):
    """Without `__init__.py` our folder is at most a namespace, which any real package behind it on the path beats."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("real = True")
    assert python("-c", "import kernels; print(kernels.real)", cwd=ROOT, path=(ROOT, tmp_path)) == "True"


def test_transformers_does_not_take_our_folder_for_kernels():
    try:
        installed = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed:
        pytest.skip("Hugging Face's kernels is installed")
    code = "from transformers.utils.import_utils import is_kernels_available; print(is_kernels_available())"
    assert python("-c", code, cwd=ROOT) == "False"


# ---- what is declared


def test_the_version_has_one_source():
    import lorakit

    assert lorakit.__version__ == importlib.metadata.version("lorakit") == PROJECT["project"]["version"]


def test_the_command():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="lorakit")
    assert entry.value == "lorakit.cli:main"
    assert callable(entry.load())


def test_constraints_pin_every_direct_dependency():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
    extras = PROJECT["project"]["optional-dependencies"]
    # Everything `make` installs. The other extras are for machines that no constraint was tested on.
    tested = (extras[extra] for extra in ("train", "quickstart", "bench", "docs", "dev"))
    for requirement in map(Requirement, itertools.chain(PROJECT["project"]["dependencies"], *tested)):
        # PyTorch's CUDA builds demand a Triton of their own, so none is pinned.
        if requirement.name not in ("lorakit", "triton"):
            version = pins.get(canonicalize_name(requirement.name))
            assert version, f"constraints.txt has no line for {requirement.name}"
            assert requirement.specifier.contains(version), f"{requirement} does not admit the pinned {version}"


# ---- what is built


@pytest.mark.parametrize("folder", ["recipes", "demo"])
def test_what_lies_beside_the_package_is_a_relative_link(folder):
    link = ROOT / "lorakit" / folder
    assert link.is_symlink(), f"lorakit/{folder} must be a link: ln -s ../{folder} lorakit/{folder}"
    assert os.readlink(link) == f"../{folder}"


@pytest.mark.parametrize("package", ["lorakit", "lorakit.recipes", "lorakit.demo", "lorakit_kernels"])
def test_importable_from_anywhere(package, tmp_path):
    code = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
    assert python("-c", code, cwd=tmp_path).endswith("__init__.py")


BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"


def build(kind: str, tree: Path, into: Path) -> Path:
    """Builds with the environment's setuptools: no network, and nothing left in the repository."""
    output = python("-W", "ignore", "-c", BUILD.format(kind=kind), str(into), cwd=tree)
    return into / output.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel of the tree, and the wheel of the tree's sdist."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("lorakit", "recipes", "demo", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    outputs = [folder / name for name in ("wheel", "sdist", "wheel-of-sdist")]
    for output in outputs:
        output.mkdir()
    sdist = build("sdist", tree, outputs[1])
    shutil.unpack_archive(sdist, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build("wheel", tree, outputs[0]), build("wheel", unpacked, outputs[2])


def packaged_files() -> set[str]:
    """What a wheel has to hold, by its path in the wheel: our modules and their data."""
    wanted = set()
    for folder in (ROOT / "lorakit", ROOT / "kernels/torch-ext/lorakit_kernels"):
        for where, _, names in os.walk(folder, followlinks=True):
            inner = Path(where).relative_to(folder.parent)
            wanted |= {
                (inner / n).as_posix() for n in names if Path(n).suffix in (".py", ".yaml", ".json", ".css", ".typed")
            }
    return wanted


@pytest.mark.slow
def test_the_wheel_holds_everything(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (top_level,) = (n for n in names if n.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["lorakit", "lorakit_kernels"]
    missing = packaged_files() - names
    assert not missing, f"not in the wheel: {missing}. A folder without __init__.py, or data not in package-data?"
    assert "lorakit/py.typed" in names
    assert any(n.startswith("lorakit/recipes/") and n.endswith(".yaml") for n in names)
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"lorakit", "lorakit_kernels"}


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built):
    wheel, wheel_of_sdist = built
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(wheel_of_sdist) as other:
        assert {i.filename: i.CRC for i in one.infolist() if ".dist-info/" not in i.filename} == {
            i.filename: i.CRC for i in other.infolist() if ".dist-info/" not in i.filename
        }


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_repository(built, tmp_path):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import lorakit, lorakit_kernels, lorakit.recipes, importlib.resources as r, pathlib\n"
        "for m in (lorakit, lorakit_kernels, lorakit.recipes): assert 'installed' in m.__file__, m.__file__\n"
        "print(any(f.name.endswith('.yaml') for f in pathlib.Path(r.files('lorakit.recipes')).rglob('*')))"
    )
    assert python("-c", code, cwd=tmp_path, path=(tmp_path / "installed",)) == "True"
