"""Encoders without some of their blocks or heads: what is left computes what it did, and the search takes the right."""

import re
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fastmae.checkpoint.load import load_model
from fastmae.cli import main
from fastmae.data.sources import train_and_val
from fastmae.evaluate.knn import knn_predictions
from fastmae.evaluate.probe import knn_accuracy
from fastmae.evaluate.sharing import Share
from fastmae.export.encoder import VitTokens
from fastmae.export.measure import as_taken
from fastmae.export.onnx import opened_onnx
from fastmae.export.program import opened_program
from fastmae.export.prune import (
    all_of,
    features_of,
    features_of_each,
    flops_of,
    one_less,
    parameters_of,
    pruned,
    read_for_search,
    search,
    some_drawn,
    with_heads,
)
from fastmae.model.classifier import encoder_products
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import mae_vit_tiny_patch4
from fastmae.model.vit import Attention

SIZES = dict(embed_dim=32, depth=3, num_heads=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def small(seed=0, **sizes):
    torch.manual_seed(seed)
    model = MaskedAutoencoderViT(16, 4, 1, **{**SIZES, **sizes})
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def pixels(count, seed=0):
    return torch.randint(0, 256, (count, 16, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def read(blobs):
    """The neighbours and the queries of the search: 58 and 14 images of three classes."""
    train, _ = train_and_val(blobs)
    return read_for_search(small(), train, 1)


# --- smaller encoders -------------------------------------------------------------------------------------------------


def test_a_block_without_branches_goes_first_and_is_not_missed_by_a_bit(read):
    for number in range(3):
        model = small(number)
        for layer in (model.blocks[number].attn.proj, model.blocks[number].mlp.fc2):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
        (step,) = search(model, "blocks", 1, *read)
        assert step.removed == f"block {number}"
        assert step.knn == step.whole_knn
        images = pixels(5)
        with torch.no_grad():
            assert torch.equal(pruned(model, step.kept).forward_features(images), model.forward_features(images))
        encoder, whole = VitTokens(model), all_of(model)
        found = features_of_each(model, encoder, whole, one_less(whole, "blocks"), read[1])
        assert torch.equal(found[step.removed], features_of(model, encoder, whole, read[1]))


def test_a_head_that_nothing_reads_goes_first_and_is_not_missed(read):
    model = small()
    model.blocks[1].attn.proj.weight.data[:, 16:24] = 0  # that of head 2
    (step,) = search(model, "heads", 1, *read)
    assert step.removed == "head 2 of block 1"
    model, images = model.double(), as_taken(model, pixels(5), False).double()
    smaller = pruned(model, step.kept)
    with torch.no_grad():
        torch.testing.assert_close(smaller.forward_features(images), model.forward_features(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (0, 1, 3), (2,), (1, 2)])
def test_a_pruned_attention_is_the_whole_one_with_masked_heads(heads):
    """In float64; the weights that are left are a part of the whole's."""
    torch.manual_seed(0)
    whole = Attention(32, 4).double()
    block = torch.nn.Module()
    block.attn = whole
    smaller, tokens = with_heads(block, heads).attn, torch.randn(2, 5, 32, dtype=torch.float64)
    mask = torch.tensor([float(head in heads) for head in range(4)], dtype=torch.float64).repeat_interleave(8)
    q, k, v = whole.qkv(tokens).view(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v
    wanted = whole.proj(mixed.transpose(1, 2).reshape(2, 5, 32) * mask)
    torch.testing.assert_close(smaller(tokens), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(smaller(tokens, 2), wanted[:, 2:], rtol=0, atol=1e-12)
    assert smaller.qkv.weight.shape == (24 * len(heads), 32)
    assert smaller.proj.weight.shape == (32, 8 * len(heads))
    assert whole.num_heads == 4
    assert whole.qkv.weight.shape == (96, 32)


def test_what_is_left_costs_less_by_what_was_removed():
    model = small()
    assert flops_of(model) == sum(product.flops for product in encoder_products(model))
    assert parameters_of(model) == sum(
        tensor.numel() for name, tensor in model.state_dict().items() if not name.startswith(("decoder_", "mask_token"))
    )
    whole = all_of(model)
    less = pruned(model, {0: (0, 1, 2, 3), 2: (0, 1, 2, 3)})
    block = sum(tensor.numel() for tensor in model.blocks[1].state_dict().values())
    assert parameters_of(model) - parameters_of(less) == block
    S, D, hidden = 17, 32, 128
    assert flops_of(model) - flops_of(less) == 2 * S * (4 * D * D + 2 * D * hidden) + 2 * 2 * S * S * D
    less = pruned(model, {**whole, 1: (0, 2, 3)})
    assert parameters_of(model) - parameters_of(less) == 3 * 8 * (D + 1) + 8 * D
    assert flops_of(model) - flops_of(less) == 2 * S * 4 * D * 8 + 2 * 2 * S * S * 8
    assert len(model.blocks) == 3  # the model itself is as it was
    assert all_of(model) == whole


# --- the search -------------------------------------------------------------------------------------------------------


def brute_force(model, candidates, bank, queries):
    """The best candidate by the rule of the docs, with whole models and the probe's k-NN."""

    def features(one, images):
        with torch.no_grad():
            return torch.cat([one.features(batch) for batch in images.batches])

    def accuracy(one):
        predictions = knn_predictions(features(one, bank), bank.labels, features(one, queries), [20])[20]
        return 100 * (predictions == queries.labels).double().mean().item()

    whole = normalize(features(model, queries))
    loss, moved = {}, {}
    for name, kept in candidates.items():
        one = pruned(model, kept)
        loss[name] = max(0.0, accuracy(model) - accuracy(one))
        moved[name] = (normalize(features(one, queries)) - whole).square().sum(dim=1).mean().item()
    least = [name for name in candidates if loss[name] == min(loss.values())]
    return min(least, key=moved.get), min(moved, key=moved.get)


@pytest.mark.parametrize("what", ["blocks", "heads"])
def test_each_step_is_the_best_of_all(read, what):
    nearest = chosen = 0
    for seed in range(3):
        model = small(seed)
        kept = all_of(model)
        for step in search(model, what, 2 if what == "blocks" else 1, *read):
            best, least_moved = brute_force(model, one_less(kept, what), *read)
            assert step.removed == best
            assert step.kept == one_less(kept, what)[best]
            nearest, chosen, kept = nearest + (best == least_moved), chosen + 1, step.kept
    assert nearest < chosen or what == "heads"  # accuracy decided, not the features alone


def test_the_search_gives_the_same_again_and_leaves_one_of_each(read):
    model = small()
    for what, count in (("blocks", 2), ("heads", 9)):
        steps = list(search(model, what, count, *read))
        assert steps[:2] == list(search(model, what, 2, *read))
        assert len({step.removed for step in steps}) == count
        assert [len(heads) for heads in steps[-1].kept.values()] == ([4] if what == "blocks" else [1, 1, 1])
    assert pruned(model, steps[-1].kept).forward_features(pixels(2)).shape == (2, 17, 32)


def test_of_many_images_some_are_drawn(blobs):
    train, _ = train_and_val(blobs)
    some = some_drawn(train, 30)
    assert len({*some.indices.tolist()}) == 30
    assert some.indices.tolist() == sorted(some.indices.tolist()) == some_drawn(train, 30).indices.tolist()
    assert some_drawn(train, 72) is train
    bank, queries = read_for_search(small(), some, 1)
    assert (len(bank.labels), len(queries.labels)) == (24, 6)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    args = {"model": "mae_vit_tiny_patch4", "input_size": 16, "mean": [0.3], "std": [0.2], "norm_pix_loss": True}
    path = tmp_path_factory.mktemp("prune") / "checkpoint-0.pth"
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


@pytest.fixture
def no_comparison(monkeypatch):
    monkeypatch.setattr("fastmae.commands.export.compare", lambda *inputs: {})


def wanted_features(trained, out):
    """The tokens of what the command says that it left, from the whole model."""
    model = load_model(trained)
    kept = all_of(model)
    for head, block in re.findall(r"without (?:head (\d+) of )?block (\d+)", out):
        kept = one_less(kept, "heads" if head else "blocks")[f"{f'head {head} of ' * bool(head)}block {block}"]
    assert kept != all_of(model)
    images = as_taken(model, pixels(3), False)
    with torch.no_grad():
        return images, pruned(model, kept).forward_features(images)


OUTPUT = {"official": "a.pth", "timm": "a.safetensors", "hf": "folder", "vitdet": "folder"}
PROGRAMS = {"onnx": "a.onnx", "torch-export": "a.pt2"}
SLOW = [pytest.mark.slow]


@pytest.fixture
def export_without_two(trained, blobs, tmp_path, capsys, no_comparison):
    """A function that exports without two blocks or heads: the path, images, their wanted tokens, and what was said."""

    def export(to, what):
        path = tmp_path / (OUTPUT | PROGRAMS)[to]
        words = ["--prune", what, "--prune_count", "2", "--data_path", blobs, "--to", to, "--output", str(path)]
        assert main(["export", str(trained), *words]) == 0
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        out = capsys.readouterr().out
        return path, *wanted_features(trained, out), out

    return export


@pytest.mark.parametrize("to", ["official", "timm", "hf"])
def test_files_give_the_features_of_the_blocks_that_are_left(export_without_two, to):
    path, images, wanted, out = export_without_two(to, "blocks")
    model = load_model(path)
    assert len(model.blocks) == 2
    if to == "timm":  # whose files do not say how images are normalised
        assert "embed_dim=128, depth=2, num_heads=4" in out
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("to", "kind"), [("hf", "ViTModel"), ("vitdet", "VitDetBackbone")])
def test_transformers_opens_what_is_left(export_without_two, monkeypatch, to, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    path, images, wanted, _ = export_without_two(to, "blocks")
    options = dict(local_files_only=True, output_loading_info=True)
    options |= {"add_pooling_layer": False} if to == "hf" else {}
    theirs, info = getattr(transformers, kind).from_pretrained(path, **options)
    assert not any(info.values()), info
    assert theirs.config.num_hidden_layers == 2
    with torch.no_grad():
        found = theirs.eval()(images)
    if to == "hf":
        torch.testing.assert_close(found.last_hidden_state, wanted, rtol=0, atol=1e-5)
    else:  # it has no class token and no last norm
        assert found.feature_maps[0].shape == (3, 128, 4, 4)


@pytest.mark.parametrize(
    ("to", "what"),
    [
        ("torch-export", "heads"),
        pytest.param("torch-export", "blocks", marks=SLOW),
        pytest.param("onnx", "blocks", marks=SLOW),
        pytest.param("onnx", "heads", marks=SLOW),
    ],
)
def test_programs_give_the_features_of_what_is_left(export_without_two, to, what):
    path, images, wanted, _ = export_without_two(to, what)
    found = {"onnx": opened_onnx, "torch-export": opened_program}[to](path)(images)
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-5)


def table(out):
    """The names of the rows, and {k-NN, logistic, million, MB, MFLOP, ms/image} of all rows."""
    rows = re.findall(r"│ ([^│]+) │ (\S+) % │ (\S+) % │ (\S+) │ (\S+) │ (\S+) │ (\S+) │", " ".join(out.split()))
    return [row[0] for row in rows], np.array([row[1:] for row in rows], float).T


def test_the_command_tells_what_is_lost_and_saved(trained, blobs, tmp_path, capsys, monkeypatch):
    """Without the packages of ONNX int8 is left out, and a line says so."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = ["export", str(trained), "--to", "timm", "--output", str(tmp_path / "a.pth"), "--data_path", blobs]
    assert main([*words, "--prune", "blocks", "--prune_count", "3"]) == 0
    said = capsys.readouterr()
    assert "int8 is left out of the comparison: ONNX needs onnxscript" in said.err
    names, (knn, _, millions, megabytes, flops, milliseconds) = table(said.out)
    assert names == ["whole", *(f"– {name}" for name in re.findall(r"without (block \d);", said.out))]
    assert len(names) == 4
    model, (train, test) = load_model(trained), train_and_val(blobs)
    assert knn[0] == knn_accuracy(model, train, test)
    assert (millions[0], flops[0]) == (round(parameters_of(model) / 1e6, 3), round(flops_of(model) / 1e6, 1))
    assert megabytes[0] == round(4 * parameters_of(model) / 1e6, 2)
    for costs in (millions, megabytes, flops):
        assert (np.diff(costs) < 0).all()
    assert (milliseconds >= 0).all()


@pytest.mark.slow
def test_int8_stands_beside(trained, blobs, tmp_path, capsys):
    words = ["export", str(trained), "--to", "timm", "--output", str(tmp_path / "a.pth"), "--data_path", blobs]
    assert main([*words, "--prune", "blocks", "--prune_count", "2"]) == 0
    names, (knn, _, _, megabytes, _, _) = table(capsys.readouterr().out)
    assert names[3:] == ["whole, ONNX fp32", "pruned, ONNX fp32", "whole, ONNX int8", "pruned, ONNX int8"]
    assert (knn[3], knn[4]) == (knn[0], knn[2])  # the same encoders
    assert megabytes[5] < megabytes[3] / 2
    assert megabytes[6] < megabytes[5]


WRONG = {
    "heads of a file": (["--prune", "heads"], "--prune heads: must be blocks with --to timm"),
    "something else": (["--prune", "layers"], "--prune"),
    "all blocks": (
        ["--prune", "blocks", "--prune_count", "4"],
        "--prune_count 4: must be at most 3, as the encoder has",
    ),
    "all heads": (
        ["--prune", "heads", "--prune_count", "13", "--to", "onnx", "--output", "{tmp}/a.onnx"],
        "must be at most 12, as the encoder has 16 heads in 4 blocks, and one in each block must stay",
    ),
    "none": (["--prune", "blocks", "--prune_count", "0"], "--prune_count 0: must be at least 1"),
    "with the decoder": (
        ["--prune", "blocks", "--to", "hf", "--output", "{tmp}/out", "--part", "full"],
        "--part full: must be encoder, or left out, with --prune",
    ),
    "a count of nothing": (["--prune_count", "2"], "--prune_count 2: must be left out without --prune"),
    "data for nothing": (["--data_path", "digits"], "--data_path digits: must be left out without --prune"),
    "images for nothing": (["--prune_images", "50"], "--prune_images 50: must be left out without --prune"),
    "few images": (["--prune", "blocks", "--prune_images", "5"], "--prune_images 5: must be 20 or more"),
    "no data": (["--prune", "blocks"], "--data_path: must be given"),
    "data that are not": (["--prune", "blocks", "--data_path", "{tmp}/none"], "no such file"),
    "no labels": (["--prune", "blocks", "--data_path", "{tmp}/x.npy"], "--data_path: images such as"),
    "one class": (["--prune", "blocks", "--data_path", "{tmp}/one.npz"], "all of one class"),
    "few data": (["--prune", "blocks", "--data_path", "{tmp}/few.npz"], "--data_path: has 12 images to choose by"),
    "a folder in use": (
        ["--prune", "blocks", "--data_path", "digits", "--to", "hf", "--output", "{tmp}"],
        "is a folder with files in it",
    ),
    "under a file": (["--prune", "blocks", "--data_path", "digits", "--output", "{tmp}/x.npy/a.pth"], "--output"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(trained, tmp_path, name, capsys):
    images = np.zeros((12, 16, 16), np.uint8)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "one.npz", x_train=images, y_train=np.zeros(12, int))
    np.savez(tmp_path / "few.npz", x_train=images, y_train=np.arange(12) % 2, x_test=images, y_test=np.arange(12) % 2)
    words, expected = WRONG[name]
    words = [word.format(tmp=tmp_path) for word in words]
    words += [] if "--to" in words else ["--to", "timm"]
    words += [] if "--output" in words else ["--output", f"{tmp_path}/a.pth"]
    assert main(["export", str(trained), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.npz", "one.npz", "x.npy"]


def test_what_a_format_cannot_hold_is_refused_before_the_search(blobs, tmp_path, capsys, monkeypatch):
    model = small(registers=2)
    sizes = {name: SIZES[name] for name in SIZES if not name.startswith("decoder")}
    args = {"model": "mae_vit_tiny_patch4", "input_size": 16, "registers": 2, **SIZES, **sizes}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "a.pth")
    monkeypatch.setattr("fastmae.commands.export.search", None)
    words = ["--prune", "blocks", "--data_path", blobs, "--to", "hf", "--output", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "a.pth"), *words]) == 2
    assert "have no registers" in capsys.readouterr().err


def test_a_classifier_is_pruned_without_its_head(blobs, tmp_path, capsys, no_comparison):
    torch.manual_seed(0)
    weights = {name: t for name, t in small().state_dict().items() if not name.startswith(("decoder_", "mask_token"))}
    weights = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in weights.items()
    }
    weights |= {"head.weight": torch.randn(3, 32), "head.bias": torch.zeros(3)}
    args = {"model": "mae_vit_tiny_patch4", "input_size": 16, "nb_classes": 3, "global_pool": True, **SIZES}
    torch.save({"model": weights, "args": args}, tmp_path / "a.pth")
    words = ["export", str(tmp_path / "a.pth"), "--prune", "blocks", "--data_path", blobs]
    words += ["--to", "timm", "--output", str(tmp_path / "b.pth")]
    assert main(words) == 2
    assert "--prune blocks: is for encoders" in capsys.readouterr().err
    assert main([*words, "--part", "encoder"]) == 0
    found = torch.load(tmp_path / "b.pth", weights_only=True)
    assert {name.split(".")[1] for name in found if name.startswith("blocks.")} == {"0", "1"}
    assert not [name for name in found if name.startswith("head")]


def test_several_ranks_are_refused(trained, blobs, tmp_path, capsys, monkeypatch):
    from fastmae.train import parallel

    @contextmanager
    def two(device):
        with contextmanager(lambda: (yield parallel.start(device)))() as context:
            yield context, Share(0, 2)

    monkeypatch.setattr("fastmae.commands.export.ranks_that_share", two)
    words = ["--prune", "blocks", "--data_path", blobs, "--to", "timm", "--output", str(tmp_path / "a.pth")]
    assert main(["export", str(trained), *words]) == 2
    assert "--prune blocks: searches in one process, not in 2" in capsys.readouterr().err
