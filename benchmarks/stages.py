"""Seconds of each stage of an answer, and a recording of the network calls that make it up.

Hooks time the networks, and the processor's steps are wrapped while a block runs; nothing stays behind. What is nested
in a stage counts to that stage; what another thread does meanwhile counts to none.
"""

import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from sa2va import Sa2VAChatModel, Sa2VAProcessor
from sa2va.modeling_sa2va import _CACHE

STEPS = {
    "preprocess": ("preprocess_image", "preprocess_key_frames", "grounding_pixel_values"),
    "postprocess": ("resize_logits", "binarize"),
}


@dataclass(frozen=True)
class Call:
    """One call of a network, with its arguments. Calls of a kind, as tensors of equal shapes, do the same work."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    kind: tuple

    @classmethod
    def of(cls, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "Call":
        """The call with its kind, to which the length of a cache belongs."""
        cache = kwargs.get(_CACHE)
        leaves = tree_leaves((args, {name: value for name, value in kwargs.items() if name != _CACHE}))
        shapes = (tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
        return cls(module, args, dict(kwargs), (id(module), None if cache is None else cache.get_seq_length(), *shapes))


class Stages:
    """Times the stages of a model's answers inside a `with` block.

    Attributes:
        seconds: by stage: "vision_tower", "prefill", "decode", "seg_states" (reading an answer again),
            "generate" (transformers' own work around these), "sam2_encode", "mask_decoder", "memory_attention",
            "memory_encoder", "projections" (what lies between these networks), and `STEPS` where there is a processor.
            Devices are synchronised around each.
        counts: how often each ran; "frames_encoded" is the number of frames that went through SAM 2's image encoder.
        calls: the first `record` calls of each kind in order, except "seg_states".
        kinds: how often each kind of call ran.
    """

    def __init__(self, model: Sa2VAChatModel, processor: Sa2VAProcessor | None = None, record: float = 0):
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.kinds: Counter[tuple] = Counter()
        self._model, self._processor, self._record = model, processor, record
        self._handles: list[Any] = []
        self._outermost: tuple[Any, str] | None = None
        self._begun = 0.0
        self._thread = threading.get_ident()

    def __enter__(self) -> "Stages":
        for stage, modules in _networks(self._model).items():
            for module in modules:
                begin = self._begin_network(stage)
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(lambda module, *_: self._end(module)))
        self._model.causal_model.generate = self._timed_generate(self._model.causal_model.generate)
        for stage, names in STEPS.items() if self._processor is not None else ():
            for name in names:
                setattr(self._processor, name, self._timed_step(stage, getattr(self._processor, name)))
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()
        del self._model.causal_model.generate
        for names in STEPS.values() if self._processor is not None else ():
            for name in names:
                delattr(self._processor, name)

    def _begin_network(self, stage: str) -> Callable:
        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._outermost is not None:
                return
            name = _language_stage(kwargs) if stage == "language" else stage
            if stage == "sam2_encode" and args[0].shape[1] == 3:
                self.counts["frames_encoded"] += len(args[0])
            if self._record and name != "seg_states":
                self._keep(Call.of(module, args, kwargs))
            self._begin(module, name)

        return begin

    def _keep(self, call: Call) -> None:
        self.kinds[call.kind] += 1
        if self.kinds[call.kind] <= self._record:
            self.calls.append(call)

    def _begin(self, owner: Any, stage: str) -> None:
        self._outermost = (owner, stage)
        self.counts[stage] += 1
        synchronize(self._model.device)
        self._begun = time.perf_counter()

    def _end(self, owner: Any) -> None:
        if self._outermost is not None and self._outermost[0] is owner:
            synchronize(self._model.device)
            self.seconds[self._outermost[1]] += time.perf_counter() - self._begun
            self._outermost = None

    def _timed_generate(self, generate: Callable) -> Callable:
        def timed(*args, **kwargs):
            begun, inside = time.perf_counter(), sum(self.seconds.values())
            try:
                return generate(*args, **kwargs)
            finally:
                inside = sum(self.seconds.values()) - inside
                self.seconds["generate"] += time.perf_counter() - begun - inside

        return timed

    def _timed_step(self, stage: str, step: Callable) -> Callable:
        def timed(*args, **kwargs):
            if threading.get_ident() != self._thread:  # as a thread reads ahead
                return step(*args, **kwargs)
            if self._outermost is None:
                self._begin(step, stage)
            try:
                return step(*args, **kwargs)
            finally:
                self._end(step)

        return timed


def _networks(model: Sa2VAChatModel) -> dict[str, Sequence[nn.Module]]:
    sam2 = model.grounding_encoder.sam2_model
    return {
        "vision_tower": [model.vision_model],
        "language": [model.causal_model],
        "seg_states": [model.get_decoder()],  # inside `causal_model` it counts to that
        "sam2_encode": [sam2.image_encoder, sam2.sam_mask_decoder.conv_s0, sam2.sam_mask_decoder.conv_s1],
        "mask_decoder": [sam2.sam_mask_decoder],
        "memory_attention": [sam2.memory_attention],
        "memory_encoder": [sam2.memory_encoder],
        "projections": [  # the embedding of tokens counts to `language` where that computes it
            model.get_input_embeddings(),
            model.mlp1,
            model.text_hidden_fcs,
            sam2.obj_ptr_proj,
            sam2.sam_prompt_encoder.pe_layer,
        ],
    }


def _language_stage(kwargs: dict[str, Any]) -> str:
    cache = kwargs.get(_CACHE)
    return "decode" if cache is not None and cache.get_seq_length() else "prefill"


def replay(recorded: Stages, device: torch.device) -> float:
    """Seconds that the recorded calls take by themselves, with caches that begin empty.

    Where not all calls of a kind were kept, those that were stand for the others.
    """
    kept = Counter(call.kind for call in recorded.calls)
    seconds = 0.0
    caches: dict[int, DynamicCache] = {}
    for share, calls in groupby(recorded.calls, key=lambda call: recorded.kinds[call.kind] / kept[call.kind]):
        fresh = [_with_new_cache(call, caches) for call in calls]
        seconds += share * clock(partial(_call_all, fresh), device)
    return seconds


def _with_new_cache(call: Call, caches: dict[int, DynamicCache]) -> Call:
    """The call with a cache of its own; calls that shared one do so again, as `caches` remembers."""
    if call.kwargs.get(_CACHE) is None:
        return call
    return replace(call, kwargs={**call.kwargs, _CACHE: caches.setdefault(id(call.kwargs[_CACHE]), DynamicCache())})


@torch.no_grad()
def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call.module(*call.args, **call.kwargs)


@contextmanager
def prescribed(model: Sa2VAChatModel, token_ids: Sequence[int]) -> Iterator[None]:
    """Has the model write these tokens in one answer, whatever its weights and the picture.

    By a hook on the head: for each token of a logits processor transformers inspects signatures, which takes longer.
    """
    words = iter(token_ids)

    def force(head: nn.Module, args: tuple, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -torch.inf)
        forced[..., next(words)] = 0
        return forced

    handle = model.get_output_embeddings().register_forward_hook(force)
    try:
        yield
    finally:
        handle.remove()


def median_ratio(measures: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of one measure by another, taken side by side."""
    return statistics.median(measure / other for measure, other in zip(measures, others, strict=True))


def synchronize(device: torch.device) -> None:
    """Waits for what was begun on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that something takes."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def peak_memory(device: torch.device) -> float:
    """The most memory that was held so far, in 10^6 bytes: of the device, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
