"""The turns of a pretokenize run: which split they belong to, and which of them cannot be used and why."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from csm_fast.config.commands import PretokenizeConfig
from csm_fast.data.metadata import Conversation, MetadataTurn, load_metadata
from csm_fast.data.metadata_files import show
from csm_fast.data.text import TextTokenizer
from csm_fast.packing.fit import MAX_POSITIONS
from csm_fast.system.errors import InputError


@dataclass(frozen=True, slots=True)
class Split:
    """``conversations`` are ranges of ``Corpus.turns``; ``base`` is where the split's metadata file begins in them."""

    name: str
    base: int
    conversations: list[range]


class Corpus:
    """The turns of all metadata files, numbered 0, 1, 2, ...

    Attributes:
        turns: all turns, those of --train-data first.
        splits: "train", and "val" where asked for.
        refused: by turn, why it cannot be used.
        filtered: those of ``refused`` that are not mistakes but outside --min-seconds and --max-seconds.
    """

    def __init__(self, config: PretokenizeConfig):
        self._config = config
        self.turns: list[MetadataTurn] = []
        self.splits: list[Split] = []
        self.refused: dict[int, InputError] = {}
        self.filtered: set[int] = set()
        self._load()
        self._text_lengths = array("i", bytes(4 * len(self.turns)))

    def tokenize(self, i: int, tokenizer: TextTokenizer) -> None:
        """Store how long the text of turn ``i`` is; refuse a text that leaves no room for a frame."""
        length = len(tokenizer.encode(self.turns[i].text, self.turns[i].speaker))
        self._text_lengths[i] = length
        if length + 2 > MAX_POSITIONS:
            self.refuse(i, f"its text is {length:,} tokens, a sequence has {MAX_POSITIONS:,} rows", "shorten it")

    def admit(self, i: int, frames: int, seconds: float) -> bool:
        """Whether turn ``i`` can be used, given the length of its audio; refuse it if not. ``tokenize`` comes first."""
        low, high = self._config.min_seconds, self._config.max_seconds
        if seconds < low or (high is not None and seconds > high):
            limit = f"--min-seconds {low:g}" if seconds < low else f"--max-seconds {high:g}"
            self.refuse(i, f"{seconds:.2f} s, outside {limit}", None)
            self.filtered.add(i)
            return False
        rows = self._text_lengths[i] + frames + 1
        if rows > MAX_POSITIONS:
            what = f"{seconds:,.1f} s is {frames:,} frames; with its text it needs {rows:,} rows"
            self.refuse(i, f"{what}, a sequence has {MAX_POSITIONS:,}", "cut it with start and end")
            return False
        return True

    def refuse(self, i: int, what: str, mend: str | None) -> None:
        """Mark turn ``i``, and so its conversation, as one that cannot be used."""
        self.refused[i] = InputError(what, file=self.turns[i].file, row=self.turns[i].row, mend=mend)

    def stop_if_bad(self) -> None:
        """Raise the first refused row, unless --skip-bad; called after every step that may refuse one."""
        if self._config.skip_bad or len(self.refused) == len(self.filtered):
            return
        bad = [i for i in self.refused if i not in self.filtered]
        error = self.refused[min(bad)]
        more = f" (and {len(bad) - 1:,} more so far)" if len(bad) > 1 else ""
        skip = "leave such clips out with --skip-bad"
        mend = f"{error.mend}, or {skip}" if error.mend else skip
        raise InputError(error.what + more, file=error.file, row=error.row, mend=mend)

    def usable(self, turns: range) -> bool:
        """Whether all turns of a conversation can be used."""
        return self.refused.keys().isdisjoint(turns)

    def _load(self) -> None:
        config = self._config
        train = self._read(config.train_data)
        if config.val_fraction is not None:
            kept, held_out = split_validation(train, config.val_fraction, config.seed)
            self._add(train, ("train", kept), ("val", held_out))
        else:
            self._add(train, ("train", train))
        if config.val_data is not None:
            val = self._read(config.val_data)
            self._add(val, ("val", val))

    def _read(self, path: str) -> list[Conversation]:
        config = self._config
        return load_metadata(
            path,
            speaker_map=config.speaker_map,
            default_speaker=config.default_speaker,
            omit_speaker_id=config.omit_speaker_id,
            check_files=not config.skip_bad,
        )

    def _add(self, conversations: Sequence[Conversation], *chosen: tuple[str, Sequence[Conversation]]) -> None:
        base, places = len(self.turns), {}
        for conversation in conversations:
            places[id(conversation)] = range(len(self.turns), len(self.turns) + len(conversation.turns))
            self.turns.extend(conversation.turns)
        for name, part in chosen:
            self.splits.append(Split(name, base, [places[id(conversation)] for conversation in part]))


def split_validation(
    conversations: Iterable[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into (training, validation), each in the given order and with at least one conversation.

    Conversations that share a recording stay together. Their side follows from a hash of the seed and the recording's
    path relative to its metadata file (of several recordings, the first by name). So adding, removing or reordering
    rows moves no other row, and ``fraction`` holds on average, not exactly. Two exceptions are for small data: an empty
    side gets the recording nearest to it, and a recording that alone is more than twice the fraction stays in training.

    Raises:
        InputError: a fraction not between 0 and 1, or fewer than two recordings to split.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise InputError(f"validation fraction {show(fraction)}", mend="use a number between 0 and 1, e.g. 0.05")
    conversations = list(conversations)
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for conversation in conversations:
        first = conversation.turns[0].audio_path
        for turn in conversation.turns[1:]:
            parent[root(turn.audio_path)] = root(first)
    leaders = [root(conversation.turns[0].audio_path) for conversation in conversations]
    groups: dict[str, int] = {}
    names: dict[str, str] = {}
    for leader, conversation in zip(leaders, conversations, strict=True):
        groups[leader] = groups.get(leader, 0) + 1
        for turn in conversation.turns:
            name = _recording_name(turn.audio_path, turn.file)
            names[leader] = min(names.get(leader, name), name)
    if len(groups) < 2:
        file = conversations[0].turns[0].file if conversations else None
        what = "every conversation shares one recording" if conversations else "nothing to split"
        raise InputError(f"{what}, so no validation set can be taken out", file=file, mend="give --val-data")

    place = {leader: _hash_to_unit(f"{seed}/{name}") for leader, name in names.items()}
    limit = 2 * fraction * len(conversations)
    chosen = {leader for leader, size in groups.items() if place[leader] < fraction and size <= max(1, limit)}
    if not chosen:
        # Small groups first, so that one long recording does not become the validation set.
        chosen = {min(groups, key=lambda leader: (groups[leader] > max(1, limit), place[leader]))}
    if len(chosen) == len(groups):
        chosen.discard(max(groups, key=lambda leader: place[leader]))
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for leader, conversation in zip(leaders, conversations, strict=True):
        sides[leader in chosen].append(conversation)
    return sides


def _hash_to_unit(name: str) -> float:
    """A number in [0, 1) that depends on the name."""
    # A path may hold lone surrogates: Python's form of file names that are not UTF-8.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return int(digest[:13], 16) / 16**13


def _recording_name(audio_path: str, file: str) -> str:
    # Relative to the metadata file, so that a data folder gives the same split wherever it is.
    return os.path.relpath(audio_path, os.path.dirname(os.path.abspath(file)))
