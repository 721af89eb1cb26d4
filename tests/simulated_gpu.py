"""A GPU that is not there: its tensors hold values, refuse the CPU's, and tell when the host waits.

`OnGpu` is a tensor that says it is on `cuda:0` and computes on the CPU. So a whole client can be
trained, and its result compared bit by bit with the CPU's. `SimulatedGpu` watches every operation:

- tensors of two devices in one operation raise, as CUDA does; a CPU scalar is allowed as there;
- a CPU generator for numbers on the device raises, as in CUDA;
- what makes the host wait for the device, or copies to it from pageable memory, is a `Stall`: it is
  noted with its place, and raises within `no_stalls`; so does a draw from the global generator.

What it proves: where tensors are, which operations wait, which branches Python takes for CUDA. What
it does not prove: that a kernel exists for a type or gives these values, what C++ decides for CUDA
(mixed precision casts as on the CPU), memory, streams, timing.

PyTorch's fake tensors know the same rules, but hold no values, let a CPU index and a CPU generator
pass, and cannot run a backward pass on `cuda` without a driver. `test_simulated_gpu.py` compares
the rules of both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fedprompt

GPU = torch.device("cuda", 0)
PACKAGE, TESTS = Path(fedprompt.__file__).parent, Path(__file__).parent
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")
aten = torch.ops.aten


class HiddenStall(RuntimeError):
    """The host waited for the device where nothing may wait."""


class GlobalDraw(RuntimeError):
    """Numbers came from the device's global generator, whose state no seed of a run decides."""


@dataclasses.dataclass(frozen=True)
class Stall:
    """Where the host waited for the device, or copied to it from pageable memory."""

    what: str
    place: str
    """`room/file.py:function` of the package, else `file.py:function` of the tests."""


