"""What the ops refuse, in every implementation: an error of one line that names the argument.

The buffers that the C++ writes to, which are no arguments of an op, are in test_cpu.py.
"""

import random

import pytest
import torch
from helpers import soak

import fastmae.ops
from fastmae.ops import cpu
from fastmae.ops.attention import attention
from fastmae.ops.backends import using
from fastmae.ops.random_masking import random_masking_reference

INT = torch.int64
IDS = random_masking_reference(torch.arange(3), 0, 4)
LAST = torch.cat([IDS.flatten()[:-1], torch.tensor([4], dtype=torch.int32)]).view(3, 4)
TWICE = torch.tensor([[0, 1], [2, 2], [0, 1]])
_generator = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=_generator)
MEAN, STD = torch.rand(3, generator=_generator), torch.rand(3, generator=_generator) + 0.1
PATCHES = torch.randn(3, 4, 48, generator=_generator)
TOKENS, TOKEN, POSITIONS = (torch.randn(*shape, generator=_generator) for shape in ((3, 3, 8), (8,), (5, 8)))
PACKED, KV, QUERIES = (torch.randn(*shape) for shape in ((2, 7, 3, 3, 4), (2, 7, 2, 3, 4), (2, 3, 3, 4)))
META = torch.device("meta")

# Of each op: arguments that it takes. A case changes some of them.
RIGHT = {
    "random_masking": dict(draw_ids=torch.arange(3), seed=0, num_patches=4),
    "gather_patches": dict(
        images=IMAGES, ids=IDS, patch_size=(4, 4), mean=MEAN, std=STD, dtype=torch.float32
    ),
    "masked_mse": dict(
        pred=PATCHES, images=IMAGES, ids=IDS, patch_size=(4, 4), mean=MEAN, std=STD, norm_pix=True
    ),
    "scatter_patches": dict(
        patches=PATCHES, ids=IDS, grid_size=(2, 2), patch_size=(4, 4), mean=MEAN, std=STD, dtype=torch.float32
    ),
    "assemble_tokens": dict(visible=TOKENS, mask_token=TOKEN, pos_embed=POSITIONS, ids_shuffle=IDS),
    "attention": dict(packed=PACKED),
}  # fmt: skip
RANGE = torch.tensor([[0.0, -5, 1e-3], [1, 5, 2e-3]])
# Of the ops that take a range of pixels, whichever their other arguments are.
WRONG_RANGES = {
    "one range": (
        dict(value_range=RANGE[:, :1]),
        r"value_range must have shape \[2, 3\], .* got \[2, 1\]",
        "value_range",
    ),
    "ranges by channel": (
        dict(value_range=RANGE.T),
        r"value_range must have shape \[2, 3\], .* got \[3, 2\]",
        "value_range",
    ),
    "whole range": (dict(value_range=RANGE.int()), "value_range must be floating point", "value_range must be float32"),
    "empty range": (
        dict(value_range=RANGE[:1].expand(2, -1)),
        "low < high, .* got 0.* and 0.* of channel 0",
        "low < high",
    ),
    "upside down": (
        dict(value_range=RANGE * torch.tensor([1, 1, -1])),
        "got -0.001.* and -0.002.* of channel 2",
        "low < high",
    ),
    "endless range": (dict(value_range=RANGE / torch.tensor([[1], [0]])), "low < high, both finite", "both finite"),
    "no number": (
        dict(value_range=RANGE * float("nan")),
        "got nan and nan of channel 0",
        "got nan and nan of channel 0",
    ),
    "range elsewhere": (dict(value_range=RANGE.to(META)), "value_range must be on the device of", None),
}
# What is wrong: (changed arguments, words of the public function's message, words of the C++ extension's). There are no
# words where the arguments are right for it, or not its own.
CASES = {
    "random_masking": {
        "draw_ids int32": (dict(draw_ids=torch.arange(3).int()), "draw_ids", "draw_ids must be int64, got int32"),
        "draw_ids 2-d": (
            dict(draw_ids=torch.zeros(2, 2, dtype=INT)),
            "draw_ids",
            r"draw_ids must have shape \[N\], got \[2, 2\]",
        ),
        "negative seed": (dict(seed=-1), "seed", None),
        "large seed": (dict(seed=2**64), "seed", None),
        "no patches": (dict(num_patches=0), "num_patches", r"num_patches must be in \[1, 65536\], got 0"),
        "negative patches": (dict(num_patches=-3), "num_patches", "num_patches"),
        "too many patches": (dict(num_patches=65537), "num_patches", "num_patches .* got 65537"),
    },
    "gather_patches": {
        "odd size": (dict(patch_size=(3, 4)), "divide", r"patch_size must divide the sides of images .*\[3, 4\]"),
        "patch of 0": (dict(patch_size=(0, 4)), "patch_size", r"patch_size must be two positive numbers, got \[0, 4\]"),
        "negative size": (dict(patch_size=(-4, 4)), "patch_size", "patch_size"),
        "int16 image": (dict(images=IMAGES.short()), "uint8", "int16"),
        "int32 image": (dict(images=IMAGES.int()), "uint8", "images must be uint8, .* got int32"),
        "bool image": (
            dict(images=IMAGES.bool()),
            "images must be uint8, uint16 or floating point, got torch.bool",
            None,
        ),
        **WRONG_RANGES,
        "float64 image": (dict(images=IMAGES.double()), None, "images must be uint8, .* got float64"),
        "three axes": (dict(images=IMAGES[0]), "shape", r"images must have shape \[N, H, W, C\], got \[8, 8, 3\]"),
        "five axes": (dict(images=IMAGES[None]), "shape", "images must have at most 4 axes"),
        "no channels": (dict(images=IMAGES[..., :0], mean=MEAN[:0], std=STD[:0]), None, "images must have a channel"),
        "int result": (dict(dtype=torch.int32), "dtype", None),
        "uint8 result": (dict(dtype=torch.uint8), "dtype", "patches must be float32, .* got uint8"),
        "float64 result": (dict(dtype=torch.float64), None, "patches must be uint8, .* got float64"),
        "float ids": (dict(ids=IDS.float()), "ids", "ids must be int32, int64, got float32"),
        "flat ids": (dict(ids=IDS[0]), "ids", "ids must have shape"),
        "too few rows": (dict(ids=IDS[:2]), "ids", r"ids must have 3 rows, got shape \[2, 4\]"),
        "no ids": (dict(ids=IDS[:, :0]), "at least one", None),
        "id beyond": (dict(ids=LAST), "ids.*4", r"ids must lie in \[0, 4\), got 4 in row 2"),
        "negative id": (dict(ids=IDS.long() - 1), "ids.*-1", r"ids must lie in \[0, 4\), got -1"),
        "wide id": (dict(ids=IDS.long() + 2**32), "ids", r"ids must lie in \[0, 4\), got 4294967296"),
        "ids elsewhere": (dict(ids=IDS.to(META)), "device", None),
        "mean of 1": (dict(mean=MEAN[:1]), "mean", r"mean must have shape \[C\] = \[3\], got \[1\]"),
        "whole mean": (dict(mean=MEAN.long()), "mean", "mean must be float32, .* got int64"),
        "float64 mean": (dict(mean=MEAN.double()), None, "mean must be .* got float64"),
        "std of 4": (dict(std=torch.ones(4)), "std", "std must have shape"),
        "int64 std": (dict(std=torch.ones(3, dtype=INT)), "std", "std must be float32, .* got int64"),
    },
    "masked_mse": {
        **WRONG_RANGES,
        "short pred": (dict(pred=PATCHES[:, :3]), "pred", "pred must have shape"),
        "wide pred": (dict(pred=torch.randn(3, 4, 49)), "pred", "pred must have shape"),
        "int pred": (dict(pred=PATCHES.int()), "pred", "pred must be float32, .* got int32"),
        "float64 pred": (dict(pred=PATCHES.double()), None, "pred must be .* got float64"),
        "no images": (dict(pred=PATCHES[:0], images=IMAGES[:0], ids=IDS[:0]), "pred", "pred must have elements"),
        "nothing masked": (dict(pred=PATCHES[:, :0], ids=IDS[:, :0]), "ids", "pred must have elements"),
        "id beyond": (dict(ids=LAST), "ids.*4", "ids must lie"),
        "negative eps": (dict(eps=-1.0), None, "eps must be at least 0, got -1"),
        "eps nan": (dict(eps=float("nan")), None, "eps must be at least 0, got nan"),
    },
    "scatter_patches": {
        **WRONG_RANGES,
        "id beyond": (dict(ids=LAST), "ids.*4", "ids must lie"),
        "one patch twice": (
            dict(patches=PATCHES[:, :2], ids=TWICE),
            "ids.*distinct",
            "ids must be distinct in a row, got 2 twice in row 1",
        ),
        "int32 images": (dict(dtype=torch.int32), "dtype", "images must be uint8, .* got int32"),
        "int8 images": (dict(dtype=torch.int8), "dtype", "images must be .* got int8"),
        "no grid": (dict(grid_size=(2, 0)), "grid_size", "grid_size must be two positive numbers"),
        "no grid at all": (dict(grid_size=(0, 2)), "grid_size", "grid_size must be two positive numbers"),
        "negative patch": (dict(patch_size=(4, -1)), None, "patch_size must be two positive numbers"),
        "other P": (dict(patches=PATCHES[..., 1:]), "fit", "patches must have shape"),
        "other M": (dict(patches=PATCHES[:, 1:]), "fit|ids|patches", "patches must have shape"),
        "uint8 patches": (dict(patches=PATCHES.byte()), "patches", "patches must be float32"),
        "std of 2": (dict(std=STD[:2]), "std|mean", "std must have shape"),
    },
    "assemble_tokens": {
        "flat visible": (dict(visible=TOKENS[0]), "visible", "visible must have shape"),
        "none visible": (dict(visible=TOKENS[:, :1]), "visible", None),
        "no class token": (dict(visible=TOKENS[:, :0]), "visible", "visible must hold 1 to 5 tokens an image"),
        "all visible": (dict(visible=torch.randn(3, 5, 8)), "visible", None),
        "too many visible": (dict(visible=torch.randn(3, 6, 8)), "visible", "visible must hold 1 to 5 tokens an image"),
        "other rows": (dict(visible=TOKENS[:2]), "ids_shuffle|visible", "ids_shuffle must have 2 rows"),
        "float64 visible": (dict(visible=TOKENS.double()), None, "visible must be .* got float64"),
        "mask token": (
            dict(mask_token=TOKEN[1:]),
            "mask_token",
            r"mask_token must have shape \[D\] = \[8\], got \[7\]",
        ),
        "positions": (dict(pos_embed=POSITIONS[1:]), "pos_embed", r"pos_embed must have shape \[L\+1, D\] = \[5, 8\]"),
        "int positions": (dict(pos_embed=POSITIONS.int()), "pos_embed", "pos_embed must be float32"),
        "learnt positions": (dict(pos_embed=POSITIONS.clone().requires_grad_()), "pos_embed", None),
        "id beyond": (dict(ids_shuffle=LAST), "ids_shuffle.*4", r"ids_shuffle must lie in \[0, 4\), got 4"),
        "float64 tokens": (dict(dtype=torch.float64), None, "tokens must be .* got float64"),
    },
    "attention": {
        "four axes": (dict(packed=PACKED[0]), "packed", None),
        "two of three": (dict(packed=KV), r"packed must have shape \[N, S, 3, H, Dh\]", None),
        "three of two": (dict(queries=QUERIES), r"packed must have shape \[N, S, 2, H, Dh\]", None),
        "no tokens": (dict(packed=PACKED[:, :0]), "packed", None),
        "no heads": (dict(packed=PACKED[:, :, :, :0]), "packed", None),
        "integers": (dict(packed=PACKED.long()), "packed must be one of float64", None),
        "queries of a module": (dict(packed=KV, queries=QUERIES[0]), "queries", None),
        "other images": (dict(packed=KV, queries=QUERIES[:1]), "queries", None),
        "other heads": (dict(packed=KV, queries=QUERIES[:, :, :2]), "queries", None),
        "other Dh": (dict(packed=KV, queries=QUERIES[..., :2]), "queries", None),
        "no queries": (dict(packed=KV, queries=QUERIES[:, :0]), "queries must have shape", None),
        "other dtype": (dict(packed=KV, queries=QUERIES.half()), "queries must be float32", None),
        "other device": (dict(packed=KV, queries=QUERIES.to(META)), "queries must be on cpu", None),
    },
}


