"""The memory that a recipe needs on one device, part by part, and whether a GPU has it; nothing is downloaded or run.

What stays is counted from the model's config: weights in their dtype (4 bits as `sizes_only.nf4_bytes` says), and two
states of the optimiser per trained weight. What comes and goes, activations, gradients and logits, is counted by
running one step of the real code on tensors without memory (trainers/sizes_only.py), in micro-batches of
`hardware.per_device_batch_size` rows of exactly `data.max_length` tokens with `estimate.pictures_per_row` pictures.

The peak is that of one whole step: weights + optimiser states + the largest sum of all else. What the estimate leaves
out, and how far it was off, is in docs/recipes.md.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from trainers.families import PARTS, find_parts, unwrap
from trainers.freezing import Freeze, freeze
from trainers.lora import TORCH_DTYPES
from trainers.recipe_model import model_path, prepare_model, trained_parts
from trainers.recipes import Recipe
from trainers.sizes_only import WEIGHT_CASTS, Allocations, GpuBehaviour, gradients_labelled, nf4_bytes
from trainers.token_losses import token_losses

GIB = 2**30
# Memory in GiB as nvidia-smi names it.
GPUS = {"T4": 15.0, "RTX 3090": 24.0, "RTX 4090": 24.0, "L40S": 45.0, "A100 40GB": 40.0, "A100 80GB": 80.0,
        "H100 80GB": 79.6, "H200": 140.4}  # fmt: skip
# Assumptions, not measurements: CUDA's context with cuBLAS's workspaces, and what the allocator cannot reuse.
CONTEXT_GIB = 1.0
FRAGMENTATION = 0.05
# bitsandbytes' 8-bit AdamW, bytes per trained weight: two states of one byte, and a float32 scale per 256 of each.
EIGHT_BIT_STATES = 2 + 2 * 4 / 256


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device at the peak of a step.

    `weights`, `optimizer`: per part, there throughout. `moving`: what the step adds at its peak, by label: the parts'
    activations, "gradients", "head and loss", "backward", copies of weights. `communication`: gradient buckets of data
    parallelism, or the layers that FSDP has gathered.
    """

    recipe: Recipe
    parameters: dict[str, int]
    trained: dict[str, int]
    weights: dict[str, int]
    optimizer: dict[str, int]
    moving: dict[str, int]
    communication: int

    @property
    def tensors(self) -> int:
        """Bytes of all tensors at the peak."""
        parts = sum(self.weights.values()) + sum(self.optimizer.values())
        return parts + sum(self.moving.values()) + self.communication

    @property
    def gib_needed(self) -> float:
        """GiB that the device must have, with the assumed context and fragmentation."""
        return self.tensors / GIB * (1 + FRAGMENTATION) + CONTEXT_GIB

    def fits(self, memory_gib: float) -> bool:
        return self.gib_needed <= memory_gib

    def table(self) -> Table:
        """Part by part, in GiB."""
        table = Table(title=f"{self.recipe.name}: memory of one device at the peak of a step, GiB")
        for heading in ("part", "parameters", "trained", "weights", "optimiser", "activations"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for part in PARTS:
            numbers = [self.weights[part], self.optimizer[part], self.moving.get(part, 0)]
            cells = [f"{bytes_ / GIB:.2f}" for bytes_ in numbers]
            table.add_row(part, f"{self.parameters[part]:,}", f"{self.trained[part]:,}", *cells)
        table.add_section()
        rest = {label: size for label, size in self.moving.items() if label not in PARTS}
        for label, size in (rest | {"communication": self.communication}).items():
            if size:
                table.add_row(label, "", "", "", "", f"{size / GIB:.2f}")
        table.add_section()
        table.add_row("all tensors", "", "", "", "", f"{self.tensors / GIB:.2f}")
        table.add_row("with context and fragmentation (assumed)", "", "", "", "", f"{self.gib_needed:.2f}")
        return table


def estimate(recipe: Recipe) -> Estimate:
    """Estimates `recipe`, whose `model.path` must hold or name a config.json; no weights are needed.

    Raises ValueError if a row's pictures have more tokens than `data.max_length`, and for stages after SFT.

    Example:
        >>> estimate(load_recipe("qlora_24gb")).fits(24.0)
        True
    """
    if recipe.stage in ("grpo", "rloo", "ppo"):
        raise ValueError(
            f"{recipe.name}: there is no estimate for the stage {recipe.stage} yet, which also samples. A lower "
            "bound: the same recipe with stage=sft and sampling=null."
        )
    if recipe.stage == "dpo":
        raise ValueError(
            f"{recipe.name}: there is no estimate for the stage dpo yet, whose rows have two answers and a reference. "
            "A lower bound: the same recipe with stage=sft and preference=null."
        )
    return estimate_config(AutoConfig.from_pretrained(model_path(recipe)), recipe)


def estimate_config(config: PreTrainedConfig, recipe: Recipe) -> Estimate:
    """The same for a config in memory, which is changed."""
    settings, hardware = recipe.model, recipe.hardware
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config,
            dtype=TORCH_DTYPES[settings.dtype],
            # Flash attention need not be installed here: GpuBehaviour keeps for sdpa what it keeps.
            attn_implementation="eager" if settings.attention == "eager" else "sdpa",
        )
        quantized = _language_model_matrices(model) if settings.quantization == "nf4" else []
        last = model.get_input_embeddings().weight.shape[0]
        wrapped = prepare_model(model, recipe, list(range(last - len(settings.new_tokens), last)))
    decided = freeze(wrapped, trained_parts(recipe))
    moving = _moving_bytes(decided, recipe, quantized)

    part_of = decided.parts.part_of
    four_bit = {id(weight) for weight in quantized}
    counts: dict[str, Counter[str]] = {key: Counter() for key in ("parameters", "trained", "weights", "optimizer")}
    gradients = 0
    for name, parameter in unwrap(wrapped).named_parameters():
        part, numel = part_of[name], parameter.numel()
        counts["parameters"][part] += numel
        counts["weights"][part] += nf4_bytes(numel) if id(parameter) in four_bit else parameter.nbytes
        if parameter.requires_grad:
            counts["trained"][part] += numel
            gradients += parameter.nbytes
            counts["optimizer"][part] += _optimizer_bytes(parameter, recipe)
    communication = 0
    if hardware.sharding == "full":
        for key in ("weights", "optimizer"):
            counts[key] = Counter({part: size // hardware.devices for part, size in counts[key].items()})
        moving["gradients"] //= hardware.devices
        # FSDP keeps no copies of weights: it gathers the layer in use and the next one, in the multiplications' dtype.
        del moving[WEIGHT_CASTS]
        layers = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        largest = max(sum(p.numel() for p in layer.parameters()) for stack in layers for layer in stack)
        communication = 2 * largest * TORCH_DTYPES[hardware.precision].itemsize
    elif hardware.devices > 1:
        communication = gradients
    filled = {key: {part: counter[part] for part in PARTS} for key, counter in counts.items()}
    return Estimate(recipe, **filled, moving=dict(moving), communication=communication)


def _language_model_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    parts = find_parts(model)
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [parameter for name, parameter in parts.parameters("language_model") if name in linear]


def _optimizer_bytes(parameter: Tensor, recipe: Recipe) -> int:
    if recipe.optimizer.states == "float32":
        return 2 * parameter.nbytes  # torch's AdamW keeps both states in the dtype of the weight
    # bitsandbytes keeps float32 states for tensors below 4096 weights.
    return int(EIGHT_BIT_STATES * parameter.numel()) if parameter.numel() >= 4096 else 8 * parameter.numel()


def _moving_bytes(decided: Freeze, recipe: Recipe, quantized: list[nn.Parameter]) -> Counter[str]:
    """What one step allocates, at its peak."""
    base = decided.parts.base
    base.train()
    decided.set_modes()
    memory = Allocations(known=[*base.parameters(), *base.buffers()])
    handles = []
    for part in ("tower", "language_model", "adapter"):
        for module in decided.parts.modules(part):
            # The adapter may sit inside the tower, which goes on after it.
            after = "tower" if part == "adapter" else "other"
            handles.append(module.register_forward_pre_hook(_labeller(memory, part)))
            handles.append(module.register_forward_hook(_labeller(memory, after)))
    behaviour = GpuBehaviour(recipe.hardware.precision == "bfloat16", quantized, memory)
    for module in (*decided.parts.modules("tower"), *decided.parts.modules("language_model")):
        if module.is_activation_checkpointing:
            # The mode is not on where layers are run again, inside the backward pass.
            settings = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), behaviour)}
            module.activation_checkpointing_enable(settings)
    with decided.tower_without_graph(), gradients_labelled(base.parameters(), memory), memory, behaviour:
        # With accumulation, the second micro-batch finds the first one's gradients.
        for _ in range(min(2, recipe.accumulation_steps)):
            behaviour.caches_casts = True
            loss = _loss(decided, recipe, memory)
            behaviour.leave_autocast()
            memory.label = "backward"
            loss.backward()
            del loss
    for handle in handles:
        handle.remove()
    return Counter({label: size for label, size in memory.at_peak.items() if size})


