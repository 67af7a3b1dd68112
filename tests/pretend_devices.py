"""Several devices on a machine that has one: CPU tensors that say they lie elsewhere, and refuse to meet.

    with pretend_devices():
        dispatch_model(model, {"vision_model": "ipu:0", "language_model": "ipu:1", ...})
        model.predict_forward(...)  # a RuntimeError wherever tensors of two devices meet

Numbers are computed by the CPU, so results can be compared bit by bit with those of one device.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "ipu"  # a device type that torch can name without having it or trying to start it
aten = torch.ops.aten


class PretendTensor(torch.Tensor):
    """A CPU tensor `held`, which says that it lies on `device`."""

    @staticmethod
    def __new__(cls, held, device):
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype)

    def __init__(self, held, device):
        self.held, self._device = held, torch.device(device)

    def __repr__(self):
        return f"PretendTensor({self.held}, {self.device})"

    @property
    def device(self):
        return self._device

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.held.tolist()

    def new_tensor(self, data, dtype=None):
        return _move(torch.tensor(data, dtype=dtype or self.dtype), self.device)

    def to(self, *args, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            device, dtype = args[0].device, args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or self.device, dtype or self.dtype
        here = (device, dtype) == (self.device, self.dtype) and not copy
        return self if here else _move(self, device, dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _move(tensor, device, dtype=None):
    return aten._to_copy.default(tensor, device=torch.device(device), dtype=dtype)


def _is_pretend(device):
    return device is not None and torch.device(device).type == KIND


def _compute(func, args, kwargs):
    """Runs an operator on the CPU, if all its tensors are in one place (plain scalars may be anywhere)."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    pretended = {id(t.held): t for t in tensors if isinstance(t, PretendTensor)}
    places = {t.device for t in pretended.values()}
    if func is not aten._to_copy.default:
        # as on a real accelerator, indices may come from the CPU
        strangers = func is not aten.index.Tensor and any(t.dim() and not isinstance(t, PretendTensor) for t in tensors)
        if len(places) > 1 or (places and strangers):
            raise RuntimeError(f"{func} meets tensors on {sorted({str(t.device) for t in tensors})}")
    output = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    device = kwargs.get("device") or next(iter(places), None)
    if not _is_pretend(device):
        return output

    def dress(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return pretended[id(leaf)] if id(leaf) in pretended else PretendTensor(leaf, device)

    return tree_map(dress, output)


def _held(leaf):
    if isinstance(leaf, PretendTensor):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == KIND else leaf


class _Operators(TorchDispatchMode):
    """Sees to what makes tensors from none: zeros, arange..."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees to what never becomes an operator with the right device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_pretend(kwargs.get("device")):
            device = kwargs.pop("device")
            data = tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, PretendTensor) else leaf, args[0])
            return _move(func(data, **kwargs), device)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], PretendTensor):
            return _move(args[0], args[1].device, args[1].dtype)
        return func(*args, **kwargs)


@contextmanager
def pretend_devices():
    """Where `ipu:0`, `ipu:1`... can be used like devices; tensors must be moved between them."""
    with ExitStack() as modes:
        modes.enter_context(_Operators())
        modes.enter_context(_Functions())
        yield
