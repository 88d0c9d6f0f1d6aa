"""The prompt of OpenVLA and OpenVLA-OFT, and the positions of the instruction in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from tokenizers import Tokenizer

from tokenprune.errors import CheckpointError
from tokenprune_adapters.inputs.tokenizer import (
    Prompt,
    TokenizerBase,
    check_length,
    one_line,
    piece_id,
    read_tokenizer,
    tokens_of,
)

PromptStyle = Literal["pure", "vicuna"]
_QUESTION = "What action should the robot take to "

# The text before and after the instruction. The v0.1 releases are fine-tuned from a chat model.
_STYLES: Mapping[PromptStyle, tuple[str, str]] = {
    "pure": (f"In: {_QUESTION}", "?\nOut:"),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {_QUESTION}",
        "? ASSISTANT:",
    ),
}


class PromptTokenizer(TokenizerBase):
    """Builds the prompt OpenVLA was trained with (upstream OpenVLA, `get_vla_action`).

    The empty token, SentencePiece's single space, ends every prompt: upstream appends it if the tokenizer has not
    produced it, and OpenVLA-OFT reads the first action at its position.

    Args:
        tokenizer: A tokenizer of Llama's kind; it is set up here to encode whole plain texts.
        source: Where it comes from, for errors.

    Attributes:
        bos_id: Id of `<s>`.
        eos_id: Id of `</s>`.
        empty_id: Id of the empty token.

    Raises:
        CheckpointError: If it lacks one of these pieces, or the byte tokens.
    """

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        super().__init__(tokenizer)

        def id_of(piece: str) -> int:
            return piece_id(piece, tokenizer, source, "Llama's")

        id_of("<0x0A>")  # without byte tokens the line break and foreign characters would be lost
        self.bos_id = id_of("<s>")
        self.eos_id = id_of("</s>")
        self.empty_id = id_of("▁")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json`.

        Raises:
            CheckpointError: If the file is missing, is not a tokenizer, or lacks a piece.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file; a release carries its tokenizer as tokenizer.json")
        return cls(read_tokenizer(path), str(path))

    def encode(self, instruction: str, max_tokens: int = 256, style: PromptStyle = "pure") -> Prompt:
        """Tokenise the prompt of an instruction.

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
