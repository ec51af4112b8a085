"""QwenVLDPOTrainer: TRL's DPO with its own losses, on pairs whose pictures and prompts are computed once.

TRL's loss calls `model(..., labels=..., fused_lm_head=True)` and reads log-probabilities, so the model answers that
call with trainers/completion_logps.py and the loss code is TRL's to the last line: every loss type and mixture, every
divergence, its metrics. Data, reference and what trains are ours, at TRL's own methods.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.training_args import ParallelMode
from trl import DPOTrainer

from processing.example import Example
from processing.processing_qwenvl import QwenVLProcessor
from trainers.answering import AnsweringMixin
from trainers.checkpoint_mixin import CheckpointMixin
from trainers.completion_batch import Batch, CompletionGroup, collate_groups
from trainers.completion_logps import add_completion_head
from trainers.dpo_arguments import DPOArguments, Reference
from trainers.evaluation import GenerationEvaluation
from trainers.example_batches import at_stage_resolution
from trainers.families import unwrap
from trainers.freezing import TrainedParts
from trainers.optimizer import LearningRates
from trainers.parts_mixin import PartsMixin, checkpointing_kept, freeze_for_preferences
from trainers.picture_memory import PictureMemory
from trainers.preference_pairs import PreferencePairs
from trainers.reference_cache import COLUMNS, fingerprint_of_model, fingerprint_of_processor, load_or_compute
from trainers.stages import SFT

REF_ADAPTER = "ref"  # TRL's name for the copy of an adapter
ROW = "row"
# What TRL's loss reads of the head, with use_weighting and without.
HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


Row = Example | CompletionGroup


class PreferenceCollator:
    """Numbers of rows (with columns of the reference, if they are known) -> a batch as TRL's loss takes it."""

    def __init__(self, pairs: PreferencePairs) -> None:
        self.pairs = pairs
        self.examples: list[Row] = []

    def number(self, examples: Sequence[Row]) -> Dataset:
        """A dataset of numbers that stand for `examples`: TRL wants a `datasets.Dataset`, which holds no Examples."""
        first = len(self.examples)
        self.examples.extend(examples)
        return Dataset.from_dict({ROW: list(range(first, len(self.examples)))})

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        examples = [self.examples[row[ROW]] for row in rows]
        groups = [example if isinstance(example, CompletionGroup) else self.pairs(example) for example in examples]
        batch = collate_groups(groups, self.pairs.processor.tokenizer.pad_token_id, order="completion")
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in COLUMNS if name in rows[0]}


