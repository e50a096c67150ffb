"""The turns that a pretokenize run is about: which split they belong to, and which of them cannot be used and why."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from csm_fast.packing.fit import MAX_POSITIONS
from csm_fast.system.errors import InputError

if TYPE_CHECKING:
    from csm_fast.config.commands import PretokenizeConfig
    from csm_fast.data.metadata import Conversation, MetadataTurn
    from csm_fast.data.text import TextTokenizer


@dataclass(frozen=True, slots=True)
class Split:
    """`conversations` are ranges of Corpus.turns; `base` is where the split's metadata file begins in them."""

    name: str
    base: int
    conversations: list[range]


class Corpus:
    """The turns of all metadata files, numbered 0, 1, 2, ...

    Attributes:
        turns: all turns, those of --train-data first.
        splits: "train", and "val" where asked for.
        refused: why a turn cannot be used.
        filtered: those of `refused` that are no mistakes: --min-seconds and --max-seconds said so.
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
        """Note how long the text of turn `i` is; one that leaves no room for a frame is refused."""
        length = len(tokenizer.encode(self.turns[i].text, self.turns[i].speaker))
        self._text_lengths[i] = length
        if length + 2 > MAX_POSITIONS:
            self.refuse(i, f"its text is {length:,} tokens, a sequence has {MAX_POSITIONS:,} rows", "shorten it")

    def admit(self, i: int, frames: int, seconds: float) -> bool:
        """Whether turn `i`, tokenized, can be used, now that its audio's length is known."""
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
        """Turn `i` cannot be used, and so its conversation cannot."""
        self.refused[i] = InputError(what, file=self.turns[i].file, row=self.turns[i].row, mend=mend)

    def stop_if_bad(self) -> None:
        """Unless --skip-bad, raise the first refused row; called after whatever may refuse one."""
        if self._config.skip_bad or len(self.refused) == len(self.filtered):
            return
        bad = [i for i in self.refused if i not in self.filtered]
        error = self.refused[min(bad)]
        more = f" (and {len(bad) - 1:,} more so far)" if len(bad) > 1 else ""
        skip = "leave such clips out with --skip-bad"
        mend = f"{error.mend}, or {skip}" if error.mend else skip
        raise InputError(error.what + more, file=error.file, row=error.row, mend=mend)

    def usable(self, turns: range) -> bool:
        """Whether no turn of a conversation is refused."""
        return self.refused.keys().isdisjoint(turns)

    def _load(self) -> None:
        from csm_fast.data.metadata import split_validation

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
        from csm_fast.data.metadata import load_metadata

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
