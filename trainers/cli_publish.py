"""`qwenvl upload`: a trained model, adapter or processor to the Hub, after it was tried as a stranger would."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upload(
    source: Annotated[
        Path, typer.Argument(help="Folder with a model, an adapter or a processor: final/ or a checkpoint of a run.")
    ],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub: user/model.")],
    send: Annotated[bool, typer.Option("--upload", help="Send it; without, everything else is done.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Create the repository public instead of private.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Publish the adapter merged into its base.")] = False,
    code: Annotated[
        bool, typer.Option("--code", help="Add the Python files that load it without this package.")
    ] = False,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run that the card is written from; by default around SOURCE.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where to build what is sent; by default published/ beside SOURCE.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model's name on the Hub, where the run names a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the base model, where it is not known.")] = None,
    question: Annotated[str, typer.Option(help="What the card's code asks.")] = "What is in the picture?",
) -> None:
    """Build the folder, write its card, load it in a fresh process, compare; with --upload, send it to REPO_ID."""
    from rich.console import Console

    from trainers.publish import prepare, show
    from trainers.publish_record import read_record
    from trainers.publish_upload import upload as send_plan

    console = Console()
    try:
        record = read_record(run or source.resolve().parent, base_model, license)
        with console.status("building, loading in a fresh process, comparing"):
            found = prepare(
                source,
                folder or source.resolve().parent / "published",
                repo_id,
                record,
                merged=merge,
                has_code=code,
                question=question,
            )
        show(found, repo_id, console)
        if send:
            console.print(f"Sent: {send_plan(found.plan, repo_id, private=not public)}", soft_wrap=True)
        else:
            kind = "public" if public else "private"
            console.print(
                f"Dry run: {len(found.plan.files)} files, {found.plan.num_bytes:,} bytes. "
                f"Add --upload to send them ({kind}).",
                highlight=False,
            )
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
