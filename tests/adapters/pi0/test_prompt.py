"""pi0's and pi0.5's prompts: the text, the spans, the bins of the state, and every refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.helpers.paths import ROOT
from tokenprune.errors import CheckpointError, ObservationError
from tokenprune_adapters.backbones.pi0.prompt import PI0_MAX_TOKENS, PI05_MAX_TOKENS, GemmaTokenizer, state_bins
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer

ASSET = ROOT / "adapters" / "tokenprune_adapters" / "assets" / "tokenizer.json"
INSTRUCTIONS = (ROOT / "tools" / "libero_instructions.txt").read_text(encoding="utf-8").splitlines()
BOS, LINE_BREAK = 2, 108
WORDS = ["▁put", "▁the", "▁bowl", "put", "Task", "▁State", "Action", "▁-"]

printable = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=60).filter(
    lambda text: text.strip(" _") and text.strip() and "▁" not in text
)

states = st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=9).map(np.array)


def gemma_like(leave_out: str = "") -> Tokenizer:
    """Gemma's layout by hand: no space in front, single digits, the line break an added token, a piece `<s>`."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁", "<s>"]
    vocab = {piece: 300 + index for index, piece in enumerate(pieces)} | {p: i for i, p in enumerate(special)}
    merges = []
    for word in WORDS:
        for stop in range(2, len(word) + 1):
            if word[:stop] not in vocab:
                vocab[word[:stop]] = 1000 + len(merges)
                merges.append((word[: stop - 1], word[stop - 1]))
    vocab = {piece: index for piece, index in vocab.items() if piece != leave_out}
    made = Tokenizer(models.BPE(vocab | {"\n": LINE_BREAK}, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([piece for piece in special if piece != leave_out])
    made.add_tokens(["\n"])
    if leave_out != "<bos>":
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return made


raw = gemma_like()
tokenizer = GemmaTokenizer(gemma_like(), "hand-made")
bundled = GemmaTokenizer.bundled()


def cleaned(instruction: str) -> str:
    return instruction.strip().replace("_", " ").replace("\n", " ")


def bins_of(state: np.ndarray) -> list[int]:
    """How many of 256 steps from -1 to 1 lie at or below a value, less one."""
    return [sum(value >= -1 + step / 128 for step in range(256)) - 1 for value in state.tolist()]


def text_of(made: Tokenizer, ids: tuple[int, ...]) -> bytes:
    out = b""
    for token in ids:
        piece = made.id_to_token(token)
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        out += bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    return out


def expected_span(made: Tokenizer, ids: tuple[int, ...], first: int, last: int) -> list[int]:
    """Positions of the tokens with bytes from `first` to before `last` of the text behind BOS."""
    at, span = 0, []
    for position, token in enumerate(ids[1:], start=1):
        length = len(text_of(made, (token,)))
        if at < last and at + length > first:
            span.append(position)
        at += length
    return span


@given(printable)
def test_pi0_is_bos_the_instruction_and_a_line_break(instruction):
    ids = tokenizer.encode(instruction, 1000).ids
    assert (ids[0], ids[-1]) == (BOS, LINE_BREAK)
    assert text_of(raw, ids[1:-1]).decode() == cleaned(instruction)


@given(printable, states)
def test_pi05_holds_instruction_and_state(instruction, state):
    ids = tokenizer.encode(instruction, 1000, state).ids
    numbers = " ".join(str(number) for number in bins_of(state))
    assert ids[0] == BOS
    assert text_of(raw, ids[1:]).decode() == f"Task: {cleaned(instruction)}, State: {numbers};\nAction: "


@given(printable)
def test_pi0_span_is_the_instruction(instruction):
    for made, encoder in ((raw, tokenizer), (Tokenizer.from_file(str(ASSET)), bundled)):
        prompt = encoder.encode(instruction, 1000)
        whole = len(text_of(made, prompt.ids[1:]))
        assert list(prompt.instruction) == expected_span(made, prompt.ids, 0, whole - 1)
        assert not prompt.state


@given(printable, states)
def test_pi05_spans_are_instruction_and_state(instruction, state):
    text, numbers = cleaned(instruction).encode(), " ".join(map(str, bins_of(state)))
    for made, encoder, space in ((raw, tokenizer, 0), (Tokenizer.from_file(str(ASSET)), bundled, 1)):
        prompt = encoder.encode(instruction, 1000, state)
        first = space + len(b"Task: ")
        behind = first + len(text)
        assert list(prompt.instruction) == expected_span(made, prompt.ids, first, behind)
        number = behind + len(b", State: ")
        assert list(prompt.state) == expected_span(made, prompt.ids, number, number + len(numbers))


def test_a_prompt_token_by_token():
    prompt = tokenizer.encode(" put the\nbowl_", 48)
    assert [raw.id_to_token(token) for token in prompt.ids] == ["<bos>", "put", "▁the", "▁bowl", "▁", "\n"]
    prompt = tokenizer.encode("put the bowl", 200, np.array([0.0, -2.0]))
    pieces = [raw.id_to_token(token) for token in prompt.ids]
    assert pieces[:8] == ["<bos>", "Task", ":", "▁put", "▁the", "▁bowl", ",", "▁State"]
    assert pieces[8:] == [":", "▁", "1", "2", "8", "▁-", "1", ";", "\n", "Action", ":", "▁"]
    assert (prompt.instruction, prompt.state) == (range(3, 6), range(10, 15))


def test_case_is_kept():
    assert tokenizer.encode("Put the bowl", 48) != tokenizer.encode("put the bowl", 48)


def test_special_tokens_in_the_text_are_text():
    ids = tokenizer.encode("put <bos> on <eos> the <pad> bowl", 48).ids
    assert not {0, 1, 2, 3} & set(ids[1:])
    ids = bundled.encode("put <s> on </s> the <unk> bowl", 100).ids
    assert not {0, 1, 2} & set(ids[1:])


def test_truncation_and_padding_of_the_file_are_ignored():
    made = gemma_like()
    made.enable_truncation(4)
    made.enable_padding(length=48)
    assert GemmaTokenizer(made, "").encode("put the bowl", 48) == tokenizer.encode("put the bowl", 48)


@given(states)
def test_bins_by_counting(state):
    assert state_bins(state) == bins_of(state)


def test_known_bins():
    below = math.nextafter(0.0, -1.0)
    state = np.array([-1.0, -1.01, below, 0.0, 1 / 128, 127 / 128, 1.0, 1.5])
    assert state_bins(state) == [0, -1, 127, 128, 129, 255, 255, 255]
    assert state_bins(np.array([-0.5, 0.5], dtype=np.float32)) == [64, 192]


def test_bundled_tokenizer_begins_with_its_own_bos():
    own = PromptTokenizer.bundled()
    line_break = Tokenizer.from_file(str(ASSET)).token_to_id("<0x0A>")
    prompt = bundled.encode("put the bowl on the plate", 48)
    assert bundled.bos_id == own.bos_id
    assert (prompt.ids[0], prompt.ids[-1], len(prompt.ids)) == (own.bos_id, line_break, 8)
    assert bundled.vocab_size == own.vocab_size


def test_libero_prompts_fit():
    state = np.full(8, 0.7)
    assert max(len(bundled.encode(instruction, PI0_MAX_TOKENS).ids) for instruction in INSTRUCTIONS) <= 24
    assert max(len(bundled.encode(instruction, PI05_MAX_TOKENS, state).ids) for instruction in INSTRUCTIONS) <= 80


def test_a_number_costs_a_space_and_its_digits():
    short, long = (len(bundled.encode("put it down", 200, np.full(8, value)).ids) for value in (-1.0, 1.0))
    assert long - short == 8 * (len("255") - len("0"))
    more = len(bundled.encode("put it down", 200, np.full(9, 1.0)).ids)
    assert more - long == len(" 255")


@pytest.mark.parametrize("state", [None, np.zeros(8)])
def test_too_long_a_prompt_is_refused(state):
    length = len(tokenizer.encode("put the bowl", 200, state).ids)
    assert len(tokenizer.encode("put the bowl", length, state).ids) == length
    with pytest.raises(ObservationError, match=f"a prompt of {length} tokens; valid: at most {length - 1}"):
        tokenizer.encode("put the bowl", length - 1, state)


@pytest.mark.parametrize("state", [None, np.zeros(8)])
@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (None, "instruction is a NoneType; valid: a str"),
        (b"put it down", "instruction is a bytes"),
        (" \n\t ", "is empty; valid: what the robot should do"),
        ("_", "is empty"),
        ("put \x00 down", r"instruction holds '\\x00'"),
        ("put\tit", r"instruction holds '\\t'"),
    ],
)
def test_what_is_no_instruction_is_refused(instruction, message, state):
    with pytest.raises(ObservationError, match=message):
        tokenizer.encode(instruction, 200, state)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    gemma_like().save(str(path))
    read = GemmaTokenizer.from_file(path)
    assert (read.bos_id, read.vocab_size) == (BOS, raw.get_vocab_size())
    assert read.encode("put the bowl", 48) == tokenizer.encode("put the bowl", 48)