def _labeller(memory: Allocations, label: str):
    def label_next(*_: object) -> None:
        if memory.label != "backward":  # layers that are recomputed count as the backward pass
            memory.label = label

    return label_next


def _loss(decided: Freeze, recipe: Recipe, memory: Allocations) -> Tensor:
    base, data = decided.parts.base, recipe.data
    at_once = recipe.hardware.per_device_batch_size
    # Packed rows of a batch become one.
    rows, length = (1, at_once * data.max_length) if data.packing else (at_once, data.max_length)
    memory.label = "other"
    features = _picture_features(base, at_once * recipe.estimate.pictures_per_row, data.picture_side)
    num_tokens = rows * length
    if len(features) >= num_tokens:
        raise ValueError(
            f"{recipe.estimate.pictures_per_row} picture(s) of {data.picture_side} pixels have "
            f"{len(features) // at_once} tokens, which leaves nothing of data.max_length {data.max_length}."
        )
    memory.label = "embeddings"
    embedded = base.get_input_embeddings()(torch.empty(num_tokens, dtype=torch.long, device="meta"))
    merged = torch.cat([features.to(embedded.dtype), embedded[len(features) :]]).view(rows, length, -1)
    (language_model,) = decided.parts.modules("language_model")
    # On the CPU, since transformers looks into positions for packed rows.
    places = torch.arange(length, device="cpu").expand(rows, -1)
    hidden = language_model(inputs_embeds=merged, position_ids=places, use_cache=False).last_hidden_state
    num_visual = len(features)
    del features, embedded, merged
    memory.label = "head and loss"
    supervised = max(1, int((num_tokens - num_visual) * recipe.estimate.supervised_share))
    positions = torch.arange(supervised, device="meta")
    logits = base.get_output_embeddings()(hidden.flatten(0, 1)[positions])
    if recipe.hardware.precision == "bfloat16":
        logits = logits.float()  # accelerate converts what a forward under autocast returns
    optimizer = recipe.optimizer
    return token_losses(logits, positions, optimizer.label_smoothing, optimizer.z_loss).sum()


def _picture_features(base: PreTrainedModel, num_pictures: int, side: int) -> Tensor:
    """Visual tokens of square pictures, (tokens of all pictures, width)."""
    vision = base.config.vision_config
    dtype = base.get_submodule(find_parts(base).family.tower).dtype
    if "spatial_merge_size" in vision.to_dict():
        patches = max(1, round(side / (vision.patch_size * vision.spatial_merge_size))) * vision.spatial_merge_size
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(num_pictures * patches**2, values, dtype=dtype, device="meta")
        grid = torch.tensor([[1, patches, patches]] * num_pictures, device="cpu")
        output = base.model.get_image_features(pixels, image_grid_thw=grid)
    else:
        # LLaVA's towers take the size they were made for.
        side = side if base.config.model_type == "qwen_vl" else vision.image_size
        output = base.model.get_image_features(torch.empty(num_pictures, 3, side, side, dtype=dtype, device="meta"))
    features = output.pooler_output
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    return features.flatten(0, -2)
