"""The instruction as prompt tokens, and which of them are the instruction."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tokenprune.errors import CheckpointError, ObservationError

_BEFORE, _AFTER = "In: What action should the robot take to ", "?\nOut:"
_BUNDLED = Path(__file__).parent / "assets" / "tokenizer.json"


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt.

    Attributes:
        ids: Token ids without the leading BOS; the last one is the empty token.
        instruction: Positions in `ids` of the tokens that hold characters of the instruction.
    """

    ids: tuple[int, ...]
    instruction: range


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
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        _id_of("<0x0A>", tokenizer, source)  # without byte tokens the line break and foreign characters would be lost
        self.bos_id = _id_of("<s>", tokenizer, source)
        self.eos_id = _id_of("</s>", tokenizer, source)
        self.empty_id = _id_of("▁", tokenizer, source)

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
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises nothing narrower
            raise CheckpointError(f"{path}: not a readable tokenizer.json ({error})") from error
        return cls(tokenizer, str(path))

    @classmethod
    def bundled(cls) -> PromptTokenizer:
        """Return the small tokenizer that ships with the adapters; it fits no released checkpoint."""
        return cls.from_file(_BUNDLED)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, instruction: str, max_tokens: int = 256) -> Prompt:
        """Put an instruction into the prompt and tokenise it.

        Args:
            instruction: What the robot should do; case and surrounding white space do not matter.
            max_tokens: Most tokens the prompt may have.

        Returns:
            The prompt.

        Raises:
            ObservationError: If the instruction is not text, is blank, holds control characters, or is too long.
        """
        if not isinstance(instruction, str):
            raise ObservationError(f"instruction is a {type(instruction).__qualname__}; valid: a str")
        text = instruction.strip()
        if not text:
            raise ObservationError(f"instruction {instruction!r} is empty; valid: what the robot should do, in words")
        bad = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs")), None)
        if bad is not None:
            raise ObservationError(f"instruction holds {bad!r}; valid: one line of text without control characters")
        text = text.lower()
        encoding = self._tokenizer.encode(_BEFORE + text + _AFTER, add_special_tokens=False)
        ids = tuple(encoding.ids)
        if ids[-1] != self.empty_id:
            ids = (*ids, self.empty_id)
        if len(ids) > max_tokens:
            raise ObservationError(f"instruction needs a prompt of {len(ids)} tokens; valid: at most {max_tokens}")
        first, last = len(_BEFORE), len(_BEFORE) + len(text)
        inside = [at for at, (start, stop) in enumerate(encoding.offsets) if start < last and stop > first]
        return Prompt(ids, range(inside[0], inside[-1] + 1))


def _id_of(piece: str, tokenizer: Tokenizer, source: str) -> int:
    index = tokenizer.token_to_id(piece)
    if index is None:
        raise CheckpointError(f"{source}: not a tokenizer of Llama's kind, it has no piece '{piece}'")
    return int(index)
