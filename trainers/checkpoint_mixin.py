"""CheckpointMixin: the checkpoints of trainers/checkpoints.py, at the seams of transformers' Trainer or a subclass."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from trainers import checkpoints


class CheckpointMixin(Trainer):
    """Put before a Trainer (`class MyTrainer(CheckpointMixin, DPOTrainer)`): its runs resume bit for bit, the best
    model is the one that is loaded at the end, and a kill at any moment leaves earlier checkpoints usable.

    Checkpoints keep the names of the modules; `save_model` exports under the published names. PEFT, DeepSpeed and FSDP
    write and read their own formats, in the same unfinished folder and with the same rename.
    """

    _is_saving_checkpoint = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_LogWhenSaving())

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains, and returns steps, mean loss and metrics.

        `resume_from_checkpoint`: a checkpoint folder, "auto" for the last whole one in `args.output_dir` or a fresh
        start if there is none, or True for the last whole one. Raises ValueError for a folder that is not whole.
        """
        return super().train(resume_from_checkpoint=self._find_checkpoint(resume_from_checkpoint), **kwargs)

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
        unfinished = checkpoints.unfinished_run_dir(run_dir) / name
        if self.args.should_save:
            checkpoints.remove_leftovers(run_dir)
        self.accelerator.wait_for_everyone()
        self._is_saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving_checkpoint = False
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.finish(run_dir, name)
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint)
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
        if self._has_own_format:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        if self._has_own_format:
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, checkpoint: str) -> None:
        checkpoints.load_weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), Path(checkpoint))

    @property
    def _has_own_format(self) -> bool:
        return isinstance(self.model, PeftModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled


class _LogWhenSaving(TrainerCallback):
    """Logs whenever something may be saved: the loss since the last log is in no checkpoint, so a resumed run would
    report another mean."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save or control.should_evaluate
        return control

    on_epoch_end = on_step_end