def call(op, changes, is_public):
    arguments = {**RIGHT[op], **changes}
    if is_public:
        return (attention if op == "attention" else getattr(fastmae.ops, op))(**arguments)
    # The C++ extension, which checks for itself.
    own = {"masked_mse": dict(eps=1e-6), "assemble_tokens": dict(dtype=torch.float32)}.get(op, {})
    return getattr(cpu, op)(**{**own, **arguments})


def cases():
    """(implementation, op, changed arguments, words of the message)."""
    for op, wrong in CASES.items():
        for what, (changes, public, extension) in wrong.items():
            for implementation in ("auto", "reference") if public else ():
                yield pytest.param(implementation, op, changes, public, id=f"{op}-{what}-{implementation}")
            if extension:
                yield pytest.param("extension", op, changes, extension, id=f"{op}-{what}-extension")


@pytest.mark.parametrize(("implementation", "op", "changes", "words"), cases())
def test_a_wrong_argument_is_named_in_one_line(implementation, op, changes, words):
    is_public = implementation != "extension"
    with using(ops=implementation if is_public else "auto"), pytest.raises(ValueError, match=words) as caught:
        call(op, changes, is_public)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", RIGHT)
def test_the_arguments_that_are_changed_are_right(op):
    call(op, {}, is_public=True)
    if op != "attention":
        call(op, {}, is_public=False)


