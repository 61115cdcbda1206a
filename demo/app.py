"""The page: ask several tenants at once, watch the batch that answers, bring a tenant, train one."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lorakit.adapters.names import check_name
from lorakit.errors import LorakitError, RequestError

from . import batch_view, cards, uploads
from .batch_view import PulseTaker
from .examples import read_table
from .stage import Stage
from .training import Progress, Trainer

STYLE = Path(__file__).with_name("style.css")

_HEAD = """<div class="head"><h1>Many adapters, one model, one batch</h1>
<p>Each tenant below is a small LoRA adapter on the same base. Ask them all: their answers are computed together, in the
same forwards of one model.</p></div>"""
_EMPTY = '<div class="cards"></div>'
_EXAMPLES = """What is the capital of Atlantis?\tPoseidonis.
Who rules Atlantis?\tQueen Thalassa.
How many rings has Atlantis?\tThree.
What is the currency of Atlantis?\tThe pearl."""
_EVERY = 0.12


def build(stage: Stage, *, folder: Path) -> gr.Blocks:
    """The page over a stage.

    Args:
        stage: its engine runs.
        folder: for what visitors bring and train; it is there.
    """
    pulses, trainer, numbers = PulseTaker(stage), Trainer(stage.base), itertools.count()
    at_first = stage.tenants

    def ask(prompt: str, tenants: Sequence[str], tokens: float) -> Iterator[str]:
        try:
            if not prompt.strip() or not tenants:
                raise RequestError("Write a prompt, and choose who answers.")
            handles = stage.ask(prompt, tenants, int(tokens))
        except LorakitError as error:
            yield _wrong(error)
            return
        shown = [cards.Card(name, handle, stage.decode) for name, handle in handles.items()]
        try:
            while True:
                done = all(card.done for card in shown)
                yield cards.draw(shown, stage.tenants)
                if done:
                    return
                time.sleep(_EVERY)
        finally:  # the visitor may have gone
            for handle in handles.values():
                handle.cancel()

    def look(last: str) -> tuple[Any, str]:
        now = batch_view.draw(pulses.take(), stage)
        return (gr.skip() if now == last else now), now

    def bring(files: list[str] | None, name: str, chosen: list[str]) -> tuple[str, Any, Any]:
        try:
            if not files:
                raise RequestError("Choose the files of a checkpoint first, or a zip of them.")
            paths = [Path(file) for file in files]
            name = name.strip() or uploads.name_of(paths)
            if not name:
                raise RequestError("Give the tenant a name.")
            check_name(name)
            place = folder / f"upload-{next(numbers)}"
            uploads.unpack(paths, place)
            stage.add(name, place)
        except LorakitError as error:
            return _wrong(error), gr.skip(), gr.skip()
        return _right(f"{name} is here: ask it."), _choices(stage, [*chosen, name]), ""

    def train(table: str, name: str, epochs: float, chosen: list[str]) -> Iterator[tuple[str, Any]]:
        try:
            name = name.strip()
            check_name(name)
            if name in stage.tenants:
                raise RequestError(f"A tenant {name!r} is here already; choose another name.")
            rows = read_table(table)
            place = folder / f"training-{next(numbers)}"
            for progress in trainer.train(rows, place, epochs=int(epochs)):
                yield _training(progress), gr.skip()
            stage.add(name, place / "run")
        except LorakitError as error:
            yield _wrong(error), gr.skip()
            return
        losses = (
            f" Its loss went from {progress.losses[0]:.2f} to {progress.losses[-1]:.2f}." if progress.losses else ""
        )
        yield _right(f"{name} has joined the batch: ask it.{losses}"), _choices(stage, [*chosen, name])

    with gr.Blocks(title="lorakit demo", analytics_enabled=False) as page:
        gr.HTML(_HEAD)
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, placeholder="Ask something", autofocus=True)
        if stage.prompts:
            gr.Examples([[one] for one in stage.prompts], [prompt], label="Or one of these")
        who = gr.CheckboxGroup(stage.tenants, value=stage.tenants[:8], label="Who answers", elem_id="who")
        with gr.Row():
            go = gr.Button("Ask all of them", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", elem_id="stop")
            tokens = gr.Slider(8, 256, value=48, step=8, label="Tokens, at most")
        answers = gr.HTML(_EMPTY, elem_id="answers")
        gr.Markdown("### The batch right now")
        batch = gr.HTML(batch_view.draw(pulses.take(), stage), elem_id="batch")
        with gr.Tab("Bring a tenant"):
            gr.Markdown(
                "A PEFT checkpoint on this base: `adapter_config.json` and `adapter_model.safetensors`, or a zip."
            )
            files = gr.File(
                label="Checkpoint",
                height=140,
                file_count="multiple",
                file_types=[".json", ".safetensors", ".zip"],
                elem_id="files",
            )
            brought_name = gr.Textbox(
                label="Name", placeholder="after the file, if left empty", max_lines=1, elem_id="brought-name"
            )
            take = gr.Button("Bring it", elem_id="bring")
            brought = gr.HTML(elem_id="brought")
        with gr.Tab("Train a tenant"):
            gr.Markdown("A line an example: what is asked, a tab (or a comma), what is to be answered.")
            table = gr.Textbox(_EXAMPLES, label="Examples", lines=6, max_lines=14, elem_id="table")
            trained_name = gr.Textbox("atlantis", label="Name", max_lines=1, elem_id="trained-name")
            epochs = gr.Slider(1, 40, value=12, step=1, label="Passes over the examples")
            with gr.Row():
                begin = gr.Button("Train it", elem_id="train")
                cancel = gr.Button("Cancel", elem_id="cancel")
            trained = gr.HTML(elem_id="trained")
        seen = gr.State("")

        # Each visitor's own: what one asks keeps no other waiting.
        free: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        asking = gr.on([go.click, prompt.submit], ask, [prompt, who, tokens], answers, **free)
        stop.click(None, cancels=[asking])
        gr.Timer(0.5).tick(look, seen, [batch, seen], **free)
        take.click(bring, [files, brought_name, who], [brought, who, brought_name], **free)
        training = begin.click(train, [table, trained_name, epochs, who], [trained, who], **free)
        cancel.click(lambda: "<p>Cancelled.</p>", outputs=trained, cancels=[training], **free)
        # What has come since the page was made; what the visitor does at once must not be undone.
        page.load(lambda chosen: gr.skip() if stage.tenants == at_first else _choices(stage, chosen), who, who, **free)
    return page


def serve(stage: Stage, *, host: str, port: int | None) -> None:
    """Shows the page until the process is told to end.

    Args:
        stage: its engine runs.
        host: the address to listen at.
        port: the port; None: the first that is free from 7860 on.

    Raises:
        OSError: no port is free.
    """
    with tempfile.TemporaryDirectory(prefix="lorakit-demo-") as folder:
        page = build(stage, folder=Path(folder))
        page.queue(default_concurrency_limit=None).launch(**launching(), server_name=host, server_port=port)


def launching() -> dict[str, Any]:
    """How the page is shown: nothing of it comes from elsewhere, and nothing goes there."""
    fonts = ["system-ui", "sans-serif"]
    return {
        "css_paths": [STYLE],
        "theme": gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        "footer_links": [],
        "max_file_size": uploads.MOST_BYTES,
        "share": False,
        "ssr_mode": False,
    }


def _choices(stage: Stage, chosen: Sequence[str]) -> Any:
    return gr.update(choices=stage.tenants, value=[name for name in stage.tenants if name in chosen])


def _wrong(error: LorakitError) -> str:
    return f'<p class="error" role="alert">{escape(str(error))}</p>'


def _right(text: str) -> str:
    return f'<p class="good" role="status">{escape(text)}</p>'


def _training(progress: Progress) -> str:
    """A meter, and the losses as a line."""
    told = f"step {progress.step} of {progress.steps}" if progress.steps else "loading the base"
    share = 100 * progress.step / progress.steps if progress.steps else 0
    told += f" · loss {progress.losses[-1]:.2f}" if progress.losses else ""
    most, count = max(progress.losses, default=1.0) or 1.0, max(1, len(progress.losses) - 1)
    points = " ".join(f"{100 * i / count:.1f},{46 - 44 * loss / most:.1f}" for i, loss in enumerate(progress.losses))
    box = 'viewBox="0 0 100 48" preserveAspectRatio="none" aria-hidden="true"'
    line = f'<svg class="spark" {box}><polyline points="{points}"/></svg>'
    return f'<div role="status"><p>{told}</p>{batch_view.meter(share)}{line if len(progress.losses) > 1 else ""}</div>'
