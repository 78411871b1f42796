"""The training loss in loops of other people: own masks as booleans, MAELoss, wrappers, overridden drawing of masks."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import forget_accelerate
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastmae
from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.ops import random_masking

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
SIZES |= dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)


def fresh(kind=MaskedAutoencoderViT, **changes):
    torch.manual_seed(0)
    return kind(**{**SIZES, **changes})


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def mask():
    """Nine of 16 patches of each of six images."""
    return torch.rand(6, 16, generator=torch.Generator().manual_seed(1)).argsort(dim=1) < 9


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- masks --------------------------------------------------------------------------------------------------------


def test_ids_list_visible_patches_first_and_both_kinds_in_order(mask):
    ids = fastmae.ids_from_mask(mask)
    assert ids.dtype == torch.int32
    for row, is_masked in zip(ids.tolist(), mask, strict=True):
        assert row[:7] == is_masked.logical_not().nonzero()[:, 0].tolist()
        assert row[7:] == is_masked.nonzero()[:, 0].tolist()
    assert torch.equal(fastmae.ids_from_mask(mask.view(6, 4, 4)), ids)


@pytest.mark.parametrize("kind", [MaskedAutoencoderViT, CrossMAE])
@pytest.mark.parametrize("shape", [(6, 16), (6, 4, 4)])
def test_a_mask_is_what_the_model_masks(images, mask, kind, shape):
    model = fresh(kind)
    loss, pred, found = model(images, mask=mask.view(shape))
    assert torch.equal(found.bool(), mask)
    error = (pred - model.patchify(model._normalised(images))).square().mean(dim=-1)
    torch.testing.assert_close(loss, error[mask].mean())
    torch.testing.assert_close(model.training_loss(images, mask=mask.view(shape)), loss)
    assert torch.equal(model.forward_encoder(images, mask=mask.view(shape))[1].bool(), mask)


@pytest.mark.parametrize("visible", range(1, 49))
def test_every_number_of_visible_patches_is_the_models(visible):
    """1 − K/L is rounded, and K must not be."""
    model = fresh(img_size=28, depth=1, decoder_depth=1)
    mask = torch.arange(49)[None] >= visible
    assert model.forward_encoder(torch.zeros(1, 3, 28, 28), mask=mask)[0].shape[1] == 1 + visible


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mask: mask.float(), "must be bool"),
        (lambda mask: mask[:, :8], r"must have shape \[6, 16\] or \[6, 4, 4\]"),
        (lambda mask: mask.view(6, 2, 8), r"must have shape \[6, 16\] or \[6, 4, 4\]"),
        (lambda mask: mask[:5], r"must have shape \[6, 16\]"),
        (lambda mask: mask | (torch.arange(6)[:, None] == 0), "as many patches in every image, got 9 to 16"),
        (lambda mask: mask | True, "leaves 0 of 16"),
        (lambda mask: mask & False, "leaves 16 of 16"),
    ],
)
def test_masks_that_do_not_suit_are_refused(images, mask, change, words):
    for call in (fresh(), fresh().training_loss, fastmae.MAELoss(fresh())):
        with pytest.raises(ValueError, match=words):
            call(images, mask=change(mask))


def test_a_mask_beside_an_order_or_a_share_of_the_masked_is_refused(images, mask):
    model = fresh(CrossMAE)
    with pytest.raises(ValueError, match="only one of them"):
        model(images, mask=mask, ids_shuffle=fastmae.ids_from_mask(mask))
    with pytest.raises(ValueError, match="a mask has no order"):
        model.training_loss(images, mask=mask, predict_ratio=0.25)
    with pytest.raises(ValueError, match=r"\[N, L\] or"):
        fastmae.ids_from_mask(mask[0])


def test_training_loss_draws_the_masks_that_the_official_model_would(images):
    model = fresh()
    torch.manual_seed(3)
    expected, _, _ = model(images)
    torch.manual_seed(3)
    torch.testing.assert_close(model.training_loss(images), expected)


# --- drawing masks in a subclass ------------------------------------------------------------------------------------


class Checkered(MaskedAutoencoderViT):
    """Masks as an official subclass would: tokens of all patches come in, those of visible patches go out."""

    calls = 0

    def random_masking(self, x, mask_ratio):
        self.calls += 1
        N, L, D = x.shape
        ids_shuffle = torch.cat([torch.arange(0, L, 2), torch.arange(1, L, 2)]).expand(N, -1)
        ids_restore = ids_shuffle.argsort(dim=1)
        visible = x.gather(1, ids_shuffle[:, : L // 2, None].expand(-1, -1, D))
        return visible, (ids_restore >= L // 2).float(), ids_restore


class CheckeredToo(MaskedAutoencoderViT):
    """The same, and takes what a run draws."""

    def random_masking(self, x, mask_ratio, ids_shuffle=None):
        return super().random_masking(x, mask_ratio, ids_shuffle=ids_shuffle.flip(1))


def test_an_overridden_random_masking_is_called_in_every_path(images):
    model, mask = fresh(Checkered), torch.arange(16).expand(6, -1) % 2 == 1
    expected = fresh().training_loss(images, mask=mask)
    losses = [model(images)[0], model.training_loss(images), fastmae.MAELoss(model)(images)]
    for loss in losses:
        torch.testing.assert_close(loss, expected)
    assert torch.equal(model.forward_encoder(images)[1].bool(), mask)
    assert model.calls == 4


def test_an_overridden_random_masking_works_with_a_cross_decoder(images):
    class CheckeredCross(Checkered, CrossMAE):
        pass

    mask = torch.arange(16).expand(6, -1) % 2 == 1
    expected = fresh(CrossMAE).training_loss(images, mask=mask)
    torch.testing.assert_close(fresh(CheckeredCross).training_loss(images), expected)


def test_an_overridden_random_masking_gets_the_masks_of_a_run_or_refuses_them(images, mask):
    ids = random_masking(torch.arange(6), 0, 16)
    expected = fresh().training_loss(images, ids.flip(1))
    torch.testing.assert_close(fresh(CheckeredToo).training_loss(images, ids), expected)
    for given in (dict(ids_shuffle=ids), dict(mask=mask)):
        for call in (fresh(Checkered), fresh(Checkered).training_loss):
            with pytest.raises(TypeError, match=r"Checkered.random_masking must take the argument ids_shuffle"):
                call(images, **given)


def test_our_own_random_masking_is_the_official_step(images):
    model, x = fresh(), torch.randn(6, 16, 32)
    torch.manual_seed(5)
    visible, mask, ids_restore = model.random_masking(x, 0.75)
    torch.manual_seed(5)
    assert torch.equal(mask, model(images)[2])
    for n in range(6):
        kept = ids_restore[n].argsort()[:4]
        assert torch.equal(visible[n], x[n, kept])
        assert not mask[n, kept].any()


class Official(MaskedAutoencoderViT):
    """Steps as forks of the official code have them: they know nothing of ours."""

    def forward_encoder(self, x, mask_ratio):
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.repeat(len(x), ids_restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def patchify(self, imgs):
        p = self.patch_embed.patch_size[0]
        side = imgs.shape[2] // p
        patches = imgs.reshape(len(imgs), 3, side, p, side, p)
        return torch.einsum("nchpwq->nhwpqc", patches).reshape(len(imgs), side**2, p**2 * 3)


def test_steps_of_official_code_work_as_they_are(images):
    ours, theirs = fresh(), fresh(Official)
    losses = []
    for call in (ours.training_loss, theirs.training_loss, fastmae.MAELoss(theirs)):
        torch.manual_seed(3)
        losses.append(call(images))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert torch.equal(losses[2], losses[1])
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, 2 * one.grad, rtol=1e-4, atol=1e-6)


# --- MAELoss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(MaskedAutoencoderViT, {}), (CrossMAE, {}), (CrossMAE, dict(predict_ratio=0.25))],
)
def test_the_loss_is_that_of_the_masks_of_its_numbers(images, kind, settings):
    model = fresh(kind)
    loss_of = fastmae.MAELoss(model, 0.5, seed=7, rank=2, **settings)
    for step in (1, 2):
        ids = random_masking(step * 2**32 + 2 * 6 + torch.arange(6), 7, 16)
        assert torch.equal(loss_of(images), model.training_loss(images, ids, 0.5, settings.get("predict_ratio")))


def test_masks_go_on_from_a_checkpoint_and_stay_in_evaluation(images):
    loss_of = fastmae.MAELoss(fresh())
    first = [loss_of(images).item() for _ in range(3)]
    saved = io.BytesIO()
    torch.save(loss_of.state_dict(), saved)
    then = [loss_of(images).item() for _ in range(3)]
    assert len({*first, *then}) == 6
    other = fastmae.MAELoss(fresh(depth=2))
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert [other(images).item() for _ in range(3)] == then
    other.eval()
    assert other(images) == other(images)
    other.train()
    assert other.forwards == 6


def test_copies_and_pickles_go_on_alike(images):
    loss_of = fastmae.MAELoss(fresh())
    loss_of(images)
    others = copy.deepcopy(loss_of), pickle.loads(pickle.dumps(loss_of))
    expected = loss_of(images)
    assert all(torch.equal(other(images), expected) for other in others)


def test_two_ranks_have_the_masks_of_one_with_both_batches(images):
    whole = fastmae.MAELoss(fresh(), rank=0)
    whole(images).backward()
    parts = [fastmae.MAELoss(fresh(), rank=rank) for rank in (0, 1)]
    for loss_of, part in zip(parts, images.chunk(2), strict=True):
        loss_of(part).backward()
    for one, (first, second) in zip(
        whole.parameters(), zip(*(p.parameters() for p in parts), strict=True), strict=True
    ):
        if one.grad is not None:
            torch.testing.assert_close((first.grad + second.grad) / 2, one.grad, rtol=1e-4, atol=1e-7)


def test_dataparallel(images):
    copies = fastmae.MAELoss(fresh())._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"forget which masks were drawn; use DistributedDataParallel"):
        copies(images)


def test_checkpoints_of_blocks(images):
    loss_of = fastmae.MAELoss(fresh())
    loss = checkpoint(loss_of, images, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"checkpoint the blocks .* or give ids_shuffle"):
        loss.backward()
    ids = random_masking(torch.arange(6), 0, 16)
    checkpoint(lambda images: loss_of(images, ids_shuffle=ids), images, use_reentrant=False).backward()
    for block in loss_of.model.blocks:
        block.checkpointing = "full"
    loss_of(images).backward()


def test_a_step_that_draws_masks_itself_is_said_and_left_to_it(images, caplog):
    class OfficialEncoder(MaskedAutoencoderViT):
        def forward_encoder(self, imgs, mask_ratio=0.75):
            return super().forward_encoder(imgs, mask_ratio)

    loss_of = fastmae.MAELoss(fresh(OfficialEncoder))
    assert "OfficialEncoder.forward_encoder draws the masks itself: seed is not used" in caplog.text
    plain = fresh()
    torch.manual_seed(3)
    expected, _, _ = plain(images)
    torch.manual_seed(3)
    torch.testing.assert_close(loss_of(images), expected)
    assert loss_of.forwards == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(mask_ratio=0.99), "mask ratio"),
        (dict(predict_ratio=0.5), "predict_ratio"),
        (dict(seed=-1), "seed"),
        (dict(seed=0.5), "seed"),
        (dict(rank=-1), "rank"),
    ],
)
def test_wrong_settings_are_refused_when_it_is_made(settings, words):
    with pytest.raises(ValueError, match=words):
        fastmae.MAELoss(fresh(), **settings)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="masked autoencoder of fastmae, got Linear"):
        fastmae.MAELoss(torch.nn.Linear(2, 2))


def test_ddp_wraps_it_and_its_hooks_run(images, one_rank):
    """Averaging gradients is seen by a hook of the communication, which doubles them."""
    plain, loss_of = fastmae.MAELoss(fresh()), fastmae.MAELoss(fresh())
    plain(images).backward()
    wrapped = DistributedDataParallel(loss_of)

    def doubled(state, bucket):
        return _done(2 * bucket.buffer())

    wrapped.register_comm_hook(None, doubled)
    wrapped(images).backward()
    for one, other in zip(plain.parameters(), loss_of.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, 2 * one.grad)


def _done(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


def test_accelerate_saves_the_number_of_the_masks(images, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    forget_accelerate()
    accelerator = accelerate.Accelerator(cpu=True)
    loss_of = fastmae.MAELoss(fresh())
    prepared = accelerator.prepare(loss_of)
    accelerator.backward(prepared(images))
    accelerator.save_state(str(tmp_path))
    expected = prepared(images).item()
    assert prepared(images) != expected
    accelerator.load_state(str(tmp_path))
    assert prepared(images) == expected


def test_fully_shard_wraps_it_and_gives_the_same_loss_and_gradients(images, one_rank):
    plain, loss_of = fastmae.MAELoss(fresh()), fastmae.MAELoss(fresh())
    plain(images).backward()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in (*loss_of.model.blocks, *loss_of.model.decoder_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(loss_of, mesh=mesh)
    loss_of(images).backward()
    for one, other in zip(plain.parameters(), loss_of.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad.full_tensor(), one.grad)


def two_ranks(folder):
    """Three steps of each wrapper on this rank's half of the batch."""
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), dist.device_mesh.init_device_mesh("cpu", (2,))
    half = whole_batch().chunk(2)[rank]

    def by_fsdp(loss_of):
        for block in (*loss_of.model.blocks, *loss_of.model.decoder_blocks):
            fully_shard(block, mesh=mesh)
        return fully_shard(loss_of, mesh=mesh)

    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp", by_fsdp)):
        loss_of = fastmae.MAELoss(fresh())
        wrapped = wrap(loss_of)
        losses = steps(wrapped, half, 3)
        weights = [
            one.full_tensor() if isinstance(one, dist.tensor.DTensor) else one for one in loss_of.model.parameters()
        ]
        if rank == 0:
            torch.save((losses, [weight.detach() for weight in weights]), folder / name)
    dist.destroy_process_group()
    return 0


def whole_batch():
    return torch.randint(0, 256, (6, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def steps(loss_of, images, count):
    """The mean losses of all ranks."""
    optimizer, losses = torch.optim.SGD(loss_of.parameters(), lr=0.1), []
    for _ in range(count):
        loss = loss_of(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_both_batches(tmp_path):
    """Wrapped in DistributedDataParallel and sharded by FSDP2: the masks, the mean gradients and the weights."""
    run_ranks(2, partial(two_ranks, tmp_path))
    plain = fastmae.MAELoss(fresh())
    losses = steps(plain, whole_batch(), 3)
    for name in ("ddp", "fsdp"):
        found, weights = torch.load(tmp_path / name)
        assert found == pytest.approx(losses, rel=1e-5)
        for one, expected in zip(weights, plain.model.parameters(), strict=True):
            torch.testing.assert_close(one, expected.detach(), rtol=1e-4, atol=1e-6)
