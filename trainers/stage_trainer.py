"""StageTrainer: transformers' Trainer with this package's parts, loss, optimizer groups and checkpoints.

Each stage is a subclass that names its `Stage` (pretrain.py, multitask.py, sft.py). Only seams of Trainer are
overridden; loop, logging, evaluation and distribution are its own.
"""

import inspect
import logging
from collections.abc import Callable
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
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from trainers import checkpoints
from trainers.arguments import StageArguments
from trainers.freezing import TrainedParts, freeze
from trainers.loss import supervised_loss, weight_of
from trainers.optimizer import parameter_groups
from trainers.stages import Stage

logger = logging.getLogger(__name__)


class StageTrainer(Trainer):
    """Trains one stage. Use a subclass; what is said here holds for all of them.

    The model must be of a family in `trainers.families`, bare or wrapped by PEFT. The batches that `data_collator`
    makes hold `labels` (B, L), aligned with `input_ids` and -100 where there is no loss, optionally `loss_weights`
    (B, L) of floats, and what the model's forward takes.

    `trained` overrides what the stage trains; `args.last_tower_blocks` and `args.freeze_patterns` narrow it.

    The loss is the mean over all supervised tokens of the step (weighted, if weights are given), over all
    micro-batches and devices. After the first step each part is checked to have moved, or not, as it should.

    Raises ValueError for settings that cannot be kept (see StageArguments), for nn.DataParallel, and for a model whose
    forward has no `logits_to_keep`.
    """

    stage: ClassVar[Stage]
    optimizer: torch.optim.Optimizer | None
    _is_saving_checkpoint = False

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
    ) -> None:
        if not isinstance(args, StageArguments):
            raise ValueError(
                f"args is a {type(args).__name__}: use trainers.arguments.StageArguments, which extends it."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"nn.DataParallel over {args.n_gpu} devices would tear pictures from their rows: start one process "
                "per device with torchrun or accelerate launch."
            )
        self.freeze = freeze(model, trained or _trained_parts(self.stage, args))
        if "logits_to_keep" not in inspect.signature(self.freeze.parts.base.forward).parameters:
            raise ValueError(
                f"{type(self.freeze.parts.base).__name__}.forward has no logits_to_keep: logits cannot be limited "
                "to supervised positions."
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_GradientCheck(self), _LogWhenSaving(), *(callbacks or [])],
        )
        # Trainer asks the model; here the loss is computed outside it, and always scaled for the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.saw_pictures = False

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains, and returns steps, mean loss and metrics.

        `resume_from_checkpoint`: a checkpoint folder, "auto" for the last whole one in `args.output_dir` or a fresh
        start if there is none, or True for the last whole one. Raises ValueError for a folder that is not whole.
        """
        if self.is_world_process_zero():
            Console().print(self.freeze.table(f"stage {self.stage.name}: what trains"))
        with self.freeze.tower_without_graph():
            return super().train(resume_from_checkpoint=self._find_checkpoint(resume_from_checkpoint), **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if model.training:
            self.freeze.set_modes()
            self.saw_pictures = self.saw_pictures or inputs.get("pixel_values") is not None
        loss, outputs = supervised_loss(
            model, inputs, num_items_in_batch, self.args.label_smoothing_factor, self.args.z_loss
        )
        if num_items_in_batch is not None:
            # The weight is that of all devices, and DistributedDataParallel averages what they contribute.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

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
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(settings):
                raise ValueError(f"optim={self.args.optim} makes its own parameter groups: choose a plain optimizer.")
            groups = parameter_groups(model, self.args.learning_rates, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    # Checkpoints: what trainers/checkpoints.py says, at Trainer's seams.

    def _find_checkpoint(self, wanted: str | Path | bool | None) -> str | None:
        if wanted is None or wanted is False:
            return None
        run_dir = Path(self.args.output_dir)
        if wanted is True or wanted == "auto":
            found = checkpoints.find_last_checkpoint(run_dir)
            if found is None and wanted is True:
                raise ValueError(
                    f"{run_dir} has no whole checkpoint to resume from: pass 'auto' to start afresh then."
                )
            return None if found is None else str(found)
        problems = checkpoints.what_is_missing(Path(wanted))
        if problems:
            raise ValueError(f"{wanted} is not a whole checkpoint of a stage trainer: {'; '.join(problems)}.")
        return str(wanted)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(checkpoints.unfinished_run_dir(Path(run_dir))) if self._is_saving_checkpoint else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.remove_leftovers(run_dir)
        self.accelerator.wait_for_everyone()
        self._is_saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            unfinished = Path(self._get_output_dir(trial)) / name
        finally:
            self._is_saving_checkpoint = False
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.finish(run_dir, name)
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer calls this before the checkpoint has its name; `_save_checkpoint` pushes afterwards."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self._is_saving_checkpoint or isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            assert output_dir is not None
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_by_itself:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoints.load_weights(self.freeze.parts.base, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._loads_by_itself:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            checkpoints.load_weights(self.freeze.parts.base, Path(self.state.best_model_checkpoint))

    @property
    def _loads_by_itself(self) -> bool:
        """PEFT, DeepSpeed and FSDP have their own formats, which Trainer reads back under the names it wrote."""
        return isinstance(self.model, PeftModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled


def _trained_parts(stage: Stage, args: StageArguments) -> TrainedParts:
    return TrainedParts(stage.parts, args.last_tower_blocks, tuple(args.freeze_patterns))


class _GradientCheck(TrainerCallback):
    """Checks the gradients of the first step, and of later ones until a step with pictures has shown the tower's."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer
        self.judged = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # They keep gradients in buffers of their own, out of reach.
        self.judged = self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled
        if self.judged:
            logger.warning("Which parts get gradients is not checked under DeepSpeed and FSDP.")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.judged:
            self.judged = self.trainer.freeze.check_gradients(self.trainer.saw_pictures)
        self.trainer.saw_pictures = False


class _LogWhenSaving(TrainerCallback):
    """Logs whenever something may be saved: the loss since the last log is in no checkpoint, so a resumed run would
    report another mean."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save or control.should_evaluate
        return control

    on_epoch_end = on_step_end
