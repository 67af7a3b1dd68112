"""The browser page: what its sessions compute, what programs get over HTTP, and what people see in a real browser.

Browser tests need Playwright and a Chromium or Chrome: `apt-get install chromium`, or SA2VA_BROWSER=/path/to/chrome.
"""

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from sa2va.data.scenes import CAPTION_QUESTION
from sa2va.demo import app
from sa2va.demo.make_figure import VIDEO_QUESTION
from sa2va.demo.make_samples import SAMPLES
from sa2va.demo.media import open_source, video_writer
from sa2va.demo.predict import DEFAULT_MODEL, load_model
from sa2va.demo.session import (
    Mark,
    Session,
    answer_html,
    ask,
    object_color,
    open_session,
    parse_marks,
    record,
    region_masks,
    stage_html,
    write_files,
)
from sa2va.processing_sa2va import rle_to_masks

IMAGE, VIDEO = SAMPLES / "shapes.png", SAMPLES / "shapes.mp4"
STAR, CROSS = "Please segment the red star in this image.", "Please segment the orange cross."
READING = {"num_frames": 5, "frame_sampling": "first"}
SPREAD = {"num_frames": 4, "frame_sampling": "uniform"}
PURPLE_BOX = Mark("box", ((235, 20), (325, 110)))  # in shapes.png
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
    marked = last(ask(model, captioned, "Please describe region1.", READING, [PURPLE_BOX]))
    assert len(marked.turns) == 2
    assert not marked.goes_on([moved], READING)
    assert len(last(ask(model, marked, "Please describe region1.", READING, [moved])).turns) == 1


def test_video_answer_grows_frame_by_frame_and_reads_as_it_is_told(model):
    clip = open_session(VIDEO, max_frames=24)
    steps = list(ask(model, clip, CROSS, SPREAD))
    assert [len(step.turns[0].frames) for step in steps] == list(range(1, 25))
    assert not steps[-1].goes_on([], READING)
    out = model.predict_forward(video=VIDEO, text=CROSS, **SPREAD)
    kept = np.stack([steps[-1].frame(0, index, 0.5).masks[0] for index in range(24)])
    assert np.array_equal(kept, out.prediction_masks[0])


def test_regions_of_a_video_lie_in_its_first_frame_which_must_be_seen(model):
    clip = open_session(VIDEO, max_frames=24)
    with pytest.raises(ValueError, match="frame 0"):
        last(ask(model, clip, CROSS, {"num_frames": 5, "frame_sampling": [8, 16]}, [PURPLE_BOX]))


def test_video_with_too_many_frames_is_refused():
    with pytest.raises(ValueError, match="more than 23 frames"):
        open_session(VIDEO, max_frames=23)


def test_phrases_have_the_colours_of_their_masks(captioned):
    labels = captioned.turns[0].labels
    answer, stage = answer_html(captioned.turns[0], 0), stage_html(captioned, 0, 0, 0.5, range(len(labels)))
    for index, label in enumerate(labels):
        color = "#{:02x}{:02x}{:02x}".format(*object_color(index))
        assert f'<mark class="turn0-object{index}" style="background: {color}' in answer
        assert f">{label}</mark>" in answer
        assert f'class="mask turn0-object{index}"' in stage
        assert f'fill="{color}"' in stage


def test_words_of_the_model_are_no_html_of_ours(captioned):
    frame = replace(captioned.turns[0].frames[0], prediction="1 < 2 & <p> x & y </p> [SEG] .<|im_end|>")
    html = answer_html(replace(captioned.turns[0], frames=(frame,)), 0)
    assert html.startswith("1 &lt; 2 &amp; <mark")
    assert html.endswith(">x &amp; y</mark>.")


def test_hidden_object_is_not_painted_but_recorded(captioned, tmp_path):
    overlay, masks = write_files(captioned, 0, 0.5, [1], tmp_path)
    given, painted = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (IMAGE, overlay))
    areas = captioned.frame(0, 0, 0.5).masks
    assert (given == painted)[areas[0] & ~areas[1]].mean() > 0.9  # a label may lie on it
    assert (given != painted).any(axis=-1)[areas[1]].all()
    assert [len(thing["rle"]) for thing in json.loads(masks.read_text())["objects"]] == [1] * len(areas)


