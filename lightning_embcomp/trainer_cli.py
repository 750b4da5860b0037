"""LightningCLI as ``embcomp fit | validate | test | predict`` runs it."""

import os
import re
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_embcomp.cli_errors import explain_error, file_with
from lightning_embcomp.report import CheckpointError, open_checkpoint, report_tables

DEFAULT_MODEL = "lightning_embcomp.models.ClickModel"
DEFAULT_DATA = "lightning_embcomp.data.SyntheticClickLogDataModule"
DEFAULT_LOGGER = "lightning.pytorch.loggers.CSVLogger"
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")
_GROUPS = {
    "--trainer": ("trainer", "Lightning's Trainer, with its callbacks and strategy."),
    "--model": ("model", "`--model.help` lists the options of the model, `--model.help=CLASS` those of another one."),
    "--data": ("data", "`--data.help` lists the options of the data, `--data.help=CLASS` those of another source."),
    "--ckpt_path": ("checkpoint", None),
}
_REFERENCE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")
_read: ContextVar[tuple[str, ...]] = ContextVar("configuration files read so far", default=())
_file: ContextVar[str | None] = ContextVar("configuration file that is being read", default=None)


class EmbCompParser(LightningArgumentParser):
    """A parser that says what is wrong in a line or two, instead of after a page of usage.

    Args:
        kwargs: As for LightningCLI's parser; options cannot be abbreviated unless ``allow_abbrev`` is given.
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:  # noqa: ANN401
        """Parse a configuration file; errors name it.

        Args:
            path: The file.
            args: As for jsonargparse.
            kwargs: As for jsonargparse.

        Returns:
            What the file sets.
        """
        token = _file.set(str(path))
        _read.set((*_read.get(), str(path)))
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            _file.reset(token)

    def format_help(self, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401
        """Options with their explanations, in groups of plain names.

        Args:
            args: As for jsonargparse.
            kwargs: As for jsonargparse.

        Returns:
            The text.
        """
        for group in self._action_groups:
            options = [text for action in group._group_actions for text in action.option_strings]
            title = next((_GROUPS[head] for text in options if (head := text.partition(".")[0]) in _GROUPS), None)
            if title is not None:
                group.title, group.description = title
        for action in self._actions:
            action.help = _REFERENCE.sub(r"``\1``", action.help) if action.help else action.help
        return super().format_help(*args, **kwargs).replace(" [options]", "", 1)

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
        # Commands that build a run as `fit` does come with their own name in front of that.
        program = " ".join(parser.prog.replace(" [options]", "").split()[:2])
        options = [text for action in parser._actions for text in action.option_strings if text.startswith("--")]
        unknown = re.search(r"does not accept option '([\w.+]+)'$", message)
        file = _file.get() or (unknown and file_with(unknown[1], _read.get()))
        where = f"{file}: " if file else ""
        print(f"{program}: error: {where}{explain_error(message, options)}", file=sys.stderr)
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
        _read.set(())
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
