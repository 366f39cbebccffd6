"""Register ops with PyTorch's dispatcher, so that torch.compile, FLOP counters, checkpointing and autograd see each as one.

`torch.library.custom_op` does the same, but costs the host about 40 us a call, more than a small kernel takes on a GPU. Here, a
call on plain tensors skips the dispatcher when only autograd needs to see it.
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
    # A second copy of this package takes over the ops of the first; pytest makes such copies of folders that it collects.
    namespace = vars(torch.ops.tilewright)
    if "library" in namespace:
        namespace["library"]._destroy()
    namespace["library"] = torch.library.Library("tilewright", "FRAGMENT")
    return namespace["library"]


_LIBRARY = _open_library()
_PLAIN = (Tensor, Parameter)
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def _needs_dispatcher(args: Sequence[Any]) -> bool:
    """Whether a dispatch mode, a profiler, a tensor subclass or a meta tensor needs the dispatcher."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.profiler._is_profiler_enabled:
        return True
    # A loop, because a generator costs more than the loop body.
    for x in args:  # noqa: SIM110
        if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta):
            return True
    return False


class CustomOp:
    """A function of tensors and plain values, registered as `torch.ops.tilewright.<name>`; see `custom_op`."""

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
        """Register the function that computes output shapes and dtypes of fake tensors."""

        @functools.wraps(fake)
        def on_fakes(*args: Any) -> Any:
            _register_inductor_fallback(self.overload)
            return self.function(*args) if is_recording() else fake(*args)

        torch.library.register_fake(f"tilewright::{self.name}", on_fakes, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any] | None, *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Register the gradient: `setup_context(ctx, inputs, output)` saves what `backward(ctx, *gradients)` needs.

        `ctx.needs_input_grad` has one entry more than the op has inputs. Without a `backward`, differentiation raises an error.
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
        if torch.compiler.is_compiling() or _needs_dispatcher(args):
            return self.overload(*args)
        return self._run(None, args)

    def _run(self, keyset: Any, args: Sequence[Any]) -> Any:
        # `keyset` holds the dispatch keys below autograd; None if the call skipped the dispatcher.
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            output = self._differentiable.apply(*args, keyset)
        else:
            output = self._below_autograd(keyset, args)
        for i in self._mutated:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        return output

    def _below_autograd(self, keyset: Any, args: Sequence[Any]) -> Any:
        # Only the device key remains below autograd, as in a compiled graph: skip a second dispatch.
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
    """Register the decorated function as the op `tilewright::<name>`; its schema comes from the annotations."""
    return lambda function: CustomOp(name, function, mutates_args)


def _register_inductor_fallback(op: torch._ops.OpOverload) -> None:
    # For an op without a lowering, Inductor of PyTorch 2.11 formats a message that expands all arguments at each use: its
    # length is exponential in the layers below the loss. An op is traced before it is lowered, so registering here is in time.
    lowering: Any = None if torch.__version__ >= "2.13" else sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        tag = lowering.get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag))


def count_no_flops(*ops: CustomOp) -> None:
    """Register a FLOP formula of 0: FlopCounterMode counts matrix products only, and these ops have none."""
    register_flop_formula([getattr(torch.ops.tilewright, op.name) for op in ops])(lambda *args, **kwargs: 0)
