"""The demo on a tiny base with the small model's tokenizer, and a real Chromium in front of it."""

import copy
import os
import shutil

import pytest
from playwright.sync_api import sync_playwright
from speaking import speaking_base, tenant_of
from transformers import AutoTokenizer, LlamaForCausalLM

from lorakit import MultiLoraModel
from lorakit.demo.app import build, launching
from lorakit.demo.stage import Stage
from lorakit.embedded import model_path

TENANTS = ("sql", "poet")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a base."""
    folder = tmp_path_factory.mktemp("demo") / "base"
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = speaking_base(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(base):
    """A folder with a checkpoint that nobody has loaded yet."""
    folder = base.parent / "checkpoint"
    tenant_of(LlamaForCausalLM.from_pretrained(base), 7).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stage(base):
    loaded = LlamaForCausalLM.from_pretrained(base)
    model = MultiLoraModel(copy.deepcopy(loaded))
    for seed, name in enumerate(TENANTS):
        model.load_adapter(name, tenant_of(loaded, seed))
    with Stage(str(base), model, AutoTokenizer.from_pretrained(base), prompts=["Hello there"]) as stage:
        yield stage


@pytest.fixture(scope="module")
def url(stage, tmp_path_factory):
    page = build(stage, folder=tmp_path_factory.mktemp("visitors"))
    page.queue(default_concurrency_limit=None)
    _, url, _ = page.launch(**launching(), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url.rstrip("/")
    page.close()


# Of one file: while it is open there is an event loop in this thread, which others' tests would find.
@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        assert not os.environ.get("CI"), "install chromium"
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page as a visitor of its own."""
    contexts = []

    def open(width=1280, height=900, theme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.foreign = []
        page.on("request", lambda sent: page.foreign.append(sent.url) if not _is_ours(sent.url, url) else None)
        page.goto(f"{url}/?__theme={theme}")
        page.wait_for_selector("#ask")
        return page

    yield open
    for context in contexts:
        context.close()


def _is_ours(sent, url):
    return sent.startswith((url, url.replace("127.0.0.1", "localhost"), "data:", "blob:"))
