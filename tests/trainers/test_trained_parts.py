"""What a recipe says shall learn is what moves in a step, in three families, each part at its own rate."""

import pytest
import torch

from trainers.families import find_parts, unwrap
from trainers.recipe_reading import load_recipe
from trainers.train import build_trainer

LATER = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FROZEN = {part: {"train": "frozen"} for part in ("tower", "adapter", "language_model", "embeddings")}
# Choice -> (overrides of parts, what moves: part names, or "head" and "block 2" for less than a part).
CHOICES = {
    "tower": ({"tower": {"train": "full"}}, {"tower"}),
    "its last block": ({"tower": {"train": "full", "last_blocks": 1}}, {"block 2"}),
    "merger": ({"adapter": {"train": "full"}}, {"adapter"}),
    "language model": ({"language_model": {"train": "full"}}, {"language_model"}),
    "head alone": ({"embeddings": {"train": "full"}, "frozen_patterns": ["embed_tokens"]}, {"head"}),
    "tower through LoRA": ({"tower": {"train": "lora"}}, {"tower"}),
    "all": ({part: {"train": "full"} for part in FROZEN}, {"tower", "adapter", "language_model", "embeddings"}),
}


@pytest.fixture
def recipe(model_folder, rows_file, tmp_path):
    def _recipe(family, parts, *overrides):
        settings = [
            f"model.path={model_folder(family)}",
            f"data.train=[{{path: {rows_file}}}]",
            "data.picture_side=8",
            f"run.output_dir={tmp_path / 'run'}",
            "optimizer.max_steps=1",
            "optimizer.warmup_steps=0.0",
            "optimizer.learning_rate=1e-2",
            "optimizer.global_batch_size=2",
            "hardware.per_device_batch_size=2",
            f"parts={FROZEN | parts}",
            *(["lora={rank: 2, dropout: 0.0}"] if "lora" in str(parts) else []),
        ]
        return load_recipe("cpu_demo", [*settings, *overrides])

    return _recipe


@pytest.mark.slow
@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_moves_what_was_chosen_and_nothing_else(recipe, family, choice):
    overrides, moves = CHOICES[choice]
    trainer = build_trainer(recipe(family, overrides))
    base = unwrap(trainer.model)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    trainer.train()
    # LoRA's second matrix starts at zero: in a first step only it moves.
    changed = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
    parts = find_parts(base)
    if moves == {"head"}:
        assert changed == {"lm_head.weight"}
    elif moves == {"block 2"}:
        # The last of three blocks, and what follows the blocks.
        blocks = {parts.block_of(name) for name in changed}
        assert 2 in blocks
        assert blocks <= {2, None}
        assert {parts.part_of[name] for name in changed} == {"tower"}
        assert not any("patch_embed" in name or "pos_embed" in name for name in changed)
    else:
        assert {parts.part_of[name] for name in changed} == moves
        assert all("lora_" in name for name in changed) is (choice == "tower through LoRA")


@pytest.mark.parametrize("family", LATER)
def test_each_part_moves_by_its_own_rate(recipe, family):
    """One step of Adam moves a weight with a clear gradient by its rate: a thousandth, a hundredth, a tenth."""
    everything = {part: {"train": "full"} for part in FROZEN}
    everything["tower"] |= {"learning_rate": 1e-3}
    everything["adapter"] |= {"learning_rate": 1e-1}
    trainer = build_trainer(recipe(family, everything, "optimizer.weight_decay=0.0", "optimizer.epsilon=1e-12"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    parts = find_parts(trainer.model)
    largest = dict.fromkeys(FROZEN, 0.0)
    for name, p in trainer.model.named_parameters():
        moved = float((p.detach() - before[name]).abs().max())
        largest[parts.part_of[name]] = max(largest[parts.part_of[name]], moved)
    wanted = {"tower": 1e-3, "adapter": 1e-1, "language_model": 1e-2, "embeddings": 1e-2}
    assert largest == {part: pytest.approx(rate, rel=1e-2) for part, rate in wanted.items()}


@pytest.mark.parametrize("family", LATER)
def test_recomputation_is_on_in_the_language_model_alone(recipe, family):
    parts = {"adapter": {"train": "full"}, "language_model": {"train": "lora", "checkpointing": True}}
    base = unwrap(build_trainer(recipe(family, parts)).model)
    assert base.model.language_model.is_activation_checkpointing
    assert not base.model.visual.is_activation_checkpointing


def test_8bit_states_run_on_the_cpu_and_paged_ones_say_that_they_are_not_paged_there(recipe):
    parts = {"language_model": {"train": "full"}}
    trainer = build_trainer(recipe("qwen2_5_vl", parts, "optimizer.states=8bit"))
    trainer.train()
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    paged = build_trainer(recipe("qwen2_5_vl", parts, "optimizer.states=8bit_paged"))
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
            paged.train()
        for one, other in zip(trainer.model.parameters(), paged.model.parameters(), strict=True):
            assert torch.equal(one, other)
