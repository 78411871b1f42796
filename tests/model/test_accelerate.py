"""accelerate: the models of others train as before, with the same losses, weights, outputs and names."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import fastmae
from fastmae.errors import UserError
from fastmae.model import accelerate as module
from fastmae.model.accelerate import accelerate, vitmae_parts
from fastmae.model.reference import ReferenceMAE
from fastmae.ops.backends import asked_backends, using
from fastmae.ops.choices import Choices

STEPS = 20
SIZES = dict(embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
CONFIG = dict(
    image_size=24, patch_size=6, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=72,
    decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=80,
)  # fmt: skip


def disturbed(model):
    """Moves weights that start at 0 or 1, where mistakes could hide."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def vitmae(**settings):
    torch.manual_seed(0)
    return disturbed(ViTMAEForPreTraining(ViTMAEConfig(**{**CONFIG, **settings})))


class OfficialMAE(ReferenceMAE):
    """A model in the layout, and with the interface, of the official one."""

    def __init__(self, **settings):
        super().__init__((24, 36), (6, 12), 2, **{**SIZES, **settings})
        nn.init.normal_(self.pos_embed)
        nn.init.normal_(self.decoder_pos_embed)
        self.patch_embed.img_size = (24, 36)

    def random_masking(self, x, mask_ratio):
        N, L, D = x.shape
        order = torch.rand(N, L, device=x.device).argsort(dim=1)
        restore = order.argsort(dim=1)
        keep = int(L * (1 - mask_ratio))
        return x.gather(1, order[:, :keep, None].expand(-1, -1, D)), (restore >= keep).float(), restore

    def forward(self, imgs, mask_ratio=0.75):
        _, _, restore = self.random_masking(imgs.new_zeros(len(imgs), self.pos_embed.shape[1] - 1, 1), mask_ratio)
        return super().forward(imgs, restore.argsort(dim=1), mask_ratio)


def official(**settings):
    torch.manual_seed(0)
    return disturbed(OfficialMAE(**settings))


MODELS = {"transformers": (vitmae, (3, 24, 24)), "official": (official, (2, 24, 36))}


def batches(shape, dtype=torch.float32, steps=STEPS, N=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, *shape, generator=generator).to(dtype) for _ in range(steps)]


def trained(model, images, autocast=None):
    """Losses of AdamW, with masks that the model draws itself."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    torch.manual_seed(2)
    losses = []
    for batch in images:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = model(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(("name", "norm_pix_loss"), [("transformers", True), ("official", False)])
def test_twenty_steps_give_the_same_losses_and_weights(name, norm_pix_loss):
    """In float64, as Adam makes steps of whole size from the rounding errors that keys' biases have for gradients."""
    make, shape = MODELS[name]
    theirs = make(norm_pix_loss=norm_pix_loss).double()
    ours = accelerate(copy.deepcopy(theirs))
    begun = {key: value.clone() for key, value in theirs.state_dict().items()}
    images = batches(shape, torch.float64)
    torch.testing.assert_close(trained(ours, images), trained(theirs, images), rtol=1e-9, atol=0)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-7, atol=1e-7, msg=key)
        assert value.equal(begun[key]) == key.endswith(("pos_embed", "position_embeddings"))


@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", MODELS)
def test_losses_of_twenty_steps_agree_in_the_usual_precisions(name, autocast, tolerance):
    make, shape = MODELS[name]
    theirs = make(norm_pix_loss=name == "official")
    ours = accelerate(copy.deepcopy(theirs))
    images = batches(shape)
    expected = trained(theirs, images, autocast)
    torch.testing.assert_close(trained(ours, images, autocast), expected, rtol=tolerance, atol=0)
    assert expected.unique().numel() == STEPS  # it trains


@pytest.mark.parametrize("name", MODELS)
def test_parameters_names_and_random_numbers_are_the_models_own(name):
    make, shape = MODELS[name]
    theirs, model = make(), make()
    before = dict(model.named_parameters())
    modes = [part.train(number % 2 == 0).training for number, part in enumerate(model.modules())]
    torch.manual_seed(3)
    numbers = torch.get_rng_state()
    assert accelerate(model) is model
    assert torch.get_rng_state().equal(numbers)
    assert [part.training for part in model.modules()] == modes
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in after)
    assert type(model) is type(theirs)
    theirs.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(theirs.state_dict(), strict=True)
    (images,) = batches(shape, steps=1)
    torch.manual_seed(4)
    model(images)
    drawn = torch.get_rng_state()
    torch.manual_seed(4)
    theirs(images)
    assert torch.get_rng_state().equal(drawn)