def test_mark_covers_the_cells_it_lies_on():
    marks = [Mark("box", ((200, 50), (0, 0))), Mark("point", ((399, 99),)), Mark("brush", ((0, 75), (400, 75)))]
    box, point, stroke = region_masks(marks, (400, 100), 4)
    assert np.argwhere(box).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert np.argwhere(point).tolist() == [[3, 3]]
    assert stroke[2:].all()


def test_a_frame_that_is_at_hand_is_not_read_again(captioned, photo, monkeypatch):
    """Of a video each would be read from its beginning."""
    wanted = stage_html(captioned, 0, 0, 0.5, [0])
    picture = photo.picture(0)
    monkeypatch.setattr(Session, "picture", None)
    assert stage_html(captioned, 0, 0, 0.5, [0], picture) == wanted


def test_a_click_with_the_brush_marks_what_a_point_does():
    brush, point = region_masks([Mark(kind, ((200, 50),)) for kind in ("brush", "point")], (400, 400), 16)
    assert brush.any() and (brush == point).all()


@pytest.mark.parametrize("points", [((401, 50),), ((-9, -9), (-1, 300)), ((10, 500), (20, 600))])
def test_a_mark_beside_the_picture_is_refused(points):
    with pytest.raises(ValueError, match="beside the picture of 400x400"):
        region_masks([Mark("brush", points)], (400, 400), 16)


