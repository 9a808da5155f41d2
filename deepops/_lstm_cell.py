"""One step of an LSTM under autograd, for loops in Python: what a step costs beside its arithmetic is kept small.

The weights are packed once for all steps, until they change. A step's backward computes the gradients of its gates and
with them those of its inputs; the gradients of the weights are products over all steps of a backward, taken once, at its
end: every step takes a *token*, a tensor of nothing, whose backward autograd runs when all steps it reaches are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops.reference import lstm as reference

Grad = Tensor | None
State = tuple[Tensor, Tensor]

_PACK: Any = torch.ops.deepops.lstm_pack.default
_FORWARD: Any = torch.ops.deepops.lstm_cell.default
_BACKWARD: Any = torch.ops.deepops.lstm_cell_backward.default
_graph_task = torch._C._current_graph_task_id

# Bytes of gate gradients that are kept before they are multiplied: enough rows for a fast product, in the cache.
_MOST_GATHERED = 4 << 20


class CellWeights:
    """The weights of a cell as they are now, packed, and what the steps with them share.

    Args:
        tensors: weight_ih ``[4H, I]``, weight_hh ``[4H, H]``, bias_ih and bias_hh ``[4H]`` or None, weight_peephole
            ``[3H]`` or None; one dtype, one device.
        cell_clip: the limit of the cell's values, or None.
        dtype: that of inputs, states and products; by default that of the weights.
    """

    def __init__(
        self, tensors: tuple[Tensor, Tensor, Grad, Grad, Grad], cell_clip: float | None, dtype: torch.dtype
    ) -> None:
        """Pack the weights."""
        self.tensors, self.cell_clip, self.dtype = tensors, cell_clip, dtype
        self.facts = facts_of(*tensors)
        self.alive = [None if t is None else t.detach() for t in tensors]  # no other tensor may get this memory
        self.requires_grad = any(t is not None and t.requires_grad for t in tensors)
        self._token: Grad = None
        self._gathered: WeakValueDictionary[int, _Gathered] = WeakValueDictionary()
        with torch.no_grad():
            weight_ih, weight_hh, bias_ih, bias_hh, peephole = tensors
            self.packed: Tensor = _PACK(weight_ih.to(dtype).contiguous(), weight_hh.to(dtype).contiguous())
            self.peephole = None if peephole is None else peephole.to(dtype).contiguous()
            sums = torch.promote_types(dtype, torch.float32) if weight_hh.is_cpu else dtype
            biases = [bias.to(sums) for bias in (bias_ih, bias_hh) if bias is not None]
            self.bias = None if not biases else biases[0] + biases[1] if len(biases) == 2 else biases[0].contiguous()

    def token(self) -> Grad:
        """The input that leads autograd from a step to the weights; None if they need no gradient."""
        if self._token is None and self.requires_grad:
            self._token = _Collect.apply(self._gathered, self.dtype, *self.tensors)  # type: ignore[no-untyped-call]
        return self._token

    def gathered(self) -> _Gathered:
        """Where the steps of the running backward leave what the gradients of the weights are made of."""
        task = _graph_task()
        gathered = self._gathered.get(task)
        if gathered is None:
            assert self._token is not None
            wanted = torch._C._will_engine_execute_node(self._token.grad_fn)  # type: ignore[attr-defined]
            gathered = self._gathered[task] = _Gathered(self, wanted)
            # The engine keeps it until this backward has ended, in whatever way.
            torch.autograd.Variable._execution_engine.queue_callback(gathered.end)  # type: ignore[attr-defined]
        return gathered

    def check(self, *numbers: int) -> None:
        """Raise, as torch does, where one of these tensors was written to since it was packed."""
        for number in numbers:
            tensor = self.tensors[number]
            if tensor is not None and tensor._version != self.facts[3 * number + 1]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version "
                    f"{self.facts[3 * number + 1]} instead. Hint: enable anomaly detection to find the operation that "
                    "failed to compute its gradient, with torch.autograd.set_detect_anomaly(True)."
                )


def facts_of(
    weight_ih: Tensor, weight_hh: Tensor, bias_ih: Grad, bias_hh: Grad, peephole: Grad
) -> tuple[int | bool | None, ...]:
    """What changes when a weight gets other memory, is written to, or is frozen: three facts of each tensor.

    Torch counts in-place writes, by optimizers and ``load_state_dict`` too; those through ``.data`` it does not.
    """
    facts: list[int | bool | None] = []
    for t in (weight_ih, weight_hh, bias_ih, bias_hh, peephole):
        facts += (None, None, None) if t is None else (t.data_ptr(), t._version, t.requires_grad)
    return tuple(facts)


def step(x: Tensor, h: Tensor, c: Tensor, weights: CellWeights) -> State:
    """``(h, c)`` after one step, from x ``[B, I]``, h and c ``[B, H]``, all of ``weights.dtype``."""
    if torch.is_grad_enabled() and (weights.requires_grad or x.requires_grad or h.requires_grad or c.requires_grad):
        state: State = _apply(x, h, c, weights.token(), weights)
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
        weights.check(*((0,) if need_x else ()), *((1,) if need_h else ()), 4)
        if grad_h is None and grad_c is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():
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
    def forward(ctx: Any, gathered: Any, dtype: torch.dtype, *tensors: Grad) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gathered = gathered
        weight = tensors[0]
        assert weight is not None
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Grad) -> tuple[Grad, ...]:
        gathered = ctx.gathered.get(_graph_task())
        if gathered is None:  # no step got a gradient
            return (None,) * 7
        grads = gathered.gradients()
        return None, None, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[2:], strict=True))


class _Gathered:
    """What the steps of one backward leave for the gradients of the weights."""

    def __init__(self, weights: CellWeights, wanted: bool) -> None:
        """Start empty. Keep nothing unless ``wanted``."""
        weight = weights.tensors[1]
        self.wanted = wanted
        self.dtypes = [None if t is None else t.dtype for t in weights.tensors]
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
        sums = self.differentiable or [None] * len(grads)
        self.differentiable = [b if a is None else a if b is None else a + b for a, b in zip(sums, grads, strict=True)]

    def flush(self) -> None:
        """Multiply what has been gathered."""
        grad_gates, x, h, grad_peephole = zip(*self.steps, strict=True)
        self.steps, self.rows = [], 0
        gates, rows = self._one(grad_gates), (self._one(x), self._one(h))
        small = gates.sum(0), self._one(grad_peephole).view(len(x), -1).sum(0)
        if not self.sums:
            self.sums = [torch.mm(gates.t(), rows[0]), torch.mm(gates.t(), rows[1]), *small]
            return
        for i in range(2):
            self.sums[i].addmm_(gates.t(), rows[i])
            self.sums[2 + i].add_(small[i])

    def _one(self, parts: Sequence[Tensor]) -> Tensor:
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.dtype)

    def gradients(self) -> list[Grad]:
        """Those of all tensors of ``CellWeights``, summed over the steps; None where nothing came."""
        if self.steps:
            self.flush()
        grads: list[Grad] = [None] * len(self.dtypes)
        if self.sums:
            weight_ih, weight_hh, bias, peephole = self.sums
            grads = [weight_ih, weight_hh, bias, bias if self.dtypes[2] is None else bias.clone(), peephole]
        pairs = zip(grads, self.dtypes, strict=True)
        grads = [None if grad is None or dtype is None else grad.to(dtype) for grad, dtype in pairs]
        if self.differentiable:
            self.add_differentiable(grads)
            grads = self.differentiable
        return grads


def _differentiable_backward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, grad_h: Grad, grad_c: Grad) -> tuple[Grad, ...]:
    """The same by differentiable torch operations, for double backward (``create_graph=True``).

    Forward in plain PyTorch on the saved tensors, then ``torch.autograd.grad``. On aliases: the history of ``h`` leads
    to the same weights, and its part is for others to add.
    """
    weights = ctx.weights
    aliases = [None if t is None else t.view_as(t) for t in (x, h, c, *weights.tensors)]
    new_x, new_h, new_c, weight_ih, weight_hh, bias_ih, bias_hh, peephole = (
        None if t is None else t.to(weights.dtype) for t in aliases
    )
    gates_x = F.linear(new_x, weight_ih, bias_ih)
    if bias_hh is not None:
        gates_x = gates_x + bias_hh
    clip = weights.cell_clip
    states = reference.lstm_sequence(gates_x[None], new_h, new_c, weight_hh, None, peephole, cell_clip=clip)[2:]
    given = [(state, grad) for state, grad in zip(states, (grad_h, grad_c), strict=True) if grad is not None]
    wanted = [i for i, t in enumerate(aliases) if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        [state for state, _ in given],
        [aliases[i] for i in wanted],
        [grad for _, grad in given],
        create_graph=True,
        allow_unused=True,
    )
    grads: list[Grad] = [None] * len(aliases)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    if ctx.needs_input_grad[3]:
        gathered = weights.gathered()
        if gathered.wanted:
            gathered.add_differentiable(grads[3:])
    return grads[0], grads[1], grads[2], None, None


class CellCache:
    """The packed weights of one module, kept while they hold; never saved or copied.

    They are packed anew exactly when a weight is another tensor, has other memory, or was written to: torch counts
    in-place writes (``Tensor._version``). Writes through ``.data`` are not counted: ``drop`` after them.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.packs = 0  # how often weights were packed: what tests count
        self._weights: CellWeights | None = None

    def drop(self) -> None:
        """Forget the weights."""
        self._weights = None

    def get(
        self,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Grad = None,
        bias_hh: Grad = None,
        weight_peephole: Grad = None,
        cell_clip: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> CellWeights:
        """The weights, packed; arguments as of ``CellWeights``."""
        if dtype is None:
            dtype = weight_hh.dtype
        tensors = (weight_ih, weight_hh, bias_ih, bias_hh, weight_peephole)
        if any(t is not None and (t.is_inference() or not t.is_leaf) for t in tensors):
            self.packs += 1  # those made anew for every use, and those that do not count writes
            return CellWeights(tensors, cell_clip, dtype)
        kept = self._weights
        if (
            kept is not None
            and kept.dtype is dtype
            and kept.cell_clip == cell_clip
            and all(a is b for a, b in zip(kept.tensors, tensors, strict=True))
            and kept.facts == facts_of(*tensors)
        ):
            return kept
        self.packs += 1
        made = self._weights = CellWeights(tensors, cell_clip, dtype)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> CellCache:
        """A copied module starts with an empty cache."""
        return CellCache()

    def __reduce__(self) -> tuple[type[CellCache], tuple[()]]:
        """Neither does a pickle hold it."""
        return CellCache, ()
