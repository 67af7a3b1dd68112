"""Every kind of image, video, call and checkpoint that a user may try: what works, and what a wrong one is told."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, DynamicCache, GenerationConfig

from sa2va import Sa2VAChatConfig, Sa2VAChatModel
from sa2va.hub_upload import CheckpointError, check_checkpoint, convert_pickles
from sa2va.processing_sa2va import (
    Sa2VAProcessor,
    VideoFrames,
    choose_tiling,
    collate_inputs,
    draw_overlay,
    load_image,
    masks_to_rle,
    open_video,
    rle_to_masks,
    select_key_frames,
)

GOLDEN = Path(__file__).parent / "golden"
RED, WHITE = (200, 30, 40), (255, 255, 255)


@pytest.fixture(scope="module")
def processor():
    return Sa2VAProcessor.from_pretrained(GOLDEN / "ivl_qwen2")


def plain(size=(8, 6)):
    """A red picture; `size` is (width, height)."""
    return Image.new("RGB", size, RED)


def pixels(color=RED):
    return np.full((6, 8, 3), color, dtype=np.uint8)


def numbered_frames(count=4, size=(32, 24)):
    """Frames whose grey value tells their number."""
    return [Image.new("RGB", size, (20 * number,) * 3) for number in range(count)]


def numbers(frames):
    """Inverse of `numbered_frames`, up to compression."""
    return [round(np.asarray(frame).mean() / 20) for frame in frames]


def saved(image, path, **options):
    image.save(path, **options)
    return path


def rotated_jpeg(folder):
    """A landscape file that its EXIF orientation 6 stands on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(plain(size=(60, 40)), folder / "rotated.jpg", exif=exif)


def half_transparent_palette():
    image = Image.fromarray(pixels()).quantize(2)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