def test_no_generator_is_seeded(monkeypatch):
    """torch.manual_seed would seed those of all GPUs, from which a model that is moved there then draws its masks."""
    models = [make() for make, _ in MODELS.values()]
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds all GPUs"))
    for model in models:
        accelerate(model)


def test_saved_weights_move_both_ways(tmp_path):
    ours, theirs = accelerate(vitmae()), vitmae()
    (images,) = batches((3, 24, 24), steps=1)
    trained(ours, [images])
    ours.save_pretrained(tmp_path)
    opened = ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert opened.config.architectures == ["ViTMAEForPreTraining"]
    for key, value in ours.state_dict().items():
        assert opened.state_dict()[key].equal(value), key
    theirs.save_pretrained(tmp_path / "theirs")
    opened = accelerate(ViTMAEForPreTraining.from_pretrained(tmp_path / "theirs"))
    noise = torch.rand(2, 16)
    assert opened(images, noise=noise).loss.item() == pytest.approx(theirs(images, noise=noise).loss.item(), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_output_of_transformers_has_the_same_fields(training):
    theirs = vitmae().train(training)
    ours = accelerate(copy.deepcopy(theirs))
    (images,) = batches((3, 24, 24), steps=1)
    noise = torch.rand(2, 16)
    expected, found = theirs(images, noise), ours(images, noise)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)
        assert found[key].dtype == value.dtype
    pair = ours(pixel_values=images, noise=noise, return_dict=False)
    assert isinstance(pair, tuple)
    torch.testing.assert_close(pair[1], expected.logits)
    with pytest.raises(ValueError, match="doesn't match model"):  # transformers' own
        ours(images[:, :, :12])
    with pytest.raises(TypeError, match="multiple values for argument 'pixel_values'"):
        ours(images, pixel_values=images)


