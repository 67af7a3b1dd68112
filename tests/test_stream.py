"""Long videos: streams that are stopped, saved and gone on with, reading ahead, and damaged files."""

import copy
import gc
import struct
import threading
import weakref

import cv2
import numpy as np
import pytest
import torch
from conftest import Prescribed
from PIL import Image
from safetensors.torch import load_file, save_file

from sa2va import modeling_sa2va, processing_sa2va
from sa2va.processing_sa2va import ReadAhead, open_video, rle_to_masks
from sa2va.sam2_decoder import TrackingState

# ---------------------------------------------------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def small(clip):
    """Seven small frames."""
    return [frame.resize((40, 30)) for frame in clip[:7]]


@pytest.fixture(scope="module")
def arguments(golden_processor, small):
    """A call with two objects, and key frames 2 and 4: two frames are tracked backwards, three forwards."""
    ids = golden_processor.tokenizer("[SEG] and [SEG]<|im_end|>").input_ids
    return {"video": small, "text": "all", "frame_sampling": [2, 4], "logits_processor": [Prescribed(ids)]}


@pytest.fixture(scope="module")
def whole(golden_model, arguments):
    """All frames of a stream that is not stopped, and the state behind each."""
    stream = golden_model.predict_stream(**arguments, return_raw_masks=True)
    return [(frame, stream.state()) for frame in stream]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_no_objects_are_float32_too(golden_model, golden_processor, small, dtype):
    ids = golden_processor.tokenizer("nothing<|im_end|>").input_ids
    model = copy.deepcopy(golden_model).to(dtype)
    arguments = {"video": small[:2], "text": "all", "logits_processor": [Prescribed(ids)], "return_raw_masks": True}
    frames = list(model.predict_stream(**arguments, processor=golden_processor))
    assert [(frame.masks.shape, frame.masks.dtype) for frame in frames] == [((0, 30, 40), np.float32)] * 2


def test_frames_leave_pinned_memory_as_they_come(monkeypatch):
    """A GPU is pretended: its stream's events say when they are waited for."""
    arrived = []

    class Stream:
        def record_event(self):
            return Event(len(sent) - 1)

    class Event:
        def __init__(self, number):
            self.number = number

        def synchronize(self):
            arrived.append(self.number)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    sent, arriving = [], modeling_sa2va._Arriving()
    for number in range(20):
        parts = [torch.full((1,), number), torch.full((2,), number)]
        sent.append({"iou": torch.full((2,), number), "logits": parts, "masks": []})
        arriving.add(dict(sent[-1]), torch.device("cuda"))
        assert arrived == list(range(number + 1 - modeling_sa2va._MOST_ON_THEIR_WAY))
    frames = arriving.wait()
    assert arrived == list(range(20))
    for number, (frame, pinned) in enumerate(zip(frames, sent, strict=True)):
        assert frame["iou"].tolist() == [number] * 2 and frame["masks"] == []
        assert frame["logits"].tolist() == [number] * 3
        assert frame["iou"].data_ptr() != pinned["iou"].data_ptr()


