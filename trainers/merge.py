"""LoRA folder + unquantised base -> one ordinary model folder, with every tensor accounted for.

A 4-bit base is not merged into: rounding the sum back to 4 bits loses more than the update holds. What QLoRA learned
goes onto the weights that the 4 bits were made from.
"""

import hashlib
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import modeling_qwenvl  # noqa: F401 -- registers Qwen-VL with AutoModelForImageTextToText
from trainers.families import embedding_modules
from trainers.lora import load_lora

# What PEFT appends to a module's path for the tensors that change the module's own weight.
_LORA = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class MergeReport:
    """What became of each tensor of the base, by name: "merged" (LoRA added), "replaced" (trained whole), "rows" (some
    rows of an embedding trained), "copied" (bit for bit as in the base)."""

    fate: dict[str, str]

    def __str__(self) -> str:
        counts = Counter(self.fate.values())
        return f"{len(self.fate)} tensors: " + ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))


def merge(adapter: str | Path, output: str | Path, base: str | Path | None = None) -> MergeReport:
    """Writes base + adapter to `output`, a folder that `from_pretrained` loads without PEFT, with the processor.

    `base`: the model the adapter was trained from, without quantisation; None means the one its settings name. Sums
    are formed in float32 and stored in the base's own dtype.

    Raises ValueError for a quantised base, for an adapter that does not fit, and if a tensor is not accounted for.
    """
    adapter, output = Path(adapter), Path(output)
    source = str(base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
    if "quantization_config" in AutoConfig.from_pretrained(source).to_dict():
        raise ValueError(
            f"{source} is quantised: merging would round the sums to few bits. Pass the unquantised model it was made "
            "from as --base."
        )
    model, report = merge_into(AutoModelForImageTextToText.from_pretrained(source, dtype="auto"), adapter)
    model.save_pretrained(output)
    copy_processor(adapter if (adapter / "processor_config.json").is_file() else Path(source), output)
    return report


def merge_into(base: PreTrainedModel, adapter: Path) -> tuple[PreTrainedModel, MergeReport]:
    """Merges the folder `adapter` into `base`, in memory; `base` is used up."""
    saved = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    targets = {name: _target(name) for name in saved}
    dtypes = {name: tensor.dtype for name, tensor in base.state_dict().items()}
    before = {name: _fingerprint(tensor) for name, tensor in base.state_dict().items()}
    homeless = sorted(name for name, (target, _) in targets.items() if target not in before)
    if homeless:
        raise ValueError(
            f"{len(homeless)} tensors of {adapter} belong to no tensor of {type(base).__name__}: "
            f"{', '.join(homeless[:3])}. Was it trained from another model?"
        )

    weights = [module.weight for module in embedding_modules(base)]
    tied = len(weights) == 2 and weights[0] is weights[1]
    model = load_lora(base.float(), adapter).merge_and_unload()
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])
    fate = dict.fromkeys(before, "copied") | dict(targets.values())
    if tied:
        model.tie_weights()
        names = {id(module): f"{path}.weight" for path, module in model.named_modules()}
        embedding, *heads = [names[id(module)] for module in embedding_modules(model)]
        fate |= dict.fromkeys(heads, fate[embedding])

    # Nothing is taken on trust: what should be as it was, or as it was saved, is compared bit for bit.
    after = model.state_dict()
    replaced = {
        target: saved[name].to(dtypes[target]) for name, (target, kind) in targets.items() if kind == "replaced"
    }
    problems = [f"{name} is gone" for name in before.keys() - after.keys()]
    problems += [f"{name} is new" for name in after.keys() - before.keys()]
    for name in before.keys() & after.keys():
        if fate[name] == "copied" and _fingerprint(after[name]) != before[name]:
            problems.append(f"{name} changed, though nothing was trained there")
        if fate[name] == "replaced" and not torch.equal(after[name], replaced.get(name, after[name])):
            problems.append(f"{name} is not what was trained")
        if not after[name].isfinite().all():
            problems.append(f"{name} is not finite")
    if problems:
        raise ValueError(f"{len(problems)} tensors came out wrong: {'; '.join(sorted(problems)[:5])}.")
    return model, MergeReport(fate)


def copy_processor(source: Path, output: Path) -> None:
    """Copies the processor's files as they are, so that the merged model sees what was trained on."""
    names = ("*processor_config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja", "*.tiktoken", "*tokens*.json")
    for pattern in names:
        for path in source.glob(pattern):
            shutil.copy2(path, output / path.name)


def _target(name: str) -> tuple[str, str]:
    """Tensor of the base that a tensor of the adapter folder changes, and how."""
    path = name.removeprefix("base_model.model.")
    for suffix in _LORA:
        if path.endswith(suffix):
            return path.removesuffix(suffix) + ".weight", "merged"
    if path.endswith(_TOKENS):
        return path.removesuffix(_TOKENS) + ".weight", "rows"
    return path, "replaced"


def _fingerprint(tensor: Tensor) -> bytes:
    """A digest of the tensor's bytes, so that a second copy of the model need not be kept."""
    return hashlib.blake2b(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()).digest()
