"""The instruction as prompt tokens, and which of them are the instruction."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from tokenprune.errors import CheckpointError, ObservationError

PromptStyle = Literal["pure", "vicuna"]

_QUESTION = "What action should the robot take to "
# What stands before and after the instruction. The v0.1 releases are fine-tuned from a chat model.
_STYLES: Mapping[PromptStyle, tuple[str, str]] = {
    "pure": (f"In: {_QUESTION}", "?\nOut:"),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {_QUESTION}",
        "? ASSISTANT:",
    ),
}
BUNDLED = Path(__file__).parent / "assets" / "tokenizer.json"


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt.

    Attributes:
        ids: Token ids. OpenVLA's have no BOS, which stands before the image, and end in the empty token; pi0's begin
            with BOS.
        instruction: Positions in `ids` of the tokens that hold characters of the instruction.
        state: Positions in `ids` of the tokens that hold the robot state; none where the prompt does not name it.
    """

    ids: tuple[int, ...]
    instruction: range
    state: range = range(0)


class PromptTokenizer:
    """Builds the prompt OpenVLA was trained with (upstream OpenVLA, `get_vla_action`).

    The empty token, SentencePiece's lone space, ends every prompt: upstream appends it where the tokenizer has
    not produced it, and OpenVLA-OFT reads the first action at its position.

    Args:
        tokenizer: A tokenizer of Llama's kind; it is set up here to encode plain text, whole.
        source: Where it comes from, for messages.

    Attributes:
        bos_id: Id of `<s>`.
        eos_id: Id of `</s>`.
        empty_id: Id of the empty token.

    Raises:
        CheckpointError: If it lacks one of these pieces, or the byte tokens.
    """

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self._tokenizer = as_plain_text(tokenizer)

        def id_of(piece: str) -> int:
            return piece_id(piece, tokenizer, source, "Llama's")

        id_of("<0x0A>")  # without byte tokens the line break and foreign characters would be lost
        self.bos_id = id_of("<s>")
        self.eos_id = id_of("</s>")
        self.empty_id = id_of("▁")

    @classmethod
    def from_file(cls, path: str | Path) -> PromptTokenizer:
        """Read a `tokenizer.json`.

        Args:
            path: The file.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: If the file is missing, is not a tokenizer, or lacks a piece.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file; a release carries its tokenizer as tokenizer.json")
        return cls(read_tokenizer(path), str(path))

    @classmethod
    def bundled(cls) -> PromptTokenizer:
        """Return the small tokenizer that ships with the adapters; it fits no released checkpoint."""
        return cls.from_file(BUNDLED)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, instruction: str, max_tokens: int = 256, style: PromptStyle = "pure") -> Prompt:
        """Put an instruction into the prompt and tokenise it.

        Args:
            instruction: What the robot should do; case and surrounding white space do not matter.
            max_tokens: Most tokens the prompt may have.
            style: `vicuna` for the v0.1 releases, whose prompt is a chat; `pure` for all later ones.

        Returns:
            The prompt.

        Raises:
            ObservationError: If the instruction is not text, is blank, holds control characters, or is too long.
        """
        text = one_line(instruction).lower()
        before, after = _STYLES[style]
        encoding = self._tokenizer.encode(before + text + after, add_special_tokens=False)
        ids = tuple(encoding.ids)
        if ids[-1] != self.empty_id:
            ids = (*ids, self.empty_id)
        check_length(ids, max_tokens)
        return Prompt(ids, tokens_of(encoding.offsets, len(before), len(before) + len(text)))


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer of any kind.

    Raises:
        CheckpointError: If the file holds none.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing narrower
        raise CheckpointError(f"{path}: not a readable tokenizer.json ({error})") from error


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Set a tokenizer up to encode all of a text, and special tokens in it as the characters they are written in."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def piece_id(piece: str, tokenizer: Tokenizer, source: str, kind: str) -> int:
    """The id of a piece that every tokenizer of a kind has.

    Raises:
        CheckpointError: If this one lacks it.
    """
    index = tokenizer.token_to_id(piece)
    if index is None:
        raise CheckpointError(f"{source}: not a tokenizer of {kind} kind, it has no piece '{piece}'")
    return int(index)


def one_line(instruction: object) -> str:
    """Strip an instruction.

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
        offsets: The characters of each token, as an encoding gives them.
        first: The first character.
        last: One past the last character.
    """
    inside = [at for at, (start, stop) in enumerate(offsets) if start < last and stop > first]
    return range(inside[0], inside[-1] + 1)
