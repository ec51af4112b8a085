"""StageTrainer: transformers' Trainer with this package's parts, loss, optimizer groups and checkpoints.

Each stage is a subclass that names its `Stage` (pretrain.py, multitask.py, sft.py). Only seams of Trainer are
overridden; loop, logging, evaluation and distribution are its own.
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from processing.processing_qwenvl import QwenVLProcessor
from trainers.answering import AnsweringMixin
from trainers.arguments import StageArguments
from trainers.blank_pictures import tower_in_every_forward
from trainers.checkpoint_mixin import CheckpointMixin
from trainers.cpu_sharding import CpuShardingMixin
from trainers.evaluation import GenerationEvaluation
from trainers.example_batches import ExampleCollator, at_stage_resolution
from trainers.feature_cache import FeatureCache
from trainers.freezing import TrainedParts, freeze
from trainers.loss import supervised_loss, weight_of
from trainers.monitoring import StepMonitor
from trainers.optimizer import build_optimizer
from trainers.packed_examples import PackedRowsCollator, pack_examples
from trainers.stages import Stage

logger = logging.getLogger(__name__)


class StageTrainer(CpuShardingMixin, AnsweringMixin, CheckpointMixin):
    """Trains one stage. Use a subclass; what is said here holds for all of them.

    Args:
        model: of a family in `trainers.families`, bare or wrapped by PEFT.
        train_dataset, eval_dataset: with `data_collator`, whatever it takes. Without, `processing.rows.Example`, which
            `processing_class` encodes in the stage's label style and resolution (see trainers/example_batches.py).
            With `args.packing` the training rows are packed, at the start (trainers/packed_examples.py).
        data_collator: makes batches with `labels` (B, L), aligned with `input_ids` and -100 where there is no loss,
            optionally `loss_weights` (B, L) of floats, and what the model's forward takes.
        processing_class: the processor; it is saved in every checkpoint.
        trained: what trains, instead of what the stage says with `args.last_tower_blocks` and `args.freeze_patterns`.
        generation: held-out examples to answer at every evaluation; their scores are logged beside `eval_loss`.

    The loss is the mean over all supervised tokens of the step (weighted, if weights are given), over all
    micro-batches and devices. After the first step each part is checked to have got a gradient, or none, as it should.

    Raises ValueError for settings that cannot be kept (see StageArguments), for nn.DataParallel, and for a model whose
    forward has no `logits_to_keep`.
    """

    stage: ClassVar[Stage]
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: StageArguments,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        trained: TrainedParts | None = None,
        generation: GenerationEvaluation | None = None,
    ) -> None:
        if not isinstance(args, StageArguments):
            raise ValueError(f"args is a {type(args).__name__}: use trainers.arguments.StageArguments.")
        if args.n_gpu > 1:
            raise ValueError(
                f"nn.DataParallel over {args.n_gpu} devices would tear pictures from their rows: start one process "
                "per device with torchrun or accelerate launch."
            )
        self.freeze = freeze(model, _what_trains(self.stage, args, trained))
        base = self.freeze.parts.base
        if "logits_to_keep" not in inspect.signature(base.forward).parameters:
            raise ValueError(
                f"{type(base).__name__}.forward has no logits_to_keep, to limit logits to supervised positions."
            )
        if data_collator is None:
            if processing_class is None:
                raise ValueError(
                    "Give processing_class (a processor) to train on Examples, or data_collator for other rows."
                )
            processing_class = at_stage_resolution(processing_class, base.config, self.stage, args.resolution)
            data_collator = examples_collator = ExampleCollator(processing_class, self.stage, args.max_length)
            if args.packing:
                assert args.max_length is not None  # StageArguments refuses packing without it
                data_collator = PackedRowsCollator.for_model(base, examples_collator)
                if train_dataset is not None:
                    train_dataset = pack_examples(train_dataset, examples_collator, args.max_length, args.seed)
        elif (args.resolution, args.max_length, args.packing) != (None, None, False):
            raise ValueError(
                f"resolution={args.resolution}, max_length={args.max_length} and packing={args.packing} say how "
                "Examples become batches, but a data_collator is given, which decides that itself: leave one or the "
                "other out."
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_GradientCheck(self), *(callbacks or [])],
        )
        # Trainer asks the model; here the loss is computed outside it, and always scaled for the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.saw_pictures = False
        if self.stage.label_style == "chat" and isinstance(processing_class, QwenVLProcessor):
            # Its tokenizer's end token is <|endoftext|>, but the answers of this stage end with <|im_end|>.
            base.generation_config.eos_token_id = processing_class.stop_token_ids
        self.generation = generation
        self.monitor = StepMonitor(self.freeze.parts, self.freeze.trains)
        cache_dir = args.feature_cache_dir
        self.feature_cache = None if cache_dir is None else FeatureCache(self.freeze.parts, cache_dir)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `CheckpointMixin.train`. Prints which parts train; a frozen tower runs without a graph meanwhile."""
        self.monitor.restart()
        if self.is_world_process_zero():
            Console().print(self.freeze.table(f"stage {self.stage.name}: what trains"))
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        # Of text alone, tower and adapter get no gradient: where nothing else trains, there would be no backward pass.
        only_vision = not any(self.freeze.count(part)[0] for part in ("language_model", "embeddings"))
        with ExitStack() as during_training:
            during_training.enter_context(self.freeze.tower_without_graph())
            if is_sharded or only_vision:
                during_training.enter_context(tower_in_every_forward(self.freeze.parts, is_sharded))
            return super().train(resume_from_checkpoint, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        # In evaluation the plain loss, whose exponential is the perplexity.
        label_smoothing = z_loss = 0.0
        if model.training:
            label_smoothing, z_loss = self.args.label_smoothing_factor, self.args.z_loss
            self.freeze.set_modes()
            self.saw_pictures |= not {"pixel_values", "pixel_values_videos"}.isdisjoint(inputs)
            self.monitor.observe(inputs)
        with nullcontext() if self.feature_cache is None else self.feature_cache.serving(inputs):
            loss, outputs = supervised_loss(model, inputs, num_items_in_batch, label_smoothing, z_loss)
        if num_items_in_batch is not None:
            # The weight is that of all devices, and DistributedDataParallel averages what they contribute.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.monitor.figures(self.args.device))
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Summed weight of the targets of one step, over its micro-batches and all devices."""
        if not batch_samples:
            return None
        weight = self.accelerator.gather(weight_of(batch_samples).to(device)).sum()
        if not weight > 0:
            raise ValueError(
                f"Step {self.state.global_step + 1} has no supervised token in any of its "
                f"{sum(len(batch['labels']) for batch in batch_samples)} rows: every label is -100 or has weight 0. "
                "Check that answers are not cut off by the length limit."
            )
        return weight

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            self.optimizer = build_optimizer(self, model, self.args.learning_rates)
        return self.optimizer


def _what_trains(stage: Stage, args: StageArguments, trained: TrainedParts | None) -> TrainedParts:
    if trained is None:
        return TrainedParts(stage.parts, args.last_tower_blocks, tuple(args.freeze_patterns))
    if args.last_tower_blocks is not None or args.freeze_patterns:
        raise ValueError(
            f"last_tower_blocks={args.last_tower_blocks} and freeze_patterns={args.freeze_patterns} narrow what the "
            "stage trains, but `trained` is given instead of it: put them there."
        )
    return trained


class _GradientCheck(TrainerCallback):
    """Checks the gradients of the first step, and of later ones until a step with pictures has shown the tower's."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer
        self.has_gradients = True
        self.judged = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # They keep gradients in buffers of their own, out of reach.
        self.has_gradients = not (self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled)
        self.judged = not self.has_gradients
        if self.judged:
            logger.warning("Which parts get gradients is not checked under DeepSpeed and FSDP.")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.judged:
            self.judged = self.trainer.freeze.check_gradients(self.trainer.saw_pictures)
        if self.has_gradients and (state.global_step + 1) % state.logging_steps == 0:
            self.trainer.monitor.observe_gradients()
        self.trainer.saw_pictures = False
