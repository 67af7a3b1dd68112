"""The browser page: what stands where, and what happens when. What is computed stands in `session.py`.

All visitors share the model, which never changes. Everything else lives in `gr.State`, of which gradio keeps one for
each open page.
"""

import html
import re
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from sa2va import Sa2VAChatModel
from sa2va.data.scenes import CAPTION_QUESTION
from sa2va.demo.make_figure import IMAGE_QUESTION, VIDEO_QUESTION
from sa2va.demo.make_samples import SAMPLES
from sa2va.demo.predict import frame_sampling as parse_sampling
from sa2va.demo.session import (
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

IMAGE_QUESTIONS = (IMAGE_QUESTION, CAPTION_QUESTION, "How many shapes are there?")
KEPT_SECONDS = (3600, 24 * 3600)  # every hour, files older than a day are deleted
DRAWING_CONCURRENCY = 4  # of what needs no model
MAX_QUESTION = 4000  # characters
THRESHOLDS = (0.01, 0.99)
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError, ArgumentTypeError)
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<MPD")  # that FFmpeg follows
PRIVATE = {"api_visibility": "private"}
QUICK = {**PRIVATE, "show_progress": "hidden", "trigger_mode": "always_last"}

HERE = Path(__file__).resolve().parent
THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"])
CSS = (HERE / "page.css").read_text(encoding="utf-8") + "".join(
    f"#objects label:nth-of-type({i + 1}) {{ border-left-color: {css_color(i)} }}\n" for i in range(24)
)
STAGE_SCRIPT = (HERE / "stage.js").read_text(encoding="utf-8")
STAGE = """<div class="tools">
<button data-tool="look" title="Point at a mask, or at its words, to see it alone">Look</button>
<span>Mark a region:</span> <button data-tool="point">Point</button> <button data-tool="box">Box</button>
<button data-tool="brush">Brush</button> <button data-tool="clear">Clear</button>
</div><div class="picture">${picture}</div>"""
EMPTY = "<p>Give an image or a video, or take one of the examples.</p>"


@contextmanager
def told() -> Iterator[None]:
    """Makes errors that the visitor can mend messages on the page; paths in them lose the server's folders."""
    try:
        yield
    except USER_ERRORS as error:
        message = re.sub(rf"{re.escape(gr.utils.get_upload_folder())}[^'\s]*/", "", str(error))
        raise gr.Error(html.escape(message, quote=False), print_exception=False) from error


def _uploaded(path: str) -> str:
    """The path, if a visitor uploaded that file. gradio looks at this only where it preprocesses.

    Raises:
        ValueError: it lies elsewhere, or is a playlist, which can name any file of the server.
    """
    folder = Path(gr.utils.get_upload_folder()).resolve()
    if not Path(path).resolve().is_relative_to(folder):
        raise ValueError("Only files that were uploaded can be opened. Upload the image or the video.")
    with Path(path).open("rb") as file:
        head = file.read(1024)
        if head.startswith(b"ID3") or any(mark in head for mark in PLAYLISTS):  # FFmpeg looks behind such a tag
            raise ValueError("This is a playlist, which only names other files. Upload the video itself.")
    return path


class Visit:
    """What one visitor's page is about.

    Events change it in place, so that an answer that is still written sees that something else was opened.
    """

    def __init__(self):
        self.session = Session()