BAD_MARKS = [
    "box", [1], [{"kind": "box"}], [{"kind": "lasso", "points": [[1, 2]]}], [{"kind": "point", "points": []}],
    [{"kind": "point", "points": [[1, 2, 3]]}], [{"kind": "point", "points": [[1, float("nan")]]}],
    [{"kind": "point", "points": [[1, 2]]}] * 17, [{"kind": "point", "points": [[1, 2], [3, 4]]}],
    [{"kind": "box", "points": [[1, 2], [3, 4], [5, 6]]}],
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
    arguments = app.parse(["--max-frames", "100", "--max-file-size", "1mb", "--concurrency", "2"])
    yield app.launch(arguments, wait=False).rstrip("/")
    gradio.close_all()


@pytest.mark.parametrize(("named", "wanted"), [(None, "127.0.0.1"), ("0.0.0.0", "0.0.0.0")])
def test_a_space_says_where_to_answer(monkeypatch, named, wanted):
    """Spaces and containers reach no page that answers at 127.0.0.1 alone."""
    page = pytest.importorskip("sa2va.demo.page")
    launched = {}
    blocks = SimpleNamespace(launch=lambda **options: launched.update(options) or (None, "address", None))
    processor = SimpleNamespace(num_key_frames=5, frame_sampling="first")
    monkeypatch.setattr(page, "Page", lambda *_, **__: SimpleNamespace(blocks=blocks))
    monkeypatch.setattr(app, "load_model", lambda *_: SimpleNamespace(load_processor=lambda: processor))
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    if named:
        monkeypatch.setenv("GRADIO_SERVER_NAME", named)
    assert app.launch(app.parse([])) == "address" and launched["server_name"] == wanted


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
    kind, (answer,) = http_predict(address, VIDEO, CROSS, "", [], 4, "uniform", 0.5)
    assert kind == "complete"
    assert answer["fps"] == 8
    assert same_as(model.predict_forward(video=VIDEO, text=CROSS, **SPREAD), answer)


@pytest.mark.parametrize("language", ["python", "bash"])
def test_the_calls_in_the_docs_run_as_they_stand(address, language, monkeypatch, capfd):
    if language == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not here")
    monkeypatch.chdir(SAMPLES.parents[1])
    text = Path("docs/app.md").read_text()
    (call,) = re.findall(rf"```{language}\n((?:(?!```).)*?:7860(?:(?!```).)*?/predict.*?)```", text, re.DOTALL)
    call = call.replace("http://127.0.0.1:7860", address)
    if language == "python":
        exec(call, {})
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", call], check=True)
    told = capfd.readouterr().out
    assert "it is the red star" in told and (language == "python" or "event: complete" in told)


def test_program_is_told_what_is_wrong_and_nothing_of_the_server(address, tmp_path):
    (tmp_path / "broken.png").write_bytes(IMAGE.read_bytes()[:9000])
    kind, message = http_predict(address, tmp_path / "broken.png", STAR, "", [], 5, "first", 0.5)
    assert kind == "error"
    assert message["error"].startswith("'broken.png' is a damaged image")


def queue_event(address, kind, value):
    """What the page's server says to the event of an image or a video that has come, without any client."""
    config = json.loads(urllib.request.urlopen(f"{address}/config").read())
    (component,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == kind]
    (event,) = [part for part in config["dependencies"] if [component, "change"] in part["targets"]]
    data = {"data": [value, None], "fn_index": event["id"], "session_hash": "visitor"}
    post(f"{address}/gradio_api/queue/join", json.dumps(data).encode(), "application/json")
    events = urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=visitor").read().decode()
    found = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
    return next(event for event in found if event["msg"] == "process_completed")


@pytest.mark.parametrize("path", [IMAGE, VIDEO, SAMPLES])
def test_a_visitor_sees_no_files_of_the_server(address, path):
    """gradio leaves paths of images that come without its own mark as they are; those of videos it refuses."""
    for kind, told in (("image", "Only files that were uploaded"), ("video", "")):
        done = queue_event(address, kind, {"path": str(path)})
        assert not done["success"] and (done["output"]["error"] or "").startswith(told)


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\x00\x00\x00\x00\x0a\x00" + bytes(1280)], ids=["bare", "behind a tag"])
def test_a_playlist_is_not_followed(address, tmp_path, tag):
    words = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{VIDEO}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_bytes(tag + words.encode())
    kind, message = http_predict(address, tmp_path / "list.m3u8", CROSS, "", [], 5, "first", 0.5)
    assert kind == "error" and message["error"].startswith("This is a playlist")


def test_program_is_told_of_frames_that_are_no_numbers(address):
    kind, message = http_predict(address, VIDEO, CROSS, "", [], 5, "every second", 0.5)
    assert kind == "error"
    assert message["error"].startswith("'every second' is unknown; give first, uniform or numbers")


def test_nothing_but_predict_is_offered_to_programs(client):
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/predict"]


def test_upload_larger_than_the_limit_is_refused(address, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(2_000_000))
    with pytest.raises(urllib.error.HTTPError, match="413"):
        http_predict(address, tmp_path / "large.png", STAR, "", [], 5, "first", 0.5)


def test_page_is_for_this_computer_only(address):
    assert address.startswith("http://127.0.0.1:")
    assert app.parse([]).share is False


def test_a_model_that_is_nowhere_is_told(capsys):
    assert app.main(["--model", "no-such-folder"]) == 2
    assert "no-such-folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--concurrency", "0"), ("--port", "99999"), ("--max-file-size", "many")])
def test_unusable_options_are_told(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        app.main(list(option))
    assert option[1] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """What the browser takes for a webcam: it shows shapes.mp4 again and again. Uncompressed, as Chromium wants it."""
    path = tmp_path_factory.mktemp("camera") / "shapes.y4m"
    source = open_source(VIDEO)
    frames = [cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2YUV_I420).tobytes() for frame in source.frames]
    width, height = source.frames.select([0])[0].size
    header = f"YUV4MPEG2 W{width} H{height} F{round(source.fps)}:1 Ip C420\n".encode()
    path.write_bytes(header + b"".join(b"FRAME\n" + frame for frame in frames))
    return path


