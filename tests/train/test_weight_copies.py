"""bfloat16 copies of weights: the numbers of autocast, never an old weight, and no trace of them outside of a step."""

import copy
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from ranks import run_script, start_ranks
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastmae
from fastmae import torch_compat
from fastmae.model.classifier import ClassificationLoss, classifier_of, tune
from fastmae.model.weight_copies import WeightCopies
from fastmae.ops.backends import using
from fastmae.ops.choices import TORCHS_OWN, Choices
from fastmae.ops.linear import Linear
from fastmae.train.optim import make_optimizer
from fastmae.train.step import TrainingLoss, prepare, train_step

SMALL = dict(img_size=16, in_chans=3, embed_dim=32, depth=2, num_heads=2)
SMALL |= dict(decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=2)
N = 6


def small_model(**settings):
    torch.manual_seed(0)
    return fastmae.mae_vit_tiny_patch4(**SMALL | settings)


def batch(seed=0):
    shape = (N, 16, 16, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images, fastmae.ops.random_masking(torch.arange(N), seed, 16)


class Trainer:
    """A model in training with bfloat16 products, with copies of its weights or with casts at every use."""

    def __init__(self, with_copies, loss_of=None, checkpointing="none", compiling="off"):
        self.loss_of = loss_of or TrainingLoss(small_model(), 0.75)
        self.model = self.loss_of.model
        prepare(self.loss_of, checkpointing, compiling)
        self.optimizer = make_optimizer(self.loss_of, 1e-3, 0.05)
        self.copies = WeightCopies(self.model) if with_copies else None

    def step(self, *micro):
        autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        micro = micro or (batch(0), batch(1))
        return train_step(self.loss_of, self.optimizer, micro, len(micro), 1e-3, autocast, copies=self.copies)

    def state(self):
        """Every weight, gradient and moment."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"gradient.{name}": p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        for number, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"{number}.{name}": tensor for name, tensor in moments.items()}
        return copy.deepcopy(state)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert {tensor.dtype for name, tensor in one.items() if name.startswith("gradient.")} == {torch.float32}


def lent(copies):
    """The layers that have copies during a pass."""
    copies.write()
    with copies.in_use():
        return [layer for layer in copies._layers if layer.copies is not None]


# --- the numbers ------------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts the casts of matrices and vectors of weights to bfloat16, by operation."""

    def __init__(self, model):
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        out = operation(*arguments, **(keywords or {}))
        if operation is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.count["one"] += arguments[0].untyped_storage().data_ptr() in self.storages
        elif operation is torch.ops.aten._foreach_copy_.default:
            self.count["all"] += len(arguments[0])
        return out


@pytest.mark.parametrize("choices", [TORCHS_OWN, Choices.always("bfloat16", gelu="cpu")], ids=["torch", "fused"])
def test_weights_are_cast_once_a_step(choices):
    """Each of them, whatever the number of micro-batches, and by one call."""
    with using(choices=choices):
        count_casts()


def count_casts():
    for micro in ([batch(0)], [batch(seed) for seed in range(4)]):
        trainer = Trainer(with_copies=True)
        linears = [module for module in trainer.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        with Casts(trainer.model) as casts:
            trainer.step(*micro)
        assert casts.count == {"one": 0, "all": 2 * len(linears)}
    with Casts(trainer.model) as casts:
        trainer.copies = None
        trainer.step(*micro)
    assert casts.count["one"] >= len(micro) * len(linears), "without copies at every use"


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_step_is_that_of_autocast(checkpointing, residual):
    ours, plain = (Trainer(with_copies, checkpointing=checkpointing) for with_copies in (True, False))
    ours.model.autocast_residual = plain.model.autocast_residual = residual
    for seed in range(2):
        assert torch.equal(ours.step(batch(seed), batch(5)).loss, plain.step(batch(seed), batch(5)).loss)
    assert_same(ours.state(), plain.state())


@pytest.mark.parametrize("settings", [dict(decoder_attention="cross"), dict(in_chans=1)], ids=["cross", "one channel"])
def test_a_step_of_other_models_is_that_of_autocast(settings):
    images, ids = batch()
    micro = images[..., : settings.get("in_chans", 3)], ids
    ours, plain = (Trainer(copies, TrainingLoss(small_model(**settings), 0.75)) for copies in (True, False))
    ours.step(micro), plain.step(micro)
    assert_same(ours.state(), plain.state())
    assert ours.model.patch_embed in lent(ours.copies)


@pytest.mark.parametrize("what", ["full", "linear", "last-1", "lora"])
def test_a_step_of_fine_tuning_is_that_of_autocast(what):
    """Weights that are not trained get no gradient."""
    images, targets = batch()[0], torch.eye(N)
    trainers = []
    for with_copies in (True, False):
        torch.manual_seed(0)
        model = classifier_of(small_model(), N)
        tune(model, what, lora_rank=2)
        trainers.append(Trainer(with_copies, ClassificationLoss(model)))
        trainers[-1].step((images, targets))
    assert_same(trainers[0].state(), trainers[1].state())
    assert all((p.grad is not None) == p.requires_grad for p in trainers[0].model.parameters())
    assert model.blocks[0].attn.qkv.copies is None
    copied = lent(trainers[0].copies)
    assert trainers[0].model.blocks[0].attn.qkv in copied
    assert trainers[0].model.head in copied


def test_gradients_are_added_up_in_float32():
    """Those of eight micro-batches are the sum of eight gradients, not of bfloat16 numbers."""
    trainer, micro, total = Trainer(with_copies=True), [batch(seed) for seed in range(8)], {}
    trainer.copies.write()
    for each in micro:
        trainer.optimizer.zero_grad()
        with trainer.copies.in_use():
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = trainer.loss_of(*each) / len(micro)
            loss.backward()
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                total[name] = total[name] + parameter.grad if name in total else parameter.grad.clone()
    trainer.step(*micro)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert [name for name in total if not torch.equal(total[name], gradients[name])] == []
    weight = gradients["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(weight, weight.bfloat16().float()), "the sum has more digits than bfloat16"


def test_operations_are_counted_as_without_copies():
    counts = []
    for with_copies in (True, False):
        trainer = Trainer(with_copies)
        with FlopCounterMode(display=False) as counter:
            trainer.step()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- never an old weight ----------------------------------------------------------------------------------------------


def load(model):
    torch.manual_seed(7)
    model.load_state_dict({name: tensor + torch.randn_like(tensor) / 8 for name, tensor in model.state_dict().items()})


def replace(model):
    layer = model.blocks[0].mlp.fc1
    with torch.no_grad():
        layer.weight.set_(layer.weight * 2)  # other memory, the same parameter


def swap(model):
    """An average takes the place of the weights, as in an evaluation of it that forgets to put them back."""
    for parameter in model.parameters():
        parameter.data = parameter.data.lerp(torch.ones(()), 0.1)


def edit(model):
    with torch.no_grad():
        model.decoder_blocks[1].attn.qkv.weight.mul_(2)


def edit_unnoticed(model):
    model.decoder_pred.bias.data.add_(1)  # autograd does not count this as a change of the parameter


def there_and_back(model):
    model.to(torch.float64).to(torch.float32)


@pytest.mark.parametrize("change", [load, replace, swap, edit, edit_unnoticed, there_and_back])
def test_whatever_happened_to_weights_between_steps_the_next_step_knows(change):
    ours, plain = Trainer(with_copies=True), Trainer(with_copies=False)
    for trainer in (ours, plain):
        trainer.step()
        before = trainer.step().loss
        change(trainer.model)
        after = trainer.step(batch(2)).loss
    assert_same(ours.state(), plain.state())
    assert before != after


def test_a_weight_of_another_shape_or_dtype_gets_another_copy_or_none():
    model = small_model()
    copies, layer = WeightCopies(model), model.blocks[0].mlp.fc1
    assert layer in lent(copies)
    layer.weight = nn.Parameter(torch.randn(7, 32))
    assert layer in lent(copies)
    with copies.in_use():
        assert torch.equal(layer.copies[0], layer.weight.bfloat16())
    layer.weight.data = layer.weight.data.double()
    assert layer not in lent(copies)


def test_copies_stay_where_they_are():
    """A CUDA graph reads them at the addresses of its capture; hooks for a while change nothing of that."""
    trainer, addresses = Trainer(with_copies=True), []
    for has_hooks in (False, True, False):
        hook = trainer.model.blocks[1].register_forward_pre_hook(grow) if has_hooks else None
        trainer.step()
        if hook is not None:
            hook.remove()
        addresses.append([copy.data_ptr() for pair in trainer.copies._copies for copy in pair])
    assert addresses[0] == addresses[1] == addresses[2]
    weight = trainer.model.blocks[1].mlp.fc1.weight
    trainer.copies.write()
    with trainer.copies.in_use():
        assert torch.equal(trainer.model.blocks[1].mlp.fc1.copies[0], weight.bfloat16())


def test_a_step_that_is_skipped_changes_no_copy():
    ours, plain = Trainer(with_copies=True), Trainer(with_copies=False)
    images, ids = batch()
    bad = images.permute(0, 3, 1, 2) / torch.zeros(())
    for trainer in (ours, plain):
        trainer.step()
        before = copy.deepcopy(trainer.model.state_dict())
        assert trainer.step((bad, ids)).skipped == 1
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
        assert trainer.step().skipped == 0
    assert_same(ours.state(), plain.state())


def grow(block, _):
    block.mlp.fc1.weight.data.mul_(1.1)


def test_hooks_may_change_weights_in_the_middle_of_a_pass():
    """So a model that has any works without copies."""
    ours, plain = Trainer(with_copies=True), Trainer(with_copies=False)
    for trainer in (ours, plain):
        trainer.step()
        hook = trainer.model.blocks[1].register_forward_pre_hook(grow)
        trainer.step()
        hook.remove()
        trainer.step()
    assert_same(ours.state(), plain.state())
    assert len(lent(ours.copies)) == len(ours.copies._layers)


class Scaled(Linear):
    """Somebody's layer, which changes its weight before it uses it."""

    def forward(self, x):
        self.weight.data.mul_(1.1)
        return super().forward(x)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def parametrised(layer):
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


def with_another_bias(layer):
    bias = layer.bias
    del layer.bias
    layer.bias = bias * 2


def of_somebody(layer):
    layer.__class__ = Scaled


@pytest.mark.parametrize(
    ("change", "when"),
    [(change, when) for change in (pruned, parametrised, with_another_bias) for when in ("before", "after")]
    + [(of_somebody, "before")],
)
def test_a_layer_whose_weight_is_made_in_another_way_casts_it_itself(change, when):
    models = [small_model(), small_model()]
    copies = WeightCopies(models[0]) if when == "after" else None
    for model in models:
        change(model.blocks[1].attn.proj)
    copies = copies or WeightCopies(models[0])
    losses = []
    for model in models:
        copies.write()
        with copies.in_use(), torch.autocast("cpu", torch.bfloat16):
            losses.append(TrainingLoss(model, 0.75)(*batch()))
    assert torch.equal(*losses)
    assert models[0].blocks[1].attn.proj not in lent(copies)


# --- no trace ---------------------------------------------------------------------------------------------------------


def traces(trainer):
    """All that others see of a model and its optimiser."""
    model = trainer.model
    return (
        list(trainer.loss_of.state_dict()),
        [name for name, _ in model.named_buffers()],
        sum(p.numel() for p in model.parameters()),
        len(pickle.dumps(model)),
        len(pickle.dumps(trainer.optimizer.state_dict())),
        {key for module in model.modules() for key in vars(module)},
    )


def test_nothing_is_left_of_copies_after_a_step():
    ours, plain = Trainer(with_copies=True), Trainer(with_copies=False)
    ours.step(), plain.step()
    assert traces(ours) == traces(plain)
    assert lent(ours.copies)
    copied = copy.deepcopy(ours.model)
    assert copied.blocks[0].mlp.fc1.copies is None

    def failing(*_):
        raise KeyError("in the middle of a pass")

    ours.loss_of.forward = failing
    with pytest.raises(KeyError):
        ours.step()
    assert ours.model.blocks[0].mlp.fc1.copies is None


def test_evaluation_and_other_loops_cast_their_weights():
    """A step with copies before them changes nothing, in or outside of autocast, with or without gradients."""
    ours, plain = Trainer(with_copies=True), Trainer(with_copies=False)
    ours.step(), plain.step()
    images, ids = batch(3)
    for model in (ours.model, plain.model):
        with torch.no_grad():
            model.norm.weight.mul_(2)
            model.decoder_pred.weight.mul_(2)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got, expected = (model.training_loss(images, ids) for model in (ours.model, plain.model))
            with torch.no_grad():
                features = [model.forward_features(images) for model in (ours.model, plain.model)]
        assert torch.equal(got, expected)
        assert torch.equal(*features)


def test_copies_are_for_bfloat16_alone():
    """In float32, and in a region that turns autocast off, weights themselves are used."""
    model = small_model()
    copies = WeightCopies(model)
    copies.write()
    expected = model.training_loss(*batch())
    with copies.in_use():
        assert torch.equal(model.training_loss(*batch()), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(model.training_loss(*batch()), expected)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(model.training_loss(*batch()), expected)


def test_copies_are_cast_one_by_one_by_a_torch_that_cannot_cast_all(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_copy_")
    target, source = torch.zeros(3, dtype=torch.bfloat16), torch.tensor([1.0, 2.0, 1 / 3])
    torch_compat.copy_all([target], [source])
    assert torch.equal(target, source.bfloat16())
    torch_compat.copy_all([], [])


# --- compiled, and on several ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiling", "checkpointing", "graphs"),
    [
        ("block", "none", 2),
        pytest.param("block", "selective", 2, marks=pytest.mark.slow),
        *(pytest.param("model", checkpointing, 1, marks=pytest.mark.slow) for checkpointing in ("none", "full")),
    ],
)
def test_compiled_steps_are_those_of_autocast(monkeypatch, compiling, checkpointing, graphs):
    """By torch.compile without code generation, in one graph for blocks of one kind."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_anything = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: compile_anything(*args, **rest, backend=counter))
    torch.compiler.reset()
    losses_of = [TrainingLoss(small_model(decoder_depth=1), 0.75) for _ in range(2)]
    ours, plain = Trainer(True, losses_of[0], checkpointing, compiling), Trainer(False, losses_of[1])
    for seed in range(2):
        assert torch.equal(ours.step(batch(seed), batch(9)).loss, plain.step(batch(seed), batch(9)).loss)
    assert counter.frame_count == graphs
    assert_same(ours.state(), plain.state())
    torch.compiler.reset()


RANKS = """
import sys, torch, fastmae
from fastmae.model.sharding import in_one_piece
from fastmae.model.weight_copies import WeightCopies
from fastmae.train import parallel
from fastmae.train.optim import make_optimizer
from fastmae.train.step import TrainingLoss, prepare, train_step
kind, checkpointing = sys.argv[1:]
context = parallel.start("cpu")

def trained(with_copies):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, depth=2)
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    ids = fastmae.ops.random_masking(torch.arange(8), 0, 16)
    mine = slice(context.rank * 4, context.rank * 4 + 4)
    loss_of = TrainingLoss(model, 0.75)
    prepare(loss_of, checkpointing, "off")
    loss_of = parallel.parallelize(loss_of, context, parallel.choose_parallelism(kind, "fp32", None, context))
    optimizer = make_optimizer(model, 1e-3, 0.05)
    copies = WeightCopies(model) if with_copies else None
    assert not copies or bool(copies._layers) == (kind == "ddp"), "weights in pieces have no copies"
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    for _ in range(3):
        micro = [(images[mine], ids[mine]), (images[mine] // 2, ids[mine])]
        train_step(loss_of, optimizer, micro, 2, 1e-3, autocast, 0.5, context.mean, copies=copies)
    return in_one_piece(model.state_dict(), keep=True)

ours, plain = trained(True), trained(False)
assert [name for name in plain if not torch.equal(ours[name], plain[name])] == []
print("the same", flush=True)
parallel.stop(context)
"""


@pytest.mark.parametrize("words", [("ddp", "full"), ("fsdp", "none")])
@pytest.mark.slow
def test_several_ranks_take_the_steps_of_autocast(tmp_path, words):
    file = tmp_path / "ranks.py"
    file.write_text(RANKS)
    started = start_ranks(2, partial(run_script, file, *words))
    ended = [rank.finish() for rank in started]
    assert [status for status, _ in ended] == [0, 0], ended
    assert [rank.said().split("\n")[0] for rank in started] == ["the same"] * 2
