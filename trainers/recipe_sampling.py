"""The section `sampling` of a recipe: what is sampled, what it is rewarded for, and how the policy learns from it."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
NotNegative = Annotated[float, Field(ge=0)]
UpToOne = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=CHECKED)
class Reward:
    """One summand of the reward: a name of trainers/rewards.py:REWARDS and its weight.

    `final_weight`: what the weight reaches, in a line, at the end of training; null: it stays. `settings`: of the
    reward function, such as {longest: 128} of overlong.
    """

    name: str
    weight: float = 1.0
    final_weight: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from trainers.rewards import RewardTerm  # here, since it loads torch, and reading a recipe should not

        RewardTerm(self.name, self.weight, self.final_weight, self.settings)


@dataclass(frozen=True, config=CHECKED)
class Values:
    """What stage ppo has besides: discount and lambda of the advantages, weight of the value loss, and the KL of an
    answer that `beta` is steered to (null: beta is constant)."""

    gamma: UpToOne = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    coefficient: NotNegative = 0.1
    kl_target: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, config=CHECKED)
class SamplingSection:
    """Learning from one's own answers (stages grpo, rloo, ppo) to rows with a `solution`. Names are TRL's where it has
    some; `optimizer.global_batch_size` and `hardware.per_device_batch_size` count completions.

    `rewards`: at least one. `group`: completions per prompt; a device takes whole groups. `longest`: tokens of a
    completion. `beta`: weight of the KL to the model as it was; 0 keeps no reference. `clip`: how far a probability
    may move per batch, as a ratio. `passes`: how often each batch is learned from. `loss`: which of GRPO's losses.
    `values`: for stage ppo. `layout`: "tree" computes a prompt once per group, "rows" once per completion. `vllm`:
    sample with vLLM, by TRL's own switch. `show`: keep a page of completions at every log.
    """

    rewards: tuple[Reward, ...]
    group: Annotated[int, Field(ge=2)] = 8
    longest: Annotated[int, Field(gt=0)] = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: UpToOne = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    beta: NotNegative = 0.0
    clip: Annotated[float, Field(gt=0)] = 0.2
    passes: Annotated[int, Field(gt=0)] = 1
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    values: Values | None = None
    layout: Literal["tree", "rows"] = "tree"
    vllm: bool = False
    show: bool = True

    def __post_init__(self) -> None:
        names = [reward.name for reward in self.rewards]
        if not names or len(set(names)) < len(names):
            raise ValueError("sampling.rewards names a reward twice or none")
