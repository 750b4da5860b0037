"""The ``embcomp`` command: LightningCLI for training, plus commands with a module of their own.

``embcomp fit | validate | test | predict`` take LightningCLI's options and configuration files, which compose::

    embcomp fit -c examples/dlrm.yaml -c callbacks/fiited.yaml --trainer.max_epochs 3
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from lightning_embcomp.stack import quiet_third_party


class Command(NamedTuple):
    """A command besides LightningCLI's.

    Its module is imported only when the command runs, and holds ``add_arguments(parser: ArgumentParser) -> None``
    and ``run(args: Namespace) -> int | None``, which returns the exit status.
    """

    module: str
    """Dotted name of the module."""

    help: str
    """One line for ``embcomp --help``."""


TRAINER_COMMANDS = {
    "fit": "train a model, with validation after each epoch",
    "validate": "evaluate a model on the validation split",
    "test": "evaluate a model on the test split",
    "predict": "predict click probabilities",
}
"""What LightningCLI runs, with the line for ``embcomp --help``."""

COMMANDS = {
    "consolidate": Command(
        "lightning_embcomp.checkpoints.command", "write a sharded run's checkpoint directory as one file"
    ),
    "export": Command("lightning_embcomp.export.command", "turn a checkpoint into low-precision tables that serve"),
    "plan": Command(
        "lightning_embcomp.planners.command", "say which rank would hold which table, with and without compression"
    ),
    "report": Command("lightning_embcomp.report.command", "account for every byte of a trained model"),
}
"""The other commands; one line here adds one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``embcomp``.

    Args:
        argv: Arguments after the program's name; by default those of the process.

    Raises:
        SystemExit: With the command's status; 2 if the arguments cannot be understood.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        from importlib.metadata import version

        print(f"embcomp {version('lightning-embcomp')}")
    elif command in COMMANDS:
        _run_command(command, arguments[1:])
    elif command in TRAINER_COMMANDS:
        # LightningCLI reads sys.argv itself, and warns if it is given arguments beside it.
        _run_trainer(None if argv is None else arguments)
    else:
        print(_unknown(command), file=sys.stderr)
        raise SystemExit(2)


class _CommandParser(argparse.ArgumentParser):
    """A parser that answers a misspelt option with the nearest one, in two lines."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # noqa: ANN401
        """Parse; an option that does not exist is named before arguments that are missing."""
        known = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        for text in args or []:
            name = text.partition("=")[0]
            if text == "--":
                break
            if text.startswith("--") and name not in known:
                self.error(f"unknown option {name!r}{_nearest(name, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message, and exit with status 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        print(f"`{self.prog} --help` lists all options.", file=sys.stderr)
        raise SystemExit(2)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _run_command(name: str, arguments: list[str]) -> None:
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = _CommandParser(
        prog=f"embcomp {name}", description=command.help[0].upper() + command.help[1:] + ".", allow_abbrev=False
    )
    module.add_arguments(parser)
    status = module.run(parser.parse_args(arguments))
    if status:
        raise SystemExit(status)


def _run_trainer(arguments: list[str] | None) -> None:
    quiet_third_party()
    # Imported late: the other commands do not wait for LightningCLI.
    from lightning_embcomp import trainer_cli

    trainer_cli.run(arguments)


def _help() -> str:
    commands = {**TRAINER_COMMANDS, **{name: command.help for name, command in COMMANDS.items()}}
    width = max(len(name) for name in commands)
    lines = [f"  {name:<{width}}  {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "usage: embcomp COMMAND [OPTIONS]",
            "",
            "Embedding compression for recommender training with Lightning and TorchRec.",
            "",
            "commands:",
            *lines,
            "",
            "`embcomp COMMAND --help` lists the options of a command; `-c FILE` may be given several times, and later",
            "files win: embcomp fit -c examples/dlrm.yaml -c callbacks/fiited.yaml",
        ]
    )


def _unknown(command: str) -> str:
    names = [*TRAINER_COMMANDS, *COMMANDS]
    if command.startswith("-"):
        return f"embcomp: options come after the command: embcomp {{{','.join(names)}}} {command} ..."
    hint = _nearest(command, names) or f"; choose one of {', '.join(names)}"
    return f"embcomp: no command {command!r}{hint}"


if __name__ == "__main__":
    main()
