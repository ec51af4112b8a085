"""The command `qwenvl`: one word, one function. Heavy imports stay inside the functions, so that --help is quick."""

import typer

app = typer.Typer(
    name="qwenvl",
    help="Model, processor and trainers for the Qwen-VL family.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
