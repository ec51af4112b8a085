"""LoRA, QLoRA and DoRA through PEFT: low-rank updates in chosen parts, and other parts trained whole beside them.

What PEFT and bitsandbytes take as names is worked out here from trainers/families.py and compared afterwards with what
they did. A list such as ["q_proj", "gate_proj", ...] would also hit the tower of Qwen2.5-VL, and a skip list
["visual"] would not spare it; both without a word.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from trainers.families import embedding_modules, find_parts, unwrap
from trainers.recipes import LoraSection, Recipe

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def target_modules(model: PreTrainedModel, parts: Iterable[str], names: Iterable[str] = ()) -> dict[str, str]:
    """Linear layers of `parts` -> the regular expression for PEFT that fits them and nothing else.

    Returns the pattern of each module path; layers that differ only in their indices share one. `names` keeps those
    whose last name it contains.

    Raises ValueError for a name that fits no layer, with the names there are.

    Example:
        >>> set(target_modules(model, ["language_model"], ["q_proj"]).values())
        {'model\\\\.language_model\\\\.layers\\\\.\\\\d+\\\\.self_attn\\\\.q_proj'}
    """
    part_of = find_parts(model).part_of
    # nn.MultiheadAttention multiplies with its out_proj's weight without calling it: LoRA there would never run.
    inside_attention = {
        child for module in model.modules() if isinstance(module, nn.MultiheadAttention) for child in module.modules()
    }
    parts = tuple(parts)
    linear = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module not in inside_attention
        and part_of.get(f"{path}.weight") in parts  # a tied head has no entry of its own
    ]
    last_names = {path: path.rsplit(".", 1)[-1] for path in linear}
    wrong = sorted(set(names) - set(last_names.values()))
    if wrong or not linear:
        raise ValueError(
            f"LoRA targets {', '.join(wrong) or 'all linear layers'} fit nothing in {', '.join(parts) or 'no part'} "
            f"of {type(model).__name__}. Linear layers there: {', '.join(sorted(set(last_names.values()))) or 'none'}."
        )
    wanted = [path for path in linear if not names or last_names[path] in set(names)]
    return {path: re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(path)) for path in wanted}


def whole_modules(model: PreTrainedModel, parts: Iterable[str]) -> list[str]:
    """Paths of the modules of `parts` for PEFT's `modules_to_save`: those it can copy, so members instead of lists.

    Raises ValueError for a part with bare parameters of its own (LLaVA-NeXT's image_newline): PEFT cannot save them.
    """
    found = find_parts(model)
    paths = {id(module): path for path, module in model.named_modules()}
    chosen: list[str] = []
    for part in parts:
        for module in found.modules(part):
            members = list(module) if isinstance(module, nn.ModuleList) else [module]
            chosen += [paths[id(member)] for member in members]
        outside = [
            name
            for name, owner in found.part_of.items()
            if owner == part and not any(name.startswith(path + ".") for path in chosen)
        ]
        if outside:
            raise ValueError(
                f"{', '.join(outside)} of the {part} lie outside every module that PEFT could save next to LoRA: "
                f"freeze the {part}, or train without LoRA."
            )
    return chosen


def add_lora(model: PreTrainedModel, recipe: Recipe, new_token_ids: Iterable[int] = ()) -> PeftModel:
    """Wraps `model`: LoRA in the parts that say lora, the adapter and the embeddings whole where the recipe says so.

    Everything that trains is held in `model.trained_dtype`; the rest keeps its dtype and is frozen. PEFT's
    `prepare_model_for_kbit_training` is not called: it would turn a frozen tower into float32 and recompute it.

    Raises ValueError if a target fits nothing, and if PEFT wrapped anything else than was meant.
    """
    lora = recipe.lora
    assert lora is not None
    targets = target_modules(model, recipe.lora_parts, lora.targets)
    peft_model = get_peft_model(
        model, _lora_config(model, recipe, lora, targets, sorted(new_token_ids)), autocast_adapter_dtype=False
    )
    wrapped = {path for path, module in unwrap(peft_model).named_modules() if isinstance(module, LoraLayer)}
    assert wrapped == set(targets), wrapped ^ set(targets)
    # PEFT makes a whole module's every parameter train, fixed position tables included.
    for name in find_parts(peft_model).constants:
        unwrap(peft_model).get_parameter(name).requires_grad_(False)
    cast_trained(peft_model, TORCH_DTYPES[recipe.model.trained_dtype])
    return peft_model


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Holds every parameter that trains in `dtype`; the frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _lora_config(
    model: PreTrainedModel, recipe: Recipe, lora: LoraSection, targets: dict[str, str], new_token_ids: list[int]
) -> LoraConfig:
    embeddings = recipe.parts.embeddings.train
    paths = {id(module): path for path, module in model.named_modules()}
    embedding_paths = [paths[id(module)] for module in embedding_modules(model)]
    whole = whole_modules(model, ["adapter"]) if recipe.parts.adapter.train == "full" else []
    weights = [module.weight for module in embedding_modules(model)]
    tied = len(weights) == 2 and weights[0] is weights[1]
    if embeddings == "full":
        # The tied head follows the embedding (ensure_weight_tying).
        whole += embedding_paths[:1] if tied else embedding_paths
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        bias="none",
        target_modules="|".join(dict.fromkeys(targets.values())),
        modules_to_save=whole or None,
        trainable_token_indices=dict.fromkeys(embedding_paths, new_token_ids) if embeddings == "new_tokens" else None,
        ensure_weight_tying=tied and embeddings == "full",
    )


def quantization_config(path: str | Path, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """4 bits (NF4, double quantisation; arXiv 2305.14314) for the language model's linear layers and nothing else.

    `path` is the model's: its config tells the names of tower, adapter and head before anything is loaded.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    part_of = find_parts(model).part_of
    spared = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of.get(f"{path}.weight") != "language_model"  # None: a tied head
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=sorted(spared),
    )


