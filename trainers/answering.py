"""AnsweringMixin: a Trainer that also asks its model held-out questions at every evaluation, and shows the answers."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from processing.coordinates import Shape
from processing.drawing import draw_shapes
from trainers.evaluation import Answer, GenerationEvaluation

COLOURS: dict[str | None, str] = {"truth": "#009e73", "answer": "#d55e00"}
MIN_SIDE = 224  # small pictures are enlarged for drawing, in pixels


class AnsweringMixin(Trainer):
    """Put before a Trainer. With `generation` set, each evaluation also logs "eval_<task>/<score>" of generated
    answers, writes all of them to `output_dir`/answers/step-000100.jsonl, and draws `generation.num_drawn` of them
    beside it (and in TensorBoard, where that is reported to).

    Under DDP each process asks its share; under FSDP and ZeRO-3 all ask everything, since every answer takes them all.
    """

    generation: GenerationEvaluation | None = None

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.generation is not None:
            model = self.accelerator.unwrap_model(self.model)
            answers = self._ask(model, self.generation)
            measured = self.generation.measure(answers)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
            if self.is_world_process_zero():
                self._show(answers[: self.generation.num_drawn], answers)
        return output

    def _ask(self, model: nn.Module, generation: GenerationEvaluation) -> list[Answer]:
        """All answers, on every process; of those that are not drawn, without pictures where they travelled."""
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if count == 1 or is_sharded or len(generation.examples) < count:
            return generation.answers(model, self.processing_class)
        own = replace(generation, examples=generation.examples[rank::count]).answers(model, self.processing_class)
        own = [
            answer if rank + count * place < generation.num_drawn else replace(answer, pictures=())
            for place, answer in enumerate(own)
        ]
        answers = dict(gather_object([(rank + count * place, answer) for place, answer in enumerate(own)]))
        return [answers[place] for place in range(len(generation.examples))]

    def _show(self, drawn: Sequence[Answer], answers: Sequence[Answer]) -> None:
        name = f"step-{self.state.global_step:06d}"
        folder = Path(self.args.output_dir) / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_record(answer), ensure_ascii=False) for answer in answers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        boards = [c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback) and c.tb_writer]
        for number, answer in enumerate(answer for answer in drawn if answer.pictures):
            picture = draw_answer(answer)
            picture.save(folder / f"{name}-{number:02d}.png")
            for board in boards:
                board.tb_writer.add_image(
                    f"answers/{number}", np.asarray(picture), self.state.global_step, dataformats="HWC"
                )


def draw_answer(answer: Answer) -> Image.Image:
    """The picture that the shapes lie in (the last one, where there are none), with the true shapes in green and the
    answer's in orange.

    Raises:
        ValueError: the example has no picture.
    """
    if not answer.pictures:
        raise ValueError(f"{answer.example.source.where} has no picture to draw on.")
    shapes = [*answer.true_shapes, *answer.parsed.shapes]
    index = shapes[0].image_index if shapes else len(answer.pictures) - 1

    def named(shapes: Sequence[Shape], label: str) -> list[Shape]:
        return [replace(shape, label=label) for shape in shapes if shape.image_index == index]

    marked = [*named(answer.true_shapes, "truth"), *named(answer.parsed.shapes, "answer")]
    return draw_shapes(answer.pictures[index], marked, min_side=MIN_SIDE, colours=COLOURS)


def _record(answer: Answer) -> dict[str, Any]:
    return {
        "where": answer.example.source.where,
        "task": answer.example.task,
        "answer": answer.raw,
        "truths": list(answer.truths),
        "true_boxes": [[box.x1, box.y1, box.x2, box.y2] for box in answer.true_boxes],
        "boxes": [[box.x1, box.y1, box.x2, box.y2] for box in answer.boxes],
        "problems": [f"{problem.piece}: {problem.reason}" for problem in answer.parsed.problems],
    }
