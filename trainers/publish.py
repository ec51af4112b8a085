"""Something trained -> a folder that strangers can use, proved by using it as they would, with its card.

Build the folder, write the card, run the card's code in a fresh process, compare with the original; sending it
(publish_upload.py) comes after, and only by wish.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from processing.processing_families import load_processor
from trainers.publish_card import Kind, code_sample, model_card
from trainers.publish_check import Comparison, compare
from trainers.publish_files import CARD, UploadPlan, plan_upload
from trainers.publish_folder import base_of, build_folder, is_native, kind_of
from trainers.publish_record import RunRecord
from trainers.stages import MULTITASK, PRETRAIN

QUESTION = "What is in the picture?"
_PLAIN_STAGES = (PRETRAIN.name, MULTITASK.name)


@dataclass(frozen=True)
class Publication:
    """A folder that is ready to be sent, and how it compared with what it was made from. `left_behind`: files of the
    source that no published model consists of."""

    kind: Kind
    plan: UploadPlan
    left_behind: tuple[str, ...]
    comparison: Comparison


def prepare(
    source: str | Path,
    folder: str | Path,
    name: str,
    record: RunRecord,
    *,
    merged: bool = False,
    has_code: bool = False,
    question: str = QUESTION,
) -> Publication:
    """Builds and checks in `folder` what `name` on the Hub is to hold.

    Args:
        source: a model, an adapter or a processor, as `save_pretrained` or a stage trainer wrote it.
        folder: replaced if this function made it; must not exist otherwise.
        record: what the card says of the training.
        merged, has_code: see `build_folder`.
        question: what the card's code asks about its picture.

    Raises ValueError for whatever keeps the folder from being published: see `build_folder`, `plan_upload`, `compare`.
    """
    source, folder = Path(source), Path(folder)
    if folder.exists():
        if not (folder / CARD).is_file() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and was not made by this command: give another folder.")
        shutil.rmtree(folder)
    if kind_of(source) == "adapter" and not merged and record.base_model is None:
        raise ValueError(f"{source} is an adapter, but the record names no base model for it to be loaded onto.")
    native = is_native(source)
    kind = build_folder(source, folder, merged, has_code, record.base_model)
    base = None if kind_of(source) != "adapter" else base_of(source)
    asked: dict[str, Any] = {
        "is_native": native,
        "is_plain": record.stage in _PLAIN_STAGES,
        "question": question,
    }
    sample = code_sample(kind, name, record.base_model, has_code=has_code, **asked)
    card = model_card(record, name, kind, load_processor(folder).convention, sample)
    (folder / CARD).write_text(str(card), encoding="utf-8")
    plan = plan_upload(folder, has_code)

    # The very text of the card, with the folder in place of the name that does not exist yet.
    published = sample.replace(f'"{name}"', f'"{folder.resolve()}"')
    if kind == "adapter":
        published = published.replace(f'"{record.base_model}"', f'"{_local(str(base))}"')
    local_base = None if base is None else _local(base)
    original = code_sample(kind_of(source), str(source.resolve()), local_base, has_code=False, **asked)
    comparison = compare(published, original, is_merged=merged, without_package=has_code)
    return Publication(kind, plan, plan_upload(source).refused, comparison)


def _local(name: str) -> str:
    """Folders by their whole path, since the code runs elsewhere; Hub names as they are."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def show(publication: Publication, name: str, console: Console) -> None:
    """Prints the files that would go to `name`, those that would not, and the comparison."""
    plan = publication.plan
    table = Table("file", "bytes", "", title=f"{plan.folder} -> {name} ({publication.kind})")
    table.columns[1].justify = "right"
    for file in plan.files:
        table.add_row(file, f"{(plan.folder / file).stat().st_size:,}", "")
    for file in (*publication.left_behind, *plan.refused):
        table.add_row(file, "", "stays here: not part of a model", style="red")
    console.print(table)
    checked = f"Loaded in a fresh process: {publication.comparison}"
    console.print(checked, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Card: {plan.folder / CARD}", highlight=False, soft_wrap=True)
