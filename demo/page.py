"""The browser page: what stands where, and what happens when. What is computed stands in `session.py`.

All visitors share the model and the limits, which never change. Everything else lives in `gr.State`, of which gradio
keeps one for each open page.
"""

import html
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from sa2va import Sa2VAChatModel
from sa2va.data.scenes import CAPTION_QUESTION
from sa2va.demo.make_samples import SAMPLES
from sa2va.demo.predict import frame_sampling
from sa2va.demo.session import (
    LEVELS,
    Limits,
    Reading,
    Session,
    answer_html,
    ask,
    css_color,
    open_session,
    parse_marks,
    record,
    stage_html,
    write_files,
)

IMAGE_QUESTIONS = ("Please segment the red star in this image.", CAPTION_QUESTION, "How many shapes are there?")
VIDEO_QUESTION = "Can you segment the square moving right in this video?"
SAMPLINGS = ("first", "uniform")
KEPT_SECONDS = (3600, 24 * 3600)  # files are looked through every hour, and deleted after a day
DRAWING_CONCURRENCY = 4  # of what needs no model
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError)
THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"])

STAGE = """<div class="tools">
<button data-tool="look" title="Point at a mask, or at its words, to see it alone">Look</button>
<span>Mark a region:</span> <button data-tool="point">Point</button> <button data-tool="box">Box</button>
<button data-tool="brush">Brush</button> <button data-tool="clear">Clear</button>
</div><div class="picture">${picture}</div>"""
EMPTY = "<p>Give an image or a video, or take one of the examples.</p>"
HERE = Path(__file__).resolve().parent
STAGE_SCRIPT = (HERE / "stage.js").read_text(encoding="utf-8")
CSS = (HERE / "page.css").read_text(encoding="utf-8") + "".join(
    f"#objects label:nth-of-type({i + 1}) {{ border-left-color: {css_color(i)} }}\n" for i in range(24)
)


class Photo(gr.Image):
    """gradio's image, which hands over the file as it is: whether it can be read is then told as everywhere."""

    is_template = True  # the browser's side is that of gr.Image

    def preprocess(self, payload: Any) -> str | None:
        """Path of the uploaded file."""
        return None if payload is None else payload.path


@contextmanager
def told() -> Iterator[None]:
    """Errors that the visitor can mend become messages on the page; paths in them lose the server's folders."""
    try:
        yield
    except USER_ERRORS as error:
        message = re.sub(rf"{re.escape(gr.utils.get_upload_folder())}[^'\s]*/", "", str(error))
        raise gr.Error(html.escape(message, quote=False), print_exception=False) from error