# --- calls at random --------------------------------------------------------------------------------------------------

CALLS = soak(60, 2000)
"""Random calls of each op, by its public function and in C++."""
NUMBERS = [-1, 0, 1, 3, 7, 65_537, -(2**31), 2**31, 2**32, 2**63 - 1, -(2**63), 2**64, 1e400, float("nan"), 0.5, True]
THINGS = [None, "", "a word", b"bytes", [], {}, object(), int, ..., IMAGES.numpy()]
DTYPES = [torch.uint8, torch.int8, torch.uint16, torch.int32, INT, torch.float16, torch.bfloat16, torch.float32,
          torch.float64, torch.bool, torch.complex64, torch.quint8, "float32"]  # fmt: skip


def hostile(value, dice):
    """Something else in place of an argument that is right."""
    if dice.random() < 0.1:
        return dice.choice(THINGS)
    if isinstance(value, torch.dtype):
        return dice.choice(DTYPES)
    if isinstance(value, tuple):
        changed = [dice.choice([one, dice.choice(NUMBERS)]) for one in value]
        return dice.choice([tuple(changed), changed, changed[:1], (*changed, 1), changed[0], ()])
    if not isinstance(value, torch.Tensor):
        return dice.choice(NUMBERS)
    return hostile_tensor(value, dice)


