"""How long a pretraining takes and how much memory it needs, by arithmetic: no run, no GPU, and for presets no torch.

A step's work is split by class of kernel, each class is a number of operations or bytes over a rate, and every rate and
count is a ``Constant`` that says where it comes from. docs/estimate.md explains the formulas and how far off they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from fastmae.config import EstimateConfig, ModelSpec, check_estimate
from fastmae.config.family import FAMILY, family_of, usual_ratio
from fastmae.errors import SettingError, UserError
from fastmae.model.flops import Product, of_convolution, products_of
from fastmae.model.sizes import PRESET_SIZES, Sizes, preset_sizes

USUAL_SIZES: dict[str, tuple[int, ...]] = {"convnext": (224,), "conv": (32,), "mlp": (28,)}
"""Sides of images, where none is given, of the families whose models do not say it."""
Basis = Literal["measured", "datasheet", "counted", "assumed"]
WEIGHT = 4  # bytes: weights, gradients and moments are float32
Blocks = list[tuple[int, int, int, int, int]]
Seconds = dict[str, float]


class Constant(NamedTuple):
    """A number of the arithmetic, what it is based on, and where it is from."""

    value: float
    basis: Basis
    source: str


def _assumed(value: float, source: str) -> Constant:
    return Constant(value, "assumed", source)


CONSTANTS: dict[str, Constant] = {
    # GPUs whose rates were not measured reach the same shares of their data sheets as the H200 did.
    "products_reached": Constant(0.80, "measured", "H200: 790 of 989 TFLOP/s, bf16, 8192³"),
    "copy_reached": Constant(0.90, "measured", "H200: a copy, 4.3 of 4.8 TB/s"),
    # Shares of a large square product's rate, by the smaller side of a layer's weight.
    "linear_1024": _assumed(0.80, "layers from 1024 wide on"),
    "linear_768": _assumed(0.74, "layers from 768 wide on"),
    "linear_512": _assumed(0.62, "layers from 512 wide on; 512 to 512 is bound by memory"),
    "linear_narrow": _assumed(0.40, "narrower layers"),
    "narrow_weight_gradient": _assumed(0.84, "weight gradients below 768 wide, of the share above: few output tiles"),
    # Shares of a copy's rate that attention reaches with the fewest bytes it can move, 8 forward and 14 backward.
    "attention_forward": Constant(8, "counted", "bytes per token and channel: q, k, v read, output written, bf16"),
    "attention_backward": Constant(14, "counted", "bytes per token and channel: four read, three gradients written"),
    "attention_sdpa": _assumed(0.26, "tiles of 128 tokens, and three gradients packed by a copy"),
    "attention_triton_short": _assumed(0.65, "up to 64 tokens: one tile per head"),
    "attention_triton_long": _assumed(0.415, "more tokens: bound by exponentials and two sweeps backward"),
    # Bytes per token and channel of a block that are neither products nor attention, bf16 with a float32 residual.
    "pointwise_off_forward": Constant(66, "counted", "traced: LayerNorm, additions, GELU, casts, eager"),
    "pointwise_off_backward": _assumed(150, "the same, backward, eager"),
    "pointwise_block_forward": _assumed(44, "fused by --compile block"),
    "pointwise_block_backward": _assumed(90, "fused by --compile block"),
    # The same with the kernels of add_layer_norm and gelu, compiled or not, and with a bfloat16 residual.
    "pointwise_fused_forward": Constant(40, "counted", "add and LayerNorm twice 12, bias and GELU 16"),
    "pointwise_fused_backward": Constant(62, "counted", "add and LayerNorm twice 16, GELU 24, a bias gradient 6"),
    "pointwise_fused_bf16_forward": Constant(32, "counted", "add and LayerNorm twice 8, bias and GELU 16"),
    "pointwise_fused_bf16_backward": Constant(46, "counted", "add and LayerNorm twice 8, GELU 24, a bias gradient 6"),
    "gelu_again": Constant(8, "counted", "more of them under --checkpointing gelu, in the pass of GELU's gradient"),
    # Of other families, whose layers are counted by their products alone.
    "convolutions": _assumed(0.35, "convolutions 3×3, share of a large product's rate"),
    "layers_moved": _assumed(32, "bytes per number that a layer gives: activation, norm and addition after it"),
    "layers_kept": _assumed(8, "bytes per number that a layer gives: it and its activation, kept for backward"),
    "launches_layer": _assumed(12, "kernels per layer, forward and backward"),
    # Of the discriminator of an adversarial term, in forward passes of it: two, a gradient by the reconstructions, and
    # two each of inputs and of weights; with R1 a gradient by the real images, and two that differentiate it.
    "discriminator_passes": Constant(7, "counted", "passes of the discriminator in a micro-step, without R1"),
    "discriminator_r1_passes": Constant(10, "counted", "passes of the discriminator in a micro-step, with R1"),
    "pointwise_reached": _assumed(0.85, "share of a copy's rate that pointwise kernels and the optimiser reach"),
    "patches": Constant(9, "counted", "bytes per number of decoder tokens and of predicted patches; 3 per visible one"),
    "optimiser": Constant(32, "counted", "bytes per weight and step: AdamW 28, norm 4"),
    "casts": Constant(12, "counted", "bytes per weight and micro-step: to bf16 6, of gradients 6"),
    "copies": Constant(6, "counted", "bytes per weight and step: bf16 copies; products write float32 gradients"),
    "launches_off": Constant(66, "counted", "kernels per block, forward 21 (traced) and backward 45, eager"),
    "launches_block": _assumed(35, "kernels per block under --compile block"),
    "launches_fused_off": _assumed(30, "kernels per block with add_layer_norm and gelu, eager"),
    "launches_fused_block": _assumed(24, "kernels per block with add_layer_norm and gelu under --compile block"),
    "launch": _assumed(8e-6, "seconds of Python and PyTorch per kernel"),
    "links_reached": _assumed(0.8, "share of a link's data sheet that collectives reach"),
    "local_hop": _assumed(3.4e-6, "seconds per hop within a machine, as NCCL itself assumes for NVLink"),
    "network_hop": _assumed(14e-6, "seconds per hop between machines, as NCCL itself assumes"),
    "bucket": Constant(25 << 20, "counted", "bytes that DDP sends at once; the last ones hide behind nothing"),
    "stop_hop": _assumed(40e-6, "seconds per hop of gloo's ring, by which ranks agree after every step not to stop"),
    "decode": _assumed(500, "JPEGs per second and core, about what one Zen 4 core gave"),
    "kept_none": Constant(36, "counted", "bytes per token and channel that a block keeps for backward, bf16"),
    "kept_gelu": Constant(28, "counted", "the same under --checkpointing gelu"),
    "kept_selective": Constant(24, "counted", "the same under --checkpointing selective"),
    "kept_full": Constant(4, "counted", "the same under --checkpointing full"),
    "weight_copies": Constant(2, "counted", "bytes per weight that autocast keeps in bf16 from forward to backward"),
    "usable_memory": _assumed(0.9, "share of a GPU's memory that the allocator can use"),
}
# What is different on a CPU, which computes in float32 and hides no communication.
ON_CPU: dict[str, Constant] = {
    **{name: _assumed(0.85, "share of a 2048³ product's rate") for name in ("linear_1024", "linear_768", "linear_512")},
    "linear_narrow": _assumed(0.7, "narrow layers, share of a 2048³ product's rate"),
    "narrow_weight_gradient": _assumed(0.84, "transposed copies"),
    "convolutions": _assumed(0.5, "convolutions 3×3, share of a 2048³ product's rate"),
    "attention_cpu": _assumed(0.4, "share of a 2048³ product's rate; backward computes 2.5 times as much"),
    "pointwise_off_forward": Constant(72, "counted", "bytes per token and channel: norms 16, additions 24, GELU 32"),
    "pointwise_off_backward": Constant(132, "counted", "norms 24, additions 24, GELU 48, bias gradients 36"),
    "gelu_again": Constant(32, "counted", "more of them where GELU is computed again, in a pass of its own"),
    "pointwise_reached": _assumed(0.6, "share of a copy's rate: GELU's erf is arithmetic"),
    "optimiser": Constant(32, "counted", "bytes per weight: AdamW 28, norm 4"),
    "gloo": _assumed(0.15, "share of a copy's rate at which gloo sums gradients"),
    "local_hop": _assumed(110e-6, "seconds per hop of gloo"),
    "kept_none": Constant(64, "counted", "bytes per token and channel that a block keeps for backward, float32"),
    "kept_gelu": Constant(48, "counted", "the same where GELU is computed again: in the encoder"),
    "kept_selective": Constant(44, "counted", "the same under --checkpointing selective"),
    "weight_copies": Constant(0, "counted", "float32 needs no copies"),
}


class Machine(NamedTuple):
    """Rates of one GPU, or of one rank on a CPU: operations per second of large products, bytes per second of a copy
    (read and written ones added up), bytes of memory, and bytes per second to another GPU of its machine and to other
    machines."""

    products: Constant
    copy: Constant
    memory: Constant
    link: Constant
    network: Constant


def _sheet(name: str, tera: float, copy: float, memory: float, link: float, network: float) -> Machine:
    """From the maker's data sheet: dense bf16 TFLOP/s, GB/s of memory, GB, and GB/s of links in one direction."""

    def reached(value: float, share: str) -> Constant:
        part = CONSTANTS[share].value
        return _assumed(value * part, f"{part:.0%} of the {name}'s data sheet, as measured on an H200")

    return Machine(
        reached(1e12 * tera, "products_reached"),
        reached(1e9 * copy, "copy_reached"),
        Constant(1e9 * memory, "datasheet", name),
        Constant(1e9 * link, "datasheet", name),
        _assumed(1e9 * network, f"a network of {network:g} GB/s per GPU"),
    )


