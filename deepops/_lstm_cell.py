"""One step of an LSTM under autograd, for loops in Python: what a step costs beside its arithmetic is kept small.

The weights are packed once for all steps, until they change. A step's backward computes the gradients of its gates, and
with them those of its inputs; the gradients of the weights are products over all steps of a backward, taken once, at
its end: every step takes a *token*, a tensor of nothing that was made from the weights, and autograd runs the backward
of the token when those of all steps that it has to run are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops._autograd import Grad, aliases
from deepops._checks import autocast_enabled
from deepops._library import has_kernel
from deepops.reference import lstm as reference

State = tuple[Tensor, Tensor]
# weight_ih [4H, I], weight_hh [4H, H], bias_ih and bias_hh [4H], weight_peephole [3H]; None: the cell does not have it.
Tensors = tuple[Tensor, Tensor, Grad, Grad, Grad]

_PACK: Any = None
_FORWARD: Any = None
_BACKWARD: Any = None
if has_kernel("lstm_cell", "cpu"):
    _PACK = torch.ops.deepops.lstm_pack.default
    _FORWARD = torch.ops.deepops.lstm_cell.default
    _BACKWARD = torch.ops.deepops.lstm_cell_backward.default
_graph_task = torch._C._current_graph_task_id
_is_grad_enabled = torch.is_grad_enabled
_one_token = Lock()

# Bytes of gate gradients that wait for their products with inputs and states: rows enough for fast ones, few enough for
# the cache.
_MOST_GATHERED = 4 << 20
_NOTHING = (None, None, None)


class _Running(WeakValueDictionary[int, "_Gathered"]):
    """What has been gathered so far in the running backwards, by their numbers."""

    ended = False  # whether a backward has come to the weights


class CellWeights:
    """The weights of a cell as they are now, packed, and what the steps with them share.

    Args:
        tensors: the weights, of one dtype, on one device.
        cell_clip: the limit of the cell's values, or None.
        dtype: of inputs, states and products.
    """

    def __init__(self, tensors: Tensors, cell_clip: float | None, dtype: torch.dtype) -> None:
        """Pack the weights."""
        weight_ih, weight_hh, bias_ih, bias_hh, peephole = tensors
        self.tensors, self.cell_clip, self.dtype = tensors, cell_clip, dtype
        # Inference tensors do not count writes. Nobody keeps them packed, and they have no backward.
        self.facts = () if any(t is not None and t.is_inference() for t in tensors) else facts_of(*tensors)
        self.alive = [None if t is None else t.detach() for t in tensors]  # no other tensor may get this memory
        self.requires_grad = any(t is not None and t.requires_grad for t in tensors)
        self._token: Grad = None
        self.running = _Running()
        with torch.no_grad():
            self.packed: Tensor = _PACK(weight_ih.to(dtype).contiguous(), weight_hh.to(dtype).contiguous())
            self.peephole = None if peephole is None else peephole.to(dtype).contiguous()
            sums = torch.promote_types(dtype, torch.float32) if weight_hh.is_cpu else dtype
            biases = [bias.to(sums) for bias in (bias_ih, bias_hh) if bias is not None]
            self.bias = biases[0] + biases[1] if len(biases) == 2 else biases[0].contiguous() if biases else None

    def holds(self, tensors: Tensors, cell_clip: float | None, dtype: torch.dtype) -> bool:
        """Whether these are the weights, unchanged."""
        mine = self.tensors
        return (
            mine[0] is tensors[0]
            and mine[1] is tensors[1]
            and mine[2] is tensors[2]
            and mine[3] is tensors[3]
            and mine[4] is tensors[4]
            and self.facts == facts_of(*tensors)
            and self.cell_clip == cell_clip
            and self.dtype is dtype
        )

    def go_on_from(self, h: Tensor) -> bool:
        """Whether a step from the state ``h`` belongs to the sequence that these weights were packed for."""
        if not _is_grad_enabled() or h.is_leaf or self.running.ended:
            return False
        return self.requires_grad or getattr(h.grad_fn, "weights", None) is self

    def token(self) -> Grad:
        """The input that leads autograd from a step to the weights; None if they need no gradient."""
        with _one_token:  # the steps of two threads must not lead to two of them
            if self._token is None and self.requires_grad:
                self._token = _Collect.apply(self.running, *self.tensors)  # type: ignore[no-untyped-call]
        return self._token

    def gathered(self) -> _Gathered:
        """Where the steps of the running backward leave what the gradients of the weights are made of."""
        task = _graph_task()
        gathered = self.running.get(task)
        if gathered is None:
            assert self._token is not None
            assert self._token.grad_fn is not None
            wanted = torch._C._will_engine_execute_node(self._token.grad_fn)
            gathered = self.running[task] = _Gathered(self, wanted)
            # The engine keeps it until this backward has ended, in whatever way; nobody else does.
            torch.autograd.Variable._execution_engine.queue_callback(gathered.end)
        return gathered

    def check(self, weight_ih: bool, weight_hh: bool, biases: bool) -> None:
        """Raise, as torch does, where a weight that a backward needs was written to since it was packed."""
        mine, facts = self.tensors, self.facts
        for i in (2, 3) if biases else ():
            bias = mine[i]
            if bias is not None and bias._version != facts[3 * i + 1]:
                _raise_modified(bias, facts[3 * i + 1])
        if weight_ih and mine[0]._version != facts[1]:
            _raise_modified(mine[0], facts[1])
        if weight_hh and mine[1]._version != facts[4]:
            _raise_modified(mine[1], facts[4])
        if mine[4] is not None and mine[4]._version != facts[13]:
            _raise_modified(mine[4], facts[13])


def facts_of(
    weight_ih: Tensor, weight_hh: Tensor, bias_ih: Grad, bias_hh: Grad, peephole: Grad
) -> tuple[int | bool | None, ...]:
    """What changes when a weight gets other memory, is written to, or is frozen: three facts of each tensor."""
    return (
        weight_ih.data_ptr(),
        weight_ih._version,
        weight_ih.requires_grad,
        weight_hh.data_ptr(),
        weight_hh._version,
        weight_hh.requires_grad,
        *(_NOTHING if bias_ih is None else (bias_ih.data_ptr(), bias_ih._version, bias_ih.requires_grad)),
        *(_NOTHING if bias_hh is None else (bias_hh.data_ptr(), bias_hh._version, bias_hh.requires_grad)),
        *(_NOTHING if peephole is None else (peephole.data_ptr(), peephole._version, peephole.requires_grad)),
    )


def _raise_modified(tensor: Tensor, version: int | bool | None) -> None:
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead. "
        "Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True)."
    )


def step(x: Tensor, h: Tensor, c: Tensor, weights: CellWeights) -> State:
    """``(h, c)`` after one step, from x ``[B, I]``, h and c ``[B, H]``, all of ``weights.dtype``.

    Raises:
        RuntimeError: sizes or dtypes that do not go together.
    """
    if _is_grad_enabled() and (weights.requires_grad or x.requires_grad or h.requires_grad or c.requires_grad):
        token = weights._token
        state: State = _apply(x, h, c, weights.token() if token is None else token, weights)
        return state
    h, c, _ = _FORWARD(x, h, c, weights.packed, weights.bias, weights.peephole, weights.cell_clip, False)
    return h, c


class _Step(torch.autograd.Function):
    """Keeps its inputs and the activated gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, token: Grad, weights: CellWeights) -> State:
        new_h, new_c, gates = _FORWARD(x, h, c, weights.packed, weights.bias, weights.peephole, weights.cell_clip, True)
        ctx.save_for_backward(x, h, c, gates)
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        return new_h, new_c

    @staticmethod
    def backward(ctx: Any, grad_h: Grad, grad_c: Grad) -> tuple[Grad, ...]:
        x, h, c, gates = ctx.saved_tensors
        weights = ctx.weights
        need_x, need_h, _, need_weights, _ = ctx.needs_input_grad
        again = _is_grad_enabled()  # the differentiable path computes the step again, from all weights
        weights.check(need_x or again, need_h or again, again)
        if grad_h is None and grad_c is None:
            return None, None, None, None, None
        if again:
            return _differentiable_backward(ctx, x, h, c, grad_h, grad_c)
        grad_gates, grad_x, grad_before, grad_c, grad_peephole = _BACKWARD(
            grad_h, grad_c, gates, c, weights.packed, weights.peephole, weights.cell_clip, x.size(1), need_x, need_h
        )
        if need_weights:
            weights.gathered().add(grad_gates, x, h, grad_peephole)
        return grad_x if need_x else None, grad_before if need_h else None, grad_c, None, None