class QwenVLDPOTrainer(AnsweringMixin, CheckpointMixin, PartsMixin, DPOTrainer):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives on pictures and text.

    Args:
        model: of a family in `trainers.families`, bare or wrapped by PEFT; also 4-bit with LoRA.
        args: which loss, which reference, ...
        train_dataset, eval_dataset: `processing.example.Example`s of kind "preference", with or without pictures, or
            `trainers.completion_batch.CompletionGroup`s of two completions, the chosen one first.
        processing_class: the processor; it encodes the rows and is saved in every checkpoint.
        ref_model: another reference than the policy's own start; with `args.reference` None or "cache".
        trained: what trains; the default is all but the tower, or whatever PEFT made trainable.
        learning_rates: of parts with their own; `args.learning_rate` is then not read.
        generation: held-out examples to answer at every evaluation.

    While the tower is frozen, each picture goes through it once per step for policy and reference together, and where
    the adapter is frozen too, through that as well. A reference copy shares the frozen weights, which then take no
    memory of their own.

    Raises ValueError for rows of another kind, settings that contradict each other, and a reference that the model
    cannot give.

    Example:
        >>> trainer = QwenVLDPOTrainer(model, DPOArguments("runs/dpo", beta=0.1), rows, processing_class=processor)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: DPOArguments,
        train_dataset: Sequence[Row],
        eval_dataset: Sequence[Row] | None = None,
        processing_class: ProcessorMixin | None = None,
        ref_model: PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        trained: TrainedParts | None = None,
        learning_rates: LearningRates | None = None,
        generation: GenerationEvaluation | None = None,
    ) -> None:
        if not isinstance(args, DPOArguments):
            raise ValueError(f"args is a {type(args).__name__}: use trainers.dpo_arguments.DPOArguments.")
        if processing_class is None:
            raise ValueError("Give processing_class: the processor that encodes the rows.")
        is_peft = isinstance(model, PeftModel)
        self.freeze = freeze_for_preferences(model, trained, is_peft)
        self.learning_rates = learning_rates
        self.reference = _which_reference(args.reference, model, ref_model)
        if self.reference == "cache" and args.fsdp and not is_peft:
            raise ValueError(
                "reference='cache' under FSDP, without LoRA: the weights that it is computed from, and known by, are "
                "split by then. Say reference='copy'."
            )
        if self.reference == "copy" and ref_model is None:
            ref_model = _copy_of(model, shares_frozen=args.parallel_mode == ParallelMode.NOT_PARALLEL)
        processor = at_stage_resolution(processing_class, unwrap(model).config, SFT, args.resolution)
        self.collator = PreferenceCollator(PreferencePairs(processor, args.max_length))
        # Before FSDP splits the reference, and its weights can no longer be compared with the policy's.
        self.memory = PictureMemory(*(unwrap(one) for one in (model, ref_model) if one is not None))
        self._heads_are_ours = False
        # TRL rounds the weights of an adapter on a quantised model to bfloat16; a recipe says what they are held in.
        trained_weights = [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=self.collator,
            train_dataset=self.collator.number(train_dataset),
            eval_dataset=None if eval_dataset is None else self.collator.number(eval_dataset),
            processing_class=processor,
            callbacks=callbacks,
        )
        self._check_experts()
        for parameter, data in trained_weights:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self._add_heads()
        starts_at_base = self.reference == "cache" and is_peft and _is_fresh(model)
        if is_peft and (self.reference == "adapter_off" or starts_at_base) and REF_ADAPTER in model.peft_config:
            model.delete_adapter(REF_ADAPTER)  # TRL's copy of the adapter, where its base is the same
            self._freeze_again()
        if isinstance(processor, QwenVLProcessor):
            unwrap(model).generation_config.eos_token_id = processor.stop_token_ids
        self.generation = generation

    def _freeze_again(self) -> None:
        """PEFT sets `requires_grad` of everything whenever adapters come or go."""
        for name, parameter in self.freeze.parts.base.named_parameters():
            parameter.requires_grad_(self.freeze.trains.get(name, False))

    def _add_heads(self) -> None:
        """Over TRL's heads, which it adds in its __init__."""
        if self._heads_are_ours:
            return
        self._heads_are_ours = True
        self._freeze_again()
        models = [unwrap(self.model)]
        if self.ref_model is not None:
            models.append(unwrap(self.accelerator.unwrap_model(self.ref_model)))
        outputs = HEAD_OUTPUTS if self.use_weighting else HEAD_OUTPUTS[:-1]
        for model, wanted in zip(models, (outputs, ("log_probs",)), strict=False):
            # TRL shards the reference as one piece, which every pass collects as a whole.
            always = self._encodes_always and wanted is outputs
            layout = self.args.completion_layout
            add_completion_head(model, layout, outputs=wanted, memory=self.memory, encodes_always=always)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Dataset:
        """Examples given to `evaluate` become numbers; TRL's own tokenisation is not for them."""
        return dataset if isinstance(dataset, Dataset) else self.collator.number(dataset)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL calls this in its __init__, and for new data in `evaluate`, where `reference` is "cache"."""
        self._add_heads()
        reference = self.model if self.ref_model is None else self.ref_model
        starts_from_adapter = isinstance(reference, PeftModel) and not _is_fresh(reference)
        fingerprints = {
            "model": fingerprint_of_model(self.accelerator.unwrap_model(reference), with_adapters=starts_from_adapter),
            "processor": fingerprint_of_processor(self.collator.pairs.processor),
            "max_length": str(self.args.max_length),
            "ld_alpha": str(self.args.ld_alpha),
            "precision": f"{self.accelerator.mixed_precision}",
        }
        examples = [self.collator.examples[number] for number in dataset[ROW]]
        path = Path(self.args.reference_cache_dir) / f"{name}.safetensors"
        columns = load_or_compute(path, examples, fingerprints, lambda: self._reference_of(dataset, batch_size))
        for column, values in columns.items():
            dataset = dataset.add_column(column, values.tolist())
        return dataset

    def _reference_of(self, dataset: Dataset, batch_size: int) -> dict[str, Tensor]:
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.collator))
        model = self.model if self.ref_model is None else self.ref_model
        found: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
        for batch in loader:
            logps = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            for name, values in zip(COLUMNS, logps, strict=True):
                found[name].append(values.float().cpu())
        return {name: torch.cat(values) for name, values in found.items()}

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        with checkpointing_kept(self.model):
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False) -> Tensor:
        # Autocast: ours is the outermost forward of the reference, outside of what accelerate put around it.
        with checkpointing_kept(self.model), self.accelerator.autocast():
            loss = super()._compute_loss(model, inputs, return_outputs)
        self.memory.forget()
        return loss


def _which_reference(
    wanted: Reference | None, model: PreTrainedModel | PeftModel, ref_model: PreTrainedModel | None
) -> Reference:
    is_peft = isinstance(model, PeftModel)
    if wanted is None:
        if ref_model is not None or not is_peft:
            return "copy"
        return "adapter_off" if _is_fresh(model) else "adapter_copy"
    if ref_model is not None and wanted not in ("copy", "cache"):
        raise ValueError(f"reference={wanted!r}, but a ref_model is given: leave one of them out.")
    if wanted in ("adapter_off", "adapter_copy") and not is_peft:
        raise ValueError(f"reference={wanted!r} needs a PeftModel, this is a {type(model).__name__}: say 'copy'.")
    if wanted == "copy" and is_peft and ref_model is None:
        raise ValueError("reference='copy' of a PeftModel would hold the base twice: say 'adapter_copy'.")
    return wanted


def _is_fresh(model: PeftModel) -> bool:
    """Whether the adapter is LoRA that changes nothing yet: it begins with B = 0."""
    second_factors = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    return bool(second_factors) and not any(bool(factor.any()) for factor in second_factors)


def _copy_of(model: PreTrainedModel, shares_frozen: bool) -> PreTrainedModel:
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad} if shares_frozen else {}
    reference = copy.deepcopy(model, frozen)
    return reference.requires_grad_(False).eval()
