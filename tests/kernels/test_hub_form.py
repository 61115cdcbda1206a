"""The form in which the Hub serves the kernels: what `kernels/build.py` makes, Hugging Face's `kernels` loads."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels as hub
import lorakit_kernels

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = [
    "Stack",
    "Whole",
    "attend",
    "can_attend",
    "can_join",
    "entry",
    "expand_",
    "linears",
    "lookup",
    "plan",
    "replace_",
    "replaced",
    "sample",
    "shrink",
    "stacked_lora",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder as a Hub repository has it."""
    repository = tmp_path_factory.mktemp("hub")
    runpy.run_path(str(ROOT / "kernels/build.py"))["build"](repository / "build")
    return repository


@pytest.fixture(scope="module")
def kernel(built):
    return hub.get_local_kernel(built)


def python(code, *args, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_configuration_is_one_that_kernel_builder_reads():
    assert [str(backend) for backend in hub._rust.Build.open(ROOT / "kernels").general.backends] == ["cpu", "cuda"]


def test_a_build_holds_the_package_and_says_so(built):
    package = ROOT / "kernels/torch-ext/lorakit_kernels"
    wanted = {path.relative_to(package).as_posix() for kind in ("py", "json") for path in package.rglob(f"*.{kind}")}
    assert {folder.name for folder in (built / "build").iterdir()} == {"torch-cpu", "torch-cuda"}
    for folder in (built / "build").iterdir():
        metadata = hub._rust.Metadata.read_from_file(folder / "metadata.json")
        metadata.digest.validate(hub._rust.Digest.hash_variant(hub._rust.DigestAlgorithm.SHA256, folder))
        assert metadata.digest.files.keys() == wanted
        assert metadata.id.isidentifier() and metadata.backend.archs is None


def test_a_build_is_the_same_again_and_leaves_nothing_behind(built, tmp_path):
    (tmp_path / "torch-cpu").mkdir()
    (tmp_path / "torch-cpu/old.py").touch()
    for _ in range(2):
        subprocess.run([sys.executable, ROOT / "kernels/build.py", "--into", tmp_path], check=True)
    for folder in (built / "build").iterdir():
        before, after = (
            {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.suffix != ".pyc"}
            for root in (folder, tmp_path / folder.name)
        )
        assert before == after


def test_the_card_is_of_this_kernel(kernel):
    card = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    assert "license: apache-2.0\n" in front and "- kernels\n" in front
    assert all(f"`{name}" in text for name in EXPORTS)
    _, example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if not torch.cuda.is_available():
        example = example.replace('"cuda"', '"cpu"').replace("4096", "64")
    names = {"kernel": kernel}
    exec(example.replace("kernel.expand_", "before = y.clone()\nkernel.expand_"), names)
    x, y, a, b, before = (names[name].double() for name in ("x", "y", "a", "b", "before"))
    torch.testing.assert_close(y[::2], before[::2] + 0.5 * x[::2] @ a.T @ b, rtol=0.02, atol=0.02)
    assert torch.equal(y[1], before[1])


def test_both_forms_show_the_same_names(kernel):
    assert kernel.__all__ == lorakit_kernels.__all__ == EXPORTS == dir(kernel)
    for form in (kernel, lorakit_kernels):
        assert all(callable(getattr(form, name)) for name in EXPORTS)
        with pytest.raises(AttributeError, match="no attribute 'absent'"):
            form.absent  # noqa: B018
    assert kernel.shrink is not lorakit_kernels.shrink


def test_the_plain_form_computes(kernel):
    y, x = torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    a, b = torch.randn(1, 4, 7), torch.randn(1, 4, 5)
    rows = torch.tensor([2, 0])
    expected = y.clone()
    expected[rows] += x[rows] @ a[0].T @ b[0]
    stack = kernel.Stack(n=3, index=rows, keep=None, target=rows, a=a, b=b, c=None, d=None)
    torch.testing.assert_close(kernel.stacked_lora(y.clone(), x, stack), expected)


# What a user of the Hub's copy does. `lorakit_kernels` is not there.
LAUNCH = """
import importlib, pathlib, sys
sys.modules["lorakit_kernels"] = None
import torch, kernels
torch.manual_seed(0)
kernel = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
reference = importlib.import_module(kernel.__name__ + ".reference")
weights = {
    slot: reference.Weights(torch.randn(rank, 32), torch.randn(rank, 24), 0.5, torch.rand(24), torch.randn(24))
    for slot, rank in enumerate([8, 3])
}
table = torch.tensor([[kernel.entry(w.a, w.b, w.scale, w.c, w.d)] for w in weights.values()])
for tokens in (1, 70):
    slots = [1, -1, 0]
    plan = kernel.plan(torch.tensor(slots))
    x, y = torch.randn(3 * tokens, 32), torch.randn(3 * tokens, 24)
    expected = reference.sgmv(y, x, slots, weights)
    h = kernel.shrink(x, table, plan, [0], 16, torch.float32)
    kernel.expand_([y], h, table, plan, [0], torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
print("computed as", kernel.__name__)
"""


def test_the_kernels_compute_without_the_installed_package(built):
    assert "computed as _lorakit_kernels_c" in python(LAUNCH, built, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


# Two copies of the Hub's, of different sources, beside the installed package: each keeps its operators.
SIDE_BY_SIDE = """
import importlib, pathlib, sys
import torch, kernels
import lorakit_kernels

forms = [lorakit_kernels, *(kernels.get_local_kernel(pathlib.Path(path)) for path in sys.argv[1:])]
assert len({form.__name__ for form in forms}) == 3

def entered(form):
    seen = []
    decode = importlib.import_module(form.__name__ + ".decode")
    decode.shrink = lambda *args: seen.append(form.__name__)
    return seen

x, table = torch.randn(1, 16), torch.zeros(1, 1, 8, dtype=torch.int64)
arguments = x, table, lorakit_kernels.plan(torch.tensor([0])), [0], 16, torch.float32
for form in forms:
    form.shrink  # registers the operators
seen = [entered(form) for form in forms]
for i, form in enumerate(forms):
    getattr(torch.ops, form.__name__).shrink(*arguments)
    form.shrink(*arguments)
    torch.compile(lambda *args: form.shrink(*args) + 1, fullgraph=True, backend="aot_eager")(*arguments)
    assert [len(calls) for calls in seen] == [3] * (i + 1) + [0] * (2 - i), (form.__name__, seen)
"""


@pytest.mark.slow
def test_copies_do_not_take_each_others_operators(built, tmp_path):
    variant = built / "build" / ("torch-cuda" if torch.version.cuda else "torch-cpu")
    other = tmp_path / "build" / variant.name
    shutil.copytree(variant, other, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = json.loads((other / "metadata.json").read_text())
    metadata["id"] += "x"
    (other / "metadata.json").write_text(json.dumps(metadata))
    python(SIDE_BY_SIDE, built, tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import pathlib, torch, kernels, lorakit_kernels
for form in (lorakit_kernels, kernels.get_local_kernel(pathlib.Path(sys.argv[1]))):
    assert form.plan(torch.tensor([0])).shape == (1, 8)
    try:
        form.shrink
    except ImportError as error:
        assert "triton" in str(error)
    else:
        raise AssertionError("Triton is not there")
"""


def test_what_is_plain_pytorch_needs_no_triton(built):
    python(WITHOUT_TRITON, built)