class Page:
    """Layout, events and HTTP API.

    Args:
        model: answers all questions.
        num_frames, frame_sampling, threshold: what the page begins with.
        max_frames: of a video.
        concurrency: how many questions are answered at the same time.
        queue_size: how many more may wait.
        generate_kwargs: of every question, as for `predict_forward`.

    Attributes:
        blocks: the gradio app.

    Raises:
        ValueError: the threshold is out of range.
    """

    def __init__(
        self,
        model: Sa2VAChatModel,
        *,
        num_frames: int,
        frame_sampling: str | list[int] = "first",
        threshold: float = 0.5,
        max_frames: int = 300,
        concurrency: int = 1,
        queue_size: int = 20,
        generate_kwargs: dict[str, Any] | None = None,
    ):
        if not THRESHOLDS[0] <= threshold <= THRESHOLDS[1]:
            raise ValueError(f"threshold={threshold} is a probability: give a number from 0.01 to 0.99.")
        self.model, self.max_frames, self.generate_kwargs = model, max_frames, generate_kwargs or {}
        sampling = frame_sampling if isinstance(frame_sampling, str) else ",".join(map(str, frame_sampling))
        with gr.Blocks(title="Sa2VA", analytics_enabled=False, delete_cache=KEPT_SECONDS, fill_width=True) as blocks:
            self.visit, self.turn = gr.State(Visit()), gr.State(0)
            gr.Markdown("## Sa2VA\nAsk about an image or a video, and see what the answer points at.")
            with gr.Row():
                with gr.Column(scale=3, min_width=360) as left:
                    self._lay_stage(threshold)
                with gr.Column(scale=2, min_width=320):
                    self._lay_media()
                    self._lay_chat(num_frames, sampling)
            with left:  # again, because examples fill what has just been laid
                self._lay_examples()
            with_model = {"concurrency_id": "model", "concurrency_limit": concurrency}
            self._wire(with_model)
            self._lay_api(num_frames, sampling, threshold, with_model)
        self.blocks = blocks.queue(max_size=queue_size, default_concurrency_limit=DRAWING_CONCURRENCY)

    def _lay_stage(self, threshold: float) -> None:
        """The picture with its masks, and what changes how they look."""
        self.stage = gr.HTML(
            [], picture=EMPTY, html_template=STAGE, js_on_load=STAGE_SCRIPT, apply_default_css=False, elem_id="stage"
        )
        self.frame = gr.Slider(0, 1, 0, step=1, label="Frame", visible=False, elem_id="frame")
        self.objects = gr.CheckboxGroup([], label="Objects", visible=False, elem_id="objects")
        self.threshold = gr.Slider(
            *THRESHOLDS, threshold, step=0.01, label="Threshold of the masks (probability)", elem_id="threshold"
        )
        self.player = gr.Video(label="Overlay", height=300, interactive=False, visible=False, elem_id="player")
        with gr.Row():
            self.overlay = gr.DownloadButton("Download overlay", size="sm", visible=False, elem_id="overlay")
            self.masks = gr.DownloadButton("Download masks (RLE)", size="sm", visible=False, elem_id="masks")

    def _lay_media(self) -> None:
        # mirrored, left would be right; gradio would ask for 1920 x 1440, which a browser may encode too slowly
        size = {"width": {"ideal": 1280}, "height": {"ideal": 720}}
        camera = gr.WebcamOptions(mirror=False, constraints={"video": size})
        with gr.Tab("Image"):
            sources = ["upload", "webcam", "clipboard"]
            self.image = gr.Image(sources=sources, webcam_options=camera, height=220, elem_id="image")
        with gr.Tab("Video"):
            self.video = gr.Video(
                sources=sources[:2], webcam_options=camera, include_audio=True, height=220, elem_id="video"
            )

    def _lay_chat(self, num_frames: int, sampling: str) -> None:
        self.chat = gr.Chatbot(height=340, buttons=[], latex_delimiters=[], show_label=False, elem_id="chat")
        self.question = gr.Textbox(
            placeholder="Please segment ...", show_label=False, max_lines=4, max_length=MAX_QUESTION, elem_id="question"
        )
        with gr.Row():
            self.send = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
            self.stop = gr.Button("Stop", min_width=80, elem_id="stop")
            self.anew = gr.Button("New chat", min_width=80, elem_id="anew")
        with gr.Accordion("How a video is read", open=False):
            self.sampling = gr.Dropdown(
                ["first", "uniform"], value=sampling, allow_custom_value=True, label="Frames the language model sees",
                info="the first ones, some spread over the video, or numbers such as 0,8,16",
            )  # fmt: skip
            self.num_frames = gr.Slider(1, max(16, num_frames), num_frames, step=1, label="How many (first, uniform)")

    def _lay_examples(self) -> None:
        image, video = SAMPLES / "shapes.png", SAMPLES / "shapes.mp4"
        asked = [self.image, self.question]
        gr.Examples([[image, question] for question in IMAGE_QUESTIONS], asked, label="Examples", elem_id="examples")
        gr.Examples([[video, VIDEO_QUESTION]], [self.video, self.question], label="Video", elem_id="video-examples")

    def _wire(self, with_model: dict[str, Any]) -> None:
        """Which event calls what; `with_model` limits those that need the model."""
        look = [self.visit, self.turn, self.frame, self.threshold, self.objects]
        files = [self.player, self.overlay, self.masks]
        whole = [self.turn, self.chat, self.stage, self.frame, self.objects, *files]
        asked = gr.on(
            [self.send.click, self.question.submit],
            self.ask,
            [self.question, self.visit, self.stage, self.num_frames, self.sampling, self.threshold],
            [*whole, self.question],
            show_progress_on=self.question,
            **with_model,
            **PRIVATE,
        )
        for media, opened, other in (
            (self.image, self.open_image, self.video),
            (self.video, self.open_video, self.image),
        ):
            # preprocess: gradio would decode images itself, and tell in its own way of those it can't
            media.change(
                opened, [media, self.visit], [*whole, other], show_progress_on=media, preprocess=False, **PRIVATE
            )
        gr.on([self.anew.click, self.chat.clear], self.restart, self.visit, whole, **QUICK)
        asked.success(self.redraw, look, self.stage, **QUICK).then(self.keep, look, files, **PRIVATE)
        self.stop.click(self.keep, look, files, cancels=asked, **PRIVATE)
        self.frame.input(self.redraw, look, self.stage, **QUICK)
        for changed in (
            gr.on([self.threshold.input, self.objects.input], self.redraw, look, self.stage, **QUICK),
            self.chat.select(self.choose, [self.visit, self.threshold], whole, **QUICK),
        ):
            changed.then(self.keep, look, files, **QUICK)

    def _lay_api(self, num_frames: int, sampling: str, threshold: float, with_model: dict[str, Any]) -> None:
        """`/predict`, described in docs/app.md."""
        with gr.Group(visible=False):
            inputs = [
                gr.File(label="picture"),
                gr.Textbox(label="text"),
                gr.Textbox("", label="past_text"),
                gr.JSON([], label="marks"),
                gr.Number(num_frames, precision=0, label="num_frames"),
                gr.Textbox(sampling, label="frame_sampling"),
                gr.Number(threshold, label="threshold"),
            ]
            gr.Button().click(self.predict, inputs, gr.JSON(label="answer"), api_name="predict", **with_model)

    # ------------------------------------------------------------------------------------------------------- events

    def open_image(self, file: dict[str, Any] | None, visit: Visit) -> dict[Any, Any]:
        """An image came, or went."""
        return self._open(file, visit, False, self.video)

    def open_video(self, file: dict[str, Any] | None, visit: Visit) -> dict[Any, Any]:
        """A video came, or went."""
        return self._open(file, visit, True, self.image)

    def _open(self, file: dict[str, Any] | None, visit: Visit, is_video: bool, other: gr.Component) -> dict[Any, Any]:
        if file is None:
            if visit.session.is_video != is_video:  # the other kind has come instead
                return {self.turn: gr.skip()}
            visit.session = Session()
            return self._whole(visit.session, 0)
        with told():
            visit.session = open_session(_uploaded(file["path"]), self.max_frames)
            return {**self._whole(visit.session, 0), other: None}

    def restart(self, visit: Visit) -> dict[Any, Any]:
        """Begins a new conversation about the same picture."""
        visit.session = replace(visit.session, turns=())
        return self._whole(visit.session, 0)

    def ask(
        self,
        question: str,
        visit: Visit,
        marks: Any,
        num_frames: int,
        sampling: str,
        threshold: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  as gradio wants it
    ) -> Iterator[dict[Any, Any]]:
        """Answers, and shows every frame as soon as it has masks; ends when something else is shown meanwhile."""
        session = visit.session
        with told():
            if session.source is None:
                raise ValueError("There is no picture yet. Give an image or a video, and wait until it is shown.")
            reading = {"num_frames": int(num_frames), "frame_sampling": parse_sampling(sampling)}
            marks = parse_marks(marks)
            if not session.goes_on(marks, reading):
                gr.Info("The marks or the frames to be read have changed, so this is a new conversation.")
            answers = ask(self.model, session, question, reading, marks, **self.generate_kwargs)
            for answered, picture in zip(answers, session.source.frames, strict=False):  # each frame is read once more
                if visit.session is not session:  # what is given last stays
                    yield self._whole(visit.session, max(0, len(visit.session.turns) - 1))
                    return
                visit.session = session = answered
                turn, number = answered.turns[-1], len(answered.turns) - 1
                index, shown = len(turn.frames) - 1, range(len(turn.labels))
                progress((index + 1, answered.length), unit="frames")
                if not index:
                    yield {**self._whole(answered, number, threshold), self.question: ""}
                else:
                    stage = stage_html(answered, index, number, threshold, shown, picture)
                    yield {self.frame: index, self.stage: gr.HTML(picture=stage)}
            yield {self.frame: 0}

    def choose(self, visit: Visit, threshold: float, event: gr.SelectData) -> dict[Any, Any]:
        """Shows the masks of the answer that was clicked."""
        return self._whole(visit.session, event.index // 2, threshold)

    def redraw(self, visit: Visit, turn: int, frame: int, threshold: float, shown: Any) -> Any:
        """The stage with another frame, threshold or choice of objects."""
        session = visit.session
        with told():
            return gr.HTML(picture=stage_html(session, frame, turn, threshold, shown)) if session.source else gr.skip()

    def keep(self, visit: Visit, turn: int, frame: int, threshold: float, shown: Any) -> list[Any]:
        """Player and downloads for what the stage shows."""
        session = visit.session
        if turn >= len(session.turns):
            return [gr.skip()] * 3
        with told():
            folder = Path(tempfile.mkdtemp(dir=gr.utils.get_upload_folder()))
            overlay, masks = write_files(session, turn, threshold, shown, folder)
        clip = overlay if session.is_video else None
        return [
            gr.Video(clip, visible=clip is not None),
            gr.DownloadButton(value=overlay, visible=overlay is not None),
            gr.DownloadButton(value=masks, visible=True),
        ]

    def _whole(self, session: Session, number: int, threshold: float = 0.5) -> dict[Any, Any]:
        """The whole page with the masks of turn `number`, all of them, in the first frame."""
        labels = session.turns[number].labels if session.turns else []
        messages = [
            {"role": role, "content": content}
            for i, turn in enumerate(session.turns)
            for role, content in (("user", html.escape(turn.question)), ("assistant", answer_html(turn, i)))
        ]
        picture = stage_html(session, 0, number, threshold, range(len(labels))) if session.source else EMPTY
        choices = [(f"{i + 1}. {label}", i) for i, label in enumerate(labels)]
        return {
            self.turn: number,
            self.chat: messages,
            self.stage: gr.HTML(**({} if session.turns else {"value": []}), picture=picture),
            self.frame: gr.Slider(value=0, maximum=max(session.length - 1, 1), visible=session.is_video),
            self.objects: gr.CheckboxGroup(choices, value=list(range(len(labels))), visible=bool(labels)),
            self.player: gr.Video(None, visible=False),
            self.overlay: gr.DownloadButton(visible=False),
            self.masks: gr.DownloadButton(visible=False),
        }

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
        """Answers one question about an image or a video; see docs/app.md."""
        with told():
            if picture is None or not isinstance(threshold, int | float) or not 0 < threshold < 1:
                raise ValueError("An image or a video is needed, and a threshold between 0 and 1.")
            session = open_session(_uploaded(picture), self.max_frames)
            reading = {"num_frames": num_frames, "frame_sampling": parse_sampling(frame_sampling)}
            for answered in ask(
                self.model, session, text, reading, parse_marks(marks), past_text, **self.generate_kwargs
            ):
                session = answered
            return record(session, 0, threshold) | {"past_text": session.turns[0].frames[0].past_text}