class OnGpu(torch.Tensor):
    """A tensor on the simulated GPU; `host` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGpu:
        # For C++ it is on the CPU, so that autocast, attention and autograd do what they do there.
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="cpu",
        )
        made.host = host
        return made

    def __init__(self, host: Tensor) -> None:
        pass

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the simulated GPU outlived the simulation")

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu{tuple(self.shape)}"

    def __format__(self, how: str) -> str:
        return format(self.item() if how else repr(self), how)


class SimulatedGpu:
    """Notes the stalls; see the module."""

    def __init__(self) -> None:
        self.stalls: list[Stall] = []
        self.operations = 0
        """Operations that ran on the device."""
        self._allowed: Collection[str] | None = None
        self.inside = False
        """Whether a call is going on whose new tensors are on the device."""

    @property
    def watching(self) -> bool:
        """Whether a stall raises."""
        return self._allowed is not None

    @contextlib.contextmanager
    def no_stalls(self, allowed: Collection[str] = ()) -> Iterator[None]:
        """While entered, a stall raises `HiddenStall`, but for those at the `allowed` places."""
        before, self._allowed = self._allowed, allowed
        try:
            yield
        finally:
            self._allowed = before

    @contextlib.contextmanager
    def calling(self, on_device: bool) -> Iterator[None]:
        """While entered, what an operation creates is on the device, if `on_device`."""
        before, self.inside = self.inside, self.inside or on_device
        try:
            yield
        finally:
            self.inside = before

    def stall(self, what: str) -> None:
        """Note a stall, or raise."""
        stall = Stall(what, place())
        if self._allowed is not None and stall.place not in self._allowed:
            raise HiddenStall(f"{stall.place}: {what}: the host waits for the device")
        self.stalls.append(stall)

    def upload(self, tensor: Tensor, non_blocking: bool = False) -> Tensor:
        """A copy on the device."""
        if isinstance(tensor, OnGpu):
            return tensor
        if tensor.numel() and not (non_blocking and getattr(tensor, "pinned_here", False)):
            self.stall("copy of pageable memory to the device")
        moved: Tensor = _Upload.apply(tensor, self)  # type: ignore[no-untyped-call]
        return moved

    def download(self, tensor: Tensor, non_blocking: bool = False) -> Tensor:
        """A copy on the host."""
        if not isinstance(tensor, OnGpu):
            return tensor
        if non_blocking:
            raise RuntimeError("a copy to the host that is not waited for may be read too early")
        self.stall("copy to the host")
        moved: Tensor = _Download.apply(tensor, self)  # type: ignore[no-untyped-call]
        return moved


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: SimulatedGpu) -> Tensor:
        ctx.gpu = gpu
        return OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gpu.download(gradient), None


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: OnGpu, gpu: SimulatedGpu) -> Tensor:
        ctx.gpu = gpu
        return tensor.host.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gpu.upload(gradient), None


class _Calls(TorchFunctionMode):
    """What Python asks for: moves between devices, and where new tensors go."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.moves: Mapping[Any, Callable[..., Any]] = {
            Tensor.to: self.to,
            Tensor.cpu: lambda tensor, *_: gpu.download(tensor),
            Tensor.cuda: lambda tensor, *_, non_blocking=False: gpu.upload(tensor, non_blocking),
            Tensor.tolist: lambda tensor: gpu.download(tensor).tolist(),
            Tensor.numpy: self.numpy,
            Tensor.__array__: self.numpy,
            Tensor.pin_memory: self.pin,
            Tensor.is_pinned: lambda tensor: getattr(tensor, "pinned_here", False),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.moves:
            return self.moves[func](*args, **kwargs)
        wanted = kwargs.get("device")
        new = wanted is not None and torch.device(wanted).type == "cuda"
        if new:
            kwargs["device"] = "cpu"
        if new and func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return self.gpu.upload(func(*args, **kwargs))
        mine = any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs)))
        with self.gpu.calling(new or mine):
            return func(*args, **kwargs)

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all its forms."""
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            move = self.gpu.upload if device.type == "cuda" else self.gpu.download
            tensor = move(tensor, non_blocking)
        return Tensor.to(tensor, dtype or tensor.dtype, copy=copy)

    def numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`Tensor.numpy`, in torch's words where it cannot be."""
        if isinstance(tensor, OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return Tensor.numpy(tensor, *args, **kwargs)

    def pin(self, tensor: Tensor) -> Tensor:
        """`Tensor.pin_memory`."""
        if isinstance(tensor, OnGpu):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only CPU memory can be pinned")
        pinned = tensor.clone()
        pinned.pinned_here = True  # type: ignore[attr-defined]
        return pinned


class _Operations(TorchDispatchMode):
    """What runs: every operation below autograd and autocast."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        mine = any(isinstance(leaf, OnGpu) for leaf in leaves)
        host_args, host_kwargs = tree_map_only(OnGpu, lambda each: each.host, (args, kwargs))
        if not mine and not (self.gpu.inside and "device" in kwargs):
            return func(*args, **kwargs)
        self.gpu.operations += 1
        self.check(func, args, leaves)
        made = func(*host_args, **host_kwargs)
        changed = written(func, args, kwargs)
        if changed:
            for each in changed:
                if isinstance(each, OnGpu) and each.shape != each.host.shape:
                    # A tensor subclass has its shape for good: better no result than a wrong one.
                    raise RuntimeError(
                        f"{func} changes the shape of a simulated tensor in place, which cannot be "
                        "followed; use the operation that returns a new tensor"
                    )
            return None if made is None else changed[0] if len(changed) == 1 else tuple(changed)
        return tree_map_only(Tensor, OnGpu, made)

    def check(self, func: Any, args: Any, leaves: list[Any]) -> None:
        """Raise what CUDA raises, and note stalls."""
        name = func.overloadpacket.__name__
        on_host = [each for each in leaves if isinstance(each, Tensor) and type(each) is not OnGpu]
        if name in INDEXING:
            self.check_index(name, args)
            on_host = [each for each in on_host if all(each is not i for i in args[1])]
        elif name == "copy_":
            if on_host:
                self.gpu.stall("copy between devices")
            return
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.gpu.stall(f"aten.{name}")
        if torch.Tag.pointwise in func.tags or name.startswith("_foreach"):
            on_host = [each for each in on_host if each.ndim]
        if on_host:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but aten.{name} found "
                f"{tuple(on_host[0].shape)} on cpu beside cuda:0, at {place()}"
            )
        if any(argument.name == "generator" for argument in func._schema.arguments):
            given = [each for each in leaves if isinstance(each, torch.Generator)]
            if given and given[0].device.type != "cuda":
                raise RuntimeError(
                    f"Expected a 'cuda' device type for generator but found "
                    f"'{given[0].device.type}', aten.{name} at {place()}"
                )
            if not given and self.gpu.watching:
                raise GlobalDraw(f"aten.{name} at {place()} draws from the global generator")

    def check_index(self, name: str, args: Any) -> None:
        """CUDA takes an index on the host, and copies it; a mask has to be counted."""
        if not isinstance(args[0], OnGpu):
            raise RuntimeError(
                f"indices should be on the same device as the indexed tensor (cpu), aten.{name} "
                f"at {place()}"
            )
        for index in args[1]:
            if index is not None and not isinstance(index, OnGpu):
                self.gpu.stall(f"aten.{name} with an index on the host")
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                self.gpu.stall(f"aten.{name} with a mask")


def written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an in-place operation changes."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [value] if isinstance(value, Tensor) else list(value or ())
    return found


def place() -> str:
    """The innermost function of the package that is running; else of the tests."""
    frame, outside = sys._getframe(1), ""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if PACKAGE in file.parents and not name.startswith("<"):
            return f"{file.relative_to(PACKAGE).as_posix()}:{name}"
        if TESTS in file.parents and file != Path(__file__):
            outside = outside or f"{file.name}:{name}"
        frame = frame.f_back  # type: ignore[assignment]
    return outside


def _autocast(device: str, *args: Any, **kwargs: Any) -> Any:
    return AUTOCAST("cpu" if device == "cuda" else device, *args, **kwargs)


def _group_by_device(*args: Any) -> Any:
    """What fused optimizers and gradient clipping ask C++, which knows no simulated device."""
    groups = {}
    for (device, dtype), group in GROUP_BY_DEVICE(*args).items():
        mine = any(isinstance(leaf, OnGpu) for leaf in tree_leaves(group))
        groups[(GPU if mine else device, dtype)] = group
    return groups


AUTOCAST, GROUP_BY_DEVICE = torch.autocast, torch._C._group_tensors_by_device_and_dtype
CUDA = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "simulated",
    "get_device_capability": lambda *_: (9, 0),
    "is_current_stream_capturing": lambda: False,
    "empty_cache": lambda: None,
    "max_memory_allocated": lambda *_: 0,
}
"""Functions of `torch.cuda`, as a machine with one GPU answers them."""


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """While entered, this thread's `cuda` is simulated."""
    gpu = SimulatedGpu()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with contextlib.ExitStack() as stack:
            for name, function in CUDA.items():
                stack.enter_context(mock.patch(f"torch.cuda.{name}", function))
            wait = mock.Mock(side_effect=lambda *_: gpu.stall("torch.cuda.synchronize"))
            stack.enter_context(mock.patch("torch.cuda.synchronize", wait))
            stack.enter_context(mock.patch("torch.autocast", _autocast))
            grouping = "torch._C._group_tensors_by_device_and_dtype"
            stack.enter_context(mock.patch(grouping, _group_by_device))
            stack.enter_context(_Operations(gpu))
            stack.enter_context(_Calls(gpu))
            yield gpu
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)


@contextlib.contextmanager
def fused_optimizers() -> Iterator[None]:
    """On a GPU torch updates all tensors in one go, and on a CPU one by one: here in one go."""
    kinds = {name: getattr(torch.optim, name) for name in ("Adam", "SGD")}
    with contextlib.ExitStack() as stack:
        for name, kind in kinds.items():
            fused = functools.partial(kind, foreach=True)
            stack.enter_context(mock.patch.object(torch.optim, name, fused))
        yield
