"""Activation checkpointing: forget what a function computed on the way, and compute it again for the gradient.

Of a checkpointed function only its inputs are kept, with the state of the random numbers; the backward pass runs it
once more, under the same autocast, and goes back through what that run kept. The memory of a network is then one
input a function, and one function's own memory at a time; the price is the second run.

Most of that price is paid for few numbers: each that a convolution or an attention to many tokens makes takes thousands
of multiplications. These numbers are kept from the first run, too, and the second only fetches them, see `dear`: some
44 MB of Stable Diffusion's at 512x512 in bfloat16, added up by hand.

Source: Chen et al. 2016, Training deep nets with sublinear memory cost; Kirisame et al. 2021, Dynamic tensor
rematerialization (which to keep: what is dear to compute for the memory that it takes).
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize

from models.once import once_differentiable

Checkpointing = Literal["none", "attention", "blocks"]
AT_ONCE = nullcontext()     # no turn is waited for
DEAR = 2048                 # multiplications a number, from which on it is kept: a 3x3 convolution's of 228 channels


class Run(NamedTuple):
    """What is known within a checkpointed function: where a first run, and those around it, keep what is dear; and what
    was kept for a second run, which fetches it in the same order.
    """

    kept: tuple[list[Tensor], ...] = ()
    known: Iterator[Tensor] | None = None


ANOTHER_WAY = (
    "a checkpointed function took another way in its second run than in its first, so that what was kept of the first "
    "does not fit; what runs in it, hooks too, has to do the same where autograd records and where it does not"
)
_here = threading.local()   # its `run` is this thread's innermost one


def checkpoint(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor | None, weights: Iterable[Tensor] = (),
    turn: AbstractContextManager = AT_ONCE,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """function(*inputs), whose intermediate results are computed again in the backward pass.

    function: of tensors of any shape and dtype (None is handed on), with one tensor or a tuple of them as its value, or
    a list, which becomes a tuple: TypeError for anything else, whose tensors would lose their gradient. It may not
    change its inputs in place: RuntimeError.
    weights: what else it reads that may need a gradient: the parameters of its module. Anything more that asks for one,
    as what a hook brings along, would get none: RuntimeError in the backward pass. So would what weights are
    made of within torch's `parametrize.cached`, which hands on those of the first, unrecorded run: RuntimeError.
    turn: a lock that is held from the second run until the gradients are there.
    Gradients are those of function(*inputs), bit for bit where its operations repeat themselves; there is no second
    derivative. Checkpoints nest. Where nothing needs a gradient, the function is called and nothing is kept.
    """
    trained = list(dict.fromkeys(weight for weight in weights if weight.requires_grad))     # some layers share theirs
    needed = trained or any(x is not None and x.requires_grad for x in inputs)
    if not (needed and torch.is_grad_enabled()):
        return function(*inputs)
    if trained and parametrize._cache_enabled:
        raise RuntimeError(
            "within torch.nn.utils.parametrize.cached() what a checkpoint trains would get no gradient: leave that "
            'out, or run the network with checkpointing "none" and no offload'
        )
    inputs = [x.clone() if x is not None and x.is_inference() else x for x in inputs]       # which cannot be kept
    return _Checkpoint.apply(function, turn, len(inputs), *inputs, *trained)


def records() -> bool:
    """Whether a derivative may go through what is computed now: where autograd records, and anywhere in both runs of
    a checkpoint, of which it does not record the first, nor what lies under no_grad in the second; and where one goes
    forward.

    A layer that computes otherwise where none can asks this, so that both runs give the same bits, and keep the same.
    """
    run = _now()
    return torch.is_grad_enabled() or bool(run.kept) or run.known is not None or goes_forward()


def goes_forward() -> bool:
    """Whether derivatives go forward with the numbers, as in `torch.func.jvp`; no_grad does not keep them from it."""
    return forward_ad._current_level >= 0


def dear(multiplications: int, compute: Callable[[], Tensor]) -> Tensor:
    """compute(), of which each number takes so many multiplications: from DEAR on, once for both runs of a checkpoint.

    For the forward methods of autograd functions, whose gradient is known without the value. The value may be changed
    in place afterwards: what is kept is a copy. Raises RuntimeError in a second run that asks for more than the first.
    """
    run = _now()
    if multiplications < DEAR or not (run.kept or run.known):
        return compute()
    if run.known is None:
        value = compute()
    else:
        value = next(run.known, None)
        if value is None:
            raise RuntimeError(ANOTHER_WAY)
        value = value.clone()
    for kept in run.kept:
        kept.append(value.clone())
    return value


def _now() -> Run:
    return getattr(_here, "run", Run())


@contextmanager
def _within(run: Run) -> Iterator[None]:
    outside, _here.run = _now(), run
    try:
        yield
    finally:
        _here.run = outside


class _Checkpoint(torch.autograd.Function):
    """apply(function, turn, n, *inputs, *weights): the first n tensors are the function's arguments.

    The weights are there so that a function of inputs without a gradient has one all the same if it is trained.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, function: Callable[..., Any], turn: AbstractContextManager, n: int, *tensors: Tensor | None
    ) -> Any:
        ctx.function, ctx.turn, ctx.n, ctx.again = function, turn, n, _as_it_is_now(tensors)
        ctx.set_materialize_grads(False)
        before = [None if x is None else x._version for x in tensors[:n]]
        kept, around = [], _now()
        with _within(Run((*around.kept, kept), around.known)):
            outputs = function(*tensors[:n])
        ctx.save_for_backward(*tensors, *kept)
        if before != [None if x is None else x._version for x in tensors[:n]]:
            raise RuntimeError("a checkpointed function changed an input in place: its second run would see another")
        _require_tensors(outputs)
        return tuple(outputs) if isinstance(outputs, list) else outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed, n, saved = ctx.needs_input_grad[3:], ctx.n, ctx.saved_tensors      # once: it unpacks all
        saved, kept = saved[: len(needed)], saved[len(needed) :]
        inputs = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(saved[:n], needed)]
        sources = [x for x, need in zip((*inputs, *saved[n:]), needed) if need]
        known = iter(kept)
        with ctx.turn:
            with ctx.again(), torch.enable_grad(), _within(Run(known=known)):
                # autocast casts a leaf once for all uses, and so sums their gradients in 16 bits: none is made one
                seen = (x if x is None or was.is_leaf else x.view_as(x) for x, was in zip(inputs, saved))
                outputs = ctx.function(*seen)
            if next(known, None) is not None:
                raise RuntimeError(ANOTHER_WAY)
            outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
            reached = [(y, dy) for y, dy in zip(outputs, gradients) if dy is not None and y.requires_grad]
            if not reached:
                return None, None, None, *(None for _ in saved)
            outputs, gradients = zip(*reached)
            _require_no_other_source(outputs, (*inputs, *saved[n:]))
            found = iter(torch.autograd.grad(outputs, sources, gradients, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needed)


def _require_tensors(outputs: Any) -> None:
    """Raise TypeError for a value in which autograd would not find the tensors."""
    for y in outputs if isinstance(outputs, tuple | list) else (outputs,):
        if not isinstance(y, Tensor | None):
            raise TypeError(
                f"a checkpointed function, or a hook that changes what it gives, gives a {type(y).__name__} where a "
                "tensor or a tuple of tensors is needed: tensors in it would get no gradient"
            )


def _require_no_other_source(outputs: Iterable[Tensor], known: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError if a gradient of the outputs would go anywhere but to the known tensors."""
    seen = {get_gradient_edge(x).node for x in known if x is not None and x.requires_grad}
    ahead = [get_gradient_edge(y).node for y in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if hasattr(node, "variable"):                                   # a leaf
            raise RuntimeError(
                f"a checkpointed part of a network reads a tensor {tuple(node.variable.shape)} that needs a gradient "
                "and is neither its input nor a parameter of its module, as a hook's may be: the gradient would be "
                'lost; run the network with checkpointing "none" and no offload, or make the tensor a parameter of '
                "the module"
            )
        seen.add(node)
        ahead += (before for before, _ in node.next_functions)


def _as_it_is_now(tensors: Iterable[Tensor | None]) -> Callable[[], AbstractContextManager[None]]:
    """A context in which random numbers and autocast are what they are now, on the CPU and the tensors' devices."""
    devices = {x.device for x in tensors if x is not None}
    gpus = [device for device in devices if device.type == "cuda" and torch.cuda.is_available()]
    cpu_state, gpu_states = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]
    kinds = {"cpu", *(device.type for device in devices if torch.amp.is_autocast_available(device.type))}
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
    cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))
            torch.set_rng_state(cpu_state)
            for gpu, state in zip(gpus, gpu_states):
                torch.cuda.set_rng_state(state, gpu)
            for kind, dtype, enabled in casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cached))
            yield

    return again
