"""The instruction, and for pi0.5 the robot state, as a prompt for PaliGemma."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
from tokenizers import Tokenizer

from tokenprune.errors import CheckpointError
from tokenprune_adapters.inputs.tokenizer import (
    BUNDLED,
    Prompt,
    TokenizerBase,
    check_length,
    one_line,
    piece_id,
    read_tokenizer,
    tokens_of,
)

# Longest prompts the releases are trained with; upstream openpi truncates longer ones, here they are refused.
PI0_MAX_TOKENS, PI05_MAX_TOKENS = 48, 200

_BEFORE, _BETWEEN, _AFTER = "Task: ", ", State: ", ";\nAction: "

_EDGES = np.linspace(-1, 1, 257)[:-1]

_SOURCE = "google/paligemma-3b-pt-224"


class GemmaTokenizer(TokenizerBase):
    """Builds the prompts pi0 and pi0.5 were trained with (upstream openpi, `PaligemmaTokenizer`).

    Upstream pads prompts to a fixed length and masks the padding; here they have no padding. Case is kept.

    Args:
        tokenizer: A tokenizer of Gemma's kind; it is set up here to encode whole plain texts.
        source: Where it comes from, for errors.
        bos: The piece that begins every prompt.

    Attributes:
        bos_id: Id of that piece.

    Raises:
        CheckpointError: If it lacks this piece, or the byte tokens.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, bos: str = "<bos>") -> None:
        super().__init__(tokenizer)
        self.bos_id = piece_id(bos, tokenizer, source, "Gemma's")
        # Upstream tokenises the closing line break by itself, and Gemma has a piece for it.
        byte = piece_id("<0x0A>", tokenizer, source, "Gemma's")
        own = tokenizer.token_to_id("\n")
        self._line_break = byte if own is None else own

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read PaliGemma's `tokenizer.json`, or a copy of the bundled one.

        Raises:
            CheckpointError: If the file is missing, is not a tokenizer, or lacks a piece.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; {_remedy(path.parent)}")
        tokenizer = read_tokenizer(path)
        # Compared by vocabulary, because Gemma's has a piece `<s>` too, which is not its BOS.
        bundled = tokenizer.get_vocab() == read_tokenizer(BUNDLED).get_vocab()
        return cls(tokenizer, str(path), bos="<s>" if bundled else "<bos>")

    def encode(self, instruction: str, max_tokens: int, state: np.ndarray | None = None) -> Prompt:
        """Tokenise the prompt of an instruction and, if one is given, of a robot state.

        Without a state the prompt is pi0's: BOS, the instruction, a line break. openpi's pi0.5 for LIBERO uses it too
        (`discrete_state_input=False`). With a state it is pi0.5's, whose length depends on the state, because bins are
        written with one to three digits.

        Args:
            instruction: What the robot should do; surrounding white space does not matter, and underscores and line
                breaks count as spaces.
            max_tokens: Most tokens the prompt may have.
            state: Normalised robot state `[S]`.

        Returns:
            The prompt, BOS included.

        Raises:
            ObservationError: If the instruction is not text, is blank, holds control characters, or is too long.
        """
        text = _cleaned(instruction)
        if state is None:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            ids = (self.bos_id, *encoding.ids, self._line_break)
            check_length(ids, max_tokens)
            return Prompt(ids, range(1, len(ids) - 1))
        numbers = " ".join(map(str, state_bins(state)))
        encoding = self._tokenizer.encode(_BEFORE + text + _BETWEEN + numbers + _AFTER, add_special_tokens=False)
        ids = (self.bos_id, *encoding.ids)
        check_length(ids, max_tokens)
        offsets = [(0, 0), *encoding.offsets]
        first, behind = len(_BEFORE), len(_BEFORE) + len(text)
        number = behind + len(_BETWEEN)
        return Prompt(ids, tokens_of(offsets, first, behind), tokens_of(offsets, number, number + len(numbers)))


def state_bins(state: np.ndarray) -> list[int]:
    """The bins in which pi0.5's prompt spells the robot state (upstream openpi).

    Args:
        state: Normalised robot state `[S]`.

    Returns:
        A bin per number: 0 to 255 for [-1, 1], 255 above and -1 below.
    """
    bins: list[int] = (np.digitize(state, _EDGES) - 1).tolist()
    return bins


def _cleaned(instruction: object) -> str:
    """Clean an instruction with upstream's steps in upstream's order."""
    if not isinstance(instruction, str):
        return one_line(instruction)
    text = instruction.strip().replace("_", " ").replace("\n", " ")
    one_line(text)
    return text


def _remedy(folder: Path) -> str:
    """How to get a `tokenizer.json`."""
    found = sorted(path.name for path in folder.glob("*tokenizer.model"))
    lacks = (
        f"{found[0]} beside it, a SentencePiece model, is not read"
        if found
        else "checkpoints of openpi and lerobot carry none"
    )
    return (
        f"{lacks}; write PaliGemma's with transformers: "
        f"AutoTokenizer.from_pretrained('{_SOURCE}').save_pretrained('{folder}')"
    )
