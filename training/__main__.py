"""Commands that need no server: train, finetune, evaluate, predict, import, export, quantize,
info.

Each command reads its options, drives a function of this package and prints what comes back. torch
is imported inside the commands, so that `--help` and the server's own commands answer at once.
"""

import typer

from training import model_commands, train_commands
from training.commands import Commands

commands = typer.Typer(
    name="pytorchlib",
    cls=Commands,
    help="Train, serve, evaluate, fine-tune and promote PyTorch models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@commands.callback()
def pytorchlib() -> None:
    """Train, serve, evaluate, fine-tune and promote PyTorch models."""


commands.command("train")(train_commands.train_command())
commands.command("finetune")(train_commands.finetune_command())
commands.command("import")(model_commands.import_model)
commands.command("export")(model_commands.export_model)
commands.command("quantize")(model_commands.quantize_model)
commands.command("evaluate")(model_commands.evaluate_model)
commands.command("predict")(model_commands.predict_model)
commands.command("info")(model_commands.info)


if __name__ == "__main__":
    commands()