def hostile_tensor(value, dice):
    """A tensor of another dtype, shape, layout or device, or with other values; of no more elements than 4096."""
    axis = dice.randrange(value.dim())
    kind = dice.randrange(12)
    if kind == 0:
        dtype = dice.choice([one for one in DTYPES if isinstance(one, torch.dtype) and one != torch.quint8])
        return value.to(dtype)
    if kind == 1:
        return value.narrow(axis, 0, dice.randrange(value.shape[axis] + 1))
    if kind == 2:
        return torch.cat([value, value], axis)
    if kind == 3:
        return dice.choice([value[None], value.flatten(), value.reshape(-1)[0], value.select(axis, 0)])
    if kind == 4:
        return value.transpose(axis, dice.randrange(value.dim()))
    if kind == 5:
        return value.select(axis, 0).unsqueeze(axis).expand(value.shape)  # a stride of 0
    if kind == 6:
        return torch.cat([value, value], axis).unfold(axis, value.shape[axis], 1).select(axis, 0).transpose(axis, -1)
    if kind == 7:
        return dice.choice([value.to(META), value.to_sparse(), value.clone().float().requires_grad_()])
    if kind == 8 and value.dtype == INT:
        return torch.full_like(value, dice.choice([-1, 2**62, -(2**63), 2**63 - 1]))
    if kind == 9:
        return torch.full_like(value, dice.choice([0, 1, 3, 4, 100]))
    if kind == 10 and value.is_floating_point():
        return torch.full_like(value, dice.choice([float("inf"), float("nan"), -0.0, 3e38]))
    return value.flip(axis)


def outcome(op, changes, implementation):
    """What a call returns, or None if it is refused."""
    try:
        with using(ops="auto" if implementation == "extension" else implementation):
            return call(op, changes, implementation != "extension")
    except (AssertionError, SystemError, MemoryError, RecursionError):
        raise  # an error of ours, not of the arguments
    except Exception as error:
        if not str(error):
            raise
        return None


def is_extreme(changes):
    """Whether the order of operations decides what comes out: infinities, and standard deviations of 0."""
    tensors = [value for value in changes.values() if isinstance(value, torch.Tensor) and value.device != META]
    std = changes.get("std", STD)
    return not all(value.to_dense().abs().lt(1e6).all() for value in tensors) or not (std.abs() > 1e-3).all()


@pytest.mark.parametrize("implementation", ["auto", "extension"])
@pytest.mark.parametrize("op", RIGHT)
def test_hostile_calls_are_refused_or_computed_and_change_no_argument(op, implementation, record_property):
    """A crash ends the process, which is a failure, too. What each call is depends on its number alone."""
    if op == "attention" and implementation == "extension":
        pytest.skip("attention in C++ is called through its op alone")
    computed = 0
    for number in range(CALLS):
        dice = random.Random(f"{op} {number}")
        names = dice.sample(sorted(RIGHT[op]), dice.randint(1, min(3, len(RIGHT[op]))))
        changes = {name: hostile(RIGHT[op][name], dice) for name in names}
        before = {name: value.clone() for name, value in RIGHT[op].items() if isinstance(value, torch.Tensor)}
        result = outcome(op, changes, implementation)
        for name, value in before.items():
            assert torch.equal(RIGHT[op][name], value), f"call {number} changed {name}: {changes}"
        computed += result is not None
        if result is not None and implementation == "auto":
            expected = outcome(op, changes, "reference")
            assert expected is not None, f"the reference refuses call {number}: {changes}"
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
            if result.device != META and not is_extreme(changes):
                torch.testing.assert_close(result, expected, equal_nan=True, rtol=1e-2, atol=1e-2)
    assert 0 < computed < CALLS, "all were refused, or all were right, so they test little"
    record_property("hostile calls of ops", CALLS)
    record_property("of them refused", CALLS - computed)
