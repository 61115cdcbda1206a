"""The page in a real Chromium: ask, switch, bring, train, and what goes wrong."""

import re
import shutil
import time

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.xdist_group("demo")

PROMPT = "How many rows has the table?"


@pytest.fixture(autouse=True)
def patience():
    expect.set_options(timeout=60_000)


def ask(page, prompt=PROMPT):
    page.before = requests(page)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.locator("#ask").click()


def requests(page):
    """Names of the requests whose answers are shown."""
    return set(page.locator(".cards article").evaluate_all("cards => cards.map(card => card.dataset.request)"))


def answers(page):
    """Tenant → text, when all are done that were asked last."""
    until(lambda: (now := requests(page)) and not now & page.before, seconds=60)
    expect(page.locator('.cards article[aria-busy="true"]')).to_have_count(0)
    return {
        card.locator("header b").inner_text(): card.locator(".text").inner_text()
        for card in page.locator(".cards article").all()
    }


def alone(stage, name, prompt=PROMPT, tokens=48):
    """What a tenant answers by itself."""
    from lorakit.chat import encode

    ids = encode(stage.tokenizer, [prompt])["input_ids"][0].tolist()
    found = stage.engine.submit(ids, None if name == "base" else name, max_new_tokens=tokens).result(60)
    return stage.decode(found.token_ids).strip()


def squeezed(text):
    return re.sub(r"\s+", " ", text).strip()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_tenants_answer_side_by_side_from_one_batch(visit, stage):
    page = visit()
    before = stage.engine.stats()
    ask(page)
    found = answers(page)
    after = stage.engine.stats()
    assert {name: squeezed(text) for name, text in found.items()} == {
        name: squeezed(alone(stage, name)) for name in ("base", "sql", "poet")
    }
    assert len(set(found.values())) == 3
    assert (after.segments - before.segments) / (after.steps - before.steps) > 1.5, "they shared forwards"
    assert "tokens/s" in page.locator(".cards article footer").first.inner_text()
    expect(page.locator("#batch")).to_contain_text("2 tenants known")
    assert page.foreign == [], "nothing comes from elsewhere"


def test_only_those_answer_who_are_chosen(visit):
    page = visit()
    page.get_by_label("poet").uncheck()
    ask(page)
    assert set(answers(page)) == {"base", "sql"}
    page.get_by_label("base").uncheck()
    page.get_by_label("sql").uncheck()
    ask(page)
    expect(page.locator("#answers [role=alert]")).to_contain_text("choose who answers")
    page.get_by_label("poet").check()
    ask(page)
    expect(page.locator(".cards article")).to_have_count(1)
    assert set(answers(page)) == {"poet"}


def test_the_batch_is_drawn_while_it_runs(visit, slow):
    page = visit()
    ask(page)
    expect(page.locator("#batch .rows i")).to_have_count(3)
    expect(page.locator("#batch")).to_contain_text(re.compile(r"3 rows · 2 adapters"))
    expect(page.locator("#batch .rate")).to_have_count(3)
    page.locator("#stop").click()
    expect(page.locator("#batch")).to_contain_text("idle")


@pytest.fixture
def slow(stage):
    """Forwards take time, as those of a large base."""
    hook = stage.model.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    yield
    hook.remove()


def test_a_visitor_who_goes_ends_its_requests(visit, stage, slow):
    page = visit()
    ask(page)
    expect(page.locator("#batch .rows i")).to_have_count(3)
    assert stage.engine.stats().open == 3
    page.context.close()
    until(lambda: stage.engine.stats().open == 0, seconds=3)


@pytest.mark.long
def test_visitors_do_not_wait_for_each_other(visit, slow):
    pages = [visit(), visit()]
    for page, prompt in zip(pages, ("one", "two"), strict=True):
        ask(page, prompt)
    for page in pages:
        expect(page.locator(".cards article")).to_have_count(3)
    expect(pages[0].locator("#batch .rows i")).to_have_count(6)
    for page in pages:
        page.locator("#stop").click()


@pytest.mark.parametrize("zipped", [False, True], ids=["files", "zip"])
def test_a_checkpoint_is_brought_and_used_at_once(visit, stage, checkpoint, tmp_path, zipped):
    page = visit()
    files = [checkpoint / "adapter_config.json", checkpoint / "adapter_model.safetensors"]
    name = "brought-zip" if zipped else "brought"
    if zipped:
        files = [shutil.make_archive(str(tmp_path / name), "zip", checkpoint.parent, "checkpoint")]
    page.locator("#files input[type=file]").set_input_files(files)
    expect(page.locator("#files")).to_contain_text("brought-zip" if zipped else "adapter_config")
    if not zipped:
        page.locator("#brought-name").get_by_role("textbox").fill(name)
    page.locator("#bring").click()
    expect(page.locator("#brought [role=status]")).to_contain_text(f"{name} is here")
    expect(page.locator("#who").get_by_label(name, exact=True)).to_be_checked()
    ask(page)
    assert squeezed(answers(page)[name]) == squeezed(alone(stage, name))
    other = visit()  # another visitor finds it too
    expect(other.locator("#who").get_by_label(name, exact=True)).to_be_visible()
    stage.model.unload_adapter(name)