@pytest.fixture(scope="module")
def browser(camera):
    """A headless Chromium that doesn't ask whether a page may use the webcam."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need: pip install playwright")
    if BROWSER is None:
        pytest.skip("No Chromium or Chrome here: apt-get install chromium, or set SA2VA_BROWSER to one.")
    with playwright.sync_playwright() as driver:
        webcam = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        webcam.append(f"--use-file-for-fake-video-capture={camera}")
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *webcam])
        yield browser
        browser.close()


class Visitor:
    """Somebody in front of the page; each has a profile of their own."""

    def __init__(self, browser, address, **window):
        self.page = browser.new_context(color_scheme="light", **window).new_page()
        self.page.set_default_timeout(60_000)
        self.page.goto(address)
        self.page.wait_for_selector("#stage .picture")

    def give(self, path):
        """Uploads a file, and waits until it is shown."""
        kind = "video" if path.suffix == ".mp4" else "image"
        self.page.get_by_role("tab", name=kind.title()).click()
        self.page.set_input_files(f"#{kind} input[type=file]", path)

    def give_and_see(self, path):
        """Uploads a file, and waits until it is shown."""
        self.give(path)
        self.page.wait_for_selector("#stage .picture svg")

    def start_camera(self, kind):
        """Turns the webcam on in the tab of images or videos. Returns the tab."""
        self.page.get_by_role("tab", name=kind.title()).click()
        tab = self.page.locator(f"#{kind}")
        tab.get_by_label("Capture from camera").click()
        tab.get_by_text("Click to Access Webcam").click()
        return tab

    def ask(self, question):
        """Asks, and waits until the answer and its files are there. Returns its words."""
        count = self.page.locator("#chat .bot.message").count()
        self.page.fill("#question textarea", question)
        self.page.click("#ask")
        self.page.locator("#chat .bot.message").nth(count).wait_for()
        self.page.wait_for_selector("#masks")
        return self.page.locator("#chat .bot.message").nth(count).inner_text()

    def draw(self, tool, *points):
        """Drags the pointer over the picture, through points in its pixels."""
        self.page.click(f"[data-tool={tool}]")
        svg = self.page.locator("#stage .picture svg")
        box, width = svg.bounding_box(), int(svg.get_attribute("viewBox").split()[2])
        places = [(box["x"] + x * box["width"] / width, box["y"] + y * box["width"] / width) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place)
        self.page.mouse.up()

    def outlines(self):
        """What is drawn of each mask on the stage, by its class."""
        masks = self.page.locator("#stage .mask")
        masks = masks.evaluate_all(
            "masks => masks.map(m => [m.classList[1], m.getAttribute('d'), +getComputedStyle(m).opacity])"
        )
        return {name: outline for name, outline, opacity in masks if outline and opacity}

    def download(self, button):
        """What a download button gives."""
        with self.page.expect_download() as download:
            self.page.click(button)
        return Path(download.value.path()).read_bytes()


@pytest.fixture
def visit(browser, address):
    """Opens the page as somebody new."""
    visitors = []

    def open_page(**window):
        visitors.append(Visitor(browser, address, **window))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.page.context.close()


@pytest.mark.slow
def test_visitor_asks_about_an_image_and_asks_on(visit, captioned):
    visitor, labels = visit(), captioned.turns[0].labels
    visitor.give_and_see(IMAGE)
    answer = visitor.ask(CAPTION_QUESTION)
    assert all(label in answer for label in labels)
    assert len(visitor.outlines()) == len(labels)
    assert visitor.ask("Please segment the purple square.").startswith("Sure")
    assert {name.partition("-")[0] for name in visitor.outlines()} == {"turn1"}
    visitor.page.locator("#chat .bot.message").first.click()  # back to the first answer
    visitor.page.wait_for_selector(".mask.turn0-object0", state="attached")
    visitor.page.hover("#chat mark.turn0-object1")
    faded = "getComputedStyle(document.querySelector('.mask.turn0-object0')).opacity == 0"
    visitor.page.wait_for_function(faded)
    assert list(visitor.outlines()) == ["turn0-object1"]


@pytest.mark.slow
def test_visitor_changes_how_masks_look_and_takes_them_home(visit, captioned):
    visitor = visit()
    visitor.give_and_see(IMAGE)
    visitor.ask(CAPTION_QUESTION)
    before = visitor.outlines()
    visitor.page.get_by_label(f"2. {captioned.turns[0].labels[1]}").uncheck()
    visitor.page.wait_for_selector(".mask.turn0-object1", state="detached")
    visitor.page.locator("#threshold input[type=number]").fill("0.9")
    visitor.page.wait_for_function(
        "d => document.querySelector('.mask.turn0-object0').getAttribute('d') != d", arg=before["turn0-object0"]
    )
    assert set(visitor.outlines()) == set(before) - {"turn0-object1"}
    wanted = {**record(captioned, 0, 0.9), "overlay": "shapes-image.png"}
    assert any(json.loads(visitor.download("#masks")) == wanted for _ in range(30))  # soon
    assert visitor.download("#overlay").startswith(b"\x89PNG")


@pytest.mark.slow
def test_visitor_points_at_a_region(visit):
    visitor = visit()
    visitor.give_and_see(IMAGE)
    visitor.draw("box", *PURPLE_BOX.points)
    assert "purple square" in visitor.ask("Please describe region1.")
    visitor.draw("brush", (20, 270), (90, 270))
    visitor.draw("point", (430, 205))
    assert visitor.page.locator("#stage .marks text").all_text_contents() == ["region1", "region2", "region3"]


@pytest.mark.slow
def test_visitor_follows_an_object_through_a_video(visit, model):
    visitor = visit()
    visitor.give_and_see(VIDEO)
    visitor.page.get_by_text("How a video is read").click()
    sampling = visitor.page.get_by_label("Frames the language model sees")
    sampling.fill("0,8,16,23")
    sampling.press("Enter")
    visitor.ask(CROSS)
    visitor.page.wait_for_selector("#player video")
    visitor.page.wait_for_function("document.querySelector('#player video').readyState >= 2")
    visitor.page.locator("#frame input[type=number]").fill("23")
    visitor.page.wait_for_selector("svg[data-frame='23'] .mask", state="attached")
    (thing,) = json.loads(visitor.download("#masks"))["objects"]
    out = model.predict_forward(video=VIDEO, text=CROSS, frame_sampling=[0, 8, 16, 23])
    assert np.array_equal(rle_to_masks(thing["rle"]), out.prediction_masks[0])


needs_camera = pytest.mark.skipif(
    "SA2VA_CAMERA" not in os.environ, reason="a busy machine's camera gives no picture: SA2VA_CAMERA=1 tries it"
)


@needs_camera
@pytest.mark.slow
def test_visitor_takes_an_image_with_the_webcam(visit):
    visitor = visit()
    camera = visitor.start_camera("image")
    visitor.page.wait_for_timeout(2500)  # the first pictures are black
    camera.get_by_label("capture photo").click()
    visitor.page.wait_for_selector("#stage .picture svg")
    assert "orange cross" in visitor.ask(CROSS)


@needs_camera
@pytest.mark.slow
def test_visitor_takes_a_video_with_the_webcam(visit):
    visitor = visit()
    tab = visitor.start_camera("video")
    tab.get_by_label("start recording").click()
    visitor.page.wait_for_timeout(2500)
    tab.get_by_text("Stop").click()
    visitor.page.wait_for_selector("#stage .picture svg")
    assert "orange cross" in visitor.ask(CROSS)
    assert len(json.loads(visitor.download("#masks"))["objects"][0]["rle"]) > 1


@pytest.fixture
def waiting(visit, tmp_path):
    """Somebody who has asked about a video of 96 frames, and sees the second."""
    frames = list(open_source(VIDEO).frames) * 4
    with video_writer(tmp_path / "long.mp4", frames[0].size[::-1], 8.0) as write:
        for frame in frames:
            write(np.asarray(frame))
    visitor = visit()
    visitor.give_and_see(tmp_path / "long.mp4")
    visitor.page.fill("#question textarea", CROSS)
    visitor.page.click("#ask")
    visitor.page.get_by_text(re.compile(r"\d+/96 frames")).wait_for()
    visitor.page.wait_for_selector("svg[data-frame]:not([data-frame='0']) .mask", state="attached")
    return visitor


@pytest.mark.slow
def test_visitor_stops_a_video_and_keeps_what_is_there(waiting):
    waiting.page.click("#stop")
    waiting.page.wait_for_selector("#masks")
    (thing,) = json.loads(waiting.download("#masks"))["objects"]
    assert 1 < len(thing["rle"]) < 96
    assert waiting.ask("How many shapes are there?")


@pytest.mark.slow
def test_visitor_opens_another_picture_without_waiting_for_the_answer(waiting):
    waiting.give(IMAGE)
    waiting.page.wait_for_selector("#stage svg[viewBox='0 0 480 360']")
    waiting.page.wait_for_timeout(3000)  # in which frames of the video would come
    assert waiting.page.locator("#stage svg").get_attribute("viewBox") == "0 0 480 360"
    assert waiting.page.locator("#chat .bot.message").count() == 0
    waiting.ask("Please segment the red star.")
    assert waiting.page.locator("#chat .bot.message").count() == 1


@pytest.mark.slow
def test_visitor_takes_an_example(visit):
    visitor = visit()
    visitor.page.locator("#video-examples").get_by_text(VIDEO_QUESTION).click()
    visitor.page.wait_for_selector("#stage .picture svg")
    assert visitor.page.input_value("#question textarea") == VIDEO_QUESTION
    assert visitor.page.locator("#frame").is_visible()


@pytest.mark.slow
def test_visitor_with_a_bad_file_and_a_phone_is_told(visit, tmp_path):
    visitor = visit(viewport={"width": 390, "height": 844})
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    for name, good, message in (
        ("broken.png", IMAGE, "'broken.png' is a damaged image"),
        ("broken.mp4", VIDEO, "neither an image that Pillow reads nor a video that OpenCV reads"),
    ):
        (tmp_path / name).write_bytes(good.read_bytes()[:9000])
        visitor.give(tmp_path / name)
        visitor.page.locator(".toast-body", has_text=message).wait_for()
    visitor.page.click("#ask")
    visitor.page.locator(".toast-body", has_text="There is no picture yet").wait_for()
    assert "Traceback" not in visitor.page.inner_text("body")
    assert "/tmp" not in visitor.page.inner_text("body")


@pytest.mark.slow
def test_two_visitors_at_once_see_their_own_picture_only(visit):
    one, other = visit(), visit()
    one.give_and_see(IMAGE)
    other.give_and_see(VIDEO)
    for visitor, question in ((one, STAR), (other, CROSS)):
        visitor.page.fill("#question textarea", question)
    for visitor in (one, other):
        visitor.page.click("#ask")
    for visitor in (one, other):
        visitor.page.wait_for_selector("#masks")
    assert "red star" in one.page.inner_text("#chat")
    assert "orange cross" in other.page.inner_text("#chat")
    for visitor, size, strange in ((one, [360, 480], "cross"), (other, [180, 240], "star")):
        assert strange not in visitor.page.inner_text("#chat")
        assert json.loads(visitor.download("#masks"))["size"] == size


@pytest.mark.skipif(
    "SA2VA_SCREENSHOT" not in os.environ, reason="SA2VA_SCREENSHOT=docs/app.png makes the README's picture"
)
def test_screenshot(visit):
    path = Path(os.environ["SA2VA_SCREENSHOT"])
    visitor = visit(viewport={"width": 1280, "height": 960})
    visitor.give_and_see(IMAGE)
    visitor.ask(CAPTION_QUESTION)
    visitor.page.mouse.move(0, 0)
    visitor.page.wait_for_timeout(1000)
    visitor.page.screenshot(path=path)
    Image.open(path).quantize(256).save(path, optimize=True)
    assert path.stat().st_size < 300_000
