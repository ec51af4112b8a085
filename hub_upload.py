"""A folder on disk -> a private model repository on the Hub, after a look at what would go there.

    python hub_upload.py runs/demo/model me/my-qwen-vl            # dry run: lists the files, sends nothing
    python hub_upload.py runs/demo/model me/my-qwen-vl --upload   # creates the repository (private) and sends them

Only the kinds of file that a published model consists of are ever sent. Optimizer states, data sets, keys and anything
else the list below does not know are refused by name, so that nothing leaves the machine by accident.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer

PUBLISHED = (
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
CONFIGS = ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class UploadPlan:
    """What of `folder` would be sent (`files`, names relative to it) and what is refused (`refused`)."""

    folder: Path
    files: tuple[str, ...]
    refused: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def plan_upload(folder: str | Path) -> UploadPlan:
    """Sort the files of `folder` into those a model consists of and all others.

    Raises ValueError where the folder is none, holds no model, adapter or processor, or lacks a weight shard that its
    index names.

    Example:
        >>> plan_upload("runs/demo/model").files
        ('chat_template.jinja', 'config.json', 'model.safetensors', ...)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder that save_pretrained wrote.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = tuple(name for name in names if any(fnmatch(name, pattern) for pattern in PUBLISHED) and "/" not in name)
    if not set(CONFIGS) & set(files):
        raise ValueError(f"{folder} holds none of {', '.join(CONFIGS)}: it is no saved model, adapter or processor.")
    for index in (name for name in files if name.endswith(".index.json")):
        shards = set(json.loads((folder / index).read_text())["weight_map"].values())
        missing = sorted(shards - set(files))
        if missing:
            raise ValueError(
                f"{folder / index} names {len(shards)} shards, {len(shards) - len(missing)} are here; "
                f"missing: {', '.join(missing)}. Save the model again."
            )
    return UploadPlan(folder, files, tuple(sorted(set(names) - set(files))))


def upload(plan: UploadPlan, repo_id: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Create `repo_id` where it does not exist (an existing one keeps its visibility), send the plan's files in one
    commit and return the address of that commit. Files that are already there and not in the plan stay."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=plan.folder,
        allow_patterns=list(plan.files),
        commit_message="Upload with qwenvl",
    )
    return str(commit)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder that save_pretrained wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub: user/model.")],
    send: Annotated[bool, typer.Option("--upload", help="Send the files; without it they are only listed.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Create the repository public instead of private.")] = False,
) -> None:
    """List what of FOLDER belongs into a model repository; with --upload, send it to REPO_ID."""
    from rich.console import Console
    from rich.table import Table

    try:
        plan = plan_upload(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    table = Table("file", "size", "", title=f"{folder} -> {repo_id}")
    for name in plan.files:
        table.add_row(name, f"{(plan.folder / name).stat().st_size:,}", "")
    for name in plan.refused:
        table.add_row(name, f"{(plan.folder / name).stat().st_size:,}", "[red]refused: not part of a model[/red]")
    console = Console()
    console.print(table)
    if send:
        console.print(f"Sent: {upload(plan, repo_id, private=not public)}")
    else:
        kind = "public" if public else "private"
        console.print(f"Dry run: {len(plan.files)} files, {plan.num_bytes:,} bytes. Add --upload to send ({kind}).")


if __name__ == "__main__":
    typer.run(main)
