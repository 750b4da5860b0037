"""LightningCLI as ``embcomp fit | validate | test | predict`` runs it."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse.typing import import_object
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_embcomp.report import CheckpointError, open_checkpoint, report_tables

DEFAULT_MODEL = "lightning_embcomp.models.ClickModel"
DEFAULT_DATA = "lightning_embcomp.data.SyntheticClickLogDataModule"
DEFAULT_LOGGER = "lightning.pytorch.loggers.CSVLogger"
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


class EmbCompParser(LightningArgumentParser):
    """A parser that says what is wrong in a line or two, instead of after a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message with a suggestion, and exit with status 2.

        Args:
            message: What jsonargparse found wrong.
            ex: The exception behind it.

        Raises:
            ArgumentError: Instead of exiting, if the parser was made with ``exit_on_error=False``.
        """
        if not self.exit_on_error:
            # A parser inside the parser: jsonargparse wants to catch this one and report it from outside.
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        options = [text for action in parser._actions for text in action.option_strings if text.startswith("--")]
        print(f"{program}: error: {explain_error(message, options)}", file=sys.stderr)
        print(f"`{program} --help` lists all options.", file=sys.stderr)
        self.exit(2)


class EmbCompCLI(LightningCLI):
    """LightningCLI with the reference model and synthetic data as defaults."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults of ``--model`` and ``--data``.

        Args:
            parser: Parser of one subcommand.
        """
        parser.set_defaults({"model": {"class_path": DEFAULT_MODEL}, "data": {"class_path": DEFAULT_DATA}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; a checkpoint file that cannot be read ends the program before anything is built.

        Args:
            parser: The parser.
            args: What to parse; None for the arguments of the process.
        """
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        # Keywords such as `best`, other storage and sharded folders are the trainer's.
        if path is None or path in _CHECKPOINT_WORDS or "://" in str(path) or Path(path).is_dir():
            return
        try:
            report_tables(open_checkpoint(path), path)
        except CheckpointError as error:
            self._parser(self.config.subcommand).error(str(error))

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; a setting that one of them refuses ends the program with its message."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps the constructor's own error, with a dump of every argument.
            refusal: BaseException = error
            while refusal.__cause__ is not None:
                refusal = refusal.__cause__
            self._parser(self.subcommand).error(str(refusal))


SETTINGS: dict[str, Any] = {
    "model_class": pl.LightningModule,
    "datamodule_class": pl.LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
    # The model has its own optimizers: an `--optimizer` would also take the fused tables.
    "auto_configure_optimizers": False,
    "parser_class": EmbCompParser,
}
"""What every command that builds a run gives to LightningCLI."""


def run(arguments: list[str] | None) -> None:
    """Run a trainer command.

    Args:
        arguments: The command and its options; None for those of the process.
    """
    EmbCompCLI(
        **SETTINGS,
        trainer_defaults={"logger": {"class_path": DEFAULT_LOGGER, "init_args": {"save_dir": "."}}},
        parser_kwargs={"prog": "embcomp"},
        args=arguments,
    )


def explain_error(message: str, options: Iterable[str]) -> str:
    """Shorten a message about an unknown option, and add the option that was probably meant.

    Args:
        message: Message of jsonargparse.
        options: Known options, each with its leading dashes.

    Returns:
        The new message; any other message as it is.

    Example:
        >>> explain_error("unrecognized arguments: --modle.embedding_dim 8", ["--model", "--trainer.max_epochs"])
        "unknown option '--modle.embedding_dim'; did you mean '--model.embedding_dim'?"
    """
    of_class = re.search(r"given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message)
    if of_class:
        class_path, option = of_class.groups()
        names = list(inspect.signature(import_object(class_path)).parameters)
        return f"{class_path} has no option {option!r}{_suggestion(option, names)}"
    unknown = re.search(r"unrecognized arguments: (--[\w.+]+)|does not accept option '([\w.+]+)'", message)
    if unknown:
        option = unknown[1] or f"--{unknown[2]}"
        return f"unknown option {option!r}{_suggestion(option, list(options))}"
    return message


def _suggestion(option: str, names: list[str]) -> str:
    head, dot, tail = option.partition(".")
    heads = {name.partition(".")[0] for name in names}
    if head in heads:
        close = difflib.get_close_matches(option, names, n=1)
    else:
        close = [f"{name}{dot}{tail}" for name in difflib.get_close_matches(head, sorted(heads), n=1)]
    return f"; did you mean {close[0]!r}?" if close else ""
