"""The browser page: what its sessions compute, what programs get over HTTP, and what people see in a real browser.

Browser tests need Playwright and a Chromium or Chrome: `apt-get install chromium`, or SA2VA_BROWSER=/path/to/chrome.
"""

import json
import os
import shutil
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sa2va.data.scenes import CAPTION_QUESTION
from sa2va.demo import app
from sa2va.demo.make_samples import SAMPLES
from sa2va.demo.predict import DEFAULT_MODEL, load_model
from sa2va.demo.session import (
    Mark,
    answer_html,
    ask,
    object_color,
    open_session,
    parse_marks,
    region_masks,
    stage_html,
    write_files,
)
from sa2va.processing_sa2va import rle_to_masks

IMAGE, VIDEO = SAMPLES / "shapes.png", SAMPLES / "shapes.mp4"
STAR, SQUARE = "Please segment the red star in this image.", "Segment the blue square in this video."
READING = {"num_frames": 5, "frame_sampling": "first"}
PURPLE_SQUARE = Mark("box", ((235, 20), (325, 110)))  # in shapes.png
BROWSER = os.environ.get("SA2VA_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def model():
    """The small checkpoint."""
    return load_model(str(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def photo():
    """A session about shapes.png."""
    return open_session(IMAGE, max_frames=1)


@pytest.fixture(scope="module")
def captioned(model, photo):
    """The session after a caption with a mask for each of five shapes."""
    return last(ask(model, photo, CAPTION_QUESTION, READING))


def last(sessions):
    *_, session = sessions
    return session


def answers(session):
    return [turn.frames[0].prediction for turn in session.turns]


# ----------------------------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.835])
def test_threshold_cuts_the_kept_probabilities_as_the_model_would(model, photo, captioned, threshold):
    out = model.predict_forward(image=IMAGE, text=CAPTION_QUESTION, mask_threshold=threshold)
    kept = captioned.frame(0, 0, threshold).masks
    assert np.array_equal(kept, np.concatenate(out.prediction_masks))


def test_follow_up_goes_on_with_the_conversation_and_its_image(model, captioned):
    asked = last(ask(model, captioned, STAR, READING))
    first = model.predict_forward(image=IMAGE, text=CAPTION_QUESTION)
    second = model.predict_forward(image=IMAGE, text=STAR, past_text=first.past_text)
    assert answers(asked) == [first.prediction, second.prediction]
    assert answers(captioned) == [first.prediction]  # what was there before stays as it was


def test_region_may_be_added_to_a_conversation_but_not_moved_in_it(model, captioned):
    moved = Mark("point", ((60, 270),))
    marked = last(ask(model, captioned, "Please describe region1.", READING, [PURPLE_SQUARE]))
    assert len(marked.turns) == 2
    assert not marked.goes_on([moved], READING)
    assert len(last(ask(model, marked, "Please describe region1.", READING, [moved])).turns) == 1


def test_video_answer_grows_frame_by_frame_and_reads_as_it_is_told(model):
    clip = open_session(VIDEO, max_frames=24)
    steps = list(ask(model, clip, SQUARE, {"num_frames": 3, "frame_sampling": "uniform"}))
    assert [len(step.turns[0].frames) for step in steps] == list(range(1, 25))
    assert not steps[-1].goes_on([], READING)
    out = model.predict_forward(video=VIDEO, text=SQUARE, num_frames=3, frame_sampling="uniform")
    kept = np.stack([steps[-1].frame(0, index, 0.5).masks[0] for index in range(24)])
    assert np.array_equal(kept, out.prediction_masks[0])


def test_video_with_too_many_frames_is_refused():
    with pytest.raises(ValueError, match="more than 23 frames"):
        open_session(VIDEO, max_frames=23)


def test_phrases_have_the_colours_of_their_masks(captioned):
    answer, stage = answer_html(captioned.turns[0], 0), stage_html(captioned, 0, 0, 0.5, range(5))
    assert ">a red star</mark>" in answer
    for index in range(5):
        color = "#{:02x}{:02x}{:02x}".format(*object_color(index))
        assert f'<mark class="turn0-object{index}" style="background: {color}' in answer
        assert f'class="mask turn0-object{index}"' in stage
        assert f'fill="{color}"' in stage


def test_words_of_the_model_are_no_html_of_ours(captioned):
    frame = replace(captioned.turns[0].frames[0], prediction="1 < 2 & <p> x < y </p> [SEG] .<|im_end|>")
    html = answer_html(replace(captioned.turns[0], frames=(frame,)), 0)
    assert html.startswith("1 &lt; 2 &amp; <mark")
    assert html.endswith("[SEG]") is False


def test_hidden_object_is_not_painted_but_recorded(captioned, tmp_path):
    overlay, masks = write_files(captioned, 0, 0.5, [1], tmp_path)
    given, painted = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (IMAGE, overlay))
    areas = captioned.frame(0, 0, 0.5).masks
    assert (given == painted)[areas[0] & ~areas[1]].mean() > 0.9  # a label may lie on it
    assert (given != painted).any(axis=-1)[areas[1]].all()
    assert [len(thing["rle"]) for thing in json.loads(masks.read_text())["objects"]] == [1] * 5


def test_mark_covers_the_cells_it_lies_on():
    box, point, stroke = region_masks(
        [Mark("box", ((200, 50), (0, 0))), Mark("point", ((399, 99),)), Mark("brush", ((0, 75), (400, 75)))], (400, 100), 4
    )  # fmt: skip
    assert np.argwhere(box).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert np.argwhere(point).tolist() == [[3, 3]]
    assert stroke[2:].all()


BAD_MARKS = [
    "box", [1], [{"kind": "box"}], [{"kind": "lasso", "points": [[1, 2]]}], [{"kind": "point", "points": []}],
    [{"kind": "point", "points": [[1, 2, 3]]}], [{"kind": "point", "points": [[1, float("nan")]]}],
    [{"kind": "point", "points": [[1, 2]]}] * 17,
]  # fmt: skip


@pytest.mark.parametrize("marks", BAD_MARKS)
def test_unusable_marks_are_told(marks):
    with pytest.raises(ValueError, match="Marks are a list of at most 16"):
        parse_marks(marks)


# --------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def address():
    """The page, served at this address."""
    gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")
    arguments = app.parse(["--max-frames", "30", "--max-file-size", "1mb", "--concurrency", "2"])
    yield app.launch(arguments, wait=False).rstrip("/")
    gradio.close_all()


@pytest.fixture(scope="module")
def client(address):
    """gradio's own client."""
    import gradio_client

    return gradio_client.Client(address, verbose=False)


def same_as(out, answer):
    masks = [rle_to_masks(thing["rle"]) for thing in answer["objects"]]
    assert [answer["prediction"], answer["phrases"], answer["past_text"]] == [
        out.prediction,
        out.phrases,
        out.past_text,
    ]
    return len(masks) == len(out.prediction_masks) > 0 and all(map(np.array_equal, masks, out.prediction_masks))


def post(url, body, content_type):
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    return json.loads(urllib.request.urlopen(request).read())


def http_predict(address, path, *options):
    """The three requests of docs/app.md, without any client."""
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--x--\r\n'
    (uploaded,) = post(
        f"{address}/gradio_api/upload",
        form % (path.name.encode(), path.read_bytes()),
        "multipart/form-data; boundary=x",
    )
    data = [{"path": uploaded, "meta": {"_type": "gradio.FileData"}}, *options]
    event = post(f"{address}/gradio_api/call/predict", json.dumps({"data": data}).encode(), "application/json")[
        "event_id"
    ]
    events = urllib.request.urlopen(f"{address}/gradio_api/call/predict/{event}").read().decode()
    kind, _, content = events.strip().split("\n\n")[-1].partition("\ndata: ")
    return kind.removeprefix("event: "), json.loads(content)


def test_client_gets_what_predict_forward_gives(model, client):
    import gradio_client

    picture = gradio_client.handle_file(IMAGE)
    first = client.predict(picture=picture, text=STAR, threshold=0.4, api_name="/predict")
    out = model.predict_forward(image=IMAGE, text=STAR, mask_threshold=0.4)
    assert same_as(out, first)
    marks = [{"kind": "box", "points": [[235, 20], [325, 110]]}]
    second = client.predict(picture, "Please describe region1.", first["past_text"], marks, api_name="/predict")
    assert "a purple square" in second["prediction"]


def test_plain_http_gets_what_predict_forward_gives(model, address):
    kind, (answer,) = http_predict(address, VIDEO, SQUARE, "", [], 3, "uniform", 0.5)
    assert kind == "complete"
    assert answer["fps"] == 8
    assert same_as(model.predict_forward(video=VIDEO, text=SQUARE, num_frames=3, frame_sampling="uniform"), answer)


def test_program_is_told_what_is_wrong_and_nothing_of_the_server(address, tmp_path):
    (tmp_path / "broken.png").write_bytes(IMAGE.read_bytes()[:9000])
    kind, message = http_predict(address, tmp_path / "broken.png", STAR, "", [], 5, "first", 0.5)
    assert kind == "error"
    assert message["error"].startswith("'broken.png' is a damaged image")


def test_nothing_but_predict_is_offered_to_programs(client):
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/predict"]


def test_upload_larger_than_the_limit_is_refused(address, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(2_000_000))
    with pytest.raises(urllib.error.HTTPError, match="413"):
        http_predict(address, tmp_path / "large.png", STAR, "", [], 5, "first", 0.5)


def test_page_is_for_this_computer_only(address):
    assert address.startswith("http://127.0.0.1:")
    assert app.parse([]).share is False


def test_unusable_option_is_told(capsys):
    assert app.main(["--model", "no-such-folder"]) == 2
    assert "no-such-folder" in capsys.readouterr().err