def test_a_copy_of_the_bundled_file_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(ASSET.read_bytes())
    assert GemmaTokenizer.from_file(path).encode("put it down", 48) == bundled.encode("put it down", 48)


def test_a_tokenizer_of_llamas_kind_is_refused(tmp_path):
    data = json.loads(ASSET.read_text(encoding="utf-8"))
    data["model"]["vocab"]["of-another-size"] = len(data["model"]["vocab"])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer of Gemma's kind, .* '<bos>'"):
        GemmaTokenizer.from_file(path)


@pytest.mark.parametrize("piece", ["<bos>", "<0x0A>"])
def test_a_missing_piece_is_refused(piece):
    with pytest.raises(CheckpointError, match=f"hand-made: not a tokenizer of Gemma's kind, .* '{piece}'"):
        GemmaTokenizer(gemma_like(leave_out=piece), "hand-made")


@pytest.mark.parametrize("model", ["tokenizer.model", "paligemma_tokenizer.model"])
def test_a_sentencepiece_model_alone_is_refused(tmp_path, model):
    (tmp_path / model).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"no such file; {model} beside it, .* is not read; .*save_pretrained"):
        GemmaTokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file; .* carry none; write .*AutoTokenizer.*paligemma"):
        GemmaTokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00"])
def test_a_corrupt_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        GemmaTokenizer.from_file(path)
