"""The instruction tokenizer: nothing is lost, the span is the instruction, the prompt ends in the empty token."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from tests.helpers.paths import ROOT
from tokenprune.errors import CheckpointError, ObservationError
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer

ASSET = ROOT / "adapters" / "tokenprune_adapters" / "assets" / "tokenizer.json"
INSTRUCTIONS = (ROOT / "tools" / "libero_instructions.txt").read_text(encoding="utf-8").splitlines()
printable = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=60).filter(str.strip)
tokenizer = PromptTokenizer.bundled()

BEFORE = {
    "pure": "In: What action should the robot take to ",
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What action should the robot take to "
    ),
}

AFTER = {"pure": "?\nOut:", "vicuna": "? ASSISTANT:"}


def prompt_of(instruction: str, style: str = "pure") -> str:
    return BEFORE[style] + instruction.strip().lower() + AFTER[style]


def llama_like(*, empty_id: int = 300, suffix: str = "", bos: bool = False) -> Tokenizer:
    """Llama's own layout by hand: normalisers instead of a pre-tokenizer, byte fallback, a few merges."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    characters = [chr(code) for code in range(33, 127)] + ["▁p", "ut", "▁put", "pp"]
    vocab |= {piece: 1000 + index for index, piece in enumerate(characters)}
    vocab["▁"] = empty_id
    merges = [("▁", "p"), ("u", "t"), ("▁p", "ut"), ("p", "p")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    ending = [normalizers.Replace("Out:", "Out:" + suffix)] if suffix else []
    made.normalizer = normalizers.Sequence([*ending, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def bytes_of(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def expected_span(made: Tokenizer, ids: tuple[int, ...], instruction: str, style: str = "pure") -> list[int]:
    """Find the instruction's tokens by counting the bytes every piece stands for."""
    text = instruction.strip().lower()
    # Tokenizers of Llama's kind put one space in front of everything.
    first = len(b" " + BEFORE[style].encode())
    last = first + len(text.encode())
    span, at = [], 0
    for position, token in enumerate(ids):
        length = len(bytes_of(made.id_to_token(token)))
        if at < last and at + length > first:
            span.append(position)
        at += length
    return span


styles = st.sampled_from(["pure", "vicuna"])


@given(printable, styles)
def test_any_printable_text_comes_back(instruction, style):
    ids = tokenizer.encode(instruction, max_tokens=1000, style=style).ids
    decoded = Tokenizer.from_file(str(ASSET)).decode(list(ids[:-1]), skip_special_tokens=False)
    assert decoded == prompt_of(instruction, style).replace("▁", " ")


@given(printable.filter(lambda text: "▁" not in text), styles)
def test_span_is_the_instruction(instruction, style):
    for made in (Tokenizer.from_file(str(ASSET)), llama_like()):
        prompt = PromptTokenizer(made, "hand-made").encode(instruction, max_tokens=1000, style=style)
        assert list(prompt.instruction) == expected_span(made, prompt.ids, instruction, style)
        assert not prompt.state


def test_pure_is_the_default_style():
    assert tokenizer.encode("put it down") == tokenizer.encode("put it down", style="pure")


def test_libero_spans_decode_to_the_instruction():
    made = Tokenizer.from_file(str(ASSET))
    for instruction in INSTRUCTIONS:
        prompt = tokenizer.encode(instruction)
        assert made.decode([prompt.ids[at] for at in prompt.instruction]) == instruction
        assert len(prompt.ids) <= 40


def test_case_and_surrounding_space_do_not_matter():
    assert tokenizer.encode("  Put the Bowl on the plate\n") == tokenizer.encode("put the bowl on the plate")


def test_text_that_grows_when_lowered_keeps_its_span():
    made = Tokenizer.from_file(str(ASSET))
    prompt = tokenizer.encode("put İİ away")
    assert list(prompt.instruction) == expected_span(made, prompt.ids, "put İİ away")


@given(printable, styles)
def test_prompt_ends_in_one_empty_token_and_has_no_bos(instruction, style):
    ids = tokenizer.encode(instruction, max_tokens=1000, style=style).ids
    assert ids[-1] == tokenizer.empty_id
    assert ids[-2] != tokenizer.empty_id
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_empty_token_is_found_by_piece():
    made = PromptTokenizer(llama_like(empty_id=29871), "hand-made")
    assert made.empty_id == 29871
    assert made.encode("put it down").ids[-1] == 29871


def test_empty_token_is_not_doubled():
    with_space = PromptTokenizer(llama_like(suffix=" "), "hand-made").encode("put it down")
    without = PromptTokenizer(llama_like(), "hand-made").encode("put it down")
    assert with_space == without


def test_post_processor_bos_is_left_out():
    with_bos = PromptTokenizer(llama_like(bos=True), "hand-made").encode("put it down")
    assert with_bos == PromptTokenizer(llama_like(), "hand-made").encode("put it down")
    assert 1 not in with_bos.ids


def test_special_tokens_in_the_text_are_text():
    ids = tokenizer.encode("put </s> on <s> the <unk> plate").ids
    assert not {0, 1, 2} & set(ids)


def test_truncation_and_padding_of_the_file_are_ignored():
    made = llama_like()
    made.enable_truncation(4)
    made.enable_padding(length=200)
    assert PromptTokenizer(made, "hand-made").encode("put it down") == PromptTokenizer(llama_like(), "").encode(
        "put it down"
    )


def test_bundled_tokenizer_has_llamas_layout():
    pieces = json.loads(ASSET.read_text(encoding="utf-8"))["model"]["vocab"]
    by_id = sorted(pieces, key=pieces.__getitem__)
    assert by_id[:3] == ["<unk>", "<s>", "</s>"]
    assert by_id[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert list(range(len(pieces))) == sorted(pieces.values())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.empty_id) == (1, 2, pieces["▁"])
    assert tokenizer.vocab_size == len(pieces)
    assert ASSET.stat().st_size <= 150_000


def test_asset_is_what_the_script_trains(tmp_path):
    script = ROOT / "tools" / "train_tokenizer.py"
    output = tmp_path / "tokenizer.json"
    subprocess.run([sys.executable, script, "--output", output], check=True, capture_output=True)
    # Compared as a vocabulary: other releases of the tokenizers package may write the file with other fields.
    again, asset = (json.loads(path.read_text(encoding="utf-8"))["model"] for path in (output, ASSET))
    assert (again["vocab"], again["merges"]) == (asset["vocab"], asset["merges"])


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (None, "instruction is a NoneType; valid: a str"),
        (b"put it down", "instruction is a bytes; valid: a str"),
        ("", "instruction '' is empty"),
        (" \n\t ", r"is empty; valid: what the robot should do"),
        ("put\nit down", r"instruction holds '\\n'; valid: one line of text"),
        ("put \x00 down", r"instruction holds '\\x00'"),
        ("put \ud800 down", r"instruction holds '\\ud800'"),
    ],
)
def test_what_is_no_instruction_is_refused(instruction, message):
    with pytest.raises(ObservationError, match=message):
        tokenizer.encode(instruction)


def test_too_long_an_instruction_is_refused():
    length = len(tokenizer.encode("put it down").ids)
    assert len(tokenizer.encode("put it down", max_tokens=length).ids) == length
    with pytest.raises(ObservationError, match=f"a prompt of {length} tokens; valid: at most {length - 1}"):
        tokenizer.encode("put it down", max_tokens=length - 1)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.json: no such file"):
        PromptTokenizer.from_file(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="no such file"):
        PromptTokenizer.from_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_corrupt_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        PromptTokenizer.from_file(path)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(ASSET.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        PromptTokenizer.from_file(path)


@pytest.mark.parametrize("piece", ["<s>", "</s>", "▁", "<0x0A>"])
def test_tokenizer_of_another_kind_is_refused(tmp_path, piece):
    vocab = {name: index for index, name in enumerate(["<s>", "</s>", "▁", "<0x0A>"]) if name != piece}
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab, [])).save(str(path))
    with pytest.raises(CheckpointError, match=f"tokenizer.json: not a tokenizer of Llama's kind, .* '{piece}'"):
        PromptTokenizer.from_file(path)
