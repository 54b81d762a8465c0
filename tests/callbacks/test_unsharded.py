"""A copy of a model under FSDP2 is what the model was before it was wrapped, and the model stays as it is."""

import warnings
import weakref

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import weight_norm

from lightning_gradflow.callbacks.copies import check_memory
from lightning_gradflow.callbacks.unsharded import as_parts, gathered, whole_copy, write
from tests.distributed.program import HAS_FSDP2

pytestmark = [
    pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 runs on the CPU from torch 2.7 on"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Tied(nn.Module):
    """Uses its embedding twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.embedding(x.long() % 7))


class Recurrent(nn.Module):
    """Two layers in both directions."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0]


def _shard_all(net):
    for child in net.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child)
    return fully_shard(net)


def _hooked(net):
    fully_shard(net)
    register_fsdp_forward_method(net, "forward")
    return net


MODELS = {
    "layers": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 3)), _shard_all),
    "bf16": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda net: fully_shard(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    ),
    "frozen": (lambda: nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Linear(5, 3)), _shard_all),
    "tied": (Tied, fully_shard),
    "recurrence": (Recurrent, _shard_all),
    "parametrized": (lambda: nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3)), _shard_all),
    "method": (lambda: nn.Sequential(nn.Linear(6, 5)), _hooked),
}


def _model(name):
    """A plain model, and the same one under FSDP2."""
    build, shard = MODELS[name]
    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    sharded = build()
    shard(sharded)
    return plain, sharded


def _batch():
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) * 5


def _copy(sharded):
    return whole_copy(sharded, gathered(sharded, CPU, CPU))


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_copy_is_the_model_before_it_was_wrapped(name, is_used):
    plain, sharded = _model(name)
    if is_used:  # FSDP2 builds the rest of itself in the first forward pass
        for net in (plain, sharded):
            output = net(_batch())
            if net is sharded:
                output.sum().backward()
    as_parts(sharded)
    copied = _copy(sharded)
    assert [type(m) for m in copied.modules()] == [type(m) for m in plain.modules()] or name == "parametrized"
    assert not any(isinstance(m, FSDPModule) for m in copied.modules())
    assert not any(isinstance(p, DTensor) for p in copied.parameters())
    wanted = dict(plain.named_parameters()) | dict(plain.named_buffers())
    found = dict(copied.named_parameters()) | dict(copied.named_buffers())
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value)
        assert found[key].requires_grad == value.requires_grad
    assert torch.equal(copied(_batch()), plain(_batch()))
    assert {k: v.shape for k, v in copied.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_fsdp_is_left_on_the_copy(name):
    plain, sharded = _model(name)
    sharded(_batch()).sum().backward()
    copied = _copy(sharded)
    for mine, theirs in zip(copied.modules(), plain.modules(), strict=True):
        attributes = {key for key in vars(mine) if not key.startswith("__composable")}
        assert attributes == set(vars(theirs))
        for key, value in vars(theirs).items():
            if key.endswith("_hooks"):
                assert len(getattr(mine, key)) == len(value), key
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(type(t)) or t, lambda t: t):
        copied(_batch())
    assert DTensor not in seen


@pytest.mark.parametrize("name", MODELS)
def test_the_model_goes_on_as_if_nothing_had_been(name):
    """Step for step with one of which no copy was made."""
    outputs = []
    for copies in (True, False):
        _, sharded = _model(name)
        optimizer = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
        before = [(type(m), set(vars(m))) for m in sharded.modules()]
        for step in range(3):
            if step == 1 and copies:
                before = [(type(m), set(vars(m))) for m in sharded.modules()]
                copied = _copy(sharded)
                with torch.no_grad():
                    for values in (*copied.parameters(), *copied.buffers()):
                        values.zero_()
                assert [(type(m), set(vars(m))) for m in sharded.modules()] == before
            output = sharded(_batch())
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(output)
    assert torch.equal(*outputs)


def test_a_weight_that_is_tied_stays_one():
    _, sharded = _model("tied")
    copied = _copy(sharded)
    assert copied.out.weight is copied.embedding.weight


def test_what_is_written_comes_into_the_parts_and_their_gradients_are_dropped():
    _, sharded = _model("layers")
    sharded(_batch()).sum().backward()
    part, values = sharded[0].weight, torch.full((5, 6), 2.5)
    write([(part, values)], CPU)
    assert sharded[0].weight is part
    assert isinstance(part, DTensor)
    assert torch.equal(part.full_tensor(), values)
    assert part.grad is None
    assert sharded[3].weight.grad is not None


def test_after_a_validation_the_model_has_its_parts_again():
    _, sharded = _model("bf16")
    with torch.no_grad():
        sharded(_batch())
    before = [isinstance(p, DTensor) for p in sharded.parameters()]
    as_parts(sharded)
    assert not all(before)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())


class Module(L.LightningModule):
    """Is wrapped itself, and holds what can't be copied; FSDP2 calls its class as its own base."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 5)
        self.mesh = init_device_mesh("cpu", (1,))
        self.group = self.mesh.get_group()
        self.result = self.net(torch.ones(1, 6))


def test_a_module_that_is_wrapped_itself_can_be_copied_with_its_mesh():
    module = Module()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    fully_shard(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = _copy(module)
    assert type(copied) is Module
    assert copied.mesh is module.mesh
    assert copied.group is module.group
    assert copied._trainer is None
    assert module._trainer is not None
    assert torch.equal(copied.net.weight, module.net.weight.full_tensor())
    assert not copied.result.requires_grad


def test_a_copy_that_is_let_go_of_takes_no_memory():
    _, sharded = _model("recurrence")
    copied = _copy(sharded)
    gone = [weakref.ref(p) for p in copied.parameters()]
    del copied
    import gc

    gc.collect()
    assert all(ref() is None for ref in gone)


def test_memory_is_asked_for_whole_parameters_where_they_are_to_be():
    free = torch.nn.Module()
    free.weight = nn.Parameter(torch.empty(1 << 40, device="meta"))
    with pytest.raises(MemoryError, match=r"4096\.0 GiB"):
        check_memory(free, copies=1, device=CPU)