MACHINES: dict[str, Machine] = {
    "a100-40": _sheet("A100 SXM 40 GB", 312, 1555, 40, 300, 25),
    "a100-80": _sheet("A100 SXM 80 GB", 312, 2039, 80, 300, 25),
    "h100": _sheet("H100 SXM", 989, 3350, 80, 450, 50),
    "h200": _sheet("H200", 989, 4800, 141, 450, 50)._replace(
        products=Constant(790e12, "measured", "H200: bf16, 8192³"), copy=Constant(4.3e12, "measured", "H200")
    ),
    "b200": _sheet("B200", 2250, 8000, 180, 900, 50),
    "l4": _sheet("L4", 121, 300, 24, 32, 3),
    "rtx4090": _sheet("RTX 4090", 165, 1008, 24, 32, 3),
}


@dataclass(frozen=True)
class Estimate:
    """What a run takes. Times are seconds of one step unless stated."""

    model: str
    gpu: str
    gpus: int
    global_batch: int
    images_per_second: float
    step: float
    hours: float
    limit: str
    """What a step is not faster than: the GPU, the host (launches, agreement on stopping) or loading."""
    classes: dict[str, float]
    """On the GPU, by class of kernel; of communication what backward does not hide."""
    communication: float
    """With what backward hides."""
    host: float
    loading: float
    useful_share: float
    """The rate of products that the loss needs over that of large products."""
    parameters: int
    gigaflops: float
    """Of an image in training, forward and backward: the matrix products that the loss needs, without those of a
    discriminator."""
    memory: dict[str, float]
    """Bytes per GPU."""
    fits: bool
    constants: dict[str, Constant]