# what a user passes as an image -> (width, height) and the colour that every pixel should have
IMAGES = {
    "RGB": (lambda _: plain(), (8, 6), RED),
    "RGBA, transparent, over white": (lambda _: Image.new("RGBA", (8, 6), (200, 30, 40, 0)), (8, 6), WHITE),
    "RGBA, half transparent": (lambda _: Image.new("RGBA", (8, 6), (0, 0, 0, 128)), (8, 6), (127, 127, 127)),
    "P": (lambda _: Image.fromarray(pixels()).quantize(2), (8, 6), RED),
    "P with a transparent colour": (lambda _: half_transparent_palette(), (8, 6), WHITE),
    "L": (lambda _: Image.new("L", (8, 6), 77), (8, 6), (77, 77, 77)),
    "LA": (lambda _: Image.new("LA", (8, 6), (77, 255)), (8, 6), (77, 77, 77)),
    "La": (lambda _: Image.new("LA", (8, 6), (77, 255)).convert("La"), (8, 6), (77, 77, 77)),
    "I;16 between two levels": (
        lambda _: Image.fromarray(np.full((6, 8), 257 * 77 + 200, np.uint16)),
        (8, 6),
        (78,) * 3,
    ),
    "floats between two levels": (lambda _: np.full((6, 8, 3), 0.499), (8, 6), (127,) * 3),
    "floats a little above 1": (lambda _: np.full((6, 8, 3), 1.0018), (8, 6), WHITE),
    "floats a little below 0": (lambda _: np.full((6, 8, 3), -0.0018), (8, 6), (0, 0, 0)),
    "floats nearer to the next": (lambda _: np.full((6, 8, 3), 0.5), (8, 6), (128,) * 3),
    "I;16": (lambda _: Image.fromarray(np.full((6, 8), 257 * 77, np.uint16)), (8, 6), (77, 77, 77)),
    "I of 8 bits": (lambda _: Image.new("I", (8, 6), 77), (8, 6), (77, 77, 77)),
    "I of 16 bits": (lambda _: Image.new("I", (8, 6), 257 * 77), (8, 6), (77, 77, 77)),
    "F in 0..1": (lambda _: Image.new("F", (8, 6), 0.2), (8, 6), (51, 51, 51)),
    "F a little above 1": (lambda _: Image.new("F", (8, 6), 1.0018), (8, 6), WHITE),
    "F a little below 0": (lambda _: Image.new("F", (8, 6), -0.0018), (8, 6), (0, 0, 0)),
    "F in 0..255": (lambda _: Image.new("F", (8, 6), 51.0), (8, 6), (51, 51, 51)),
    "1": (lambda _: Image.new("1", (8, 6), 1), (8, 6), WHITE),
    "CMYK": (lambda _: Image.new("CMYK", (8, 6), (0, 255, 255, 0)), (8, 6), (255, 0, 0)),
    "HSV": (lambda _: Image.new("HSV", (8, 6), (0, 255, 255)), (8, 6), (255, 0, 0)),
    "1x1": (lambda _: plain(size=(1, 1)), (1, 1), RED),
    "20000x20": (lambda _: plain(size=(20000, 20)), (20000, 20), RED),
    "HWC uint8": (lambda _: pixels(), (8, 6), RED),
    "CHW uint8": (lambda _: pixels().transpose(2, 0, 1), (8, 6), RED),
    "HW uint8": (lambda _: np.full((6, 8), 9, np.uint8), (8, 6), (9, 9, 9)),
    "HW1": (lambda _: np.full((6, 8, 1), 9, np.uint8), (8, 6), (9, 9, 9)),
    "1HW": (lambda _: np.full((1, 6, 8), 9, np.uint8), (8, 6), (9, 9, 9)),
    "HWC with alpha": (lambda _: np.zeros((6, 8, 4), np.uint8), (8, 6), WHITE),
    "one pixel, 1x1x3": (lambda _: np.array([[RED]], np.uint8), (1, 1), RED),
    "one pixel, 3x1x1": (lambda _: np.array(RED, np.uint8)[:, None, None], (1, 1), RED),
    "one grey pixel, 1x1x1": (lambda _: np.full((1, 1, 1), 9, np.uint8), (1, 1), (9, 9, 9)),
    "float32": (lambda _: pixels().astype(np.float32) / 255, (8, 6), RED),
    "float16": (lambda _: np.ones((6, 8, 3), np.float16), (8, 6), WHITE),
    "bool": (lambda _: np.ones((6, 8), bool), (8, 6), WHITE),
    "decord's array": (lambda _: SimpleNamespace(asnumpy=pixels), (8, 6), RED),
    "flipped view": (lambda _: pixels()[:, ::-1], (8, 6), RED),
    "tensor CHW uint8": (lambda _: torch.tensor(pixels()).permute(2, 0, 1), (8, 6), RED),
    "tensor HWC float": (lambda _: torch.tensor(pixels()) / 255, (8, 6), RED),
    "tensor bfloat16": (lambda _: torch.ones(3, 6, 8, dtype=torch.bfloat16), (8, 6), WHITE),
    "tensor with gradient": (lambda _: torch.ones(3, 6, 8, requires_grad=True), (8, 6), WHITE),
    "path as str": (lambda folder: str(saved(plain(), folder / "a b.ü.png")), (8, 6), RED),
    "path as Path": (lambda folder: saved(plain(), folder / "a.bmp"), (8, 6), RED),
    "rotated by EXIF": (lambda folder: rotated_jpeg(folder), (40, 60), None),
    "rotated by EXIF, opened": (lambda folder: Image.open(rotated_jpeg(folder)), (40, 60), None),
    "16-bit PNG": (
        lambda folder: saved(Image.fromarray(np.full((6, 8), 257 * 77, np.uint16)), folder / "deep.png"),
        (8, 6),
        (77, 77, 77),
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_of_any_kind_becomes_rgb(name, tmp_path):
    make, size, color = IMAGES[name]
    image = load_image(make(tmp_path))
    assert (image.mode, image.size) == ("RGB", size)
    assert color is None or (np.asarray(image) == color).all()


def test_home_is_expanded_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    plain().save(tmp_path / "picture.png")
    assert load_image("~/picture.png").size == (8, 6)


def test_damaged_exif_does_not_cost_the_picture():
    image = plain()
    image.info["exif"] = b"Exif\x00\x00no tiff header"
    assert load_image(image).size == (8, 6)


def test_loading_twice_rotates_once(tmp_path):
    assert load_image(load_image(rotated_jpeg(tmp_path))).size == (40, 60)


def test_the_users_picture_is_not_touched(tmp_path):
    given = plain()
    load_image(given).paste("black", (0, 0, 8, 6))
    assert given.getpixel((0, 0)) == RED


def truncated_png(folder):
    path = saved(Image.effect_noise((64, 64), 90), folder / "cut.png")
    path.write_bytes(path.read_bytes()[:1500])
    return path


def text_file(folder, name="words.png"):
    path = folder / name
    path.write_text("this is no picture")
    return path


def bomb(folder):
    """A small file that claims 60000 x 60000 pixels."""
    data = bytearray(saved(Image.new("1", (8, 8)), folder / "bomb.bmp").read_bytes())
    data[18:26] = (60000).to_bytes(4, "little") * 2
    path = folder / "bomb.bmp"
    path.write_bytes(data)
    return path


def closed_picture(folder):
    with Image.open(saved(plain(), folder / "closed.png")) as image:
        return image


# what a user passes as an image -> the error and words of its message
BAD_IMAGES = {
    "missing file": (lambda folder: folder / "none.png", FileNotFoundError, "none.png"),
    "a web address": (lambda _: "https://example.com/a.png", FileNotFoundError, "no URL"),
    "no path": (lambda _: "", FileNotFoundError, "no image at ''"),
    "base64": (lambda _: "data:image/png;base64," + "A" * 5000, FileNotFoundError, "A'?. Give .*no base64"),
    "a picture whose file was closed": (closed_picture, OSError, "closed"),
    "home of nobody": (lambda _: "~nobody-at-all/a.png", FileNotFoundError, "nobody-at-all"),
    "a pipe": (lambda folder: pipe(folder / "pipe.png"), OSError, "device or pipe"),
    "a folder": (lambda folder: folder, IsADirectoryError, "video="),
    "no picture inside": (text_file, OSError, "words.png"),
    "cut file": (truncated_png, OSError, "cut.png"),
    "decompression bomb": (bomb, ValueError, "bomb.bmp"),
    "too many pixels": (lambda _: Image.new("1", (20000, 9000)), ValueError, "20000x9000"),
    "too many pixels in an array": (lambda _: np.broadcast_to(np.uint8(1), (20000, 9000)), ValueError, "9000x20000"),
    "no pixels": (lambda _: np.zeros((0, 5, 3), np.uint8), ValueError, "0 pixels"),
    "two channels": (lambda _: np.zeros((5, 5, 2), np.uint8), ValueError, "channels"),
    "channels first or last": (lambda _: np.zeros((3, 5, 3), np.uint8), ValueError, "ambiguous"),
    "grey row or column": (lambda _: np.zeros((1, 5, 1), np.uint8), ValueError, "ambiguous"),
    "one axis": (lambda _: np.zeros(5, np.uint8), ValueError, "axes"),
    "four axes": (lambda _: np.zeros((1, 5, 5, 3), np.uint8), ValueError, "axes"),
    "NaN": (lambda _: np.full((5, 5), np.nan), ValueError, "nan"),
    "infinite": (lambda _: torch.full((3, 5, 5), torch.inf), ValueError, "inf"),
    "floats to 255": (lambda _: np.full((5, 5), 255.0), ValueError, r"\[0, 1\]"),
    "floats a grey level above 1": (lambda _: np.full((5, 5), 1.004), ValueError, "1.004"),
    "negative floats": (lambda _: np.full((5, 5), -0.5), ValueError, r"\[0, 1\]"),
    "int64": (lambda _: np.zeros((5, 5), np.int64), TypeError, "uint8"),
    "NaN in mode F": (lambda _: Image.new("F", (5, 5), float("nan")), ValueError, "NaN"),
    "negative in mode I": (lambda _: Image.new("I", (5, 5), -1), ValueError, "65535"),
    "a list": (lambda _: [plain()], TypeError, "PIL image"),
    "bytes": (lambda _: b"\x89PNG", TypeError, "bytes"),
    "a number": (lambda _: 7, TypeError, "int"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_explained(name, tmp_path):
    make, error, words = BAD_IMAGES[name]
    with pytest.raises(error, match=words):
        load_image(make(tmp_path))


def test_area_counts_not_the_longest_side_and_can_be_raised():
    with pytest.raises(ValueError, match="max_pixels"):
        load_image(plain(size=(100, 10)), max_pixels=999)
    assert load_image(plain(size=(100, 10)), max_pixels=1000).size == (100, 10)


def video_file(folder, name, codec, count=4):
    path = folder / name
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, (32, 24))
    for frame in numbered_frames(count):
        writer.write(np.asarray(frame)[..., ::-1])
    writer.release()
    return path


def gif(folder, count=4):
    frames = numbered_frames(count)
    return saved(frames[0], folder / "clip.gif", save_all=True, append_images=frames[1:], duration=100)


def frame_folder(folder, count=4):
    """Frames 8, 9, 10, 11 in name, among files that are none."""
    (folder / "frames").mkdir()
    for number, frame in enumerate(numbered_frames(count), start=8):
        frame.save(folder / "frames" / f"Frame{number}.png")
    (folder / "frames" / "notes.txt").write_text("no frame")
    (folder / "frames" / "._Frame1.png").write_text("no frame")
    return folder / "frames"


def stacked(count=4):
    return np.stack([np.asarray(frame) for frame in numbered_frames(count)])


class Lazy:
    """A sequence that loads its items when asked, such as a dataset."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return numbered_frames()[index]

    def __iter__(self):
        return (self[index] for index in range(4))


VIDEOS = {
    "list of PIL": lambda _: numbered_frames(),
    "tuple of arrays": lambda _: tuple(stacked()),
    "list of paths": lambda folder: sorted(frame_folder(folder).glob("F*.png"), key=lambda p: int(p.stem[5:])),
    "THWC": lambda _: stacked(),
    "TCHW": lambda _: stacked().transpose(0, 3, 1, 2),
    "THWC float": lambda _: stacked() / np.float32(255),
    "tensor TCHW": lambda _: torch.tensor(stacked()).permute(0, 3, 1, 2),
    "mp4": lambda folder: video_file(folder, "clip.mp4", "mp4v"),
    "avi, path as str": lambda folder: str(video_file(folder, "clip.avi", "MJPG")),
    "webm": lambda folder: video_file(folder, "clip.webm", "VP80"),
    "gif": gif,
    "folder in natural order": frame_folder,
    "generator": lambda _: (frame for frame in numbered_frames()),
    "dataset": lambda _: Lazy(),
    "pandas Series": lambda _: pytest.importorskip("pandas").Series(numbered_frames(), index=[7, 8, 9, 10]),
    "opened video": lambda _: open_video(numbered_frames()),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_video_of_any_kind_gives_its_frames_in_order(name, tmp_path):
    frames = open_video(VIDEOS[name](tmp_path))
    assert numbers(frames.take(2)) == [0, 1]
    assert numbers(frames.select([2, 0])) == [2, 0]
    assert numbers(iter(frames)) == [0, 1, 2, 3]
    assert len(frames) == 4
    assert all(isinstance(frame, Image.Image) and frame.mode == "RGB" for frame in frames.take(1))


@pytest.mark.parametrize("name", [name for name in VIDEOS if name != "generator"])
def test_video_can_be_read_again(name, tmp_path):
    frames = open_video(VIDEOS[name](tmp_path))
    assert numbers(iter(frames)) == numbers(iter(frames))


def test_colours_of_a_file_are_rgb(tmp_path):
    path = tmp_path / "red.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    writer.write(np.full((24, 32, 3), (0, 0, 255), np.uint8))
    writer.release()
    red, green, blue = np.asarray(open_video(path).take(1)[0]).mean(axis=(0, 1))
    assert red > 200 > 60 > max(green, blue)


def test_a_file_named_by_the_time_is_read_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video_file(tmp_path, "clip.mp4", "mp4v").rename("2024-05-01T12:30:00.mp4")
    assert len(open_video("2024-05-01T12:30:00.mp4")) == 4


def test_frames_of_a_folder_are_in_order_of_their_numbers_whatever_the_case_of_letters(tmp_path):
    for number, name in enumerate(("frame2.png", "Frame10.PNG", "frame11.png")):
        plain(size=(4 + number, 4)).save(tmp_path / name)
    assert [frame.width for frame in open_video(tmp_path)] == [4, 5, 6]


def test_frames_may_differ_in_size():
    frames = open_video([plain(size=(8, 6)), plain(size=(9, 9))])
    assert [frame.size for frame in frames] == [(8, 6), (9, 9)]


def test_a_damaged_tail_ends_a_file_early(tmp_path):
    path = video_file(tmp_path, "clip.avi", "MJPG", count=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    frames = open_video(path)
    assert 1 <= len(frames) < 60
    assert len(list(iter(frames))) == len(frames)


def test_what_lies_behind_many_broken_frames_is_used(tmp_path):
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (160, 120))
    ground = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    for index in range(120):
        writer.write(cv2.circle(ground.copy(), (10 + index, 60), 12, (0, 0, 255), -1))
    writer.release()
    content = bytearray(path.read_bytes())
    start, end = len(content) // 4, len(content) * 17 // 20
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    frames = open_video(path)
    assert 35 < len(frames) < 120 - 64  # both ends of the file
    assert len(frames.problems) == 1 and "announces 120" in frames.problems[0]


def test_a_photo_in_place_of_a_video_is_one_upright_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (frame,) = open_video(saved(plain(size=(8, 4)), tmp_path / "photo.jpg", exif=exif))
    assert frame.size == (4, 8)


def test_every_page_of_a_tiff_is_a_frame(tmp_path):
    pages = [Image.new("RGB", (8, 6), (shade, 0, 0)) for shade in (10, 20, 30)]
    path = saved(pages[0], tmp_path / "clip.tif", save_all=True, append_images=pages[1:])
    assert [frame.getpixel((0, 0))[0] for frame in open_video(path)] == [10, 20, 30]


@pytest.mark.parametrize("guard", [Image.MAX_IMAGE_PIXELS, None])  # Pillow's own, which a user may lift
def test_a_page_larger_than_any_picture_ends_a_tiff(tmp_path, monkeypatch, guard):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", guard)
    pages = [Image.new("1", size) for size in ((8, 8), (20000, 9000))]
    path = saved(pages[0], tmp_path / "a.tiff", save_all=True, append_images=pages[1:], compression="group4")
    frames = open_video(path)
    assert len(frames) == 1 and "180000000 pixels" in frames.problems[0]


def test_a_damaged_tail_ends_a_gif_early(tmp_path):
    noise = [Image.effect_noise((64, 64), 90) for _ in range(6)]
    path = saved(noise[0], tmp_path / "clip.gif", save_all=True, append_images=noise[1:])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 1 <= len(open_video(path)) < 6


class Counter:
    """An endless stream that counts how far it was read."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        while True:
            self.read += 1
            yield Image.new("RGB", (4, 4))


def test_an_endless_stream_is_read_only_as_far_as_needed():
    stream = Counter()
    frames = open_video(stream)
    assert select_key_frames(frames, 5, "first") == [0, 1, 2, 3, 4]
    frames.select([0, 6])
    assert stream.read == 7


def test_a_stream_replays_what_was_read_ahead():
    frames = open_video(iter(numbered_frames(6)))
    frames.take(3)
    assert numbers(iter(frames)) == [0, 1, 2, 3, 4, 5]


def test_painting_on_a_frame_of_a_stream_leaves_what_is_replayed():
    frames = open_video(iter(numbered_frames(3)))
    for _ in range(2):
        frames.take(1)[0].paste("white", (0, 0, 32, 24))
    assert numbers(iter(frames)) == [0, 1, 2]


def test_a_stream_that_has_passed_says_so():
    frames = open_video(iter(numbered_frames(6)))
    list(iter(frames))
    with pytest.raises(ValueError, match="read before"):
        list(iter(frames))


def test_a_stream_knows_its_length_once_it_has_passed():
    frames = open_video(iter(numbered_frames(6)))
    for _ in frames:
        pass
    assert len(frames) == 6


def test_a_file_is_closed_when_reading_stops_early(tmp_path):
    path = video_file(tmp_path, "clip.avi", "MJPG")
    frames = open_video(path)
    next(iter(frames))
    path.unlink()  # an open file can't be removed on Windows
    assert not path.exists()


def test_only_wanted_frames_are_decoded(tmp_path):
    paths = [saved(plain(), tmp_path / "a.png"), text_file(tmp_path), saved(plain(), tmp_path / "c.png")]
    assert len(open_video(paths).select([0, 2])) == 2


def test_asking_whether_there_is_a_video_reads_nothing():
    stream = Counter()
    assert bool(open_video(stream))
    assert stream.read == 1


def empty_folder(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def headless_mp4(folder):
    path = video_file(folder, "clip.mp4", "mp4v")
    path.write_bytes(path.read_bytes()[:200])
    return path


def undecodable_mp4(folder):
    path = video_file(folder, "clip.mp4", "mp4v")
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    end = start - 8 + int.from_bytes(content[start - 8 : start - 4], "big")
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])
    return path


def pipe(path):
    os.mkfifo(path)
    return path


BAD_VIDEOS = {
    "empty list": (lambda _: [], ValueError, "empty"),
    "empty array": (lambda _: np.zeros((0, 4, 6, 3), np.uint8), ValueError, "empty"),
    "empty generator": (lambda _: iter(()), ValueError, "empty"),
    "empty folder": (empty_folder, ValueError, "empty"),
    "missing file": (lambda folder: folder / "none.mp4", FileNotFoundError, "none.mp4"),
    "a pipe": (lambda folder: pipe(folder / "pipe.mp4"), OSError, "device or pipe"),
    "a name that is not UTF-8": (lambda folder: text_file(folder, "\udcff.mp4"), OSError, "not in UTF-8"),
    "no video inside": (lambda folder: text_file(folder, "words.mp4"), ValueError, "words.mp4"),
    "cut mp4": (headless_mp4, ValueError, "clip.mp4"),
    "frames that can't be decoded": (undecodable_mp4, ValueError, "no frame of .*clip.mp4.*codec"),
    "no gif inside": (lambda folder: text_file(folder, "words.gif"), ValueError, "words.gif"),
    "three axes": (lambda _: np.zeros((4, 6, 3), np.uint8), ValueError, "4 axes"),
    "one PIL image": (lambda _: plain(), TypeError, "image="),
    "a number": (lambda _: 3, TypeError, "int"),
    "bytes": (lambda _: b"RIFF", TypeError, "bytes"),
    "a dict": (lambda _: {0: plain()}, TypeError, "dict"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_video_is_explained(name, tmp_path):
    make, error, words = BAD_VIDEOS[name]
    with pytest.raises(error, match=words):
        open_video(make(tmp_path))


# frames in the video, num_frames, frame_sampling -> key frames
SAMPLINGS = [
    (8, 5, "first", [0, 1, 2, 3, 4]),
    (3, 5, "first", [0, 1, 2]),
    (8, 5, "uniform", [0, 1, 3, 5, 7]),
    (20, 12, "uniform", [0, 1, 3, 5, 6, 8, 10, 12, 13, 15, 17, 19]),
    (3, 5, "uniform", [0, 1, 2]),
    (1, 5, "uniform", [0]),
    (8, 1, "uniform", [0]),
    (8, 5, [6, 2, 6], [2, 6]),
    (8, 5, np.array([7]), [7]),
    (8, 5, torch.tensor([1, 0]), [0, 1]),
    (8, 5, range(0, 8, 3), [0, 3, 6]),
    (8, np.int64(2), "first", [0, 1]),
]


@pytest.mark.parametrize(("count", "num_frames", "sampling", "expected"), SAMPLINGS)
def test_key_frames(count, num_frames, sampling, expected):
    chosen = select_key_frames(open_video(numbered_frames(count)), num_frames, sampling)
    assert chosen == expected
    assert all(type(index) is int for index in chosen)


BAD_SAMPLINGS = [
    (5, "middle", ValueError, "'first', 'uniform'"),
    (5, [8], ValueError, "8 frames"),
    (5, [-1], ValueError, "negative"),
    (5, [], ValueError, "empty"),
    (5, [1.5], TypeError, "integer"),
    (5, [True], TypeError, "integer"),
    (5, 3, TypeError, "list of frame numbers"),
    (0, "first", ValueError, "at least 1"),
    (-2, "uniform", ValueError, "at least 1"),
    (2.0, "first", TypeError, "integer"),
    ("5", "first", TypeError, "integer"),
    (10**12, "first", ValueError, "below"),
    (5, [10**12], ValueError, "absurd"),
    (5, range(10**12), ValueError, "at most"),
    (5, {"first": 1}, TypeError, "dict"),
    (True, "first", TypeError, "integer"),
]


@pytest.mark.parametrize(("num_frames", "sampling", "error", "words"), BAD_SAMPLINGS)
def test_bad_choice_of_frames_is_explained(num_frames, sampling, error, words):
    with pytest.raises(error, match=words):
        select_key_frames(open_video(numbered_frames(8)), num_frames, sampling)


def test_a_frame_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no frame 9"):
        VideoFrames.select(open_video(numbered_frames(3)), [0, 9])


ASK = "Please segment the red square."
TOKENS = "<img>" + "<IMG_CONTEXT>" * 256 + "</img>"
PAST = f"<|im_start|>user\n{TOKENS}Hi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
PAST_REGION = PAST.replace("Hi.", "\nregion1<vp>" + "<IMG_CONTEXT>" * 256 + "</vp>.\n")
REGION = np.ones((1, 4, 6))

SPOKEN = [
    {"role": "user", "content": [{"type": "image", "image": plain(size=(6, 6))}, {"type": "text", "text": ASK}]},
    {"role": "assistant", "content": "Sure."},
]

# arguments of a call -> the error and words of its message; a picture of 1 tile is added unless the row has its own
BAD_CALLS = {
    "no text": ({}, TypeError, "text must be a string"),
    "text is a number": ({"text": 5}, TypeError, "int"),
    "text is empty": ({"text": "  "}, ValueError, "says nothing"),
    "text is only the tag": ({"text": "<image>"}, ValueError, "says nothing"),
    "two tags": ({"text": "<image> and <image>"}, ValueError, "2 <image> tags"),
    "half a character in text": ({"text": "What is \ud83d?"}, ValueError, "surrogate"),
    "text is bytes": ({"text": b"What is this?"}, TypeError, "bytes"),
    "image token in text": ({"text": "What is <IMG_CONTEXT>?"}, ValueError, "IMG_CONTEXT"),
    "image start in text": ({"text": "What is <img>?"}, ValueError, "<img>"),
    "region start in text": ({"text": "What is <vp>?"}, ValueError, "<vp>"),
    "regions without a picture": (
        {"text": ASK, "image": None, "mask_prompts": REGION},
        ValueError,
        "image= or video=",
    ),
    "past picture without a picture": ({"text": ASK, "image": None, "past_text": PAST}, ValueError, "same image="),
    "image and video": ({"text": ASK, "video": [plain()]}, ValueError, "Both"),
    "empty video": ({"text": ASK, "image": None, "video": []}, ValueError, "empty"),
    "empty frames": (
        {"text": ASK, "image": None, "video": VideoFrames(lambda _: (_ for _ in ()))},
        ValueError,
        "empty",
    ),
    "past_text is a list": ({"text": ASK, "past_text": [PAST]}, TypeError, "past_text"),
    "unexpanded tag in past_text": ({"text": ASK, "past_text": "<image>Hi"}, ValueError, "past_text holds <image>"),
    "another picture than before": (
        {"text": ASK, "image": plain(size=(90, 60)), "past_text": PAST},
        ValueError,
        "1792",
    ),
    "video after an image": (
        {"text": ASK, "image": None, "video": numbered_frames(2), "past_text": PAST},
        ValueError,
        r"\[256, 256\]",
    ),
    "video of as many tokens as the image before": (
        {"text": ASK, "image": None, "video": numbered_frames(2), "past_text": PAST.replace("</img>", TOKENS[5:])},
        ValueError,
        r"of \[512\] tokens",
    ),
    "cut past_text": ({"text": ASK, "past_text": PAST[:400]}, ValueError, "cut"),
    "regions of before missing": ({"text": ASK, "past_text": PAST_REGION}, ValueError, "mask_prompts"),
    "other regions than before": (
        {"text": ASK, "past_text": PAST_REGION, "mask_prompts": REGION * 0},
        ValueError,
        "mask_prompts",
    ),
    "2-D region": ({"text": ASK, "mask_prompts": np.ones((4, 6))}, ValueError, r"\(4, 6\)"),
    "2-D region in a list": ({"text": ASK, "mask_prompts": [np.ones((4, 6))]}, ValueError, r"\(4, 6\)"),
    "4-D regions": ({"text": ASK, "mask_prompts": np.ones((1, 1, 4, 6))}, ValueError, r"\(1, 1, 4, 6\)"),
    "list of two": ({"text": ASK, "mask_prompts": [REGION, REGION]}, ValueError, "np.stack"),
    "empty list of regions": ({"text": ASK, "mask_prompts": []}, ValueError, "list of 0"),
    "no region": ({"text": ASK, "mask_prompts": np.ones((0, 4, 6))}, ValueError, r"\(0, 4, 6\)"),
    "region without pixels": ({"text": ASK, "mask_prompts": np.ones((1, 0, 6))}, ValueError, r"\(1, 0, 6\)"),
    "more regions than words": ({"text": ASK, "mask_prompts": np.ones((1001, 4, 6))}, ValueError, "more than 1000"),
    "a region as large as a city": (
        {"text": ASK, "mask_prompts": np.broadcast_to(np.uint8(1), (1, 10**5, 10**5))},
        ValueError,
        "100000x100000",
    ),
    "infinite region": ({"text": ASK, "mask_prompts": REGION * np.inf}, ValueError, "infinite"),
    "NaN region": ({"text": ASK, "mask_prompts": REGION * np.nan}, ValueError, "NaN"),
    "region in words": ({"text": ASK, "mask_prompts": "the left half"}, TypeError, "str"),
    "region of strings": ({"text": ASK, "mask_prompts": np.full((1, 6, 8), "a")}, TypeError, "numbers"),
    "complex region": ({"text": ASK, "mask_prompts": np.ones((1, 4, 6), complex)}, TypeError, "complex128"),
    "region on the meta device": ({"text": ASK, "mask_prompts": torch.ones(1, 4, 6, device="meta")}, TypeError, "meta"),
    "sparse region": ({"text": ASK, "mask_prompts": torch.ones(1, 4, 6).to_sparse()}, TypeError, "dense"),
    "sparse image": ({"text": ASK, "image": torch.ones(3, 4, 6).to_sparse()}, TypeError, "dense"),
    "unknown sampling": ({"text": ASK, "frame_sampling": "random"}, ValueError, "'first', 'uniform'"),
    "sampling in bytes": ({"text": ASK, "frame_sampling": b"\x01\x02"}, TypeError, "bytes"),
    "sampling by one number": ({"text": ASK, "frame_sampling": np.array(3)}, TypeError, "list of frame numbers"),
    "sampling by a table": ({"text": ASK, "frame_sampling": torch.zeros(1, 2, dtype=int)}, TypeError, "Tensor"),
    "no frames asked for": ({"text": ASK, "num_frames": 0}, ValueError, "at least 1"),
    "half a frame asked for": ({"text": ASK, "num_frames": 1.5}, TypeError, "integer"),
    "NaN pixels": ({"text": ASK, "image": np.full((6, 8, 3), np.nan)}, ValueError, "nan"),
    "NaN pixels in a video": ({"text": ASK, "image": None, "video": np.full((2, 6, 8, 3), np.nan)}, ValueError, "nan"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_explained(name, processor):
    arguments, error, words = BAD_CALLS[name]
    with pytest.raises(error, match=words):
        processor.prepare(**{"image": plain(size=(6, 6)), **arguments})


GOOD_CALLS = {
    "tag in front": {"text": "<image>" + ASK},
    "tag in the middle": {"text": "Look at <image> and speak."},
    "no tag": {"text": ASK},
    "braces": {"text": "a {b} {} c"},
    "past_text is None": {"text": ASK, "past_text": None},
    "follow-up": {"text": ASK, "past_text": PAST},
    "follow-up with tag": {"text": "<image>\n" + ASK, "past_text": PAST},
    "follow-up on words alone": {"text": ASK, "past_text": "<|im_start|>user\nHi.<|im_end|>\n"},
    "regions": {"text": ASK, "mask_prompts": REGION},
    "regions in a list": {"text": ASK, "mask_prompts": [REGION]},
    "regions upside down": {"text": ASK, "mask_prompts": REGION[:, ::-1]},
    "regions of another byte order": {"text": ASK, "mask_prompts": REGION.astype(">f4")},
    "bool regions": {"text": ASK, "mask_prompts": REGION > 0},
    "bool tensor regions": {"text": ASK, "mask_prompts": torch.ones(2, 4, 6, dtype=torch.bool)},
    "region of another size": {"text": ASK, "mask_prompts": np.ones((1, 50, 9), np.uint8)},
    "empty region": {"text": ASK, "mask_prompts": REGION * 0},
    "regions again": {"text": ASK, "past_text": PAST_REGION, "mask_prompts": REGION},
    "regions in a follow-up": {"text": ASK, "past_text": PAST, "mask_prompts": REGION},
    "video": {"text": ASK, "image": None, "video": numbered_frames(7)},
    "video of one frame": {"text": ASK, "image": None, "video": numbered_frames(1)},
    "video with regions": {"text": ASK, "image": None, "video": numbered_frames(2), "mask_prompts": REGION},
    "frames 3 and 1": {"text": ASK, "image": None, "video": numbered_frames(7), "frame_sampling": [3, 1]},
    "uniform stream": {"text": ASK, "image": None, "video": iter(numbered_frames(7)), "frame_sampling": "uniform"},
    "an image, and frames to choose": {"text": ASK, "frame_sampling": [3]},
    "words alone": {"text": ASK, "image": None},
}


@pytest.mark.parametrize("name", GOOD_CALLS)
def test_tokens_and_features_of_a_call_match(name, processor):
    inputs = processor.prepare(**{"image": plain(size=(6, 6)), **GOOD_CALLS[name]})
    tiles = 0 if inputs.pixel_values is None else len(inputs.pixel_values)
    cells = 0 if inputs.prompt_masks is None else int(inputs.prompt_masks.sum())
    image_token = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert int((inputs.input_ids == image_token).sum()) == tiles * processor.num_image_token + cells
    assert "<image>" not in inputs.prompt


# ------------------------------------------------------------------------------------- models, files and what is made


@dataclass(frozen=True)
class Have:
    """What a row of `BAD_STATES` may work with: the golden checkpoint, loaded, and an empty folder."""

    model: Sa2VAChatModel
    processor: Sa2VAProcessor
    folder: Path

    def ask(self, **arguments: Any) -> Any:
        """A call that would be right without these arguments."""
        call = {"image": plain(size=(6, 6)), "text": ASK, "max_new_tokens": 1, **arguments}
        return self.model.predict_forward(**call)

    def checkpoint(self, change=None, **files: bytes | None) -> Path:
        """A copy of the golden checkpoint with `change` done to its config, and files replaced or (None) left out."""
        shutil.copytree(GOLDEN / "ivl_qwen2", self.folder / "copy", ignore=shutil.ignore_patterns("golden*"))
        config = json.loads((self.folder / "copy" / "config.json").read_text())
        if change is not None:
            change(config)
        (self.folder / "copy" / "config.json").write_text(json.dumps(config))
        for stem, content in files.items():
            (path,) = (self.folder / "copy").glob(f"{stem}.*")
            path.unlink() if content is None else path.write_bytes(content)
        return self.folder / "copy"

    def load(self, *args: Any, **files: Any) -> Any:
        """Loads such a copy."""
        return AutoModel.from_pretrained(self.checkpoint(*args, **files))

    def config(self, part: str | None = None, **values: Any) -> Sa2VAChatConfig:
        """The golden config with other values in one of its parts."""
        config = json.loads((GOLDEN / "ivl_qwen2" / "config.json").read_text())
        (config[part] if part else config).update(values)
        return Sa2VAChatConfig.from_dict(config)

    def forward(self, **arguments: Any) -> Any:
        """A training step that would be right without these arguments."""
        inputs = self.processor(plain(size=(6, 6)), ASK + "[SEG]")
        return self.model(**{**inputs, "grounding_pixel_values": [torch.zeros(3, 256, 256)], **arguments})

    def generate(self, **arguments: Any) -> Any:
        """A continuation that would be right without these arguments."""
        inputs = self.processor(plain(size=(6, 6)), ASK, mask_prompts=REGION)
        return self.model.generate(**{**inputs, "max_new_tokens": 1, **arguments})


def cut(path: Path, size: int = 5000) -> bytes:
    return path.read_bytes()[:size]


def pickle_of(have: Have, value: Any) -> Path:
    torch.save(value, have.folder / "pytorch_model.bin")
    return have.folder


WEIGHTS = GOLDEN / "ivl_qwen2" / "model.safetensors"
XGLM = {
    **{"model_type": "xglm", "d_model": 160, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "vocab_size": 448,
}
DEEP: dict = {}
for _ in range(300):
    DEEP = {"more": DEEP}

# a call -> the error and words of its message
BAD_STATES = {
    # asking
    "threshold in words": (lambda have: have.ask(mask_threshold="high"), TypeError, "probability"),
    "threshold above 1": (lambda have: have.ask(mask_threshold=1.5), ValueError, "between 0 and 1"),
    "threshold NaN": (lambda have: have.ask(mask_threshold=float("nan")), ValueError, "between 0 and 1"),
    "unknown format": (lambda have: have.ask(output_format="png"), ValueError, "'numpy', 'torch', 'rle'"),
    "unknown mask sizes": (lambda have: have.ask(mask_sizes="big"), ValueError, "'first', 'own'"),
    "probabilities as RLE": (
        lambda have: have.ask(return_raw_masks=True, output_format="rle"),
        ValueError,
        "run-length",
    ),
    "a batch of nothing": (lambda have: collate_inputs([]), ValueError, "at least one"),
    "tiles of no picture": (lambda have: choose_tiling(0, 5), ValueError, "0x5"),
    "a cache for many": (
        lambda have: have.model.predict_batch([{"text": ASK}], past_key_values=DynamicCache()),
        ValueError,
        "belongs to one conversation",
    ),
    "a sample for samples": (lambda have: have.model.predict_batch({"text": ASK}), TypeError, "list of dictionaries"),
    "logits of a stream": (
        lambda have: have.model.predict_stream(image=plain(), text=ASK, return_mask_logits=True),
        TypeError,
        "predict_forward",
    ),
    "a frame that is none": (lambda have: have.ask(image=None, video=[plain(), None]), TypeError, "frame 1: "),
    "masks of two sizes": (
        lambda have: masks_to_rle([np.zeros((2, 3), bool), np.zeros((3, 3), bool)]),
        ValueError,
        "must have one size",
    ),
    "a prompt to be cut": (
        lambda have: have.processor(text=ASK, truncation=True, max_length=5),
        TypeError,
        r"no \['max_length', 'truncation'\]",
    ),
    "masks that are nowhere": (lambda have: masks_to_rle(torch.zeros(1, 2, 2, device="meta")), TypeError, "meta"),
    "more words than the model reads": (
        lambda have: have.ask(text="word " * 2 * have.model.config.llm_config.max_position_embeddings),
        ValueError,
        "show fewer frames",
    ),
    "two answers": (lambda have: have.ask(num_return_sequences=2, num_beams=2), ValueError, "num_return_sequences"),
    "misspelled argument": (lambda have: have.ask(max_new_token=5), ValueError, "max_new_token"),
    "no new tokens": (lambda have: have.ask(max_new_tokens=0), ValueError, "max_new_tokens"),
    "new tokens in words": (lambda have: have.ask(max_new_tokens="ten"), ValueError, "max_new_tokens='ten'"),
    "no beams": (lambda have: have.ask(num_beams=0), ValueError, "num_beams"),
    "half a beam": (lambda have: have.ask(num_beams=1.5), ValueError, "num_beams=1.5"),
    "more beams than memory holds": (lambda have: have.ask(num_beams=10**5), ValueError, "1000 are the most"),
    "so many beams in a config": (
        lambda have: have.ask(generation_config=GenerationConfig(num_beams=10**5)),
        ValueError,
        "1000 are the most",
    ),
    "shorter than its question": (
        lambda have: have.ask(max_length=5, max_new_tokens=None),
        ValueError,
        "max_length=5 co",
    ),
    "an assistant that is the model": (lambda have: have.ask(assistant_early_exit=1), ValueError, "words alone"),
    "a prompt in chunks": (lambda have: have.ask(prefill_chunk_size=8), ValueError, "embeddings"),
    "guided away from no words": (lambda have: have.ask(guidance_scale=2.0), ValueError, "guidance_scale"),
    "one message": (lambda have: have.processor.apply_chat_template(SPOKEN[0]), TypeError, "list of messages"),
    "a batch of numbers": (lambda have: have.processor.apply_chat_template([5]), TypeError, "list of messages"),
    "a batch with a gap": (
        lambda have: have.processor.apply_chat_template([SPOKEN[:1], None]),
        TypeError,
        "list of messages",
    ),
    "a picture of the assistant's": (
        lambda have: have.processor.apply_chat_template(
            [SPOKEN[0], {"role": "assistant", "content": SPOKEN[0]["content"]}, {"role": "user", "content": "Hi"}]
        ),
        ValueError,
        "of the assistant, holds",
    ),
    "an unknown word about a template": (
        lambda have: have.processor.apply_chat_template(SPOKEN[:1], processor_kwargs={"truncate": True}),
        TypeError,
        "truncate",
    ),
    "a template of the caller's": (
        lambda have: have.processor.apply_chat_template(SPOKEN[:1], chat_template="{{ messages }}"),
        ValueError,
        "chat_template",
    ),
    "room for more tokens than positions": (
        lambda have: have.ask(max_new_tokens=10**9, cache_implementation="static"),
        ValueError,
        "static cache",
    ),
    "a cache that is a number": (
        lambda have: have.model.generate(**have.processor(text=["Hi"]), past_key_values=5),
        TypeError,
        "must be a Cache",
    ),
    "a cache that is none": (lambda have: have.ask(past_key_values=5), TypeError, "a Cache"),
    "a cache by its new name": (lambda have: have.ask(cache=5), TypeError, "a Cache"),
    "stop strings of numbers": (lambda have: have.ask(stop_strings=[5]), TypeError, r"stop_strings=\[5\]"),
    "a stop string that is everywhere": (
        lambda have: have.ask(stop_strings=["a", ""]),
        TypeError,
        "none of them empty",
    ),
    "a watermark of a number": (lambda have: have.ask(watermarking_config=5), TypeError, "WatermarkingConfig"),
    "a penalty without its factor": (
        lambda have: have.ask(exponential_decay_length_penalty=(1,)),
        TypeError,
        "two numbers",
    ),
    "too cold to divide by": (lambda have: have.ask(do_sample=True, temperature=1e-300), ValueError, "leave do_sample"),
    "more than all words": (lambda have: have.ask(do_sample=True, top_p=2), ValueError, "top_p=2 .*from 0 to 1"),
    "no time": (lambda have: have.ask(max_time=-1), ValueError, "max_time=-1"),
    "an assistant of nobody": (lambda have: have.ask(is_assistant=True), TypeError, "is_assistant"),
    "a prompt to be guided away from": (
        lambda have: have.ask(negative_prompt_ids=torch.ones(1, 1, dtype=int)),
        ValueError,
        "negative_prompt_ids",
    ),
    "labels of an answer": (lambda have: have.ask(labels=torch.ones(1, 1, dtype=int)), TypeError, "made here"),
    "half an end mark": (lambda have: have.ask(eos_token_id=1.5), ValueError, "eos_token_id=1.5 is no token"),
    "an end mark nobody knows": (lambda have: have.ask(eos_token_id=10**9), ValueError, "0 to 447"),
    "an end mark below all": (lambda have: have.ask(eos_token_id=-1), ValueError, "0 to 447"),
    "end marks in a table": (lambda have: have.ask(eos_token_id=[[1]]), ValueError, "eos_token_id"),
    "end marks of a config": (
        lambda have: have.ask(generation_config=GenerationConfig(eos_token_id=[5, 448])),
        ValueError,
        "0 to 447",
    ),
    "padding nobody knows": (lambda have: have.ask(pad_token_id=10**6), ValueError, "pad_token_id"),
    "a first token nobody knows": (lambda have: have.ask(forced_bos_token_id=10**6), ValueError, "forced_bos"),
    "a last token nobody knows": (lambda have: have.ask(forced_eos_token_id=10**6), ValueError, "forced_eos"),
    "streamer is a number": (lambda have: have.ask(streamer=5), TypeError, "streamer=5"),
    "logits_processor of numbers": (lambda have: have.ask(logits_processor=[5]), TypeError, "logits_processor"),
    "an assistant that sees no picture": (
        lambda have: have.ask(assistant_model=have.model.language_model),
        ValueError,
        "assistant_model",
    ),
    "half a frame together": (lambda have: have.ask(encode_batch_size=1.5), ValueError, "encode_batch_size=1.5"),
    "no samples at all": (lambda have: have.model.predict_batch(None), TypeError, "NoneType"),
    "a sample of numbers": (
        lambda have: have.model.predict_batch([{5: "a", "b": 1}]),
        TypeError,
        r"samples\[0\] can't",
    ),
    "half a sample together": (
        lambda have: have.model.predict_batch([{"text": ASK}], batch_size=2.5),
        ValueError,
        "batch_size=2.5",
    ),
    "temperature in words": (lambda have: have.ask(do_sample=True, temperature="hot"), ValueError, "temperature"),
    "endless beams": (
        lambda have: have.ask(num_beams=2, max_new_tokens=10**8),
        ValueError,
        "2 beams of 100000000 tokens",
    ),
    "a static cache beyond all positions": (
        lambda have: have.ask(cache_implementation="static", max_cache_len=10**9),
        ValueError,
        "static cache",
    ),
    "endless answers": (
        lambda have: have.model.generate(**have.processor(text=["Hi"]), num_return_sequences=10**5),
        ValueError,
        "num_return_sequences=100000",
    ),
    "an argument that is made here": (lambda have: have.ask(attention_mask=None), TypeError, "attention_mask"),
    "token ids beside a question": (lambda have: have.ask(input_ids=torch.tensor([[5]])), TypeError, "input_ids"),
    "a message's picture without what it shows": (
        lambda have: have.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}], tokenize=True
        ),
        ValueError,
        "what it shows",
    ),
    "tools for a template": (
        lambda have: have.processor.apply_chat_template(SPOKEN[:1], tools=[{"name": "ls"}]),
        ValueError,
        "tools",
    ),
    "a prompt in place of words": (
        lambda have: have.ask(text=have.processor.apply_chat_template(SPOKEN[:1]), image=plain()),
        ValueError,
        "words alone",
    ),
    "a prompt with half a character": (
        lambda have: have.processor(text=have.processor.build_prompt("a\ud800b")),
        ValueError,
        "surrogate",
    ),
    "a prompt without its picture": (
        lambda have: have.processor(text=[have.processor.apply_chat_template(SPOKEN[:1])]),
        ValueError,
        "that the messages are about",
    ),
    "a prompt and what came before it": (
        lambda have: have.processor(text=have.processor.apply_chat_template(SPOKEN[:1]), past_text="Hi"),
        ValueError,
        "too late",
    ),
    "loss without all logits": (
        lambda have: have.forward(
            labels=have.processor(plain(size=(6, 6)), ASK + "[SEG]")["input_ids"], logits_to_keep=1
        ),
        ValueError,
        "logits_to_keep",
    ),
    "labels of another text": (lambda have: have.forward(labels=torch.zeros(1, 4, dtype=int)), ValueError, "shape of"),
    "generation_config is a dict": (lambda have: have.ask(generation_config={"num_beams": 2}), TypeError, "dict"),
    "processor to keep is a number": (lambda have: have.model.set_processor(5), TypeError, "got 5"),
    "processor is a number": (lambda have: have.ask(processor=5), TypeError, "processor="),
    "tokenizer is a name": (lambda have: have.ask(tokenizer="bert"), TypeError, "'bert'"),
    "processor of the other family": (
        lambda have: have.ask(processor=Sa2VAProcessor.from_pretrained(GOLDEN / "qwen3vl")),
        ValueError,
        "other family",
    ),
    "tokenizer of the other family": (
        lambda have: have.ask(tokenizer=AutoTokenizer.from_pretrained(GOLDEN / "qwen3vl")),
        ValueError,
        "IMG_CONTEXT",
    ),
    "tokenizer of a larger model": (
        lambda have: have.ask(tokenizer=larger_tokenizer(), text="What is <word 499>?"),
        ValueError,
        "this model knows 448 tokens",
    ),
    "stream without a picture": (
        lambda have: next(have.model.predict_stream(text=ASK)),
        ValueError,
        "predict_forward for text",
    ),
    "generate without tokens": (lambda have: have.model.generate(), ValueError, "input_ids"),
    "generate with tokens twice": (lambda have: have.generate(inputs=torch.ones(1, 2)), ValueError, "its other name"),
    "tokens in a list": (lambda have: have.generate(input_ids=[[1, 2]]), TypeError, "got a list"),
    "a token nobody knows": (lambda have: have.generate(input_ids=torch.tensor([[99999]])), ValueError, "0 to 447"),
    "a token below all": (lambda have: have.forward(input_ids=torch.tensor([[-5]])), ValueError, "from -5 to -5"),
    "tokens without a batch": (lambda have: have.generate(input_ids=torch.ones(5, dtype=int)), ValueError, "B, L"),
    "tokens in between": (lambda have: have.generate(input_ids=torch.ones(1, 5)), ValueError, "torch.float32"),
    "no tokens": (lambda have: have.generate(input_ids=torch.ones(1, 0, dtype=int)), ValueError, "at least one token"),
    "no rows": (lambda have: have.forward(input_ids=torch.ones(0, 4, dtype=int)), ValueError, "at least one token"),
    "a mask of another text": (lambda have: have.generate(attention_mask=torch.ones(1, 3)), ValueError, "shape of"),
    "a mask in a list": (lambda have: have.forward(attention_mask=[[1]]), TypeError, "attention_mask"),
    "tiles in a list": (lambda have: have.generate(pixel_values=[1]), TypeError, "pixel_values"),
    "tiles of another size": (
        lambda have: have.generate(pixel_values=torch.zeros(1, 3, 100, 100)),
        ValueError,
        "28 divides",
    ),
    "tiles that are no squares": (
        lambda have: have.forward(pixel_values=torch.zeros(1, 3, 448, 224)),
        ValueError,
        r"\(1, 3, 448, 224\)",
    ),
    "one tile without its axis": (lambda have: have.forward(pixel_values=torch.zeros(3, 28, 28)), ValueError, "tiles"),
    "no tiles": (lambda have: have.generate(pixel_values=torch.zeros(0, 3, 448, 448)), ValueError, "tiles"),
    "regions of another grid": (
        lambda have: have.generate(prompt_masks=torch.ones(1, 5, 5, dtype=bool)),
        ValueError,
        r"bool \[R, 16, 16\]",
    ),
    "regions of numbers": (lambda have: have.generate(prompt_masks=torch.ones(1, 16, 16)), ValueError, "float32"),
    "half a tile": (lambda have: have.generate(prompt_mask_tiles=torch.zeros(1)), ValueError, "prompt_mask_tiles"),
    "a list of images": (lambda have: have.processor([plain(), plain()], ASK), TypeError, "list"),
    "two texts about one image": (lambda have: have.processor(plain(), [ASK, ASK]), ValueError, "images=one Image"),
    "two texts about three images": (
        lambda have: have.processor([plain()] * 3, [ASK, ASK]),
        ValueError,
        "images=3 in a list, but text is a list of 2",
    ),
    "no texts": (lambda have: have.processor(text=[]), ValueError, "empty list"),
    "a second text that is none": (lambda have: have.processor(text=[ASK, 5]), TypeError, r"text\[1\]: "),
    "a batch without padding": (
        lambda have: have.processor(text=["Hi", ASK * 2], padding=False),
        ValueError,
        "padding=True",
    ),
    "padding to the most": (lambda have: have.processor(text=ASK, padding="max_length"), ValueError, "'max_length'"),
    "padding in the middle": (lambda have: have.processor(text=ASK, padding_side="both"), ValueError, "'both'"),
    "a conversation of nobody": (lambda have: have.processor.apply_chat_template([]), ValueError, "ends with"),
    "a message of the system": (
        lambda have: have.processor.apply_chat_template([{"role": "system", "content": "Be kind."}]),
        ValueError,
        "'system'; user and assistant",
    ),
    "a conversation that is over": (
        lambda have: have.processor.apply_chat_template(SPOKEN[:2]),
        ValueError,
        "ends with what the user asks",
    ),
    "a second picture": (
        lambda have: have.processor.apply_chat_template([*SPOKEN[:2], SPOKEN[0]]),
        ValueError,
        "about one image",
    ),
    "two pictures at once": (
        lambda have: have.processor.apply_chat_template([{"role": "user", "content": SPOKEN[0]["content"] * 2}]),
        ValueError,
        "more than one image",
    ),
    "a picture and a clip": (
        lambda have: have.processor.apply_chat_template(
            [{"role": "user", "content": [*SPOKEN[0]["content"], {"type": "video", "video": [plain()]}]}]
        ),
        ValueError,
        "about one image",
    ),
    "content of a number": (
        lambda have: have.processor.apply_chat_template([{"role": "user", "content": 5}]),
        TypeError,
        "got 5",
    ),
    "a part without type": (
        lambda have: have.processor.apply_chat_template([{"role": "user", "content": [{"text": "Hi"}]}]),
        ValueError,
        "what it shows",
    ),
    "words in a file": (
        lambda have: have.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "path": "words.txt"}]}]
        ),
        ValueError,
        r"'words\.txt'} is no text",
    ),
    "a prompt without an end": (
        lambda have: have.processor.apply_chat_template(SPOKEN[:1], add_generation_prompt=False),
        ValueError,
        "add_generation_prompt",
    ),
    "unknown argument of the processor": (lambda have: have.processor(plain(), ASK, size=3), TypeError, "size"),
    # training
    "forward without tokens": (lambda have: have.model(pixel_values=torch.zeros(1, 3, 448, 448)), ValueError, "input"),
    "forward with embeddings": (
        lambda have: have.forward(inputs_embeds=torch.zeros(1, 3, 64)),
        ValueError,
        "input_ids",
    ),
    "tiles of another picture": (
        lambda have: have.forward(pixel_values=torch.zeros(2, 3, 448, 448)),
        ValueError,
        "placeholders",
    ),
    "a picture without pixels": (lambda have: have.forward(pixel_values=None), ValueError, "no pixel_values"),
    "generate about a picture without pixels": (
        lambda have: have.model.generate(have.processor(plain(), ASK)["input_ids"]),
        ValueError,
        "no pixel_values",
    ),
    "regions on a tile that is not there": (
        lambda have: have.model.generate(
            **{**have.processor(plain(), ASK, mask_prompts=REGION), "prompt_mask_tiles": torch.tensor([99])}
        ),
        ValueError,
        r"prompt_mask_tiles=\[99\]",
    ),
    "frames of another batch": (lambda have: have.forward(grounding_pixel_values=[None] * 2), ValueError, "2"),
    "masks of another batch": (lambda have: have.forward(mask_labels=[]), ValueError, "mask_labels of 0"),
    "masks without frames": (
        lambda have: have.forward(grounding_pixel_values=None, mask_labels=[torch.ones(1, 6, 8)]),
        ValueError,
        "mask_labels need grounding_pixel_values",
    ),
    "masks of 255": (lambda have: have.forward(mask_labels=[torch.full((1, 6, 8), 255.0)]), ValueError, "by 255"),
    "masks in an array": (lambda have: have.forward(mask_labels=[np.ones((1, 6, 8))]), TypeError, "ndarray"),
    "a label nobody knows": (
        lambda have: have.forward(labels=have.processor(plain(size=(6, 6)), ASK + "[SEG]")["input_ids"] + 99999),
        ValueError,
        "labels hold tokens",
    ),
    "labels in between": (
        lambda have: have.forward(labels=have.processor(plain(size=(6, 6)), ASK + "[SEG]")["input_ids"] / 2),
        ValueError,
        "labels are torch.float32",
    ),
    "frames of another size": (
        lambda have: have.forward(grounding_pixel_values=[torch.zeros(3, 64, 64)]),
        ValueError,
        r"\[T, 3, 256, 256\]",
    ),
    "no frames to learn from": (
        lambda have: have.forward(grounding_pixel_values=[torch.zeros(0, 3, 256, 256)]),
        ValueError,
        "at least one frame",
    ),
    "frames in a list": (lambda have: have.forward(grounding_pixel_values=[[1]]), TypeError, "hold a list"),
    "masks without pixels": (lambda have: have.forward(mask_labels=[torch.zeros(1, 0, 0)]), ValueError, "h, w"),
    "masks of two objects": (
        lambda have: have.forward(mask_labels=[torch.ones(2, 1, 6, 8)]),
        ValueError,
        r"\[1, 1, h, w\] is needed",
    ),
    # configs
    "a gigantic layer": (
        lambda have: have.config("llm_config", hidden_size=10**9),
        ValueError,
        "llm_config.hidden_size=1000000000",
    ),
    "a million layers": (
        lambda have: have.config("llm_config", num_hidden_layers=10**6),
        ValueError,
        "up to 200 are accepted",
    ),
    "a thousand layers": (
        lambda have: have.config("llm_config", num_hidden_layers=1000),
        ValueError,
        "llm_config.num_hidden_layers=1000 .* up to 200 are",
    ),
    "a thousand layers of another name": (
        lambda have: have.config("llm_config", model_type="bart", decoder_layers=1000),
        ValueError,
        "decoder_layers=1000",
    ),
    "a thousand layers of memory": (
        lambda have: have.config("grounding_config", memory_attention_layers=100),
        ValueError,
        "memory_attention_layers=100 must be an integer from 1 to 32",
    ),
    "too much in all": (
        lambda have: have.config("vision_config", hidden_size=2**17, num_hidden_layers=200),
        ValueError,
        "parameters",
    ),
    "a dictionary for giants": (
        lambda have: have.config("llm_config", hidden_size=2**18, vocab_size=2**24),
        ValueError,
        "parameters",
    ),
    "a million labels": (lambda have: have.config(num_labels=10**6), ValueError, "num_labels"),
    "a million SAM 2 blocks": (
        lambda have: have.config("grounding_config", stages=[1, 10**6, 1, 1]),
        ValueError,
        "grounding_config.stages",
    ),
    "a thousand SAM 2 blocks": (
        lambda have: have.config("grounding_config", stages=[100] * 4),
        ValueError,
        r"stages=\[100, 100, 100, 100\] .* up to 200 in all",
    ),
    "a stage for every second": (
        lambda have: have.config("grounding_config", stages=[1] * 2000),
        ValueError,
        "2000 items",
    ),
    "a label for everything": (
        lambda have: have.config(id2label={str(i): "thing" for i in range(2000)}),
        ValueError,
        "config.id2label has 2000 items",
    ),
    "a factor for every second": (
        lambda have: have.config("llm_config", rope_scaling={"rope_type": "longrope", "long_factor": [1.0] * 2000}),
        ValueError,
        "rope_scaling.long_factor has 2000 items",
    ),
    "frames that SAM 2 can't halve": (
        lambda have: have.config("grounding_config", image_size=100),
        ValueError,
        "image_size=100 .* multiple of 32, such as 1024",
    ),
    "frames that SAM 2 can't tile": (
        lambda have: have.config("grounding_config", image_size=1024, window_spec=[7, 4, 16, 8]),
        ValueError,
        "image_size=1024 .* multiple of 224",
    ),
    "no frames": (lambda have: have.config("grounding_config", image_size=0), ValueError, "image_size=0"),
    "gigantic frames": (lambda have: have.config("grounding_config", image_size=10**6), ValueError, "image_size"),
    "a million tiles": (lambda have: have.config(max_dynamic_patch=10**6), ValueError, "max_dynamic_patch"),
    "no objects at once": (
        lambda have: have.config("grounding_config", max_objects_per_batch=0),
        ValueError,
        "max_objects_per_batch=0",
    ),
    "width in words": (lambda have: have.config("llm_config", hidden_size="wide"), ValueError, "must be an integer"),
    "half a layer": (lambda have: have.config("vision_config", num_hidden_layers=2.5), ValueError, "an integer"),
    "ratio 0": (lambda have: have.config(downsample_ratio=0), ValueError, "downsample_ratio=0"),
    "ratio NaN": (lambda have: have.config(downsample_ratio=float("nan")), ValueError, "downsample_ratio=nan"),
    "rope NaN": (lambda have: have.config("llm_config", rope_theta=float("nan")), ValueError, "rope_theta=nan"),
    "rope 0": (
        lambda have: have.config("llm_config", rope_theta=0),
        ValueError,
        "rope_theta=0 must be a number from 1",
    ),
    "endless rope": (lambda have: have.config("llm_config", rope_theta=1e400), ValueError, "rope_theta=inf"),
    "epsilon NaN": (lambda have: have.config("llm_config", rms_norm_eps=float("nan")), ValueError, "rms_norm_eps=nan"),
    "epsilon below 0": (lambda have: have.config("vision_config", layer_norm_eps=-1.0), ValueError, "from 0 to 1"),
    "factor NaN": (
        lambda have: have.config("llm_config", rope_scaling={"type": "linear", "factor": float("nan")}),
        ValueError,
        "rope_scaling.factor=nan",
    ),
    "factor 0": (
        lambda have: have.config("llm_config", rope_scaling={"type": "linear", "factor": 0}),
        ValueError,
        "rope_scaling.factor=0",
    ),
    "any other number NaN": (lambda have: have.config(anything=[{"else": float("-inf")}]), ValueError, "else=-inf"),
    "layer that is not there": (lambda have: have.config(select_layer=7), ValueError, "has 2 layers"),
    "unknown dtype": (lambda have: have.config(dtype="os"), ValueError, "no dtype"),
    "dtype by another name": (
        lambda _: AutoModel.from_pretrained(GOLDEN / "ivl_qwen2", dtype="bf16"),
        ValueError,
        "dtype='bf16' is no dtype",
    ),
    "unknown memory dtype": (
        lambda have: have.config("grounding_config", memory_dtype="load"),
        ValueError,
        "memory_dtype='load'",
    ),
    "SAM 2 without memory": (lambda have: have.config("grounding_config", num_maskmem=0), ValueError, "from 1 to"),
    "unknown sampling in config": (
        lambda have: have.config("grounding_config", frame_sampling="last"),
        ValueError,
        "'first', 'uniform'",
    ),
    "unknown language model": (lambda have: have.config("llm_config", model_type="gpt-9"), ValueError, "gpt-9"),
    "part that is a list": (lambda have: have.config(vision_config=[1]), ValueError, "vision_config"),
    "config of another model": (lambda have: have.config(model_type="llama"), ValueError, "'llama'"),
    "method in a config": (lambda have: have.config(to_dict=1), ValueError, "no setting"),
    "bottomless config": (lambda have: have.config(more=DEEP), ValueError, "levels deep"),
    "heads that do not divide": (
        lambda have: Sa2VAChatModel(have.config("vision_config", num_attention_heads=7)),
        ValueError,
        "divisible",
    ),
    "three stages of SAM 2": (
        lambda have: have.config("grounding_config", stages=[1, 1, 1]),
        ValueError,
        "in SAM 2's 4 stages",
    ),
    "model without checkpoint": (
        lambda have: unsaved(have).predict_forward(image=plain(), text=ASK),
        ValueError,
        "set_processor",
    ),
    # checkpoints
    "no folder": (lambda have: AutoModel.from_pretrained("./no/such/folder"), OSError, "no/such/folder"),
    "no config": (lambda have: have.load(config=None), (OSError, ValueError), "config.json"),
    "config is no JSON": (lambda have: have.load(config=b"{"), OSError, "JSON"),
    "bottomless file": (
        lambda have: Sa2VAChatModel.from_pretrained(have.checkpoint(config=b"[" * 200_000)),
        ValueError,
        "no model that can be built: RecursionError",
    ),
    **{
        f"config that is {content}": (
            lambda have, content=content: Sa2VAChatModel.from_pretrained(have.checkpoint(config=content.encode())),
            ValueError,
            "no model that can be built: TypeError",
        )
        for content in ("[1]", "5", '"words"', "null")
    },
    "no weights": (lambda have: have.load(model=None), OSError, "model.safetensors"),
    "cut weights": (lambda have: have.load(model=cut(WEIGHTS)), OSError, "hub_upload.py check"),
    "weights are no weights": (lambda have: have.load(model=b"not at all"), OSError, "hub_upload.py check"),
    **{
        f"index {name}": (lambda have, index=index: AutoModel.from_pretrained(indexed(have, index)), OSError, words)
        for name, index, words in (
            ("that is no JSON", b"{", "check"),
            ("that is no text", b"\xff", "check"),
            ("without a bottom", b"[" * 200_000, "check"),
            ("without a map", b"{}", "weight_map"),
            ("that is a list", b"[]", "weight_map"),
            ("of an empty map", b'{"weight_map": {}}', "weight_map"),
            ("whose map is null", b'{"weight_map": null}', "weight_map"),
            ("whose map is a list", b'{"weight_map": ["a"]}', "weight_map"),
            ("whose metadata are a number", b'{"weight_map": {"a": "a.safetensors"}, "metadata": 5}', "metadata"),
            ("without metadata", b'{"weight_map": {"a": "a.safetensors"}}', 'Add "metadata": {}'),
            ("of a file that is a number", b'{"weight_map": {"a": 5}}', "puts a into 5"),
            ("of a file in the folder above", b'{"weight_map": {"a": "../w.safetensors"}}', "'../w.safetensors', but"),
            ("of a file somewhere", b'{"weight_map": {"a": "/w.safetensors"}}', "'/w.safetensors', but only"),
            ("of a file in a folder of Windows", rb'{"weight_map": {"a": "..\\w.safetensors"}}', "but only"),
            ("of a folder", b'{"weight_map": {"a": ".."}}', "'..', but only"),
            ("of a pickle", b'{"weight_map": {"a": "pytorch_model.bin"}}', "'pytorch_model.bin', but only"),
        )
    },
    "index without a map beside a config that is given": (
        lambda have: Sa2VAChatModel.from_pretrained(
            indexed(have, b'{"weight_map": null}'), config=Sa2VAChatConfig.from_pretrained(GOLDEN / "ivl_qwen2")
        ),
        OSError,
        "weight_map",
    ),
    "weights of another size": (
        lambda have: have.load(lambda config: config["llm_config"].update(intermediate_size=192)),
        ValueError,
        "hub_upload.py check",
    ),
    "one tensor for billions of parameters": (
        lambda have: have.load(
            lambda config: config["llm_config"].update(
                intermediate_size=200_000, num_hidden_layers=100, layer_types=["full_attention"] * 100
            ),
            model=safetensors.torch.save({"scale": torch.ones(1)}),
        ),
        ValueError,
        r"lacks .* tensors of 9.6e\+09 numbers",
    ),
    "tables for billions of positions": (
        lambda have: have.load(
            lambda config: config.update(llm_config=XGLM | {"max_position_embeddings": 2**22}),
            model=safetensors.torch.save({"scale": torch.ones(1)}),
        ),
        ValueError,
        r"tables of 6.7e\+08 numbers",
    ),
    "plain weights called quantized": (
        lambda have: have.load(
            lambda config: config.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        ),
        (ValueError, ImportError),  # without the package
        "not quantized|bitsandbytes",
    ),
    "pickled weights": (
        lambda have: AutoModel.from_pretrained(pickled_copy(have)),
        OSError,
        "hub_upload.py convert",
    ),
    "no tokenizer": (
        lambda have: Sa2VAProcessor.from_pretrained(
            have.checkpoint(tokenizer=None, tokenizer_config=None, added_tokens=None, special_tokens_map=None)
        ),
        (OSError, ValueError),
        "tokenizer",
    ),
    "no checkpoint at all": (lambda have: Sa2VAProcessor.from_pretrained(have.folder), OSError, "config.json"),
    "unknown attention": (
        lambda have: AutoModel.from_pretrained(GOLDEN / "ivl_qwen2", attn_implementation="magic"),
        ValueError,
        "magic",
    ),
    "unknown device": (
        lambda have: AutoModel.from_pretrained(GOLDEN / "ivl_qwen2", device_map="the fast one"),
        ValueError,
        "device_map",
    ),
    "device before the first": (
        lambda have: AutoModel.from_pretrained(GOLDEN / "ivl_qwen2", device_map=-1),
        ValueError,
        "device_map",
    ),
    "unknown quantization": (
        lambda have: AutoModel.from_pretrained(GOLDEN / "ivl_qwen2", quantization_config={"quant_method": "x"}),
        ValueError,
        "x",
    ),
    # settings of the processor
    "unknown template": (
        lambda have: Sa2VAProcessor(have.processor.tokenizer, template="llama_chat"),
        ValueError,
        "qwen_chat",
    ),
    "half a token": (lambda have: Sa2VAProcessor(have.processor.tokenizer, image_size=450), ValueError, "whole number"),
    "size in words": (lambda have: Sa2VAProcessor(have.processor.tokenizer, image_size="448"), TypeError, "integer"),
    "no size": (lambda have: Sa2VAProcessor(have.processor.tokenizer, grounding_image_size=0), ValueError, "from 1"),
    "more tiles than memory": (
        lambda have: Sa2VAProcessor(have.processor.tokenizer, max_dynamic_patch=5000),
        ValueError,
        "max_dynamic_patch=5000",
    ),
    "fewer tiles than the least": (
        lambda have: Sa2VAProcessor(have.processor.tokenizer, min_dynamic_patch=5, max_dynamic_patch=4),
        ValueError,
        "min <= max",
    ),
    "no key frames": (
        lambda have: Sa2VAProcessor(have.processor.tokenizer, num_key_frames=0),
        ValueError,
        "at least 1",
    ),
    # masks, saving, checking and converting
    "encode numbers": (lambda have: masks_to_rle(np.ones((1, 2, 2))), ValueError, "bool"),
    "decode what is no encoding": (lambda have: rle_to_masks([{"counts": "04"}]), ValueError, "size"),
    "decode a gigantic mask": (
        lambda have: rle_to_masks([{"size": [10**6, 10**6], "counts": "0"}]),
        ValueError,
        "1000000x1000000",
    ),
    "decode what does not fill its size": (
        lambda have: rle_to_masks([{"size": [2, 2], "counts": "zz"}]),
        ValueError,
        "cut off",
    ),
    "decode what is cut off": (
        lambda have: rle_to_masks([{"size": [40, 40], "counts": "m8?["}]),
        ValueError,
        "cut off",
    ),
    "decode half a character": (
        lambda have: rle_to_masks([{"size": [2, 2], "counts": "\ud800"}]),
        ValueError,
        "never compressed",
    ),
    "decode no run": (lambda have: rle_to_masks([{"size": [40, 40], "counts": ""}]), ValueError, "cut off"),
    "decode too few runs": (
        lambda have: rle_to_masks([{"size": [40, 40], "counts": "0"}]),
        ValueError,
        "add up to 40x40",
    ),
    "decode a size alone": (lambda have: rle_to_masks([{"size": [40, 40]}]), ValueError, "counts"),
    "decode a number of runs": (lambda have: rle_to_masks([{"size": [2, 2], "counts": 4}]), ValueError, "counts"),
    "decode runs whose sum overflows": (
        lambda have: rle_to_masks([{"size": [2, 2], "counts": [2**63 - 1, 2**63 - 1, 6]}]),
        ValueError,
        "add up to 2x2",
    ),
    "decode an endless run": (
        lambda have: rle_to_masks([{"size": [2, 2], "counts": "o" * 20 + "0"}]),
        ValueError,
        "beyond any mask",
    ),
    "paint beyond opaque": (lambda have: draw_overlay(plain(), [], alpha=5), ValueError, "alpha=5"),
    "paint masks of another size": (
        lambda have: draw_overlay(plain(), np.ones((1, 2, 2), bool)),
        ValueError,
        r"\(2, 2\)",
    ),
    "save a model into a file": (lambda have: have.model.save_pretrained(a_file(have)), NotADirectoryError, "a file"),
    "save a processor into a file": (
        lambda have: have.processor.save_pretrained(a_file(have)),
        NotADirectoryError,
        "a file",
    ),
    "check nothing": (lambda have: check_checkpoint("./no/such/folder"), OSError, "neither a folder"),
    "check a revision of a folder": (lambda have: check_checkpoint(have.folder, "main"), ValueError, "Leave it out"),
    "convert nothing": (lambda have: convert_pickles("no such folder", have.folder), NotADirectoryError, "hf download"),
    "convert no pickles": (lambda have: convert_pickles(have.folder, "out"), FileNotFoundError, "no pickled weights"),
    "convert over weights": (
        lambda have: convert_pickles(pickle_of(have, {}), GOLDEN / "ivl_qwen2"),
        FileExistsError,
        "already has weights",
    ),
    "convert into a file": (
        lambda have: convert_pickles(pickle_of(have, {}), a_file(have)),
        NotADirectoryError,
        "a file",
    ),
    "convert more than tensors": (
        lambda have: convert_pickles(pickle_of(have, {"step": 3}), have.folder / "out"),
        CheckpointError,
        "state_dict",
    ),
    "convert what is no pickle": (
        lambda have: convert_pickles(a_file(have, "pytorch_model.bin").parent, have.folder / "out"),
        CheckpointError,
        "not converted",
    ),
}


