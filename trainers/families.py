"""Where the tower, the adapter and the language model sit in each model class: one table, and a look-up through PEFT.

Words: the **tower** turns pixels into patch vectors (ViT), the **adapter** turns those into vectors of the language
model's width (resampler, merger, projector), the **embeddings** are the token embedding and the output head, and the
**language model** is the rest of the decoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_qwenvl.adapter_qwenvl import SinCosTable

PARTS = ("tower", "adapter", "language_model", "embeddings")

# Modules whose parameters are constants that happen to be saved with the weights: no stage trains them.
CONSTANT_MODULES = (SinCosTable,)


@dataclass(frozen=True)
class Family:
    """Dotted paths, from the model with the head, of what a model class is made of. The longest matching path wins."""

    tower: str
    adapter: tuple[str, ...]
    language_model: str = "model.language_model"


_qwen2_style = Family(tower="model.visual", adapter=("model.visual.merger",))
# The deepstack mergers project intermediate layers of the tower for the first decoder layers: adapters like the last.
_qwen3_style = Family(tower="model.visual", adapter=("model.visual.merger", "model.visual.deepstack_merger_list"))
_llava_style = Family(tower="model.vision_tower", adapter=("model.multi_modal_projector",))
_llava_next_style = Family(tower="model.vision_tower", adapter=("model.multi_modal_projector", "model.image_newline"))

# Class name -> family. Subclasses find their parent's entry. Embeddings and head need no entry: transformers names
# them (get_input_embeddings, get_output_embeddings).
FAMILIES: dict[str, Family] = {
    "QwenVLForConditionalGeneration": Family(tower="model.visual", adapter=("model.adapter",)),
    "Qwen2VLForConditionalGeneration": _qwen2_style,
    "Qwen2_5_VLForConditionalGeneration": _qwen2_style,
    "Qwen3VLForConditionalGeneration": _qwen3_style,
    "LlavaForConditionalGeneration": _llava_style,
    "LlavaNextForConditionalGeneration": _llava_next_style,
    "LlavaOnevisionForConditionalGeneration": _llava_next_style,
}


def family_of(model: nn.Module) -> Family:
    """The table's entry for `model` (or for the class it inherits from); ValueError with the known classes if none."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ValueError(
        f"{type(model).__name__} is not in the table of families. Known: {', '.join(FAMILIES)}. "
        "Add a line to trainers/families.py:FAMILIES that says where its tower and its adapter are."
    )


@dataclass(frozen=True)
class ModelParts:
    """A model taken apart. Every parameter of `base` belongs to exactly one part.

    Attributes:
        base: the transformers model, without its PEFT wrapper (LoRA layers sit inside it, at the same paths).
        part_of: parameter name in `base` -> one of `PARTS`.
        constants: names of the parameters that never train.
        blocks: the tower's repeated blocks, first to last.
    """

    base: PreTrainedModel
    family: Family
    part_of: dict[str, str]
    constants: frozenset[str]
    blocks: nn.ModuleList
    blocks_path: str
    _parameters: dict[str, nn.Parameter] = field(repr=False)

    def parameters(self, part: str) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of one part, in the order of `named_parameters`."""
        return ((name, p) for name, p in self._parameters.items() if self.part_of[name] == part)

    def modules(self, part: str) -> list[nn.Module]:
        """The modules at the part's own paths: one tower, several mergers, one language model, embedding and head."""
        if part == "embeddings":
            return embedding_modules(self.base)
        family = self.family
        paths = {"tower": (family.tower,), "adapter": family.adapter, "language_model": (family.language_model,)}[part]
        # LLaVA-NeXT's image_newline is a bare parameter: it has no module of its own.
        return [self.base.get_submodule(path) for path in paths if path not in self._parameters]

    def block_of(self, name: str) -> int | None:
        """Index of the tower's block that holds the parameter `name`; None outside the blocks."""
        prefix = self.blocks_path + "."
        return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def embedding_modules(base: PreTrainedModel) -> list[nn.Module]:
    """The token embedding and, where there is one, the output head."""
    head = base.get_output_embeddings()
    return [base.get_input_embeddings()] + ([] if head is None else [head])


def find_parts(model: nn.Module) -> ModelParts:
    """Takes a model of a known family apart, bare or wrapped by PEFT.

    Raises ValueError for an unknown class, for a parameter that lies outside every part, and for a tower without
    exactly one list of blocks.

    Example:
        >>> parts = find_parts(Qwen2_5_VLForConditionalGeneration(config))
        >>> parts.part_of["model.visual.merger.ln_q.weight"], parts.part_of["lm_head.weight"]
        ('adapter', 'embeddings')
    """
    base = unwrap(model)
    family = family_of(base)
    # A tied head is the same parameter as the embedding and appears once, so paths come from module identity.
    names = {id(module): name for name, module in base.named_modules()}
    paths = {family.tower: "tower", family.language_model: "language_model"}
    paths |= dict.fromkeys(family.adapter, "adapter")
    paths |= {names[id(module)]: "embeddings" for module in embedding_modules(base)}

    parameters = dict(base.named_parameters())
    part_of = {}
    for name in parameters:
        matching = [path for path in paths if name == path or name.startswith(path + ".")]
        if not matching:
            raise ValueError(
                f"The parameter {name} of {type(base).__name__} lies outside its tower ({family.tower}), adapter "
                f"({', '.join(family.adapter)}) and language model ({family.language_model}): complete its line in "
                "trainers/families.py:FAMILIES."
            )
        part_of[name] = paths[max(matching, key=len)]

    constants = frozenset(
        f"{path}.{name}"
        for path, module in base.named_modules()
        if isinstance(module, CONSTANT_MODULES)
        for name, _ in module.named_parameters()
    )
    blocks_path = _path_of_blocks(base.get_submodule(family.tower), family)
    blocks = base.get_submodule(blocks_path)
    return ModelParts(base, family, part_of, constants, blocks, blocks_path, parameters)


def _path_of_blocks(tower: nn.Module, family: Family) -> str:
    """Full path of the one ModuleList of the tower whose members transformers can checkpoint: its blocks, by type."""
    found = [
        f"{family.tower}.{name}"
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(member, GradientCheckpointingLayer) for member in module)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(tower).__name__} has {len(found)} lists of GradientCheckpointingLayer blocks ({found}), not one: "
            "freezing its last blocks and layer-wise decay cannot be defined for it."
        )
    return found[0]