# Without the Python around it, which looks for torch.func at work: 1.5 us a step.
_apply: Any = super(torch.autograd.Function, _Step).apply


class _Collect(torch.autograd.Function):
    """From the weights to a token, and back to their gradients. Nothing is saved: it may run in several backwards."""

    @staticmethod
    def forward(ctx: Any, running: _Running, weight_ih: Tensor, *_: Grad) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.running = running  # not the weights: they hold the token, and it this
        return weight_ih.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Grad) -> tuple[Grad, ...]:
        ctx.running.ended = True
        gathered = ctx.running.get(_graph_task())
        if gathered is None:  # no step got a gradient
            return (None,) * 6
        grads = gathered.gradients()
        return None, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:], strict=True))


class _Gathered:
    """What the steps of one backward leave for the gradients of the weights."""

    def __init__(self, weights: CellWeights, wanted: bool) -> None:
        """Start empty. Keep nothing unless ``wanted``."""
        weight = weights.tensors[1]
        self.wanted = wanted
        # 16-bit products are slow on the CPU, and rounded once instead of after every few steps.
        self.dtype = torch.promote_types(weights.dtype, torch.float32) if weight.is_cpu else weights.dtype
        self.rows_at_most = _MOST_GATHERED // (weight.size(0) * weight.element_size())
        self.rows = 0
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.sums: list[Tensor] = []  # the gradients of weight_ih, weight_hh, both biases, weight_peephole
        self.differentiable: list[Grad] = []  # those of all tensors, with their own history

    def end(self) -> None:
        """Do nothing; see ``CellWeights.gathered``."""

    def add(self, grad_gates: Tensor, x: Tensor, h: Tensor, grad_peephole: Tensor) -> None:
        """Take in one step."""
        if not self.wanted:
            return
        self.steps.append((grad_gates, x, h, grad_peephole))
        self.rows += x.size(0)
        if self.rows > self.rows_at_most:
            self.flush()

    def add_differentiable(self, grads: Sequence[Grad]) -> None:
        """Take in the gradients of one step."""
        if not self.wanted:
            return
        sums = self.differentiable or [None] * len(grads)
        self.differentiable = [b if a is None else a if b is None else a + b for a, b in zip(sums, grads, strict=True)]

    def flush(self) -> None:
        """Multiply what has been gathered, some rows at a time.

        A step after the other, as torch does it, adds up few rows, and then these sums. One product of all rows is a
        single long sum: measured, twice as far from the exact one.
        """
        grad_gates, x, h, grad_peephole = zip(*self.steps, strict=True)
        self.steps, self.rows = [], 0
        with _no_autocast(x[0]):
            gates, inputs, states = self._one(grad_gates), self._one(x), self._one(h)
            small = gates.sum(0), self._one(grad_peephole).view(len(x), -1).sum(0)
            rows, new = gates.size(0), not self.sums
            if new:
                self.sums = [torch.empty(0)] * 2 + [*small]
            else:
                self.sums[2].add_(small[0])
                self.sums[3].add_(small[1])
            at_once = max(32, 2 * x[0].size(0), min(rows // 8, 64))
            for begin in range(0, max(rows, 1), at_once):
                part = slice(begin, begin + at_once)
                transposed = gates[part].t()
                for i, factor in enumerate((inputs[part], states[part])):
                    if new and begin == 0:
                        self.sums[i] = torch.mm(transposed, factor)
                    else:
                        self.sums[i].addmm_(transposed, factor)

    def _one(self, parts: Sequence[Tensor]) -> Tensor:
        return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).to(self.dtype)

    def gradients(self) -> list[Grad]:
        """Those of all tensors of ``CellWeights``, summed over the steps; None where nothing came."""
        if self.steps:
            self.flush()
        grads: list[Grad] = [None] * 5
        if self.sums:
            weight_ih, weight_hh, bias, peephole = self.sums
            grads = [weight_ih, weight_hh, bias, bias.clone(), peephole]
        if self.differentiable:
            self.add_differentiable(grads)
            grads = self.differentiable
        return grads


def _differentiable_backward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, grad_h: Grad, grad_c: Grad) -> tuple[Grad, ...]:
    """The same by differentiable torch operations, for double backward (``create_graph=True``)."""
    weights = ctx.weights
    inputs = aliases((x, h, c, *weights.tensors))
    with _no_autocast(x):
        states = _plain_step(weights.cell_clip, weights.dtype, *inputs)
        given = [(state, grad) for state, grad in zip(states, (grad_h, grad_c), strict=True) if grad is not None]
        wanted = {i: t for i, t in enumerate(inputs) if t is not None and t.requires_grad}
        found = torch.autograd.grad(
            [state for state, _ in given],
            list(wanted.values()),
            [grad for _, grad in given],
            create_graph=True,
            allow_unused=True,
        )
        grads: list[Grad] = [None] * len(inputs)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        if ctx.needs_input_grad[3]:
            weights.gathered().add_differentiable(grads[3:])
    return grads[0], grads[1], grads[2], None, None


