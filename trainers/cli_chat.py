"""`qwenvl chat`: questions about pictures and videos, answered in the terminal; boxes in pixels, drawn on request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


def chat(
    model: Annotated[str, typer.Option(help="Folder of a model and its processor, or their name on the Hub.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Picture: a file or a URL. Repeat the option for several.")
    ] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video: a file or a URL. Comes after the pictures.")] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="Ask this and end. Repeat it for several turns; without it, you are asked."),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(help="Write the picture with the boxes of the last answer that has any to this file."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    network: Annotated[bool, typer.Option(help="Allow pictures that must be fetched from the network.")] = False,
) -> None:
    """Ask a model about pictures and videos; later questions may refer to earlier answers. Exit 2 if refused."""
    from rich.console import Console
    from rich.markup import escape

    from processing.drawing import draw_shapes
    from processing.pictures import PictureLimits, load_picture
    from processing.videos import open_clip
    from trainers.conversation import Conversation

    console = Console()
    try:
        limits = PictureLimits(allow_network=network)
        if not image and not video:
            raise ValueError("nothing to ask about: give --image or --video")
        pictures = [load_picture(source, limits) for source in image or ()]
        videos = [open_clip({"type": "video", "video": source}, limits).part for source in video or ()]
        conversation = Conversation.load(model, pictures, max_new_tokens, videos)
    except (ValueError, OSError) as error:
        console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}")
        raise typer.Exit(2) from error
    for asked in _questions(question, console):
        answer = conversation.ask(asked)
        console.print(f"[bold green]{escape(answer.text.strip() or '(no words)')}[/bold green]", highlight=False)
        for shape in answer.shapes:
            numbers = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in shape.corners)
            where = f" in picture {shape.image_index + 1}" if len(pictures) > 1 else ""
            console.print(f"  {escape(shape.label or shape.kind)}: {shape.kind} {numbers}{where}", highlight=False)
        for problem in answer.problems:
            console.print(f"  [yellow]unreadable: {escape(problem.piece)} ({escape(problem.reason)})[/yellow]")
        if draw is not None and answer.shapes:
            index = answer.shapes[0].image_index
            shapes = [shape for shape in answer.shapes if shape.image_index == index]
            draw_shapes(pictures[index], shapes, min_side=300).save(draw)
            console.print(f"  drawn: {escape(str(draw))}", highlight=False)


def _questions(given: list[str] | None, console: Any) -> Iterator[str]:
    """The questions of the command line, or what is typed until an empty line or the end of the input."""
    if given:
        for question in given:
            console.print(question, style="bold", markup=False, highlight=False)
            yield question
        return
    console.print("Ask about the picture; an empty line ends.", style="dim")
    while True:
        try:
            question = console.input("[bold]? [/bold]").strip()
        except EOFError:
            return
        if not question:
            return
        yield question
