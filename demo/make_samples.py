"""Draws the sample files of the demo: `python demo/make_samples.py [FOLDER]` writes shapes.png and shapes.mp4.

The scenes are of the world that `sa2va-tiny` has learnt (`data/scenes.py`), from the test split, drawn larger than in
training. Nothing depends on chance: the picture is always the same, the video up to its encoder.
"""

import argparse
from pathlib import Path

from sa2va.data.scenes import SceneSample, make_sample
from sa2va.demo.media import picture_writer, video_writer

SAMPLES = Path(__file__).resolve().parent / "samples"
FPS = 8.0


def draw_image() -> SceneSample:
    """Five shapes, 480 x 360; one of the two circles is left of the red star."""
    return make_sample(2024, 587, split="test", task="caption", size=(360, 480))


def draw_video() -> SceneSample:
    """Two squares move, one of them right and behind a cross; 24 frames of 240 x 180."""
    return make_sample(2024, 147, split="test", task="video_motion", size=(180, 240), num_frames=24)


def write_samples(folder: Path) -> None:
    """Writes shapes.png and shapes.mp4 (see `draw_image`, `draw_video`) into a folder.

    Raises:
        OSError: the folder can't be written to, or OpenCV can't encode MP4 here.
    """
    with picture_writer(folder / "shapes.png") as write:
        write(draw_image().frames[0])
    frames = draw_video().frames
    with video_writer(folder / "shapes.mp4", frames.shape[1:3], FPS) as write:
        for frame in frames:
            write(frame)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLES, help=f"default: {SAMPLES.name}/ beside this")
    write_samples(parser.parse_args().folder)


if __name__ == "__main__":
    main()
