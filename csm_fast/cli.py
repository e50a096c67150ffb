"""The commands: thin over the dataclasses. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csm_fast.system.errors import InputError, OutOfMemory, is_out_of_memory
from csm_fast.system.version import __version__

COMMANDS = {
    "pretokenize": "recordings with transcripts -> a token store",
    "train": "fine-tune on a token store (also: csm-fast-train)",
    "generate": "speech from a model and a text",
    "plan": "what fits on which GPU, and how long it takes, before anything is loaded",
    "profile": "where the time of a training step goes, operator by operator",
    "merge": "an adapter and its base -> one model",
    "verify-adapter": "does an adapter still give the loss it was saved with?",
    "doctor": "what is on this machine, what was chosen for it and why",
}


INTERRUPTED = 130  # by Ctrl-C, as shells say it; a run that was saved first is no less unfinished


def main(argv: Sequence[str] | None = None) -> int:
    """``csm-fast COMMAND ...``; returns the exit status (0 done, 1 no memory, 2 bad input, 130 interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return _run(argv[0], argv[1:])
    parser = argparse.ArgumentParser(prog="csm-fast", description="Fast fine-tuning of Sesame's CSM.")
    parser.add_argument("--version", action="version", version=f"csm_fast {__version__}")
    listing = "\n".join(f"  {name:12} {text}" for name, text in COMMANDS.items())
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


def _run(command: str, argv: list[str]) -> int:
    # PyTorch's matrix products on a CPU are built per shape and kept, 1,024 of them; packs of many sizes need more, and
    # building one takes as long as running a small one. Read when the first is built.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    # Large tensors on a CPU lie in huge pages where the system offers them: a tenth of a step's time. Read when the
    # first is made.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _set_up_logging()
    # A log line must not depend on whether a model hub library likes to talk.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handlers: dict[str, Callable[[list[str]], Any]] = {
        "pretokenize": _pretokenize,
        "train": _train,
        "generate": _generate,
        "plan": _plan,
        "profile": _profile,
        "merge": _merge,
        "verify-adapter": _verify_adapter,
        "doctor": _doctor,
    }
    try:
        return handlers[command](argv) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OutOfMemory) else 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        line = next(iter(str(error).strip().splitlines()), "")
        mend = f"csm-fast {command} --help tells what makes it smaller"
        print(f"error: not enough memory ({line[:200]}); {mend}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 141


def _set_up_logging() -> None:
    logger = logging.getLogger("csm_fast")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _config(cls: type, prog: str, description: str, argv: list[str]) -> Any:
    from csm_fast.config.parse import Parser, add_flags, from_flags

    parser = Parser(prog=prog, description=description, allow_abbrev=False, usage=f"{prog} [--config FILE] [options]")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the settings below; flags override it")
    add_flags(parser, cls)
    if cls.__name__ in ("TrainConfig", "ProfileConfig"):
        # sesame-finetune's switches; tokens are always read from disk as they are needed.
        once: Any = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument("--use_amp", "--use-amp", dest="precision", action="store_const", const="bf16", **once)
        parser.add_argument("--partial_data_loading", "--partial-data-loading", action="store_true", **once)
        # csm-mlx's spelling of --freeze.
        for part in ("backbone", "decoder"):
            parser.add_argument(
                f"--freeze-{part}",
                dest="freeze",
                action="append_const",
                const=part,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
    if cls.__name__ == "TrainConfig":  # as the other commands call it
        hidden: Any = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument("--output", "--out", dest="output_dir", metavar="X", **hidden)
    namespace = parser.parse_args(argv)
    return from_flags(cls, namespace, namespace.config)


def _pretokenize(argv: list[str]) -> None:
    from csm_fast.config.commands import PretokenizeConfig
    from csm_fast.data.pretokenize import pretokenize

    pretokenize(_config(PretokenizeConfig, "csm-fast pretokenize", COMMANDS["pretokenize"], argv))


def _train(argv: list[str]) -> int:
    from csm_fast.config.train import TrainConfig

    config = _config(TrainConfig, "csm-fast-train", COMMANDS["train"], argv)
    _set_up_training(config.run)
    summary = importlib.import_module("csm_fast.train.loop").train(config)
    return 0 if summary["complete"] else INTERRUPTED


def _set_up_training(run: Any) -> None:
    """This process, for training steps as ``run``, a ``RunSection``, says."""
    # Compiled layers are kept where they outlast a restart of the machine. Read when the first one is compiled.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csm_fast" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    # Packs of many sizes leave holes between the blocks of CUDA's allocator, up to an eighth of the memory; segments
    # that grow have none. Read when CUDA is first used.
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if run.keep_freed_memory:
        from csm_fast.system.device import keep_freed_memory, resolve_device

        if resolve_device(run.device).type == "cpu":
            keep_freed_memory()


def _generate(argv: list[str]) -> None:
    from csm_fast.config.commands import GenerateConfig

    config = _config(GenerateConfig, "csm-fast generate", COMMANDS["generate"], argv)
    importlib.import_module("csm_fast.commands.generate").speak(config)


def _plan(argv: list[str]) -> int | None:
    from csm_fast.config.commands import PlanConfig

    config = _config(PlanConfig, "csm-fast plan", COMMANDS["plan"], argv)
    return importlib.import_module("csm_fast.commands.plan").plan(config)


def _profile(argv: list[str]) -> None:
    from csm_fast.config.commands import ProfileConfig

    config = _config(ProfileConfig, "csm-fast profile", COMMANDS["profile"], argv)
    _set_up_training(config.run)
    importlib.import_module("csm_fast.commands.profile").run(config)


def _merge(argv: list[str]) -> int | None:
    from csm_fast.config.commands import MergeConfig

    config = _config(MergeConfig, "csm-fast merge", COMMANDS["merge"], argv)
    return importlib.import_module("csm_fast.commands.merge").merge(config)


def _verify_adapter(argv: list[str]) -> int | None:
    from csm_fast.config.commands import VerifyAdapterConfig

    config = _config(VerifyAdapterConfig, "csm-fast verify-adapter", COMMANDS["verify-adapter"], argv)
    return importlib.import_module("csm_fast.commands.merge").verify(config)


def _doctor(argv: list[str]) -> None:
    from csm_fast.config.parse import Parser

    Parser(prog="csm-fast doctor", description=COMMANDS["doctor"]).parse_args(argv)
    doctor = importlib.import_module("csm_fast.commands.doctor")
    print("\n".join(doctor.report(doctor.examine())))


if __name__ == "__main__":
    sys.exit(main())