def larger_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "ivl_qwen2")
    tokenizer.add_tokens([f"<word {i}>" for i in range(500)])
    return tokenizer


def unsaved(have: Have) -> Sa2VAChatModel:
    return Sa2VAChatModel(have.config())


def indexed(have: Have, index: bytes) -> Path:
    copy = have.checkpoint(model=None)
    (copy / "model.safetensors.index.json").write_bytes(index)
    return copy


def pickled_copy(have: Have) -> Path:
    copy = have.checkpoint(model=None)
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    return copy


def a_file(have: Have, name: str = "a file") -> Path:
    (have.folder / name).write_text("words")
    return have.folder / name


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_is_explained(name, golden_model, golden_processor, tmp_path):
    call, error, words = BAD_STATES[name]
    with pytest.raises(error, match=words):
        call(Have(golden_model, golden_processor, tmp_path))


@pytest.fixture(scope="module")
def qwen():
    return AutoModel.from_pretrained(GOLDEN / "qwen3vl", dtype=torch.float32).eval()


# what is changed in arguments that the processor of Qwen-VL made -> words of the ValueError
BAD_PICTURES = {
    "no grid": ({"image_grid_thw": None}, "need image_grid_thw"),
    "a grid without its axis": ({"image_grid_thw": torch.tensor([1, 4, 4])}, "need image_grid_thw"),
    "a grid between two": ({"image_grid_thw": torch.ones(1, 3)}, "torch.float32"),
    "a larger grid": ({"image_grid_thw": torch.tensor([[1, 99, 99]])}, r"it is for \[9801, 1536\]"),
    "a grid of one row": ({"image_grid_thw": torch.tensor([[1, 1, 1600]])}, "2 must divide"),
    "a grid below nothing": ({"image_grid_thw": torch.tensor([[1, -40, -40]])}, "pixel_values of shape"),
    "a patch too few": ({"pixel_values": torch.zeros(1, 1599, 1536)}, r"\(1, 1599, 1536\)"),
    "another picture": (
        {"pixel_values": torch.zeros(16, 1536), "image_grid_thw": torch.tensor([[1, 4, 4]])},
        r"\[400\] placeholders, pixel_values \[4\]",
    ),
    "the picture in two": (
        {"image_grid_thw": torch.tensor([[1, 20, 40]] * 2)},
        r"\[400\] placeholders, pixel_values \[200, 200\]",
    ),
    "a token nobody knows": ({"input_ids": torch.tensor([[99999]])}, "this model knows"),
    "types of another text": ({"mm_token_type_ids": torch.zeros(1, 2, dtype=int)}, "shape of input_ids"),
}


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_for_qwen_are_explained(name, call, qwen):
    change, words = BAD_PICTURES[name]
    inputs = qwen.load_processor()(plain(size=(56, 56)), ASK)
    with pytest.raises(ValueError, match=words):
        getattr(qwen, call)(**{**inputs, **change})
