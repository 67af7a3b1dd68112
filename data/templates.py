"""The words around a data set's expressions, in the manner of Sa2VA's training (arXiv:2501.04001).

The first of each tuple is the plain one, which evaluation uses where a data set's own protocol says nothing else.
"""

from collections.abc import Sequence

import numpy as np

SEG = "[SEG]"
# {} is the expression, {medium} "image" or "video"
SEGMENT_QUESTIONS = (
    "Please segment {} in this {medium}.",
    "Can you segment {} in this {medium}?",
    "Please find {} in this {medium} and segment it.",
    "Where is {} in this {medium}? Please answer with a segmentation mask.",
    "Could you mark {} in this {medium} with a segmentation mask?",
    "What is {} in this {medium}? Please give its segmentation mask.",
)
VIDEO_EVALUATION_QUESTION = "Please segment {}."
REASONING_QUESTIONS = (
    "{} Please respond with a segmentation mask.",
    "{} Please output the segmentation mask.",
)
ANSWERS = ("Sure, it is [SEG].", "It is [SEG].", "Sure, [SEG].", "Sure, the segmentation result is [SEG].", "[SEG].")
REFUSALS = ("There is no such object in this {medium}.", "Nothing in this {medium} fits that description.")
GROUNDED_CAPTION_QUESTIONS = (
    "Could you please give me a brief description of the image? "
    "Please respond with interleaved segmentation masks for the corresponding parts of the answer.",
    "Please describe this image. Respond with interleaved segmentation masks for the corresponding phrases.",
    "What can be seen in this picture? "
    "Please answer with interleaved segmentation masks for the corresponding parts of the answer.",
)
REGION_QUESTIONS = (
    "Please describe {} in the image in detail.",
    "What can you tell me about {} in this picture?",
    "Could you give me a detailed description of {}?",
    "What details does {} in the image show?",
)
SHORT_ANSWER = " Answer the question using a single word or phrase."


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options by chance."""
    return options[int(rng.integers(len(options)))]


def medium(is_video: bool) -> str:
    """What a template calls a picture or a clip."""
    return "video" if is_video else "image"