def through_torch(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_safetensors(state, folder):
    save_file(state, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


@pytest.mark.parametrize(("seen", "write"), [(1, through_torch), (4, through_safetensors), (6, through_torch)])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(golden_model, whole, small, tmp_path, seen, write):
    state = write(whole[seen - 1][1], tmp_path)
    rest = list(golden_model.predict_stream(video=small, resume=state, return_raw_masks=True))
    assert [frame.frame_index for frame in rest] == list(range(seen, 7))
    for frame, (wanted, _) in zip(rest, whole[seen:], strict=True):
        assert (frame.prediction, frame.past_text, frame.phrases) == (
            wanted.prediction,
            wanted.past_text,
            wanted.phrases,
        )
        np.testing.assert_allclose(frame.masks, wanted.masks, atol=1e-4)
        np.testing.assert_allclose(frame.mask_scores["iou"], wanted.mask_scores["iou"], atol=1e-4)


def test_a_state_is_a_copy_that_may_be_changed(golden_model, arguments, whole):
    stream = golden_model.predict_stream(**arguments, return_raw_masks=True)
    for frame, (wanted, _) in zip(stream, whole, strict=True):
        np.testing.assert_allclose(frame.masks, wanted.masks, atol=1e-4)
        for tensor in stream.state().values():
            tensor.zero_()
    assert torch.equal(stream.state()["prompts"], whole[0][1]["prompts"])


def test_behind_the_last_frame_a_stream_goes_on_with_nothing(golden_model, whole, small):
    assert list(golden_model.predict_stream(video=small, resume=whole[-1][1])) == []


def test_frames_that_were_tracked_ahead_are_not_encoded_again(golden_model, whole, small):
    counts = []
    encoder = golden_model.grounding_encoder.sam2_model.image_encoder
    hook = encoder.register_forward_hook(lambda module, args, output: counts.append(len(args[0])))
    list(golden_model.predict_stream(video=small, resume=whole[0][1]))
    hook.remove()
    assert counts == [1, 1, 1]  # frames 3, 5 and 6; 2 and 4 were key frames, and 1 was tracked backwards


def test_a_state_keeps_the_order_of_many_objects(golden_model, monkeypatch):
    decoder = golden_model.grounding_encoder
    monkeypatch.setattr(decoder.config, "max_objects_per_batch", 1)
    side, prompts = decoder.config.image_size, torch.eye(12, decoder.config.d_model)
    with torch.no_grad():
        state = decoder.condition([(0, torch.zeros(1, 3, side, side))], prompts)
    again = TrackingState.from_tensors(state.to_tensors(), decoder.config, "cpu")
    pointers = [torch.cat([bank.conditioning[0].object_pointers for bank in x.banks]) for x in (state, again)]
    assert torch.equal(*pointers)


def test_several_frames_encoded_together_give_the_same_masks_as_rle_too(golden_model, arguments, whole):
    counts = []
    encoder = golden_model.grounding_encoder.sam2_model.image_encoder
    hook = encoder.register_forward_hook(lambda module, args, output: counts.append(len(args[0])))
    frames = list(golden_model.predict_stream(**arguments, encode_batch_size=3, output_format="rle"))
    hook.remove()
    assert sum(counts) == 7 and max(counts) == 2  # key frames, those before them, those between and behind
    for frame, (wanted, _) in zip(frames, whole, strict=True):
        assert (rle_to_masks(frame.masks) != (wanted.masks > 0.5)).mean() < 1e-3


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_closing_in_the_middle_frees_everything(golden_model, arguments):
    alive = weakref.WeakValueDictionary()

    def frames():
        while True:
            frame = Image.new("RGB", (40, 30))
            alive[id(frame)] = frame
            yield frame

    stream = golden_model.predict_stream(**{**arguments, "video": frames(), "frame_sampling": "first"}, num_frames=1)
    next(stream), next(stream)
    tracking = weakref.ref(stream._progress.tracking)
    assert len(readers()) == 1 and len(alive) < 8
    with stream:
        pass
    gc.collect()
    assert not readers() and not alive and tracking() is None
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(ValueError, match="before the first frame and after close"):
        stream.state()


@pytest.mark.parametrize(
    "device, waits, dtype",
    [("cpu", False, torch.float32), ("cpu", True, torch.uint8), ("meta", False, torch.uint8)],
)
def test_the_reading_thread_makes_numbers_for_a_cpu_alone_and_of_frames_that_do_not_wait(
    golden_processor, device, waits, dtype
):
    look, preprocess = modeling_sa2va._frame_steps(golden_processor, torch.zeros(1, 64, device=device), waits)
    frame = look([Image.new("RGB", (40, 30))])
    pixel_values = preprocess([frame, frame])
    assert (frame.dtype, frame.device.type) == (dtype, "cpu")
    assert (pixel_values.dtype, pixel_values.device.type, len(pixel_values)) == (torch.float32, device, 2)


def test_key_frames_are_looked_at_by_threads_in_their_order():
    """Where a GPU would wait for them; what one raises comes in its turn."""
    threads = set()

    def look(pictures):
        threads.add(threading.current_thread().name)
        return 1 / pictures[0]

    found = modeling_sa2va._look_at_all([4, 2, 1, 0, 5], look, ahead=2)
    assert [next(found), next(found), next(found)] == [0.25, 0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert all(name.startswith("read_ahead") for name in threads) and not readers()


def test_a_stream_of_no_objects_can_be_gone_on_with(golden_model, golden_processor, small):
    ids = golden_processor.tokenizer("None.<|im_end|>").input_ids
    stream = golden_model.predict_stream(video=small, text="?", logits_processor=[Prescribed(ids)])
    next(stream)
    rest = list(golden_model.predict_stream(video=small, resume=stream.state()))
    assert [frame.frame_index for frame in rest] == [1, 2, 3, 4, 5, 6] and rest[0].prediction == "None.<|im_end|>"


BAD_RESUMES = {
    "words too": (lambda state: state, {"text": "And?"}, "video= alone"),
    "no state": (lambda state: {"a": torch.zeros(1)}, {}, "no state of a stream"),
    "a part": (lambda state: {k: v for k, v in state.items() if "pointers" not in k}, {}, "no state of a stream"),
    "another model": (
        lambda state: {
            **state,
            "description": torch.tensor(list(bytes(state["description"]).replace(b'"d_model": ', b'"d_model": 1'))),
        },
        {},
        "Use the same model",
    ),
    "an endless way": (lambda state: {**state, "next_frame": torch.tensor(torch.inf)}, {}, "no state of a stream"),
    "a way back": (lambda state: {**state, "next_frame": torch.tensor(-1)}, {}, "Its next frame is -1"),
    "two places": (lambda state: {**state, "next_frame": torch.ones(2)}, {}, "no state of a stream"),
    "bottomless words": (
        lambda state: {**state, "description": torch.full((10**5,), ord("["), dtype=torch.uint8)},
        {},
        "no state of a stream",
    ),
    "settings of an answer": (lambda state: state, {"max_new_tokens": 5}, "how masks are wanted"),
    "masks of another size": (
        lambda state: {k: v[..., :-1] if k.endswith(".logits") else v for k, v in state.items()},
        {},
        "no state of a stream",
    ),
    "scores of one object": (
        lambda state: {k: v[:1] if k.endswith("_scores") else v for k, v in state.items()},
        {},
        "no state of a stream",
    ),
    "half a pointer": (
        lambda state: {k: v[:, ::2] if k.endswith(".object_pointers") else v for k, v in state.items()},
        {},
        "no state of a stream",
    ),
    "half a position": (
        lambda state: {k: v[: len(v) // 2] if k.endswith(".position") else v for k, v in state.items()},
        {},
        "no state of a stream",
    ),
    "half a memory": (
        lambda state: {k: v[: len(v) // 2] if k.endswith(".features") else v for k, v in state.items()},
        {},
        "no state of a stream",
    ),
    "objects that are not tracked": (
        lambda state: {**state, "prompts": state["prompts"].repeat(2, 1)},
        {},
        "tracks 2 objects of 4",
    ),
    "frames as large as a city": (
        lambda state: {
            **state,
            "description": torch.tensor(list(bytes(state["description"]).replace(b"[30, 40]", b"[100000, 100000]"))),
        },
        {},
        "100000x100000",
    ),
    "a shorter video": (lambda state: state, {"video": 2}, "has 2 frames, so none after the first 4"),
    "another dtype": (
        lambda state: {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in state.items()},
        {},
        "in torch.bfloat16, this one is in torch.float32",
    ),
}


@pytest.mark.parametrize("name", BAD_RESUMES)
def test_a_state_that_does_not_fit_is_explained(golden_model, whole, small, name):
    change, more, words = BAD_RESUMES[name]
    with pytest.raises(ValueError, match=words):
        length = more.get("video", len(small))
        next(golden_model.predict_stream(**{**more, "video": small[:length]}, resume=change(whole[3][1])))


# ---------------------------------------------------------------------------------------------------- reading ahead


def test_reading_ahead_is_bounded_and_keeps_the_order():
    drawn = []
    items = ReadAhead((drawn.append(i) or i for i in range(100)), depth=3)
    assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    items.close()
    assert len(drawn) <= 4 + 3 and not readers()


def test_reading_ahead_that_was_closed_has_ended():
    items = ReadAhead(range(9))
    items.close()
    assert list(items) == []


def test_reading_begins_before_the_first_is_asked_for():
    begun = threading.Event()
    items = ReadAhead(begun.set() for _ in range(3))
    assert begun.wait(timeout=10)
    assert list(items) == [None] * 3 and not readers()


def test_key_frames_of_a_file_are_read_once_for_both_networks(golden_model, arguments, tmp_path, monkeypatch):
    path, opened = video_file(tmp_path / "clip.mp4", "mp4v", count=8), []
    monkeypatch.setattr(processing_sa2va, "_read_video_file", _counting(processing_sa2va._read_video_file, opened))
    golden_model.predict_forward(**{**arguments, "video": path, "frame_sampling": "first"})
    assert opened == [5, 8]  # the key frames; all frames


def _counting(read, passes):
    """`read`, noting how many frames each pass drew."""

    def counted(*args):
        passes.append(0)
        place = len(passes) - 1
        for frame in read(*args):
            passes[place] += 1
            yield frame

    return counted


def test_what_the_reading_thread_raises_comes_after_the_frames_before_it():
    def broken():
        yield 1
        raise OSError("cable pulled")

    items = ReadAhead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="cable pulled"):
        next(items)
    assert not readers()


@pytest.mark.parametrize("encode_batch_size", [1, 4])
def test_frames_before_a_broken_one_are_handed_out(golden_model, arguments, small, encode_batch_size):
    video = {"video": [*small[:6], "no-such-file.png"], "encode_batch_size": encode_batch_size}
    seen = []
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        for frame in golden_model.predict_stream(**{**arguments, **video}):
            seen.append(frame.frame_index)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_broken_frame_surfaces_in_the_caller(golden_model, arguments, small):
    stream = golden_model.predict_stream(**{**arguments, "video": [*small[:5], "no-such-file.png"]})
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        list(stream)


def test_a_stream_that_broke_off_before_its_first_frame_has_no_state(golden_model, arguments, small):
    video = [small[0], "no-such-file.png", *small[2:]]  # both are tracked backwards first
    stream = golden_model.predict_stream(**{**arguments, "video": video})
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        next(stream)
    with pytest.raises(ValueError, match="before the first frame"):
        stream.state()


def test_key_frames_are_let_go_of_once_they_are_prompted(golden_model, arguments):
    """A long video must not carry pictures of them along."""
    clip = {"video": np.zeros((7, 31, 41, 3), np.uint8), "frame_sampling": range(5)}
    stream = golden_model.predict_stream(**{**arguments, **clip})
    next(stream), next(stream)
    pictures = [x for x in gc.get_objects() if type(x) is Image.Image and x.size == (41, 31)]
    stream.close()
    assert len(pictures) < 5  # one or two are being read now


# ---------------------------------------------------------------------------------------------------- damaged files


def video_file(path, codec, count=40):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, (64, 48))
    noise = np.random.default_rng(0)
    for number in range(count):
        frame = np.full((48, 64, 3), 5 * number + 20, np.uint8)
        frame[10:30, 10:30] = noise.integers(0, 255, (20, 20, 3))
        writer.write(frame)
    writer.release()
    return path


def grey_levels(frames):
    return [int(np.asarray(frame)[2, 2].mean()) for frame in frames]


def damaged(path, keep=1.0, hole=0):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + hole] = bytes(hole)
    path.write_bytes(data[: int(len(data) * keep)])
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.webm"])
def test_frames_behind_a_broken_one_are_used_and_the_loss_is_reported(tmp_path, name, caplog):
    codec = {"mp4": "mp4v", "avi": "MJPG", "webm": "VP80"}[name[2:]]
    frames = open_video(damaged(video_file(tmp_path / name, codec), hole=600))
    read = grey_levels(iter(frames))
    assert 30 <= len(read) < 40 and len(frames) == len(read)
    assert read[0] < 30 and read[-1] > 205 and read == sorted(read)
    assert frames.problems == [f"'{tmp_path / name}' announces 40 frames, {len(read)} could be read and are used."]


def test_a_file_that_was_cut_off_gives_what_it_has_with_one_warning(golden_model, arguments, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("sa2va.processing_sa2va.logger.warning", said.append)
    path = damaged(video_file(tmp_path / "a.avi", "MJPG", count=8), keep=0.6)
    output = golden_model.predict_forward(**{**arguments, "video": path, "frame_sampling": "uniform"}, num_frames=1)
    count = len(output.prediction_masks[0])
    assert 1 <= count < 8
    assert output.problems == said == [f"'{path}' announces 8 frames, {count} could be read and are used."]


def test_a_file_that_tells_no_number_of_frames_is_read_beyond_its_damage(tmp_path):
    pictures = [cv2.imencode(".jpg", np.full((48, 64, 3), 6 * number, np.uint8))[1].tobytes() for number in range(40)]
    pictures[20] = pictures[20].replace(b"\xff\xc0", b"\xff\x01")  # its size is no longer told
    (tmp_path / "clip.mjpeg").write_bytes(b"".join(pictures))
    frames = open_video(tmp_path / "clip.mjpeg")
    assert len(list(iter(frames))) == 39
    told = f"'{tmp_path / 'clip.mjpeg'}' is damaged in 1 places; the 39 frames between them are used."
    assert frames.problems == [told]


def test_a_whole_file_has_no_problems(tmp_path):
    frames = open_video(video_file(tmp_path / "a.mp4", "mp4v", count=5))
    assert len(list(iter(frames))) == 5 and frames.problems == []


def test_a_damaged_animation_says_where(tmp_path):
    noise = [Image.effect_noise((64, 64), 90) for _ in range(6)]
    path = tmp_path / "clip.gif"
    noise[0].save(path, save_all=True, append_images=noise[1:])
    frames = open_video(damaged(path, keep=0.5))
    count = len(frames)
    assert 1 <= count < 6 and f"damaged at frame {count}" in frames.problems[0]


def test_a_file_that_is_marked_as_rotated_gives_upright_frames(tmp_path):
    path = video_file(tmp_path / "a.mp4", "mp4v", count=3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # which will turn by 90 degrees
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    (frame,) = open_video(path).take(1)
    assert frame.size == (48, 64)
    deviation = np.asarray(frame).std(axis=-1)  # the coloured patch was left and above
    assert deviation[12:28, 20:36].mean() > 3 * deviation[40:].mean()


def test_a_file_of_variable_rate_gives_every_stored_frame_once(tmp_path):
    path = video_file(tmp_path / "a.mp4", "mp4v", count=12)
    data = bytearray(path.read_bytes())
    start = data.index(b"moov")
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"):  # each holds the next, which grows by 8 bytes
        at = data.index(box, start) - 4
        data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + 8)
    durations = data.index(b"stts", start) + 8
    _, count, ticks = struct.unpack(">3I", data[durations : durations + 12])
    data[durations : durations + 12] = struct.pack(">5I", 2, 5, ticks, count - 5, ticks // 4)
    path.write_bytes(data)
    frames = open_video(path)
    levels = grey_levels(iter(frames))
    assert len(levels) == 12 and levels == sorted(set(levels)) and frames.problems == []