def _plain_step(
    cell_clip: float | None,
    dtype: torch.dtype,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Grad,
    bias_hh: Grad,
    peephole: Grad,
) -> State:
    """``step`` in plain PyTorch."""
    gates = F.linear(x, weight_ih.to(dtype), None if bias_ih is None else bias_ih.to(dtype))
    if bias_hh is not None:
        gates = gates + bias_hh.to(dtype)
    peephole = None if peephole is None else peephole.to(dtype)
    sequence = reference.lstm_sequence(
        gates[None], h, c, weight_hh.to(dtype), weight_peephole=peephole, cell_clip=cell_clip
    )
    return sequence[2:]


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Tensors have one dtype, which autocast must not change product by product."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


class CellCache:
    """The packed weights of one module, kept while they hold; never saved or copied.

    They are packed anew when a weight is another tensor, has other memory, or was written to: torch counts in-place
    writes (``Tensor._version``). It does not count those through ``.data``, by another process, or by a sharded module
    that brings its weights together. They are therefore kept only within a sequence that is trained on: not for a state
    that is a leaf, not after a backward, not without gradients, where a state tells nothing of where it came from.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.packs = 0  # how often weights were packed: what tests count
        self._weights: CellWeights | None = None

    def drop(self) -> None:
        """Forget the weights."""
        self._weights = None

    def step(self, x: Tensor, h: Tensor, c: Tensor, tensors: Tensors, cell_clip: float | None = None) -> State:
        """``step`` with these weights, in the dtype of ``x``."""
        weights = self._weights
        if weights is None or not (weights.go_on_from(h) and weights.holds(tensors, cell_clip, x.dtype)):
            weights = self._pack(tensors, cell_clip, x.dtype)
        return step(x, h, c, weights)

    def _pack(self, tensors: Tensors, cell_clip: float | None, dtype: torch.dtype) -> CellWeights:
        self.packs += 1
        weights = CellWeights(tensors, cell_clip, dtype)
        # Not those that are computed anew for every use: their history would be kept alive.
        keep = _is_grad_enabled() and weights.facts and all(t is None or t.is_leaf for t in tensors)
        self._weights = weights if keep else None
        return weights

    def __deepcopy__(self, memo: dict[int, Any]) -> CellCache:
        """A copied module starts with an empty cache."""
        return CellCache()

    def __reduce__(self) -> tuple[type[CellCache], tuple[()]]:
        """Neither does a pickle hold it."""
        return CellCache, ()