def test_a_loss_of_somebodys_own_from_the_predictions_has_the_same_gradients():
    theirs = vitmae()
    ours = accelerate(copy.deepcopy(theirs))
    (images,) = batches((3, 24, 24), steps=1)
    noise = torch.rand(2, 16)
    for model in (theirs, ours):
        output = model(images, noise=noise)
        (output.loss + output.logits.abs().mean()).backward()
    for (key, theirs_p), our_p in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if theirs_p.requires_grad:
            torch.testing.assert_close(our_p.grad, theirs_p.grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_training_steps_without_predictions_have_the_same_loss_and_gradients(name):
    make, shape = MODELS[name]
    (images,) = batches(shape, steps=1)
    with_them, without = accelerate(make()), accelerate(make(), predictions=False)
    for model in (with_them, without):
        torch.manual_seed(0)
        model(images)[0].backward()
    for (key, expected), found in zip(with_them.named_parameters(), without.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=key)
    predictions = (lambda model: model(images)[1]) if name == "official" else (lambda model: model(images).logits)
    assert predictions(without) is None
    with torch.no_grad():
        assert predictions(without).shape == predictions(with_them).shape
    assert predictions(without.eval()).shape == predictions(with_them).shape


# --- what is left to the model's own code -----------------------------------------------------------------------------


class Adapted(nn.Linear):
    """As adapters are: a layer of another type, with more weights."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.down = nn.Parameter(torch.randn(1, layer.in_features))

    def forward(self, x):
        return super().forward(x) + (x @ self.down.T)


def adapt(model):
    attention = model.vit.layers[0].attention
    attention.q_proj = Adapted(attention.q_proj)


def hook(model):
    model.decoder.decoder_layers[1].mlp.register_forward_hook(lambda part, given, output: 2 * output)


def drop(model):
    model.vit.layers[0].dropout.p = 0.5


def train_positions(model):
    model.vit.embeddings.position_embeddings.requires_grad_(True)


LEFT = {
    "output_attentions": (dict(output_attentions=True), None),
    "output_hidden_states": (dict(output_hidden_states=True), None),
    "interpolate_pos_encoding": (dict(interpolate_pos_encoding=True), None),
    "is a Adapted": ({}, adapt),
    "hooks on decoder.decoder_layers.1.mlp": ({}, hook),
    "dropout in vit.layers.0.dropout": ({}, drop),
    "positions are trained": ({}, train_positions),
    "not float32": ({}, lambda model: model.to(torch.bfloat16)),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_accelerated_is_the_models_own_to_the_bit_and_said_once(what, caplog, monkeypatch):
    arguments, change = LEFT[what]
    theirs, ours = vitmae(), accelerate(vitmae())
    (images,) = batches((3, 24, 24), steps=1)
    for model in (theirs, ours):
        if change is not None:
            torch.manual_seed(5)
            change(model)
    images = images.to(ours.decoder.mask_token.dtype)
    for _ in range(2):
        outputs = []
        for model in (theirs, ours):
            torch.manual_seed(6)
            outputs.append(model(images, **arguments))
        expected, found = outputs
        assert list(found) == list(expected)
        assert found.loss.equal(expected.loss)
        assert found.logits.equal(expected.logits)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fastmae"]
    assert line.startswith("accelerate: the model's own code computes this (")
    assert what in line
    assert "\n" not in line
    if arguments:  # it was this call's alone
        monkeypatch.setattr(module, "_loss", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours(images)


def test_another_activation_is_left_alone(caplog):
    model = accelerate(vitmae(hidden_act="relu"))
    assert "the activation is relu, not gelu" in caplog.text
    (images,) = batches((3, 24, 24), steps=1)
    noise = torch.rand(2, 16)
    assert model(images, noise=noise).loss.equal(vitmae(hidden_act="relu")(images, noise=noise).loss)


def test_gradients_to_images_are_the_models_own():
    (images,) = batches((3, 24, 24), steps=1)
    images.requires_grad_()
    accelerate(vitmae())(images).loss.backward()
    assert images.grad.abs().sum() > 0


def test_images_on_another_device_as_in_dataparallel_are_refused_in_one_line():
    model = accelerate(vitmae())
    replica = model._replicate_for_data_parallel()  # its forward is that of the model, on whose device the weights are
    with pytest.raises(UserError, match=r"are on meta and weights on cpu; .* use DistributedDataParallel") as line:
        replica(torch.zeros(1, 3, 24, 24, device="meta"))
    assert "\n" not in str(line.value)


def test_it_is_fast_again_when_nothing_stands_in_the_way(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_loss", lambda *given, real=module._loss: calls.append(1) or real(*given))
    model = accelerate(vitmae())
    (images,) = batches((3, 24, 24), steps=1)
    calls.clear()
    handle = model.vit.layernorm.register_forward_hook(lambda *given: None)
    model(images)
    assert not calls
    handle.remove()
    model(images)
    model.register_forward_hook(lambda *given: calls.append(2))  # of the whole model: it stays outside
    model(images)
    model.vit.layernorm = copy.deepcopy(model.vit.layernorm)
    model.vit.layernorm.weight.data.zero_()
    loss = model(images, noise=(noise := torch.rand(2, 16))).loss
    assert calls == [1, 1, 2, 1, 1, 2]  # it was compared again, as a layer is another one
    del model.forward
    torch.testing.assert_close(model(images, noise=noise).loss, loss)
    assert calls == [1, 1, 2, 1, 1, 2, 2]


def test_a_part_that_is_replaced_by_one_with_the_same_layers_is_compared_again(caplog):
    class Doubled(type(vitmae().vit.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model, theirs = accelerate(vitmae()), vitmae()
    for one in (model, theirs):
        one.vit.layers[0].mlp.__class__ = Doubled
        one.vit.layers[0].mlp = copy.deepcopy(one.vit.layers[0].mlp)
    (images,) = batches((3, 24, 24), steps=1)
    noise = torch.rand(2, 16)
    for _ in range(2):
        assert model(images, noise=noise).loss.equal(theirs(images, noise=noise).loss)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "random images differs" in line


def test_a_copy_of_a_model_is_accelerated_with_its_own_weights():
    model = accelerate(vitmae())
    (images,) = batches((3, 24, 24), steps=1)
    noise = torch.rand(2, 16)
    loss = model(images, noise=noise).loss
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.forward.args[0] is copied
        with torch.no_grad():
            copied.decoder.mask_token += torch.randn(32)
        assert copied(images, noise=noise).loss.item() != pytest.approx(loss.item(), rel=1e-4)
    assert model(images, noise=noise).loss.equal(loss)


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient():
    (images,) = batches((3, 24, 24), steps=1)
    noise, kept, gradients = torch.rand(2, 16), [], []
    for checkpointing in (False, True):
        model = accelerate(vitmae())
        if checkpointing:
            model.gradient_checkpointing_enable()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(images, noise=noise).loss
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert kept[1] < 0.5 * kept[0]
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


# --- other models -----------------------------------------------------------------------------------------------------


class Scaled(OfficialMAE):
    """A fork that has more weights."""

    def __init__(self):
        super().__init__()
        self.blocks[0].register_parameter("gamma", nn.Parameter(torch.ones(1)))


class OtherLoss(OfficialMAE):
    """A fork that computes something else with the same weights."""

    def forward(self, imgs, mask_ratio=0.75):
        loss, pred, mask = super().forward(imgs, mask_ratio)
        return 1.01 * loss, pred, mask


class Tanh(OfficialMAE):
    """A fork whose predictions are others."""

    def forward(self, imgs, mask_ratio=0.75):
        loss, pred, mask = super().forward(imgs, mask_ratio)
        return loss, pred.tanh(), mask


def with_activation(layer):
    model = official()
    model.blocks[1].mlp["act"] = layer
    return model


def test_an_exact_gelu_among_the_layers_is_taken():
    assert accelerate(with_activation(nn.GELU())).forward.func is module._forward


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: with_activation(nn.GELU(approximate="tanh")), "blocks.1.mlp.act is a GELU(approximate='tanh'), not"),
        (lambda: with_activation(nn.SiLU()), "blocks.1.mlp.act is a SiLU(), not an exact GELU"),
        (Scaled, "blocks.0.gamma is a parameter that a masked autoencoder does not have"),
        (OtherLoss, "its loss for random images differs by 0.01"),
        (Tanh, "its prediction for random images differs"),
        (lambda: nn.Linear(2, 2), "Linear has no random_masking"),
        (lambda: ReferenceMAE((24, 36), (6, 12), 2, **SIZES), "ReferenceMAE has no random_masking"),
        (lambda: fastmae.mae_vit_tiny_patch4(), "fastmae.MAELoss"),
    ],
)
def test_other_models_are_refused_in_one_line(make, problem):
    model = make()
    with pytest.raises(UserError) as refused:
        accelerate(model)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "forward" not in vars(model)


def test_a_forward_of_somebody_else_is_not_replaced():
    model = vitmae()
    model.forward = lambda *given: None
    with pytest.raises(UserError, match=r"somebody has replaced model\.forward"):
        accelerate(model)


def test_ddp_wraps_an_accelerated_model(tmp_path):
    """Its gradients are those of the model alone, with one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone, wrapped = accelerate(vitmae()), nn.parallel.DistributedDataParallel(accelerate(vitmae()))
        images = torch.randn(2, 3, 24, 24)
        for model in (alone, wrapped):
            torch.manual_seed(1)
            model(images).loss.backward()
        for own, other in zip(alone.parameters(), wrapped.module.parameters(), strict=True):
            assert (own.grad is None) == (other.grad is None)
            if own.grad is not None:
                torch.testing.assert_close(other.grad, own.grad, rtol=1e-6, atol=1e-8)
    finally:
        torch.distributed.destroy_process_group()


def test_the_names_of_transformers_4_are_found():
    """Modules as version 4 nests them. This file also passes with 4.56, but for the tests that name modules of 5."""
    model = vitmae()
    version_4 = copy.deepcopy(model)
    stacks = {"vit": version_4.vit.layers, "decoder": version_4.decoder.decoder_layers}
    for stack in stacks.values():
        for number, layer in enumerate(stack):
            own = layer.attention
            stack[number] = nn.ModuleDict({
                "attention": nn.ModuleDict({
                    "attention": nn.ModuleDict({"query": own.q_proj, "key": own.k_proj, "value": own.v_proj}),
                    "output": nn.ModuleDict({"dense": own.o_proj}),
                }),
                "intermediate": nn.ModuleDict({"dense": layer.mlp.fc1}),
                "output": nn.ModuleDict({"dense": layer.mlp.fc2}),
                "layernorm_before": layer.layernorm_before,
                "layernorm_after": layer.layernorm_after,
            })  # fmt: skip
    version_4.vit.encoder = nn.ModuleDict({"layer": version_4.vit.layers})
    del version_4.vit.layers
    old, new = vitmae_parts(version_4), vitmae_parts(model)
    for name in ("blocks", "decoder_blocks"):
        for a, b in zip(getattr(old, name), getattr(new, name), strict=True):
            assert [x.weight.equal(y.weight) for x, y in zip(a.qkv, b.qkv, strict=True)] == [True] * 3
            assert (a.heads, a.fc2.weight.shape, a.proj.bias.sum()) == (b.heads, b.fc2.weight.shape, b.proj.bias.sum())


def test_tune_measures_once_for_the_first_batch_that_trains(monkeypatch):
    asked = []
    choices = Choices.always("float32", attention="cpu")

    def measured(calls, dtype):
        asked.append((calls, dtype, torch.is_autocast_enabled("cpu")))
        return choices

    monkeypatch.setattr(module.tuning, "measured", measured)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: asked.append("memory"))  # would hold for all tests
    model = accelerate(vitmae(), tune=True)
    (images,) = batches((3, 24, 24), steps=1)
    with using():
        model.eval()(images)
        assert not asked
        model.train()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model(images)
        (calls, dtype, autocast), memory = asked
        assert memory == "memory"
        assert dtype == torch.bfloat16
        assert not autocast
        assert {(call.images, call.shape[0]) for call in calls if call.op == "attention"} == {(2, 5), (2, 17)}
        assert asked_backends().choices == choices
