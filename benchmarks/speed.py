"""How fast answers with masks are, beside what no implementation can avoid and beside the official way of working.

    python benchmarks/speed.py --json speed.json             # image and 8, 64, 256 frames; 1, 3, 8 objects; small SAM 2
    python benchmarks/speed.py --sam2 real --frames 1 8 --objects 1 3 --repeats 1 --seconds 0    # Hiera-L at 1024
    python benchmarks/speed.py --sam2 real --frames 64 --repeats 1 --seconds 0 --floor-calls 3 --no-official

The language side is that of `sa2va-tiny`; SAM 2 is its own or one of true size with random weights. The answer is
prescribed: "Sure, it is [SEG].", as Sa2VA was taught to say it, with a [SEG] for each object. Videos are files. Each
case has a process of its own, in which are timed, in turn and several times over:

* ours      `predict_forward`
* floor     the network calls of that answer, recorded and run by themselves: vision tower, prefill, decode, SAM 2's
            image encoder, mask decoder, memory attention and memory encoder, and the projections between them
* official  the same networks driven as the official code drives them: states of all layers are kept while generating;
            every object has a pass over the whole video of its own, and encodes each key frame twice (13 encodes for
            8 frames and 1 object, 39 for 3 objects)

Rounds go on until there were `--repeats` of them and `--seconds` have passed. Printed are medians; a ratio is the
median over rounds, as neighbours in time share what else the machine does. glibc is told to keep what is freed: else it
gives buffers of megabytes back to the system and takes new ones, which costs now one side more and now the other.
"memory" is the peak of a `predict_stream` over the video, before anything else has run; with `--repeats 1` it is left
out. For long videos, `--floor-calls` runs only so many of the floor's calls that do the same work, and counts the
others as these, and `--no-official` leaves that way out. An answer of hours can be taken in parts: `--state FILE
--minutes 60` stops after an hour and keeps in FILE how far it came, the same command goes on from there, and what each
part took, and its floor behind it, is added up.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from sa2va import Sa2VAChatConfig, Sa2VAChatModel, Sa2VAGroundingConfig, Sa2VAProcessor
from sa2va.benchmarks.stages import STEPS, Stages, clock, median_ratio, peak_memory, prescribed, replay
from sa2va.demo.media import replacing, write_json
from sa2va.demo.predict import at_least

TINY = Path(__file__).parents[1] / "sa2va-tiny"
FRAME_SIZES = {"small": (128, 128), "real": (480, 854)}  # (h, w): that of the small one's scenes, that of DAVIS
LENGTHS = (1, 8, 64, 256)
OBJECTS = (1, 3, 8)
STAGES = (  # in the order of work; reading is done in another thread
    "preprocess",
    "vision_tower",
    "prefill",
    "decode",
    "generate",
    "seg_states",
    "sam2_encode",
    "mask_decoder",
    "memory_encoder",
    "memory_attention",
    "projections",
    "postprocess",
    "other",
)
QUESTION = "Please segment the disk."
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}  # read by glibc


def build_model(sam2: str, device: str, dtype: str) -> Sa2VAChatModel:
    """`sa2va-tiny`, as it is or around a SAM 2 Hiera-L with random weights."""
    config = Sa2VAChatConfig.from_pretrained(TINY)
    if sam2 == "small":
        return AutoModel.from_pretrained(TINY, dtype=dtype, device_map=device).eval()
    config.grounding_config = Sa2VAGroundingConfig()
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=getattr(torch, dtype)).to(device).eval()
    words = {k: v for k, v in AutoModel.from_pretrained(TINY, dtype=dtype).state_dict().items() if "grounding" not in k}
    own = model.state_dict()  # the projection of [SEG] has another width
    model.load_state_dict({k: v for k, v in words.items() if v.shape == own[k].shape}, strict=False)
    model.set_processor(Sa2VAProcessor.from_config(config, Sa2VAProcessor.from_pretrained(TINY).tokenizer))
    return model


def draw_frames(num_frames: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Frames uint8 [h, w, 3], BGR: a disk moves over noise."""
    height, width = size
    ground = np.random.default_rng(0).integers(0, 160, (height, width, 3), dtype=np.uint8)
    for index in range(num_frames):
        place = (int(width * (0.2 + 0.6 * index / num_frames)), height // 2)
        yield cv2.circle(ground.copy(), place, height // 6, (40, 60, 250), -1)


def write_media(folder: Path, num_frames: int, size: tuple[int, int]) -> Path:
    """Writes one frame as a PNG, several as a video."""
    if num_frames == 1:
        path = folder / "picture.png"
        cv2.imwrite(str(path), next(draw_frames(1, size)))
        return path
    path = folder / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 24, size[::-1])
    for frame in draw_frames(num_frames, size):
        writer.write(frame)
    writer.release()
    return path


class Answering:
    """One question about one medium, answered in our way and in the official way."""

    def __init__(self, model: Sa2VAChatModel, media: Path, is_video: bool, num_objects: int):
        self.model, self.processor = model, model.load_processor()
        self.media = {"video" if is_video else "image": media}
        self.is_video = is_video
        answer = f"Sure, it is {', '.join(['[SEG]'] * num_objects)}.<|im_end|>"
        self.words = self.processor.tokenizer(answer).input_ids

    def ours(self) -> list[np.ndarray]:
        """Masks bool [frames, h, w] of each object."""
        with prescribed(self.model, self.words):
            return self.model.predict_forward(**self.media, text=QUESTION).prediction_masks

    def stream(self, seconds: float = math.inf, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor] | None:
        """Goes through the video, from a state on if there is one, holding one frame at a time.

        Returns:
            The state after so many seconds; None at the end of the video.
        """
        begun, asked = time.perf_counter(), {"text": QUESTION} if state is None else {"resume": state}
        with prescribed(self.model, self.words), self.model.predict_stream(**self.media, **asked) as frames:
            for _ in frames:
                if time.perf_counter() - begun > seconds:
                    return frames.state()
        return None

    @torch.no_grad()
    def official(self) -> list[np.ndarray]:
        """The same masks, with the calls of the official code."""
        inputs = self.processor.prepare(text=QUESTION, **self.media)
        prompts = self._prompts_from_all_layers(inputs)
        frames = [self._pixel_values(frame) for frame in inputs.frames.read()]
        follow = self._follow_alone if self.is_video else self._segment_alone
        return [self._finish(follow(inputs, frames, prompts[i : i + 1]), inputs.size) for i in range(len(prompts))]

    def _prompts_from_all_layers(self, inputs: Any) -> Tensor:
        model, tokenizer = self.model, self.processor.tokenizer
        token_ids = model.special_token_ids(tokenizer)
        prompt = model._prompt(token_ids, [inputs])
        arguments = model._generation_arguments(self.processor, {"return_dict_in_generate": True})
        with prescribed(model, self.words):
            written = model.causal_model.generate(**prompt, **arguments, output_hidden_states=True)
        states = torch.cat([layers[-1] for layers in written.hidden_states], dim=1)
        answer = written.sequences[0][:-1]  # the last token was written, but not read
        return model.text_hidden_fcs(states[0, -len(answer) :][answer == token_ids.seg])

    def _pixel_values(self, frame: Any) -> Tensor:
        like = self.model.text_hidden_fcs[0].weight
        return self.processor.grounding_pixel_values(
            [frame], dtype=like.dtype, device=like.device, is_video=self.is_video
        )

    def _segment_alone(self, inputs: Any, frames: list[Tensor], prompt: Tensor) -> Iterator[Tensor]:
        decoder = self.model.grounding_encoder
        # The official code also remembers a picture, for nothing.
        yield from (p.logits for p in decoder.condition(enumerate(frames), prompt, inputs.size).predictions.values())

    def _follow_alone(self, inputs: Any, frames: list[Tensor], prompt: Tensor) -> Iterator[Tensor]:
        decoder = self.model.grounding_encoder
        state = decoder.condition(((i, frames[i]) for i in inputs.key_frames), prompt, inputs.size)
        for index in inputs.key_frames:  # its cache held one frame, so that all but the last are encoded anew
            decoder.encode(frames[index])
        yield from (prediction.logits for _, prediction in decoder.propagate(state, frames, torch.cat))

    def _finish(self, logits: Iterator[Tensor], size: tuple[int, int]) -> np.ndarray:
        resized = (self.processor.resize_logits(frame, size) for frame in logits)
        return torch.cat([self.processor.binarize(frame) for frame in resized]).cpu().numpy()


def measure(sam2: str, num_frames: int, num_objects: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one case in this process, with the settings of the command line.

    Returns:
        Seconds of each round ("ours", "floor", "official") and of each stage of our first ("stages"; "read" is
        decoding the file, which overlaps with the rest); "encodes" of ours and official, "floor_calls" that were run of
        each kind or None, "peak_mb" of a `predict_stream` or None, and the case. With `--state`, of all parts so far,
        and "next_frame": where the next begins, None behind the last.
    """
    model = build_model(sam2, options.device, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        media = write_media(Path(folder), num_frames, FRAME_SIZES[sam2])
        asked = Answering(model, media, num_frames > 1, num_objects)
        measured = measure_rounds(asked, options) if options.state is None else measure_part(asked, options)
        frames = asked.processor.prepare(text=QUESTION, **asked.media).frames
        measured["stages"]["read"] = clock(lambda: list(frames.read()), model.device)
    return {
        "sam2": sam2,
        "frames": num_frames,
        "objects": num_objects,
        "threads": torch.get_num_threads(),
        "floor_calls": options.floor_calls,
        **measured,
    }


def measure_rounds(asked: Answering, options: argparse.Namespace) -> dict[str, Any]:
    """Whole answers, in turn with their floor and the official way, as `measure` returns them."""
    model, peak = asked.model, None
    if options.repeats > 1:  # takes a run of its own, which also warms up
        asked.stream()
        peak = peak_memory(model.device)
    with Stages(model, asked.processor, record=options.floor_calls or math.inf) as recorded:
        ours = [clock(asked.ours, model.device)]
    floor = [replay(recorded, model.device)]
    with Stages(model) as counted:
        official = [clock(asked.official, model.device)] if options.official else []
    while len(ours) < options.repeats or sum(ours + floor + official) < options.seconds:
        ours.append(clock(asked.ours, model.device))
        floor.append(replay(recorded, model.device))
        official += [clock(asked.official, model.device)] if options.official else []
    return {
        "ours": ours,
        "floor": floor,
        "official": official,
        "stages": {**recorded.seconds, "other": ours[0] - sum(recorded.seconds.values())},
        "encodes": {"ours": recorded.counts["frames_encoded"], "official": counted.counts["frames_encoded"]},
        "peak_mb": peak,
    }


def measure_part(asked: Answering, options: argparse.Namespace) -> dict[str, Any]:
    """One more part of an answer, added to those that `options.state` tells of, as `measure` returns it."""
    state, spent = None, Counter()
    if options.state.is_file():
        state = load_file(options.state)
        with safe_open(options.state, framework="pt") as kept:
            spent = Counter(json.loads(kept.metadata()["spent"]))
    model, left = asked.model, []
    with Stages(model, asked.processor, record=options.floor_calls or math.inf) as recorded:
        seconds = clock(lambda: left.append(asked.stream(60 * options.minutes, state)), model.device)
    spent.update(recorded.seconds)
    spent.update(ours=seconds, floor=replay(recorded, model.device), encodes=recorded.counts["frames_encoded"])
    (state,) = left
    if state is None:
        options.state.unlink(missing_ok=True)
    else:
        with replacing(options.state) as temporary:
            save_file(state, temporary, metadata={"spent": json.dumps(spent)})
    ours, floor, encodes = (spent.pop(name) for name in ("ours", "floor", "encodes"))
    return {
        "ours": [ours],
        "floor": [floor],
        "official": [],
        "stages": {**spent, "other": ours - spent.total()},
        "encodes": {"ours": encodes, "official": 0},
        "peak_mb": None,
        "next_frame": None if state is None else int(state["next_frame"]),
    }


def run_case(options: argparse.Namespace, *case: Any) -> dict[str, Any]:
    """Measures one case (sam2, frames, objects) in a process of its own.

    Raises:
        RuntimeError: that process failed; the message holds what it wrote.
    """
    settings = json.dumps({"case": case, "options": vars(options)}, default=str)
    command = [sys.executable, __file__, "--case", settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**KEEP_FREED, **os.environ})
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


HEADER = ("SAM 2", "frames", "objects", "seconds", "/ floor", "/ official", "encodes", "pre+post", "memory")


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table: medians over rounds, with the range of the seconds."""
    seconds = statistics.median(result["ours"])
    ratios = {name: median_ratio(result["ours"], result[name]) for name in ("floor", "official") if result[name]}
    around = sum(result["stages"].get(name, 0.0) for name in STEPS) / result["ours"][0]
    encodes = result["encodes"]
    return (
        result["sam2"],
        str(result["frames"]),
        str(result["objects"]),
        f"{seconds:.2f} ({min(result['ours']):.2f}-{max(result['ours']):.2f})",
        f"{ratios['floor']:.2f}",
        f"{ratios['official']:.2f}" if "official" in ratios else "-",
        f"{encodes['ours']} / {encodes['official'] or '-'}",
        f"{around:.1%}",
        f"{result['peak_mb']:.0f} MB" if result["peak_mb"] else "-",
    )


def format_row(cells: Sequence[str]) -> str:
    """Cells as a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def visible_stages(result: dict[str, Any]) -> dict[str, float]:
    """Seconds of the stages of ours that take more than a hundredth of it, in the order of work; the others as one."""
    seconds = {name: result["stages"].get(name, 0.0) for name in STAGES}
    visible = {name: value for name, value in seconds.items() if value > sum(seconds.values()) / 100}
    visible.pop("other", None)
    return {**visible, "other": sum(seconds.values()) - sum(visible.values())}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws where the time of each case goes, beside its floor and the official way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict(zip(STAGES, pyplot.get_cmap("tab20").colors, strict=False))
    figure, axes = pyplot.subplots(1, len(results), figsize=(2 + 2.6 * len(results), 4), layout="constrained")
    shown = {}
    for axis, result in zip(np.atleast_1d(axes), results, strict=True):
        for place, name in enumerate(("floor", "official"), 1):
            if not result[name]:
                continue
            axis.bar(place, statistics.median(result[name]), color="1", edgecolor="0.4", hatch="///")
        bottom = 0.0
        for name, height in visible_stages(result).items():
            shown[name] = axis.bar(0, height, bottom=bottom, color=colors[name])
            bottom += height
        axis.set_xticks(range(3), ["ours", "floor", "official\nstyle"])
        medium = "image" if result["frames"] == 1 else f"{result['frames']} frames"
        axis.set_title(f"{medium}, {result['objects']} object{'s' * (result['objects'] > 1)}", fontsize="medium")
    np.atleast_1d(axes)[0].set_ylabel("seconds")
    names = [name for name in reversed(STAGES) if name in shown]
    labels = [name.replace("_", " ").replace("sam2", "SAM 2") for name in names]
    figure.legend([shown[name] for name in names], labels, loc="outside right center", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("--sam2", nargs="+", choices=FRAME_SIZES, default=["small"], help="(default: small)")
    parser.add_argument("--frames", nargs="+", type=int, default=LENGTHS, help="1 is an image (default: %(default)s)")
    parser.add_argument("--objects", nargs="+", type=int, default=OBJECTS, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds at least (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="rounds go on for so long (default: %(default)s)")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="(default here: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    parser.add_argument("--plot", type=Path, help="also draw the stages to this picture")
    parser.add_argument(
        "--floor-calls", type=at_least(1), help="of each kind of call the floor runs so many (default: all)"
    )
    parser.add_argument("--no-official", dest="official", action="store_false", help="leave the official way out")
    parser.add_argument("--state", type=Path, help="take a single case in parts: how far it is, and what that took")
    parser.add_argument("--minutes", type=float, default=60, help="with --state, of a part (default: %(default)s)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.state is not None and (1 in options.frames or math.prod(map(len, _cases(options))) > 1):
        parser.error("--state takes one case: a video, and one each of --sam2, --frames and --objects")
    return options


def _cases(options: argparse.Namespace) -> tuple[Sequence[Any], ...]:
    return options.sam2, options.frames, options.objects


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all cases and prints a line for each as it ends."""
    options = parse_arguments(argv)
    if options.case:
        given = argparse.Namespace(**options.case["options"])
        given.state = given.state and Path(given.state)
        print(json.dumps(measure(*options.case["case"], given)))
        return
    print(format_row(HEADER), format_row(["---"] * len(HEADER)), sep="\n", flush=True)
    results = []
    for case in product(*_cases(options)):
        results.append(run_case(options, *case))
        if (done := results[-1].get("next_frame")) is not None:
            print(f"{done} frames are done. The same command goes on.")
            return
        print(format_row(row(results[-1])), flush=True)
        if options.json:
            about = {"torch": torch.__version__, "device": options.device, "dtype": options.dtype}
            write_json(options.json, {**about, "results": results})
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
