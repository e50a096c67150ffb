"""The commands: a table, the parsing of their settings, the exit status. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from csm_fast.commands import INTERRUPTED
from csm_fast.system.errors import InputError, OutOfMemory, is_out_of_memory
from csm_fast.system.version import __version__


class Command(NamedTuple):
    """A command: what it is for, the dataclass of its settings as ``module:name`` below ``csm_fast`` (None: it has
    none), and its module in ``csm_fast.commands``, whose ``run`` takes them and returns the exit status (None is 0)."""

    purpose: str
    config: str | None
    module: str


COMMANDS = {
    "pretokenize": Command(
        "recordings with transcripts -> a token store", "config.commands:PretokenizeConfig", "pretokenize"
    ),
    "train": Command("fine-tune on a token store (also: csm-fast-train)", "config.train:TrainConfig", "train"),
    "generate": Command("speech from a model and a text", "config.commands:GenerateConfig", "generate"),
    "plan": Command(
        "what fits on which GPU, and how long it takes, before anything is loaded", "config.commands:PlanConfig", "plan"
    ),
    "profile": Command(
        "where the time of a training step goes, operator by operator", "config.commands:ProfileConfig", "profile"
    ),
    "merge": Command("an adapter and its base -> one model", "config.commands:MergeConfig", "merge"),
    "verify-adapter": Command(
        "does an adapter still give the loss it was saved with?",
        "config.commands:VerifyAdapterConfig",
        "verify_adapter",
    ),
    "doctor": Command("what is on this machine, what was chosen for it and why", None, "doctor"),
}
PROGRAMS = {"train": "csm-fast-train"}  # commands that have a program of their own


def main(argv: Sequence[str] | None = None) -> int:
    """``csm-fast COMMAND ...``; returns the exit status (0 done, 1 no memory, 2 bad input, 130 interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return _run(argv[0], argv[1:])
    parser = argparse.ArgumentParser(prog="csm-fast", description="Fast fine-tuning of Sesame's CSM.")
    parser.add_argument("--version", action="version", version=f"csm_fast {__version__}")
    listing = "\n".join(f"  {name:12} {command.purpose}" for name, command in COMMANDS.items())
    parser.usage = "csm-fast COMMAND [options]"
    parser.epilog = f"commands (csm-fast COMMAND --help tells their options):\n{listing}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if argv and not argv[0].startswith("-"):
        print(f"error: csm-fast: there is no command {argv[0]}; choose among {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    parser.parse_args(argv)
    parser.print_help()
    return 0


def train_main() -> int:
    """Entry point of ``csm-fast-train``."""
    return _run("train", sys.argv[1:])


def _run(name: str, argv: list[str]) -> int:
    _set_up_process()
    command = COMMANDS[name]
    try:
        config = _parse(PROGRAMS.get(name, f"csm-fast {name}"), command, argv)
        run = importlib.import_module(f"csm_fast.commands.{command.module}").run
        return (run(config) if command.config else run()) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OutOfMemory) else 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        line = next(iter(str(error).strip().splitlines()), "")
        mend = f"csm-fast {name} --help tells what makes it smaller"
        print(f"error: not enough memory ({line[:200]}); {mend}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 141


def _parse(prog: str, command: Command, argv: list[str]) -> Any:
    """The settings of a command from its flags and, under ``--config``, a YAML file; None where it has none."""
    from csm_fast.config.parse import Parser, add_flags, from_flags

    if command.config is None:
        Parser(prog=prog, description=command.purpose).parse_args(argv)
        return None
    module, name = command.config.split(":")
    cls = getattr(importlib.import_module(f"csm_fast.{module}"), name)
    usage = f"{prog} [--config FILE] [options]"
    parser = Parser(prog=prog, description=command.purpose, allow_abbrev=False, usage=usage)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the settings below; flags override it")
    add_flags(parser, cls)
    namespace = parser.parse_args(argv)
    return from_flags(cls, namespace, namespace.config)


def _set_up_process() -> None:
    # PyTorch builds a kernel per shape of a matrix product on a CPU and keeps 1,024 of them; packs of many sizes need
    # more, and building one takes as long as running a small one. Read when the first is built.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    # Large tensors on a CPU lie in huge pages where the system offers them: a tenth of a step's time. Read when the
    # first is made.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Silence the tokenizers library's warning about forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logger = logging.getLogger("csm_fast")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
