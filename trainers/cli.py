"""The command `qwenvl`: one word, one function. Heavy imports stay inside the functions, so that --help is quick."""

import typer

from . import cli_chat, cli_convert, cli_data, cli_inspect, cli_publish, cli_train

app = typer.Typer(
    name="qwenvl",
    help="Model, processor and trainers for the Qwen-VL family.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

data = typer.Typer(help="Rows on disk: read them as training does.", no_args_is_help=True)
data.command("check")(cli_data.check)
app.add_typer(data, name="data")

app.command("inspect")(cli_inspect.inspect)
app.command("chat")(cli_chat.chat)

app.command("train")(cli_train.train)
app.command("estimate")(cli_train.estimate)
app.command("merge")(cli_train.merge)
app.command("convert")(cli_convert.convert)
app.command("upload")(cli_publish.upload)
