"""A pretend accelerator: tensors that say they are elsewhere, are computed on the CPU, and refuse what a card refuses.

What goes wrong on a card only, because two tensors lie on different devices, a generator belongs to another device, or the
host waits for the device at every token, goes wrong here too, on any machine and in seconds. torch has a device type that no
build of it computes on (`lazy`); here it is ours.

    with pretend_device() as waits:
        move(model.network)
        ...

Inside, whatever is made on `DEVICE` or comes of tensors there is a `PretendTensor`. Every moment at which the host of a card
would wait, or values would cross over, is counted by kind and by the line of the package that asks for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy")

_aten: Any = torch.ops.aten
# What lies on two devices at once by right: copies between them.
_CROSSING = (_aten.copy_.default, _aten._to_copy.default)
_INDEXING = (_aten.index.Tensor, _aten._unsafe_index.Tensor, _aten.index_put.default, _aten.index_put_.default)
# The host needs a value, or the size of what comes out.
_WAITING = {
    _aten._local_scalar_dense.default: "a value",
    _aten.equal.default: "a comparison",
    _aten.is_nonzero.default: "a truth value",
    _aten.nonzero.default: "a count",
    _aten.masked_select.default: "a count",
    _aten._unique2.default: "a count",
    _aten.bincount.default: "a count",
    _aten.repeat_interleave.Tensor: "a count",
}


class Waits:
    """What the host has waited for.

    Attributes:
        places: how often, by kind and by the file and line of the package that asked: ("a count", "models/sampling.py:130").
    """

    def __init__(self) -> None:
        self.places: Counter[tuple[str, str]] = Counter()

    def note(self, kind: str) -> None:
        """Count one."""
        self.places[kind, _place()] += 1

    def total(self, *kinds: str) -> int:
        """How many of these kinds; of all without any."""
        return sum(count for (kind, _), count in self.places.items() if not kinds or kind in kinds)

    def clear(self) -> None:
        """Begin anew."""
        self.places.clear()


_waits = Waits()


def _place() -> str:
    """The innermost line of the package that led here."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        _, found, path = frame.f_code.co_filename.rpartition("safesteer_lite/")
        if found:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class PretendTensor(Tensor):
    """A tensor on `DEVICE`.

    Attributes:
        held: its values.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held
        tensor: PretendTensor = made
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held})"

    def tolist(self) -> Any:
        _waits.note("values")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of the pretend device to numpy: copy it to host memory first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Sees every operation, those too that make a tensor on the device out of nothing."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What cannot be seen among the operations that a function comes down to.

    `torch.tensor([...], device=DEVICE)` is copied to the device below all of them, and what attention gives back is laid out
    by a card's kernels as (rows, queries, heads, size), whatever its shape says.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and _is_here(named.get("device")):
            del named["device"]
            _waits.note("to the device")
            return PretendTensor(function(*args, **named))
        found = function(*args, **named)
        if function is scaled_dot_product_attention and isinstance(found, PretendTensor):
            return found.transpose(1, 2).contiguous().transpose(1, 2)
        return found


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The arguments or results of an operation with each tensor replaced."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_changed(entry, change) for entry in value) if type(value) in (list, tuple) else value


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operation: refused, or counted and computed on the CPU."""
    tensors: list[Tensor] = []
    _changed((*args, *kwargs.values()), tensors.append)
    here = any(isinstance(tensor, PretendTensor) for tensor in tensors)
    comes_out_here = _is_here(kwargs["device"]) if kwargs.get("device") is not None else here
    if not here and not comes_out_here:
        return function(*args, **kwargs)
    if here:
        _refuse_mixtures(function, args, kwargs, tensors)
        if function in _WAITING:
            _waits.note(_WAITING[function])
    if function in _CROSSING:
        _note_crossing(function, tensors, comes_out_here)
    return _computed(function, args, kwargs, tensors, comes_out_here)


def _refuse_mixtures(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Raise where a card would; numbers without dimensions may come from the CPU."""
    strange = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim()]
    if function in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        for index in indices:
            if not isinstance(index, PretendTensor):
                _waits.note("to the device")
            elif index.dtype in (torch.bool, torch.uint8):
                _waits.note("a count")
        strange = [tensor for tensor in strange if not any(tensor is index for index in indices)]
    if strange and function not in _CROSSING:
        raise RuntimeError(f"{function} expects all tensors on one device, but {strange[0].shape} is on the CPU")


def _note_crossing(function: Any, tensors: Sequence[Tensor], comes_out_here: bool) -> None:
    if function is _aten._to_copy.default:
        source, target = isinstance(tensors[0], PretendTensor), comes_out_here
    else:
        target, source = (isinstance(tensor, PretendTensor) for tensor in tensors[:2])
    if source != target:
        _waits.note("to the device" if target else "to the host")


def _computed(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor], comes_out_here: bool
) -> Any:
    generator = kwargs.get("generator")
    if comes_out_here and generator is not None and generator.device.type != DEVICE.type:
        raise RuntimeError(f"{function} expects a generator of the device, but it is of the {generator.device.type}")
    own = {key: _changed(value, values) for key, value in kwargs.items()}
    if _is_here(own.get("device")):
        own["device"] = torch.device("cpu")
    found = function(*_changed(tuple(args), values), **own)
    # An operation in place gives back the tensor that it was given.
    known = {id(values(tensor)): tensor for tensor in tensors} if function._schema.is_mutable else {}

    def shown(value: Tensor) -> Tensor:
        return known[id(value)] if id(value) in known else PretendTensor(value) if comes_out_here else value

    return _changed(found, shown)


def move(module: nn.Module) -> None:
    """Put a module's parameters and buffers on the device; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(PretendTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved.setdefault(id(parameter), fresh)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = PretendTensor(buffer)


def values(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU, which nobody waits for."""
    return tensor.held if isinstance(tensor, PretendTensor) else tensor


@contextmanager
def pretend_device() -> Iterator[Waits]:
    """Inside, `DEVICE` can be computed on; what the host waits for is counted."""
    _waits.clear()
    with pytest.MonkeyPatch.context() as patch:
        _lend_autocast(patch)
        with _Functions(), _Operations():
            yield _waits


def _lend_autocast(patch: pytest.MonkeyPatch) -> None:
    """torch asks whether mixed precision is on for the device of a tensor, and knows no answer for this one: the CPU's."""

    def as_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda device="cpu", *rest, **named: function("cpu" if _is_here(device) else device, *rest, **named)

    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        patch.setattr(torch, name, as_cpu(getattr(torch, name)))

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *rest: Any, **named: Any) -> None:
            super().__init__("cpu" if _is_here(device_type) else device_type, *rest, **named)

    patch.setattr(torch, "autocast", Autocast)