def check_quantized(model: PreTrainedModel) -> None:
    """Asserts, on the loaded modules, that the language model's linear layers have 4 bits and no other layer has."""
    from bitsandbytes.nn import Linear4bit

    part_of = find_parts(model).part_of
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            in_language_model = part_of.get(f"{path}.weight") == "language_model"
            if isinstance(module, Linear4bit) != in_language_model:
                raise ValueError(
                    f"{path} is {type(module).__name__}, but {'all' if in_language_model else 'only'} linear layers "
                    "of the language model are to have 4 bits: the skip list of the quantization config does not fit."
                )


def load_lora(
    base: PreTrainedModel, folder: str | Path, trainable: bool = False, dtype: torch.dtype | None = None
) -> PeftModel:
    """Puts a saved adapter folder onto its base, with room for the new tokens that it brings.

    What was trained is held in `dtype`; None means as it was saved, mostly float32. A bfloat16 base runs beside
    float32 only under autocast: for inference pass `dtype=base.dtype`, or merge.

    Raises ValueError if a tensor of the folder finds no place, or a place no tensor.
    """
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    embedding = next(path for path, module in base.named_modules() if module is base.get_input_embeddings())
    new_token_ids = [i for ids in (config.trainable_token_indices or {}).values() for i in ids]
    num_rows = max(new_token_ids, default=-1) + 1
    with safe_open(Path(folder) / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        saved = set(file.keys())
        saved_dtypes = {file.get_tensor(name).dtype for name in saved}
        if (whole_table := f"base_model.model.{embedding}.weight") in saved:
            num_rows = file.get_slice(whole_table).get_shape()[0]
    make_room(base, num_rows)
    model = PeftModel(base, config, autocast_adapter_dtype=False)
    wanted = set(get_peft_model_state_dict(model))
    if wanted != saved:
        missing, unexpected = sorted(wanted - saved), sorted(saved - wanted)
        raise ValueError(
            f"{folder} does not fit {type(base).__name__}: {len(missing)} places get no tensor "
            f"({', '.join(missing[:3])}), and {len(unexpected)} tensors find no place ({', '.join(unexpected[:3])}). "
            "Was it trained from another model?"
        )
    # PEFT makes the places in the base's dtype and would round what it puts there.
    cast_trained(model, dtype or max(saved_dtypes, key=lambda kind: kind.itemsize))
    model.load_adapter(str(folder), "default", is_trainable=trainable, autocast_adapter_dtype=False)
    return model


def make_room(model: PreTrainedModel, num_tokens: int) -> None:
    """Gives embedding and head at least `num_tokens` rows. Qwen has spare ones, and mostly stays as it is."""
    if num_tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(num_tokens)
