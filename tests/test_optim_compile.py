"""Optimizers and torch.compile: nothing breaks, nothing is compiled again when learning rates or gradients change."""

from contextlib import contextmanager

import pytest
import torch
from optim_cases import assert_same_bits, needs_kernel
from torch import nn

from deepops.optim import SGD, Adam, AdamW, RMSprop

pytestmark = [needs_kernel, pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]

KINDS = {Adam: {"amsgrad": True}, AdamW: {}, SGD: {"momentum": 0.9}, RMSprop: {"momentum": 0.9}}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
backends = pytest.mark.parametrize("backend", ["eager", "aot_eager"])
STEPS = 5


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextmanager
def compiled_once():
    """Fail where anything is compiled a second time."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, name):
        self.count = 0
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, graph, inputs):
        self.count += 1
        return self._compile(graph, inputs)


def make(kind, lr=0.1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, kind(model.parameters(), **KINDS[kind], **options, lr=torch.tensor(lr) if lr == 0.2 else lr)


def batches():
    return torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1)).unbind(0)


def decay(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def train_plainly(kind, lr, **options):
    """The results of :func:`train` without a compiler."""
    model, optimizer = make(kind, lr, **options)
    train(model, optimizer, model, lambda: optimizer.step())
    return list(model.parameters())


def train(model, optimizer, forward, step):
    schedule = decay(optimizer)
    for i, x in enumerate(batches()):
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        if i == 2:
            model[0].bias.grad = None
        step()
        schedule.step()


learning_rates = pytest.mark.parametrize("lr", [0.1, 0.2], ids=["float", "tensor"])


def test_the_check_notices_a_second_compilation():
    _, optimizer = make(SGD)

    @torch.compile(backend="eager")
    def uses_the_number(x):
        return x * optimizer.param_groups[0]["lr"]

    uses_the_number(torch.ones(3))
    optimizer.param_groups[0]["lr"] = 0.2
    with compiled_once(), pytest.raises(torch._dynamo.exc.RecompileError):
        uses_the_number(torch.ones(3))


@every_kind
@backends
@learning_rates
def test_compiled_model_with_a_step_of_its_own(kind, backend, lr):
    model, optimizer = make(kind, lr)
    counting = Counting(backend)
    with compiled_once():
        train(model, optimizer, torch.compile(model, backend=counting), lambda: optimizer.step())
    assert counting.count == 1
    assert_same_bits(list(model.parameters()), train_plainly(kind, lr))


@every_kind
@backends
@learning_rates
def test_compiled_step(kind, backend, lr):
    model, optimizer = make(kind, lr)
    counting = Counting(backend)

    @torch.compile(backend=counting)
    def step():
        optimizer.step()

    with compiled_once():
        train(model, optimizer, model, step)
    assert counting.count == 0
    assert_same_bits(list(model.parameters()), train_plainly(kind, lr))


@every_kind
@backends
@learning_rates
def test_compiled_training_step(kind, backend, lr):
    """Forward, backward and step in one function, a tensor's lr with clipping; gradients are set to None after it."""
    options = {"max_grad_norm": 0.01} if lr == 0.2 else {}
    (model, optimizer), (other, plain) = make(kind, lr, **options), make(kind, lr, **options)
    counting = Counting(backend)

    def training_step(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(training_step, backend=counting)
    schedules = decay(optimizer), decay(plain)
    with compiled_once():
        for x in batches():
            losses = compiled(model, optimizer, x), training_step(other, plain, x)
            assert_same_bits(losses[:1], losses[1:])
            for o, schedule in zip((optimizer, plain), schedules, strict=True):
                o.zero_grad()
                schedule.step()
    assert counting.count == 1  # what comes before backward()
    assert_same_bits(list(model.parameters()), list(other.parameters()))


@every_kind
def test_closure_within_a_compiled_function(kind):
    results = []
    for compiled in (True, False):
        model, optimizer = make(kind)

        def training_step(x, model=model, optimizer=optimizer):
            def closure():
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            return optimizer.step(closure)

        run = torch.compile(training_step, backend="eager") if compiled else training_step
        losses = [run(x).detach() for x in batches()]
        results.append([*losses, *model.parameters()])
    assert_same_bits(*results)


@every_kind
def test_full_graph_is_refused_as_by_torchs_optimizers(kind):
    model, optimizer = make(kind)
    stock = getattr(torch.optim, kind.__name__)([nn.Parameter(torch.ones(3))])
    model(torch.ones(8, 4)).square().mean().backward()
    stock.param_groups[0]["params"][0].grad = torch.ones(3)
    before = [p.detach().clone() for p in model.parameters()]
    for o, message in ((stock, "graph_break"), (optimizer, "an optimizer of deepops takes its step between graphs")):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            torch.compile(lambda o=o: o.step(), backend="eager", fullgraph=True)()
    assert_same_bits(list(model.parameters()), before)
    optimizer.step()
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