class _Rates:
    """The constants of one estimate, which notes those that are used."""

    def __init__(self, config: EstimateConfig, machine: Machine) -> None:
        self._table = CONSTANTS | (ON_CPU if config.gpu == "cpu" else {})
        self._table |= {f"{config.gpu} {name}": constant for name, constant in machine._asdict().items()}
        self._gpu = config.gpu
        self.used: dict[str, Constant] = {}

    def __getitem__(self, name: str) -> float:
        self.used[name] = self._table[name]
        return self._table[name].value

    def of_machine(self, name: str) -> float:
        return self[f"{self._gpu} {name}"]


def estimate(config: EstimateConfig, measure_cpu: Callable[[int], Machine]) -> Estimate:
    """Returns the estimate for these settings. ``measure_cpu`` gives the rates of one of so many ranks on this machine.

    Raises:
        UserError: settings that cannot work.
    """
    check_estimate(config)
    of = _work_of_vit if family_of(config.model) == "vit" else _work_of_family
    work_on = of(config)
    machine = measure_cpu(config.gpus) if config.gpu == "cpu" else MACHINES[config.gpu]
    rates = _Rates(config, machine)
    work = work_on(rates)
    plain = None
    if config.adversarial:
        plain = estimate(_without_adversary(config), lambda ranks: machine)
        work = _with_discriminator(config, rates, work)
    N, products, forward, backward = config.batch_size, work.products, work.forward, work.backward
    copying = rates.of_machine("copy") * rates["pointwise_reached"]
    again = {"selective": ("pointwise",), "full": tuple(forward)}.get(config.checkpointing, ())
    classes = {name: config.accum_iter * (forward[name] * (1 + (name in again)) + backward[name]) for name in forward}
    moved = rates["optimiser"]
    if config.gpu != "cpu":
        moved += rates["copies"] if config.fused else config.accum_iter * rates["casts"]
    classes["optimiser"] = work.parameters * moved / copying
    sent, exposed = _communication(config, rates, work.parameters, sum(backward.values()))
    classes["communication"] = exposed
    host = 0.0
    if config.gpu != "cpu":  # whose launches are part of its products' rate
        host = config.accum_iter * work.launches * rates["launch"]
    host += 2 * (config.gpus - 1) * rates["stop_hop"] if config.gpus > 1 else 0.0
    images = config.gpus * config.accum_iter * N
    nodes = 1 if config.gpu == "cpu" else math.ceil(config.gpus / config.gpus_per_node)
    loading = images / (nodes * config.cores * rates["decode"])
    bounds = {
        "the processor" if config.gpu == "cpu" else "the GPU": sum(classes.values()),
        "the host": host,
        "loading": loading,
    }
    limit = max(bounds, key=lambda name: bounds[name])
    step = bounds[limit]
    useful = 3 * images / config.gpus * sum(product.flops for product in products)
    weights = (WEIGHT + rates["weight_copies"]) * work.parameters
    memory = {
        "weights": weights,
        "gradients": WEIGHT * work.parameters,
        "moments": 2 * WEIGHT * work.parameters,
        "activations": work.kept,
    }
    return Estimate(
        model=config.model,
        gpu=config.gpu,
        gpus=config.gpus,
        global_batch=images,
        images_per_second=images / step,
        step=step,
        hours=(config.images // images) * _seconds_of_epochs(config, step, plain) / 3600,
        limit=limit,
        classes=classes,
        communication=sent,
        host=host,
        loading=loading,
        useful_share=useful / step / rates.of_machine("products"),
        parameters=work.parameters,
        gigaflops=3 * sum(product.flops for product in products) / 1e9,
        memory=memory,
        fits=sum(memory.values()) <= rates["usable_memory"] * rates.of_machine("memory"),
        constants=rates.used,
    )


def _without_adversary(config: EstimateConfig) -> EstimateConfig:
    return replace(config, adversarial=0.0, adversarial_start=None, adversarial_regulariser="r1")


def _seconds_of_epochs(config: EstimateConfig, step: float, plain: Estimate | None) -> float:
    """Returns the seconds that one step of every epoch takes; ``plain`` has one before the adversarial term begins."""
    if plain is None:
        return config.epochs * step
    start = config.epochs / 2 if config.adversarial_start is None else config.adversarial_start
    return start * plain.step + (config.epochs - start) * step


@dataclass(frozen=True)
class _Work:
    """What a micro-step of a model has to do, whatever its family."""

    products: tuple[Product, ...]
    parameters: int
    forward: Seconds
    """By class of kernel."""
    backward: Seconds
    launches: float
    """Kernels."""
    kept: float
    """Bytes of activations."""


def _work_of_vit(config: EstimateConfig) -> Callable[[_Rates], _Work]:
    """Checks the settings of a vision transformer; what it has to do follows once the rates are known."""
    sizes = _checked_sizes(config)
    ratio = _ratio(config)

    def work(rates: _Rates) -> _Work:
        N, L = config.batch_size, sizes.num_patches
        K, D, E = int(L * (1 - ratio)), sizes.width, sizes.decoder_width
        # (how many blocks, tokens that they read, tokens that they give, width of a token, of a head)
        of_decoder = E // sizes.decoder_heads
        blocks = [
            (sizes.depth, N * (K + 1 + sizes.registers), N * (K + 1 + sizes.registers), D, D // sizes.heads),
            (sizes.decoder_depth - 1, N * (L + 1), N * (L + 1), E, of_decoder),
            (1, N * (L + 1), N * (L - K), E, of_decoder),
        ]
        products = products_of(sizes, ratio)
        forward, backward = _passes(config, rates, products, blocks)
        copying = rates.of_machine("copy") * rates["pointwise_reached"]
        ends = 9 * (L + 1) * E + 9 * (L - K) * sizes.patch_numbers + 3 * K * sizes.patch_numbers
        forward["pointwise"] += rates["patches"] / 9 * N * ends / copying
        launches = 0.0
        if config.gpu != "cpu":
            per_block = rates[f"launches_{'fused_' if config.fused else ''}{_compiled(config)}"]
            launches = (sizes.depth + sizes.decoder_depth) * per_block
        return _Work(products, sizes.parameters, forward, backward, launches, _activations(config, rates, blocks))

    return work


def _work_of_family(config: EstimateConfig) -> Callable[[_Rates], _Work]:
    """Builds a model of another family without memory for its weights, and counts its layers by their products.

    Raises:
        UserError: settings that cannot work, or that are counted for vision transformers alone.
    """
    for name in ("compile", "attention", "checkpointing", "fused"):
        if getattr(config, name) != getattr(EstimateConfig(), name):
            problem = f"is counted for vision transformers alone, not for {config.model}; leave it out"
            raise SettingError(name, getattr(config, name), problem)
    _check_numbers(config)
    import torch

    from fastmae.model.build import build_model

    family = family_of(config.model)
    spec = ModelSpec(
        model=config.model,
        input_size=config.input_size or USUAL_SIZES[family],
        in_chans=1 if family == "mlp" else 3,
        patch_size=config.patch_size,
        **{name: getattr(config, name) for name in FAMILY},
    )
    with torch.device("meta"):
        model = build_model(spec)
    try:
        model.num_visible(_ratio(config))
    except ValueError as error:
        raise SettingError("mask_ratio", _ratio(config), str(error)) from error
    products = model.products(_ratio(config))
    parameters = sum(weight.numel() for weight in model.parameters())
    given = sum(product.m * product.n * product.count for product in products)

    def work(rates: _Rates) -> _Work:
        N, peak = config.batch_size, rates.of_machine("products")
        forward = {"matrix products": 0.0, "convolutions": 0.0}
        for product in products:
            is_convolution = product.kind == "convolution"
            narrow = min(product.n, product.k)
            layer = next((f"linear_{side}" for side in (1024, 768, 512) if narrow >= side), "linear_narrow")
            share = rates["convolutions" if is_convolution else layer]
            forward["convolutions" if is_convolution else "matrix products"] += N * product.flops / peak / share
        copying = rates.of_machine("copy") * rates["pointwise_reached"]
        pointwise = N * given * rates["layers_moved"] / copying
        backward = {name: 2 * seconds for name, seconds in forward.items()}
        launches = 0.0
        if config.gpu != "cpu":
            launches = rates["launches_layer"] * sum(product.count for product in products)
        kept = N * given * rates["layers_kept"]
        both = forward | {"pointwise": pointwise / 3}, backward | {"pointwise": 2 * pointwise / 3}
        return _Work(products, parameters, *both, launches, kept)

    return work


def _with_discriminator(config: EstimateConfig, rates: _Rates, work: _Work) -> _Work:
    """Adds what an adversarial term has to do in a micro-step, and its weights, to the work of a model."""
    import torch

    from fastmae.model.discriminator import Discriminator

    size = _size(config)
    with torch.device("meta"):
        discriminator = Discriminator(size, 3)
    N, products, (height, width) = config.batch_size, [], size
    for layer in discriminator.layers:
        if isinstance(layer, torch.nn.Conv2d):
            height, width = -(-height // layer.stride[0]), -(-width // layer.stride[1])
            products.append(of_convolution("discriminator", layer, height * width))
    passes = f"discriminator_{'r1_' if config.adversarial_regulariser == 'r1' else ''}passes"
    one_pass = N * sum(product.flops for product in products) / rates.of_machine("products") / rates["convolutions"]
    numbers = N * (sum(product.m * product.n for product in products) + 3 * size[0] * size[1])
    moved = rates[passes] * numbers * rates["layers_moved"] / 3  # of a layer forward and backward, which are 3 passes
    seconds = rates[passes] * one_pass + moved / rates.of_machine("copy") / rates["pointwise_reached"]
    batches = 3 if config.adversarial_regulariser == "r1" else 2  # real, reconstructed, and the penalty's gradient
    return replace(
        work,
        parameters=work.parameters + sum(weight.numel() for weight in discriminator.parameters()),
        forward=work.forward | {"discriminator": 0.0},
        backward=work.backward | {"discriminator": seconds},
        launches=work.launches + batches * len(products) * rates["launches_layer"],
        kept=work.kept + batches * numbers * rates["layers_kept"],
    )


def _size(config: EstimateConfig) -> tuple[int, int]:
    """Returns the (height, width) of the images, in pixels."""
    own = PRESET_SIZES.get(config.model.removesuffix("_dec512d8b"), {}).get("img_size", 224)
    size = config.input_size or USUAL_SIZES.get(family_of(config.model), (own,))
    return size[0], size[-1]


def _ratio(config: EstimateConfig) -> float:
    return usual_ratio(config.model) if config.mask_ratio is None else config.mask_ratio


def _checked_sizes(config: EstimateConfig) -> Sizes:
    name = config.model.removesuffix("_dec512d8b")
    if name not in PRESET_SIZES:
        raise UserError(f"--model {config.model}: unknown; one of {', '.join(PRESET_SIZES)}")
    try:
        sizes = preset_sizes(name, config.input_size or (), config.patch_size or (), config)
    except ValueError as error:
        raise UserError(f"{error}; choose another --input_size or --patch_size") from error
    if int(sizes.num_patches * (1 - _ratio(config))) < 1:
        raise UserError(f"--mask_ratio {_ratio(config):g}: leaves none of {sizes.num_patches} patches visible")
    _check_numbers(config)
    return sizes


def _check_numbers(config: EstimateConfig) -> None:
    images = config.batch_size * config.accum_iter * config.gpus
    if config.images < images:
        raise UserError(f"--images {config.images:g}: fewer than the {images} of a step")
    if config.gpu == "cpu" and (config.compile == "block" or config.attention == "triton" or config.residual == "bf16"):
        raise UserError("--gpu cpu: takes none of --compile block, --attention triton, --residual bf16; leave them out")
    if config.residual == "bf16" and not config.fused:
        raise UserError("--residual bf16: is counted for the fused kernels alone; leave out --no-fused")


def _compiled(config: EstimateConfig) -> str:
    """Returns ``block`` or ``off``, as a long run with this --compile is."""
    return {"auto": "off" if config.gpu == "cpu" else "block"}.get(config.compile, config.compile)


def _pointwise(config: EstimateConfig) -> str:
    """Returns the beginning of the names of the constants for what is neither a product nor attention."""
    if config.fused and config.gpu != "cpu":
        return f"pointwise_fused{'_bf16' if config.residual == 'bf16' else ''}"
    return f"pointwise_{_compiled(config)}"


def _keeps_less_on_cpu(config: EstimateConfig) -> bool:
    """Whether the encoder computes GELU again though nothing was said of it, as on a CPU."""
    return config.gpu == "cpu" and config.checkpointing == "none"


def _attention(config: EstimateConfig, tokens: int, head_dim: int) -> str:
    """Returns the name of the share that attention reaches. ``auto`` is as without a table of measurements."""
    triton = tokens <= 320 and head_dim in (32, 64) if config.attention == "auto" else config.attention == "triton"
    return f"attention_triton_{'short' if tokens <= 64 else 'long'}" if triton else "attention_sdpa"


def _passes(
    config: EstimateConfig, rates: _Rates, products: tuple[Product, ...], blocks: Blocks
) -> tuple[Seconds, Seconds]:
    """Seconds of a forward and of a backward pass by class of kernel."""
    N, peak, copy = config.batch_size, rates.of_machine("products"), rates.of_machine("copy")
    forward, backward = (dict.fromkeys(("matrix products", "attention", "pointwise"), 0.0) for _ in range(2))
    for product in products:
        if product.kind == "linear":
            narrow = min(product.n, product.k)
            layer = next((f"linear_{side}" for side in (1024, 768, 512) if narrow >= side), "linear_narrow")
            seconds = N * product.flops / peak / rates[layer]
            forward["matrix products"] += seconds
            slower = rates["narrow_weight_gradient"] if narrow < 768 else 1.0
            backward["matrix products"] += seconds * (1 + 1 / slower)
        elif config.gpu == "cpu":
            seconds = N * product.flops / peak / rates["attention_cpu"]
            forward["attention"] += seconds
            backward["attention"] += 2.5 * seconds
    for number, (count, read, given, width, head_dim) in enumerate(blocks):
        numbers = count * (read + given) / 2 * width
        pointwise = _pointwise(config)
        forward["pointwise"] += numbers * rates[f"{pointwise}_forward"] / copy / rates["pointwise_reached"]
        moved = rates[f"{pointwise}_backward"]
        if config.checkpointing == "gelu" or (number == 0 and _keeps_less_on_cpu(config)):
            moved += rates["gelu_again"]
        backward["pointwise"] += numbers * moved / copy / rates["pointwise_reached"]
        if config.gpu != "cpu":
            share = rates[_attention(config, read // N, head_dim)]
            forward["attention"] += numbers * rates["attention_forward"] / copy / share
            backward["attention"] += numbers * rates["attention_backward"] / copy / share
    return forward, backward


def _communication(config: EstimateConfig, rates: _Rates, parameters: int, backward: float) -> tuple[float, float]:
    """(seconds of the all-reduce of all gradients; those of them that the backward pass does not hide)."""
    n, size = config.gpus, WEIGHT * parameters
    if n == 1:
        return 0.0, 0.0
    if config.gpu == "cpu":
        sent = 2 * (n - 1) / n * size / (rates["gloo"] * rates.of_machine("copy")) + 2 * (n - 1) * rates["local_hop"]
        return sent, sent
    local = min(n, config.gpus_per_node)
    nodes = math.ceil(n / local)
    rate = rates["links_reached"] * rates.of_machine("link")
    hops = 2 * (local - 1) * rates["local_hop"]
    if nodes > 1:
        rate = min(rate, local * rates["links_reached"] * rates.of_machine("network"))
        hops += 2 * math.ceil(math.log2(nodes)) * rates["network_hop"]
    buckets = math.ceil(size / rates["bucket"])
    sent = buckets * hops + 2 * (n - 1) / n * size / rate
    last = sent / buckets
    return sent, max(last, sent - backward)


def _activations(config: EstimateConfig, rates: _Rates, blocks: Blocks) -> float:
    """Bytes of what is kept between blocks, and of the block at work."""
    numbers = [count * read * width for count, read, _, width, _ in blocks]
    kept = rates[f"kept_{config.checkpointing}"] * sum(numbers)
    if _keeps_less_on_cpu(config):
        kept -= (rates["kept_none"] - rates["kept_gelu"]) * numbers[0]
    if config.checkpointing in ("selective", "full"):
        kept += rates["kept_none"] * max(read * width for _, read, _, width, _ in blocks)
    return kept
