"""Checks of single settings that several commands share."""

from __future__ import annotations

from csm_fast.system.errors import InputError


def check_seed(value: int) -> None:
    if not 0 <= value < 2**63:
        raise InputError(f"--seed {value}", mend="give an integer from 0 to 2^63 - 1")


def check_speaker(flag: str, value: int) -> None:
    if not -1 <= value < 2**31:
        raise InputError(f"--{flag} {value}", mend="give an integer from 0 to 2^31 - 1, or -1 for turns without one")


def check_threads(value: int | None) -> None:
    if value is not None and not 1 <= value <= 1024:
        raise InputError(f"--threads {value}", mend="give 1 to 1024, or leave it out")


def check_path(flag: str, value: str) -> None:
    """Refuse an empty path: mostly it is an unset shell variable, and it would mean the current folder."""
    if not value.strip():
        raise InputError(f"--{flag} is empty", mend="name it; . is the current directory")


def check_seconds(flag: str, value: float) -> None:
    if not 0 < value <= 160:
        raise InputError(f"--{flag} {value}", mend="give above 0, at most 160 (2,000 frames)")
