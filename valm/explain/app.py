"""An app in the browser: type a prompt and see its images, attention and answers change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

# Gradio and the hub read these on import: they turn off all telemetry.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from valm.errors import PANIC, ValmError, is_panic
from valm.evaluation.controls import GivenImages, RandomImages
from valm.explain.explanation import Explanation, Reader, explain_together
from valm.explain.page import render_body, style
from valm.retrieval.retriever import BlindRetriever, Retriever

HOST = "127.0.0.1"
# The only hosts of a request: a page elsewhere can have its own name resolved to this machine (DNS rebinding).
HOSTS = (HOST, "localhost")
MAX_IMAGES = 16  # of the slider; the operation takes more
# Characters of the prompt, which models of 4,096 tokens and more read, and of all answers.
MAX_PROMPT, MAX_ANSWERS = 20_000, 2_000
MAX_UPLOAD = "64mb"  # of each image
# Uploaded images are deleted when an hour old, checked every hour, and all of them at the end.
UPLOADS_STAY = (3600, 3600)

RETRIEVED, RANDOM, UPLOADED, NONE = "retrieved", "random", "uploaded", "none"
QUERY = "its own query (blind)"  # the one image of a blind model


class Stop(NamedTuple):
    """A prepared example of the tour, and what to look for."""

    name: str
    prompt: str
    images: str
    hint: str


TOUR = (
    Stop(
        "1. What it looks at",
        "the most common color of tomato is",
        RETRIEVED,
        "Every token finds images of its own. See what the last token found, and whether the answer follows it.",
    ),
    Stop(
        "2. Other images",
        "the most common color of tomato is",
        RANDOM,
        "The control: random images of the knowledge base stand in the place of the retrieved ones. An answer that "
        "came from the images changes.",
    ),
    Stop(
        "3. No images",
        "the most common color of tomato is",
        NONE,
        "The text alone: what the model would say without looking.",
    ),
)

# Phones begin with the further controls closed, so that the answers are near the button.
FOLD_ON_PHONES = "() => { if (innerWidth < 640) document.querySelector('#more > button').click() }"

CSS = """
.gradio-container { max-width: 84rem !important; margin: 0 auto !important; }
.dark .valm-explain { color-scheme: dark; }
body:not(.dark) .valm-explain { color-scheme: light; }
.valm-explain { --paper: var(--body-background-fill); background: none; padding: 0; max-width: none; }
.valm-explain .settings { margin-top: .5rem; }
.html-container:has(> * > .valm-explain), .html-container:has(> .valm-explain) { padding: 0 !important; }
.valm-explain .error { border-left: 4px solid var(--orange); padding: .1rem 0 .1rem 1rem; margin: 0; }
#error:not(:has(.error)) { display: none; }
.valm-explain h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; margin: 0; }
"""


class App:
    """The app's computations; `blocks` builds its page.

    Args:
        name, model, tokenizer: the model's name, and model and tokenizer as `valm.load` returns them.
        other: a second model, to compare, as (name, model, tokenizer).

    Raises:
        ValmError: a model takes images and has no retriever.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, other: tuple[str, Any, Any] | None = None):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.other = other
        retriever = model.retriever
        if model.fusion_options.num_images == 0:
            self.choices = [NONE]
        elif isinstance(retriever, Retriever):
            self.choices = [RETRIEVED, RANDOM, UPLOADED, NONE]
        elif isinstance(retriever, BlindRetriever):
            self.choices = [QUERY, NONE]
        else:
            raise ValmError(
                f"the model {name} takes {model.fusion_options.num_images} images a token, but has no retriever: give "
                "it a knowledge base (--kb)"
            )

    def explain(
        self,
        prompt: str,
        images: str,
        k: int,
        uploads: Sequence[str] | None,
        answers: str,
        beside: Sequence[str],
    ) -> dict[str, Explanation]:
        """The explanations that are shown, by their titles.

        Args:
            images: one of `choices`.
            k: images per token.
            uploads: files whose images replace those of the knowledge base.
            answers: words separated by commas; empty for the likeliest.
            beside: which of `comparisons` to show too.
        """
        for what, text, most in (("the prompt", prompt, MAX_PROMPT), ("the list of answers", answers, MAX_ANSWERS)):
            if len(text) > most:
                raise ValmError(f"{what} has {len(text):,} characters, and the app takes {most:,} at most")
        if RETRIEVED in self.choices and not 1 <= k <= self._max_images():
            raise ValmError(f"K is {k}, expected 1 to {self._max_images()}")
        title, reader = self._reader(images, k, uploads)
        readers = {title: reader}
        if self.choices[0] in beside and images != self.choices[0]:
            first, with_first = self._reader(self.choices[0], k, None)
            readers = {first: with_first} | readers
        if self.other is not None and self.other[0] in beside:
            readers[self.other[0]] = Reader(*self.other[1:])
        words = [word.strip() for word in answers.split(",")] if answers.strip() else None
        return explain_together(readers, prompt, words)

    def _reader(self, images: str, k: int, uploads: Sequence[str] | None) -> tuple[str, Reader]:
        """A reader with these images, and its title."""
        if images == NONE:
            return f"{self.name}, no images", Reader(self.model, self.tokenizer, with_images=False)
        retriever: Any = self.model.retriever
        if images == QUERY:
            return f"{self.name}, blind", Reader(self.model, self.tokenizer)
        of_kb = type(retriever)(retriever.encoder, retriever.kb, k, retriever.index, cache_tokens=0)
        if images == RETRIEVED:
            return f"{self.name}, {k} retrieved images", Reader(self.model, self.tokenizer, of_kb)
        if images == RANDOM:
            return f"{self.name}, {k} random images", Reader(self.model, self.tokenizer, RandomImages(of_kb, 0))
        if not uploads:
            raise ValmError("there are no uploaded images yet: add some in More controls")
        given = GivenImages(of_kb, [Path(file) for file in uploads])
        return f"{self.name}, uploaded images", Reader(self.model, self.tokenizer, given)

    def show(self, head: int, *arguments: Any) -> tuple[str, str]:
        """The result of `explain` and the error in one sentence, as HTML; one of the two is empty.

        Args:
            head: from 1 on; 0 for the mean of all.
        """
        try:
            body = render_body(self.explain(*arguments), head - 1 if head else None)
        except BaseException as error:
            if not isinstance(error, ValmError) and not is_panic(error):
                raise
            reason = str(error) if isinstance(error, ValmError) else f"{PANIC}: {error}"
            return "", f'<div class="valm-explain"><p class="error" role="alert">{escape(reason)}</p></div>'
        return f'<div class="valm-explain">{body}</div>', ""

    def blocks(self) -> Any:
        """The app as Gradio's Blocks.

        Raises:
            ValmError: Gradio is missing.
        """
        gradio = _gradio()
        options = self.model.fusion_options
        has_kb = RETRIEVED in self.choices
        stops = [stop for stop in TOUR if stop.images in self.choices]
        beside = [*self.choices[:1], *([self.other[0]] if self.other else [])]
        heads = self.model.fusion_options.heads
        page = {"title": f"valm · {self.name}", "analytics_enabled": False, "delete_cache": UPLOADS_STAY}
        with gradio.Blocks(**page) as blocks:
            gradio.HTML(
                f'<div class="valm-explain"><p class="kicker">valm app</p><h1>{escape(self.name)}</h1></div>',
                apply_default_css=False,
                js_on_load=None,
            )
            with gradio.Row(equal_height=False):
                with gradio.Column(scale=1, min_width=300):
                    prompt = gradio.Textbox(stops[0].prompt, label="Prompt", lines=2, elem_id="prompt")
                    images = gradio.Radio(self.choices, value=self.choices[0], label="Images", elem_id="images")
                    run = gradio.Button("Explain", variant="primary", elem_id="run")
                    error = gradio.HTML(elem_id="error", apply_default_css=False, js_on_load=None)
                    with gradio.Accordion("More controls", elem_id="more"):
                        k = gradio.Slider(
                            1,
                            self._max_images(),
                            value=max(options.num_images, 1),
                            step=1,
                            label="K, images a token",
                            visible=has_kb,
                            elem_id="k",
                        )
                        uploads = gradio.File(
                            label="Your own images",
                            file_count="multiple",
                            file_types=["image"],
                            height=150,
                            visible=has_kb,
                            elem_id="uploads",
                        )
                        shown_beside = gradio.CheckboxGroup(
                            beside, value=beside, label="Beside it", visible=len(self.choices) > 1 or len(beside) > 1
                        )
                        answers = gradio.Textbox(
                            label="Answers, with commas between them (else the likeliest)", elem_id="answers"
                        )
                        every_head = ((f"head {number}", number) for number in range(1, heads + 1))
                        head = gradio.Dropdown(
                            [("all heads, their mean", 0), *every_head], value=0, label="Attention of", elem_id="head"
                        )
                with gradio.Column(scale=3, min_width=320):
                    with gradio.Row(equal_height=True):
                        buttons = [gradio.Button(stop.name, size="sm", min_width=90) for stop in stops]
                    hint = gradio.Markdown("A tour of three examples, or a prompt of your own.", elem_id="hint")
                    output = gradio.HTML(elem_id="explanation", apply_default_css=False, js_on_load=None)
            inputs = [head, prompt, images, k, uploads, answers, shown_beside]
            update = {"fn": self.show, "inputs": inputs, "outputs": [output, error], "show_progress_on": output}
            # always_last: a change during a computation is not lost
            update |= {"api_visibility": "private", "trigger_mode": "always_last"}
            changes = [prompt.submit, answers.submit, images.input, k.release, shown_beside.input, head.input]
            blocks.load(js=FOLD_ON_PHONES)
            gradio.on([blocks.load, run.click, *changes], **update)
            uploads.upload(lambda: UPLOADED, outputs=images, api_visibility="private").then(**update)
            for button, stop in zip(buttons, stops, strict=True):
                chosen = (stop.prompt, stop.images, stop.hint)
                button.click(
                    lambda chosen=chosen: chosen, outputs=[prompt, images, hint], api_visibility="private"
                ).then(**update)
        return blocks

    def _max_images(self) -> int:
        in_kb = len(self.model.retriever.kb) if RETRIEVED in self.choices else 1
        return max(1, self.model.fusion_options.num_images, min(MAX_IMAGES, in_kb))


def launch(app: App, port: int | None = None) -> Any:
    """Serves the app on this machine alone, under its own names, in a thread.

    Args:
        port: by default the first free one from 7860 on.

    Returns:
        Gradio's Blocks: `local_url` is the address, `block_thread()` waits, `close()` ends it.

    Raises:
        ValmError: Gradio is missing, or the port is taken.
    """
    gradio = _gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    own_hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS)), Middleware(_OwnOrigin)]
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"], primary_hue="blue")
    blocks = app.blocks()
    try:
        blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme,
            css=style() + CSS,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD,
            app_kwargs={"middleware": own_hosts},
        )
    except OSError as error:
        raise ValmError(f"the app cannot be served at {HOST}: {error}") from error
    return blocks


class _OwnOrigin:
    """ASGI middleware: what a page of another host asks for is refused."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        if origin is None or origin.partition("://")[2].partition(":")[0] in HOSTS:
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("this page may not ask valm app", 403)(scope, receive, send)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValmError(f"the app needs the package gradio ({error}): pip install -e '.[app]'") from error
    return gradio
