"""RolloutMixin: what QwenVLGRPOTrainer and QwenVLRLOOTrainer change of TRL's trainers, at their seams.

TRL gives each of the G completions of a prompt its own copy of the pictures, preprocesses them twice, encodes them in
every forward pass, and spreads a group over micro-batches. Here a dataset row is a number; the prompt behind it is
encoded once per batch of rollouts, generated from once, and its group stays together and is scored as one.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import split_tensor_dict

from processing.example import Example, RowError
from processing.pictures import ANYTHING, PictureLimits
from trainers.completion_layout import LayoutName
from trainers.completion_logps import add_completion_head
from trainers.families import unwrap
from trainers.freezing import TrainedParts
from trainers.gathered_weights import gathered_weights
from trainers.optimizer import LearningRates
from trainers.parts_mixin import PartsMixin, checkpointing_kept, freeze_for_preferences
from trainers.rewards import RewardTerm, reads_solutions
from trainers.rollout_checks import check_arguments, check_processor, check_rows
from trainers.rollout_display import RolloutDisplayMixin
from trainers.rollout_sampler import EpochRepeatSampler
from trainers.rollouts import (
    Prompt,
    encode_prompt,
    forbidden_token_ids,
    generation_fields,
    grouped,
    reward_columns,
    scoring_fields,
    stop_token_ids,
    text_before_stop,
)
from trainers.tower_memory import TowerMemory

SCORES = ("log_probs", "entropy", "state_values")


class RolloutMixin(RolloutDisplayMixin, PartsMixin):
    """Put before CheckpointMixin and TRL's trainer. A frozen tower sees each picture once per batch of rollouts.

    Args:
        model: of a family in `trainers.families`, bare or wrapped by PEFT.
        rewards: names of `trainers.rewards.REWARDS` or RewardTerms.
        args: TRL's arguments. `per_device_train_batch_size` counts completions and must hold whole groups of
            `num_generations`.
        train_dataset, eval_dataset: Examples of kind "reward".
        processing_class: the processor, from `load_processor`.
        trained: what trains; the default is all but the tower, or whatever PEFT made trainable.
        learning_rates: of parts with their own; `args.learning_rate` is then not read.
        max_length: tokens that a prompt and its longest completion may have together; None: any. Longer prompts are
            refused: pictures are never cut.
        layout: "tree" computes a prompt once for its completions (trainers/tree_attention.py says for which
            models), "rows" G times.

    Without PEFT the reference model of `beta` > 0 is a frozen copy of `model` as it is now; with PEFT it is the model
    without its adapter, or with a copy of the adapter that came along (see TRL).

    Raises ValueError (RowError by row) for rows, rewards and sizes that do not fit together.
    """

    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        rewards: Sequence[str | RewardTerm],
        args: Any,
        train_dataset: Sequence[Example],
        processing_class: Any,
        eval_dataset: Sequence[Example] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        trained: TrainedParts | None = None,
        learning_rates: LearningRates | None = None,
        max_length: int | None = None,
        layout: LayoutName = "tree",
        limits: PictureLimits = ANYTHING,
    ) -> None:
        self.reward_terms = [RewardTerm(term) if isinstance(term, str) else term for term in rewards]
        self.limits, self.max_length = limits, max_length
        held_out = list(eval_dataset or [])
        check_processor(processing_class)
        check_rows([*train_dataset, *held_out], reads_solutions(self.reward_terms))
        check_arguments(args, len(train_dataset))
        self.examples = [*train_dataset, *held_out]
        is_peft = isinstance(model, PeftModel)
        self.freeze = freeze_for_preferences(model, trained, is_peft)
        self.learning_rates = learning_rates
        base = self.freeze.parts.base
        stops = base.generation_config.eos_token_id = stop_token_ids(base, processing_class.tokenizer)
        given = args.generation_kwargs or {}
        forbidden = sorted({*forbidden_token_ids(base, processing_class), *given.get("suppress_tokens", ())})
        if args.use_vllm:
            args.generation_kwargs = {"logit_bias": dict.fromkeys(forbidden, -100.0), **given}
        # TRL would load the reference from the folder that the model came from, if it came from one.
        beta = args.beta
        copies_reference = beta != 0 and not is_peft and not args.sync_ref_model
        if copies_reference:
            args.beta = 0.0
        # TRL rounds the weights of an adapter on a quantised model to bfloat16, and PEFT sets `requires_grad` again
        # when TRL copies the adapter.
        weights = {name: p.data for name, p in base.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            reward_funcs=[term.reward_function() for term in self.reward_terms],
            args=args,
            train_dataset=_numbered(0, len(train_dataset)),
            eval_dataset=_numbered(len(train_dataset), len(held_out)) if held_out else None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self._check_experts()
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self.freeze.trains.get(name, False))
            if parameter.requires_grad and parameter.dtype != weights[name].dtype:
                parameter.data = weights[name].to(parameter.device)
        if copies_reference:
            args.beta = self.beta = beta
            self.ref_model = self._prepared_reference(base, layout)
        elif self.ref_model is not None:
            add_completion_head(unwrap(self.accelerator.unwrap_model(self.ref_model)), layout, self.temperature)
        # Outside TRL's own head, which its __init__ put on.
        outputs = ("log_probs", "entropy")
        add_completion_head(base, layout, self.temperature, outputs, encodes_always=self._encodes_always)
        # TRL would add the tokenizer's eos even where there is none.
        self.eos_token_ids = stops
        if not self.use_vllm:
            own = {"eos_token_id": stops, "suppress_tokens": forbidden}
            self.generation_config.update(**own)
            self.generation_kwargs.update(own)
        self.tower_memory = TowerMemory(self.freeze)
        self.layout = layout
        self._scored: dict[str, Tensor] = {}
        self._prompts: list[Prompt] = []  # of the rows that are being generated or scored
        self._rewards: Tensor = torch.empty(0)
        self._completions: list[list[dict[str, str]]] = []

    def _prepared_reference(self, base: PreTrainedModel, layout: LayoutName) -> nn.Module:
        reference = deepcopy(base).requires_grad_(False).eval()
        add_completion_head(reference, layout, self.temperature)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    # --- Rows -> prompts -> completions ---

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochRepeatSampler:
        theirs = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            theirs.data_source,
            theirs.mini_repeat_count,
            theirs.batch_size,
            theirs.repeat_count,
            theirs.shuffle,
            theirs.seed,
        )

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # TRL shuffles completions between generating and splitting, which would tear groups apart.
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        parts = self.args.steps_per_generation
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = split_tensor_dict(self._generate_and_score_completions(generation_batch), parts)
        return self._buffered_inputs[self._step % parts]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows, size = [entry["row"] for entry in inputs], self._group_size
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        assert all(len(set(group)) == 1 and len(group) == size for group in groups), "the sampler repeats each row"
        prompts = [self._encode(self.examples[group[0]]) for group in groups]
        self._prompts = [prompt for prompt in prompts for _ in range(size)]
        progress = self.state.global_step / max(1, self.state.max_steps)
        self.reward_weights = torch.tensor([term.weight_at(progress) for term in self.reward_terms])
        with checkpointing_kept(self.model):
            output = self._finish(super()._generate_and_score_completions(reward_columns(self._prompts)))
        output["prompts"] = self._prompts
        scores = self._local_scores().nan_to_num().view(-1, size)
        self._warn(scores, output["completion_mask"])
        if self.log_completions:
            rewards = self._local_rewards()
            names = self.reward_func_names
            self._keep(
                self._prompts, self._completions, names, rewards, output["advantages"], output["completion_mask"]
            )
        return output

    def _encode(self, example: Example) -> Prompt:
        prompt = encode_prompt(example, self.processing_class, self.limits)
        total = len(prompt.input_ids) + self.max_completion_length
        if self.max_length is not None and total > self.max_length:
            raise RowError(
                example.source,
                f"{len(prompt.input_ids)} tokens of prompt and {self.max_completion_length} of a completion are more "
                f"than max_length {self.max_length}: raise it, or lower the pictures' resolution",
            )
        return prompt

    def _finish(self, output: dict[str, Any]) -> dict[str, Any]:
        """For subclasses: what else becomes of a batch of scored completions before it is split."""
        return output

    @property
    def _rows_per_pass(self) -> int:
        args = self.args
        return args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size

    def _local_rewards(self) -> Tensor:
        """(N, functions), of this process's completions; NaN where a function does not apply."""
        first = self.accelerator.process_index * len(self._prompts)
        return self._rewards[first : first + len(self._prompts)]

    def _local_scores(self) -> Tensor:
        """(N,) weighted sums of this process's rewards; NaN where no function applies."""
        rewards = self._local_rewards()
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return scores.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], list[Any] | None, dict[str, Any]]:
        pictures = [list(prompt.pictures) or None for prompt in self._prompts] if self.use_vllm else None
        return [prompt.input_ids for prompt in self._prompts], pictures, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        unique = self._prompts[:: self._group_size]
        self.generation_config.num_return_sequences = self._group_size
        fields = generation_fields(unique)
        ids = [prompt.input_ids for prompt in unique]
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        reshards = plugin is not None and bool(plugin.reshard_after_forward)
        with gathered_weights(self.model_wrapped, reshards), self.tower_memory.around(self.freeze.parts.base, unique):
            return super()._generate_single_turn(ids, None, fields, *args, **kwargs)

    def _as_messages(self, completion_ids: Sequence[Sequence[int]]) -> list[list[dict[str, str]]]:
        """Completions as rewards see them: with the tags of boxes, which TRL's decoding drops, and no end token."""
        tokenizer, stops = self.processing_class.tokenizer, self.eos_token_ids
        return [[{"role": "assistant", "content": text_before_stop(ids, tokenizer, stops)}] for ids in completion_ids]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        self._completions = completions
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        return self._rewards

    # --- Scoring ---

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._prompts = inputs["prompts"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        assert not compute_aux_loss  # _check_experts
        self._scored = self._score(model, input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids))
        return self._scored["log_probs"], self._scored["entropy"] if compute_entropy else None, None

    def _score(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, rows_per_pass: int
    ) -> dict[str, Tensor]:
        """What the model's completion head computes, by name, (N, logits_to_keep) each; rows are `self._prompts`'."""
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-logits_to_keep] = -100
        outputs = []
        base = unwrap(self.accelerator.unwrap_model(model))
        for start in range(0, len(input_ids), rows_per_pass):
            rows = slice(start, start + rows_per_pass)
            groups = grouped(self._prompts[rows])
            with self.accelerator.autocast(), self.tower_memory.around(base, [prompt for prompt, _ in groups]):
                output = model(
                    input_ids=input_ids[rows],
                    attention_mask=attention_mask[rows],
                    labels=labels[rows],
                    fused_lm_head=True,
                    **scoring_fields(groups, input_ids.device),
                )
            # Made by the head: what it was not asked for is absent.
            outputs.append({name: output[name] for name in SCORES if name in output})
        return {name: torch.cat([part[name][:, -logits_to_keep:] for part in outputs]) for name in outputs[0]}


def _numbered(first: int, count: int) -> Dataset:
    return Dataset.from_dict({"row": list(range(first, first + count))})