class Page:
    """Layout, events and HTTP API.

    Args:
        model: answers all questions.
        limits: of what visitors bring.
        reading, threshold: what the page begins with.
        concurrency: how many questions are answered at the same time.
        queue_size: how many more may wait.
        generate_kwargs: of every question, as for `predict_forward`.

    Attributes:
        blocks: the gradio app.
    """

    def __init__(
        self,
        model: Sa2VAChatModel,
        limits: Limits,
        reading: Reading,
        threshold: float = 0.5,
        concurrency: int = 1,
        queue_size: int = 20,
        **generate_kwargs: Any,
    ):
        self.model, self.limits, self.generate_kwargs = model, limits, generate_kwargs
        self.with_model = {"concurrency_id": "model", "concurrency_limit": concurrency}
        with gr.Blocks(title="Sa2VA", analytics_enabled=False, delete_cache=KEPT_SECONDS, fill_width=True) as blocks:
            self.session, self.turn = gr.State(Session()), gr.State(0)
            gr.Markdown("## Sa2VA\nAsk about a picture or a video, and see what the answer points at.")
            with gr.Row():
                with gr.Column(scale=3, min_width=360):
                    self._lay_stage(threshold)
                with gr.Column(scale=2, min_width=320):
                    self._lay_media()
                    self._lay_chat(reading)
            self._wire()
            self._add_api(reading, threshold)
        self.blocks = blocks.queue(max_size=queue_size, default_concurrency_limit=DRAWING_CONCURRENCY)

    def _lay_media(self) -> None:
        with gr.Tabs():
            with gr.Tab("Image"):
                self.image = Photo(sources=["upload", "webcam", "clipboard"], height=170, elem_id="image")
            with gr.Tab("Video"):
                self.video = gr.Video(sources=["upload", "webcam"], height=170, include_audio=True, elem_id="video")

    def _lay_stage(self, threshold: float) -> None:
        self.stage = gr.HTML(
            [], picture=EMPTY, html_template=STAGE, js_on_load=STAGE_SCRIPT, apply_default_css=False, elem_id="stage"
        )
        self.frame = gr.Slider(0, 1, 0, step=1, label="Frame", visible=False, elem_id="frame")
        self.objects = gr.CheckboxGroup([], label="Objects", type="value", visible=False, elem_id="objects")
        self.threshold = gr.Slider(
            0.05, 0.95, threshold, step=0.05, label="Threshold: probability above which a pixel belongs to an object"
        )
        self.player = gr.Video(label="Overlay", interactive=False, visible=False, elem_id="player")
        with gr.Row():
            self.overlay = gr.DownloadButton("Overlay", size="sm", visible=False, elem_id="overlay")
            self.masks = gr.DownloadButton("Masks (RLE, JSON)", size="sm", visible=False, elem_id="masks")

    def _lay_chat(self, reading: Reading) -> None:
        self.chat = gr.Chatbot(height=360, buttons=[], latex_delimiters=[], show_label=False, elem_id="chat")
        self.question = gr.Textbox(
            placeholder="Please segment ...", show_label=False, lines=2, max_length=4000, elem_id="question"
        )
        with gr.Row():
            self.send = gr.Button("Ask", variant="primary", elem_id="ask")
            self.stop = gr.Button("Stop", elem_id="stop")
            self.anew = gr.Button("New conversation", elem_id="anew")
        with gr.Accordion("How a video is read", open=False):
            sampling = reading.frame_sampling
            shown = sampling if isinstance(sampling, str) else ",".join(map(str, sampling))
            self.sampling = gr.Dropdown(
                SAMPLINGS, value=shown, allow_custom_value=True, label="Frames the language model sees",
                info="the first ones, uniformly spread ones, or numbers such as 0,8,16",
            )  # fmt: skip
            self.num_frames = gr.Slider(1, 16, reading.num_frames, step=1, label="How many (first and uniform)")
        gr.Examples(
            [[str(SAMPLES / "shapes.png"), question] for question in IMAGE_QUESTIONS],
            [self.image, self.question], label="Examples: image",
        )  # fmt: skip
        gr.Examples([[str(SAMPLES / "shapes.mp4"), VIDEO_QUESTION]], [self.video, self.question], label="Video")

    def _wire(self) -> None:
        private = {"api_visibility": "private"}
        quick = {**private, "show_progress": "hidden", "trigger_mode": "always_last"}
        look = [self.session, self.turn, self.frame, self.threshold, self.objects]
        files = [self.player, self.overlay, self.masks]
        whole = [self.session, self.turn, self.chat, self.stage, self.frame, self.objects, *files]
        self.image.change(self.open_image, [self.image, self.session], [*whole, self.video], **private)
        self.video.change(self.open_video, [self.video, self.session], [*whole, self.image], **private)
        self.anew.click(self.restart, self.session, whole, **private)
        asked = gr.on(
            [self.send.click, self.question.submit],
            self.ask,
            [self.question, self.session, self.stage, self.num_frames, self.sampling, self.threshold],
            [*whole, self.question],
            show_progress_on=self.chat,
            **self.with_model,
            **private,
        )
        asked.success(self.keep, look, files, show_progress_on=files, **private)
        self.stop.click(self.keep, look, files, cancels=[asked], **private)
        self.frame.input(self.redraw, look, self.stage, **quick)
        gr.on([self.threshold.input, self.objects.input], self.redraw, look, self.stage, **quick).then(
            self.keep, look, files, show_progress="hidden", **private
        )
        self.chat.select(self.choose, [self.session, self.threshold], whole, **quick).then(
            self.keep, look, files, show_progress="hidden", **private
        )

    def _add_api(self, reading: Reading, threshold: float) -> None:
        """`/predict`, described in docs/app.md."""
        with gr.Group(visible=False):
            inputs = [
                gr.File(label="picture"),
                gr.Textbox(label="text"),
                gr.Textbox("", label="past_text"),
                gr.JSON([], label="marks"),
                gr.Number(reading.num_frames, precision=0, label="num_frames"),
                gr.Textbox("first", label="frame_sampling"),
                gr.Number(threshold, label="threshold"),
            ]
            gr.Button().click(self.predict, inputs, gr.JSON(label="answer"), api_name="predict", **self.with_model)

    # ------------------------------------------------------------------------------------------------------- events

    def open_image(self, path: str | None, session: Session) -> dict[Any, Any]:
        """An image came, or went."""
        return self._open(path, session, is_video=False, other=self.video)

    def open_video(self, path: str | None, session: Session) -> dict[Any, Any]:
        """A video came, or went."""
        return self._open(path, session, is_video=True, other=self.image)

    def _open(self, path: str | None, session: Session, is_video: bool, other: gr.Component) -> dict[Any, Any]:
        if path is None:
            return self._show(Session()) if session.source and session.is_video == is_video else {self.turn: gr.skip()}
        with told():
            return {**self._show(open_session(path, self.limits)), other: None}

    def restart(self, session: Session) -> dict[Any, Any]:
        """Begins a new conversation about the same picture."""
        return self._show(replace(session, turns=()))

    def ask(
        self,
        question: str,
        session: Session,
        marks: Any,
        num_frames: int,
        sampling: str,
        threshold: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  as gradio wants it
    ) -> Iterator[dict[Any, Any]]:
        """Answers, and shows every frame as soon as it has masks."""
        with told():
            if session.source is None:
                raise ValueError("There is no picture yet. Give an image or a video, and wait until it is shown.")
            reading, marks = Reading(int(num_frames), _sampling(sampling)), parse_marks(marks)
            if session.turns and not session.goes_on(marks, reading):
                gr.Info("The marks or the frames to be read have changed, so this is a new conversation.")
            index = 0
            for index, answered in enumerate(ask(self.model, session, question, reading, marks, **self.generate_kwargs)):
                number = len(answered.turns) - 1
                progress((index + 1, answered.length), desc="Frames", unit="frames")
                yield {**self._show(answered, number, index, threshold, new=not index), self.question: ""}
            if index:
                yield {**self._show(answered, number, 0, threshold, new=False)}

    def choose(self, session: Session, threshold: float, event: gr.SelectData) -> dict[Any, Any]:
        """Shows the masks of the answer that was clicked."""
        return self._show(session, event.index // 2, 0, threshold)

    def redraw(self, session: Session, turn: int, frame: int, threshold: float, shown: list[int]) -> Any:
        """The stage with another frame, threshold or choice of objects."""
        return gr.HTML(picture=stage_html(session, frame, turn, threshold, shown)) if session.source else gr.skip()

    def keep(self, session: Session, turn: int, frame: int, threshold: float, shown: list[int]) -> list[Any]:
        """Player and downloads for what the stage shows."""
        if turn >= len(session.turns):
            return [gr.skip()] * 3
        with told():
            folder = Path(tempfile.mkdtemp(dir=self.chat.GRADIO_CACHE))
            overlay, masks = write_files(session, turn, threshold, shown, folder)
        is_clip = overlay is not None and session.is_video
        return [
            gr.Video(overlay if is_clip else None, visible=is_clip),
            gr.DownloadButton(value=overlay, visible=overlay is not None),
            gr.DownloadButton(value=masks, visible=True),
        ]

    def _show(
        self, session: Session, number: int = 0, frame: int = 0, threshold: float = 0.5, new: bool = True
    ) -> dict[Any, Any]:
        """What a session looks like; `new` is False if only the frame is another one than before."""
        labels = session.turns[number].labels if session.turns else []
        shown = range(len(labels))
        output = {self.session: session, self.frame: gr.Slider(value=frame)}
        if session.source:
            output[self.stage] = gr.HTML(picture=stage_html(session, frame, number, threshold, shown))
        if not new:
            return output
        messages = [
            {"role": role, "content": content}
            for i, turn in enumerate(session.turns)
            for role, content in (("user", html.escape(turn.question)), ("assistant", answer_html(turn, i)))
        ]
        choices = [(f"{i + 1}. {label}", i) for i, label in enumerate(labels)]
        output |= {
            self.turn: number,
            self.chat: messages,
            self.frame: gr.Slider(value=frame, maximum=max(session.length - 1, 1), visible=session.is_video),
            self.objects: gr.CheckboxGroup(choices, value=list(shown), visible=bool(choices)),
            self.player: gr.Video(None, visible=False),
            self.overlay: gr.DownloadButton(visible=False),
            self.masks: gr.DownloadButton(visible=False),
        }
        if not session.turns:
            picture = stage_html(session, 0, 0, threshold, ()) if session.source else EMPTY
            output[self.stage] = gr.HTML([], picture=picture)
        return output

    def predict(
        self,
        picture: str | None,
        text: str,
        past_text: str,
        marks: Any,
        num_frames: int,
        frame_sampling: str,
        threshold: float,
    ) -> dict[str, Any]:
        """Answers one question about an image or a video, as described in docs/app.md."""
        with told():
            session = open_session(picture, self.limits) if picture else Session()
            reading = Reading(num_frames, _sampling(frame_sampling))
            asked = (reading, parse_marks(marks), past_text)
            for session in ask(self.model, session, text, *asked, **self.generate_kwargs):  # noqa: B007,B020
                pass
            return record(session, 0, threshold) | {"past_text": session.turns[0].past_text}


def _sampling(text: str) -> str | tuple[int, ...]:
    chosen = frame_sampling(text)
    return chosen if isinstance(chosen, str) else tuple(chosen)
