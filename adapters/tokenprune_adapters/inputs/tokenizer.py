"""Tokenizer files and prompts, for every family."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from tokenprune.errors import CheckpointError, ObservationError

BUNDLED = Path(__file__).parents[1] / "assets" / "tokenizer.json"


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt.

    Attributes:
        ids: Token ids. OpenVLA's end in the empty token and have no BOS, which is placed before the image; pi0's begin
            with BOS.
        instruction: Positions in `ids` of the tokens that hold characters of the instruction.
        state: Positions in `ids` of the tokens that hold the robot state; empty if the prompt does not spell it.
    """

    ids: tuple[int, ...]
    instruction: range
    state: range = range(0)


class TokenizerBase(ABC):
    """What the tokenizers of all families share.

    Args:
        tokenizer: The tokenizer; it is set up to encode whole texts, without padding and with special tokens as plain
            characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    @abstractmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json`.

        Raises:
            CheckpointError: If the file is missing, is not a tokenizer, or lacks a piece.
        """

    @classmethod
    def bundled(cls) -> Self:
        """The small tokenizer that ships with the adapters; it fits no released checkpoint."""
        return cls.from_file(BUNDLED)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer of any kind.

    Raises:
        CheckpointError: If the file holds none.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing narrower
        raise CheckpointError(f"{path}: not a readable tokenizer.json ({error})") from error


def piece_id(piece: str, tokenizer: Tokenizer, source: str, kind: str) -> int:
    """The id of a piece that every tokenizer of a kind has.

    Raises:
        CheckpointError: If this tokenizer lacks it.
    """
    index = tokenizer.token_to_id(piece)
    if index is None:
        raise CheckpointError(f"{source}: not a tokenizer of {kind} kind, it has no piece '{piece}'")
    return int(index)


def one_line(instruction: object) -> str:
    """An instruction without surrounding white space.

    Raises:
        ObservationError: If it is not text, is blank, or holds control characters.
    """
    if not isinstance(instruction, str):
        raise ObservationError(f"instruction is a {type(instruction).__qualname__}; valid: a str")
    text = instruction.strip()
    if not text:
        raise ObservationError(f"instruction {instruction!r} is empty; valid: what the robot should do, in words")
    bad = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs")), None)
    if bad is not None:
        raise ObservationError(f"instruction holds {bad!r}; valid: one line of text without control characters")
    return text


def check_length(ids: Sequence[int], max_tokens: int) -> None:
    """Refuse a prompt that is too long.

    Raises:
        ObservationError: If it has more than `max_tokens` tokens.
    """
    if len(ids) > max_tokens:
        raise ObservationError(f"instruction needs a prompt of {len(ids)} tokens; valid: at most {max_tokens}")


def tokens_of(offsets: Sequence[tuple[int, int]], first: int, last: int) -> range:
    """Positions of the tokens that hold any of the characters from `first` to before `last`.

    Args:
        offsets: Start and end character of each token, from an encoding.
        first: The first character.
        last: One past the last character.
    """
    inside = [at for at, (start, stop) in enumerate(offsets) if start < last and stop > first]
    return range(inside[0], inside[-1] + 1)
