"""Train the small Llama-like tokenizer that ships with the adapters.

`python tools/train_tokenizer.py` rebuilds `adapters/tokenprune_adapters/assets/tokenizer.json` byte for byte from
`tools/libero_instructions.txt`. With `--collect BDDL_DIR` it first rewrites that list from LIBERO's task files.
"""

from __future__ import annotations

import argparse
import json
import re
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = ROOT / "tools" / "libero_instructions.txt"
ASSET = ROOT / "adapters" / "tokenprune_adapters" / "assets" / "tokenizer.json"

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Characters that get a token even if the text lacks them; others, such as the line break, become bytes.
ALPHABET = sorted({"▁", *string.ascii_letters, *string.digits, *string.punctuation})
# Without punctuation, so that no token spans the border of the instruction.
PROMPT_WORDS = ("In", "What action should the robot take to", "Out")
VOCABULARY = 1024


def collect(bddl_dir: Path) -> list[str]:
    """Read the distinct instructions of LIBERO's suites and of their published perturbations.

    Args:
        bddl_dir: LIBERO's `bddl_files` directory.

    Returns:
        Lower-case instructions in alphabetical order: the `:language` of every task file, and for the five
        original suites also the file's name, which is what LIBERO itself hands to a policy.
    """
    found = set()
    for file in bddl_dir.glob("libero_*/*.bddl"):
        if not file.parent.name.startswith(SUITES):
            continue
        language = re.search(r"\(:language\s+(.*?)\)", file.read_text(encoding="utf-8"), re.DOTALL)
        if language:
            found.add(" ".join(language[1].lower().split()))
        if file.parent.name in SUITES:
            found.add(re.sub(r"^[A-Z_]+SCENE\d+_", "", file.stem).replace("_", " ").lower())
    return sorted(found)


def train(instructions: list[str]) -> Tokenizer:
    """Train a byte-pair encoding with the SentencePiece conventions of Llama's tokenizer.

    Args:
        instructions: Training text, one sentence each.

    Returns:
        A tokenizer with `<unk>`, `<s>`, `</s>` at 0 to 2, then 256 byte tokens, single characters and merges.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    size = VOCABULARY - len(SPECIAL) - len(BYTES)
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, initial_alphabet=ALPHABET, show_progress=False)
    learner.train_from_iterator([*PROMPT_WORDS, *instructions], trainer)

    pieces = learner.get_vocab()
    learned = sorted(pieces, key=pieces.__getitem__)
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *BYTES, *learned])}
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=SPECIAL[0], byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def main() -> None:
    """Rebuild the asset and, with `--collect`, the list of instructions."""
    parser = argparse.ArgumentParser(description="Train the bundled tokenizer.")
    parser.add_argument("--collect", type=Path, metavar="BDDL_DIR", help="rewrite the list of instructions first")
    parser.add_argument("--output", type=Path, default=ASSET)
    arguments = parser.parse_args()
    if arguments.collect:
        INSTRUCTIONS.write_text("\n".join(collect(arguments.collect)) + "\n", encoding="utf-8")
    tokenizer = train(INSTRUCTIONS.read_text(encoding="utf-8").splitlines())
    arguments.output.write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} tokens, {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
