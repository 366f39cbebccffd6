"""Ops that PyTorch's dispatcher knows: torch.compile, FLOP counters, selective checkpointing and autograd see each as one.

`torch.library.custom_op` does the same and takes the host about 40 us a call, which is more than a GPU needs for a small
kernel. Here a call on plain tensors that nothing watches does not pass the dispatcher at all.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from .launch import is_recording


def _open_library() -> torch.library.Library:
    # A second copy of this package, such as pytest makes of a folder that it collects, takes over the ops of the first.
    namespace = vars(torch.ops.tilewright)
    if "library" in namespace:
        namespace["library"]._destroy()
    namespace["library"] = torch.library.Library("tilewright", "FRAGMENT")
    return namespace["library"]


_LIBRARY = _open_library()
_PLAIN = (Tensor, Parameter)
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def _is_watched(args: Sequence[Any]) -> bool:
    """Whether something other than autograd has to see the call, which only the dispatcher tells."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.profiler._is_profiler_enabled:
        return True
    # A loop, because a generator costs more than what it yields here.
    for x in args:  # noqa: SIM110
        if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta):
            return True
    return False


class CustomOp:
    """A function of tensors and plain values, registered as `torch.ops.tilewright.<name>`; made by `custom_op`."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Sequence[str]) -> None:
        _LIBRARY.define(
            name + torch.library.infer_schema(function, mutates_args=mutates_args), tags=torch.Tag.pt2_compliant_tag
        )
        self.name, self.function = name, function
        self.overload: torch._ops.OpOverload = getattr(torch.ops.tilewright, name).default
        self._mutated = [i for i, arg in enumerate(self.overload._schema.arguments) if arg.is_write]
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        self.register_autograd(None)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Register what the op returns on tensors that hold nothing."""

        @functools.wraps(fake)
        def on_fakes(*args: Any) -> Any:
            _tell_inductor(self.overload)
            return self.function(*args) if is_recording() else fake(*args)

        torch.library.register_fake(f"tilewright::{self.name}", on_fakes, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any] | None, *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Register the gradient: `setup_context(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs.

        `ctx.needs_input_grad` has one more entry than the op has inputs. Without a `backward` the gradient is an error.
        """

        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            output = self._below_autograd(keyset, inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        def backward_or_error(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            if backward is None:
                raise NotImplementedError(f"tilewright::{self.name} has no gradient: a gradient cannot be differentiated again")
            inputs = backward(ctx, *gradients)
            return (*inputs, None) if isinstance(inputs, tuple) else (inputs, None)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward_or_error)}
        self._differentiable: Any = type(f"{self.name}_with_gradient", (torch.autograd.Function,), members)

    def __call__(self, *args: Any) -> Any:
        """Run the op."""
        if torch.compiler.is_compiling() or _is_watched(args):
            return self.overload(*args)
        return self._run(None, args)

    def _run(self, keyset: Any, args: Sequence[Any]) -> Any:
        # `keyset` says what lies below autograd; None, where the dispatcher was not asked.
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            output = self._differentiable.apply(*args, keyset)
        else:
            output = self._below_autograd(keyset, args)
        for i in self._mutated:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return output

    def _below_autograd(self, keyset: Any, args: Sequence[Any]) -> Any:
        # As a compiled graph calls it: nothing below autograd but the device, which spares a second way through the dispatcher.
        if keyset is None or (keyset & torch._C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _DEVICES:
            return self.function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
        ):
            raise NotImplementedError(f"tilewright::{self.name} has no forward-mode derivative: use_backend('reference') has")
        return self._run(keyset, args)


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOp]:
    """Register the decorated function as the op `tilewright::<name>`; its schema is that of the annotations."""
    return lambda function: CustomOp(name, function, mutates_args)


def _tell_inductor(op: torch._ops.OpOverload) -> None:
    # For an op that it does not know, Inductor of PyTorch 2.11 writes a message of all that the arguments are computed from,
    # each use anew: its length is exponential in the layers below the loss. An op is traced before it is lowered, so that
    # Inductor can be told of it in time.
    lowering: Any = None if torch.__version__ >= "2.13" else sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        tag = lowering.get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag))


def count_no_flops(*ops: CustomOp) -> None:
    """Register a formula of 0: FlopCounterMode counts matrix products only, and this says that the ops were not forgotten."""
    register_flop_formula([getattr(torch.ops.tilewright, op.name) for op in ops])(lambda *args, **kwargs: 0)