BAD = [
    ([], "x", "Choose the files"),
    (["adapter_config.json"], "x", "adapter_model.safetensors is missing"),
    (["bad/adapter_config.json", "adapter_model.safetensors"], "x", "peft_type"),
    (["adapter_config.json", "adapter_model.safetensors"], "sql", "already serves an adapter 'sql'"),
    (["adapter_config.json", "adapter_model.safetensors"], "a/b", "a/b"),
    (["broken.zip"], "x", "cannot be unpacked"),
]


def test_bad_uploads_are_told_in_words(visit, stage, checkpoint, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{}")
    (tmp_path / "broken.zip").write_bytes(b"PK no archive")
    before = stage.tenants
    for files, name, told in BAD:
        page = visit()
        if files:
            found = [path if (path := tmp_path / file).exists() else checkpoint / file for file in files]
            page.locator("#files input[type=file]").set_input_files(found)
            expect(page.locator("#files")).to_contain_text(found[0].stem[:8])
        page.locator("#brought-name").get_by_role("textbox").fill(name)
        page.locator("#bring").click()
        expect(page.locator("#brought [role=alert]")).to_contain_text(told)
        assert "Traceback" not in page.content() and stage.tenants == before
    ask(page)  # nothing is broken
    assert set(answers(page)) == {"base", "sql", "poet"}


@pytest.mark.long
@pytest.mark.slow
def test_a_tenant_is_trained_and_joins(visit, stage):
    page = visit()
    page.get_by_role("tab", name="Train a tenant").click()
    page.locator("#trained-name").get_by_role("textbox").fill("trained")
    page.locator("#train").click()
    expect(page.locator("#trained")).to_contain_text(re.compile("loading|step"))
    ask(page)  # meanwhile others answer
    assert set(answers(page)) == {"base", "sql", "poet"}
    other = visit()
    other.get_by_role("tab", name="Train a tenant").click()
    other.locator("#trained-name").get_by_role("textbox").fill("second")
    other.locator("#train").click()
    expect(other.locator("#trained [role=alert]")).to_contain_text("another tenant is being trained")
    expect(page.locator("#trained [role=status]")).to_contain_text("has joined the batch", timeout=120_000)
    expect(page.locator("#who").get_by_label("trained", exact=True)).to_be_checked()
    ask(page)
    assert "trained" in answers(page)
    stage.model.unload_adapter("trained")


def test_a_table_that_cannot_be_read_is_told_in_words(visit):
    page = visit()
    page.get_by_role("tab", name="Train a tenant").click()
    page.locator("#table").get_by_role("textbox").fill("only one cell\nand another\nand one\nmore")
    page.locator("#train").click()
    expect(page.locator("#trained [role=alert]")).to_contain_text("row 1 has 1 cells, not two")


def test_by_keyboard_alone(visit):
    page = visit()
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type(PROMPT)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "ask":
            break
    else:
        raise AssertionError("the button is not reached")
    page.before = set()
    page.keyboard.press("Enter")
    assert set(answers(page)) == {"base", "sql", "poet"}
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("End")
    page.keyboard.type(" Now?")
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".cards article").first).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(visit, theme, width):
    page = visit(width=width, theme=theme)
    ask(page)
    answers(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in (".head p", ".cards .text", ".cards footer", ".cards header span", ".batch p", ".batch h4"):
        assert contrast(page, selector) >= 4.5, (selector, theme)


def contrast(page, selector):
    """WCAG's ratio of an element's text to what is behind it."""
    return page.locator(selector).first.evaluate(
        """element => {
            const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
            const over = (colours) => {
                canvas.clearRect(0, 0, 1, 1)
                for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1) }
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
            }
            const behind = []
            for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor)
            const light = (rgb) => {
                const [r, g, b] = rgb.map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
                return 0.2126 * r + 0.7152 * g + 0.0722 * b
            }
            const back = light(over(['white', ...behind]))
            const text = light(over(['white', ...behind, getComputedStyle(element).color]))
            return (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05)
        }"""
    )
