"""Texts made of others by a masked model: which words, by which, made once, and kept by what they came from."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.data.labelled_text import Labelled, text_rows
from stepdistill.data.text import Example
from stepdistill.errors import InputError
from stepdistill.export.transformer import weights_hash
from stepdistill.kd.augmentation import AugmentConfig, Copies, Kept, augmented, whole_words
from stepdistill.kd.encoders import Encoders, EncoderStudentConfig
from stepdistill.kd.layouts import seeded
from stepdistill.kd.masked import MaskedLM
from stepdistill.kd.pair import LMTeacherConfig
from stepdistill.networks.network import Network

TEXT = [Example(f"The file number {i} opens and the socket closes it again.") for i in range(40)]
CLASSES = ("files", "sockets")


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    teacher, student = LMTeacherConfig(layers=2, width=32), EncoderStudentConfig(layers=1, width=16)
    return Encoders(teacher, student, None, TEXT, 300, 24, CLASSES, 0, torch.device("cpu"))


PART = Labelled([("The file opens", "files"), ("and the socket zqxj closes", "sockets")], CLASSES)


def more(encoders: Encoders, seed: int = 3, **changes: Any) -> Any:
    config = AugmentConfig(**{"copies": 4, "share": 0.5, "candidates": 2, **changes})
    return augmented(config, PART, encoders.teacher().frozen(), encoders.tokenizer, 24, seed)


def test_no_copies_are_the_texts_alone(encoders: Encoders) -> None:
    assert more(encoders, copies=0).rows == text_rows(PART, encoders.tokenizer, 24).rows


def test_words_are_replaced_by_what_the_model_guesses_where_they_are_masked(encoders: Encoders) -> None:
    plain, tokenizer = text_rows(PART, encoders.tokenizer, 24).rows, encoders.tokenizer
    found = more(encoders)
    assert found.rows[:2] == plain and len(found) == 2 + 2 * 4
    teacher: Any = encoders.teacher().module.eval()
    vocabulary, changed = range(teacher.config.vocab_size), 0
    pieces_alone = [i for i in vocabulary if not tokenizer.decode([i]).startswith(" ") or tokenizer.decode([i]) == " "]
    for row, original in zip(found.rows[2:], [plain[0]] * 4 + [plain[1]] * 4, strict=True):
        assert row.label == original.label and len(row.ids) == len(original.ids)
        for place, (now, before) in enumerate(zip(row.ids, original.ids, strict=True)):
            if now == before:
                continue
            changed += 1
            masked = torch.tensor([original.ids])
            masked[0, place] = tokenizer.mask_token_id
            logits = teacher(masked).logits[0, place]
            logits[pieces_alone] = -torch.inf
            assert now in logits.topk(2).indices.tolist()
    assert changed > 5
    pieces = tokenizer(PART.pairs[1][0])
    word = pieces.word_ids()[pieces.char_to_token(PART.pairs[1][0].index("zqxj"))]
    cut = [i for i, w in enumerate(pieces.word_ids()) if w == word]
    assert len(cut) > 1
    assert all(row.ids[i] == plain[1].ids[i] for row in found.rows[6:] for i in (0, *cut, len(row.ids) - 1))


def test_logits_are_made_at_masked_places_alone(encoders: Encoders) -> None:
    """Of a real vocabulary those of whole texts would be half a gigabyte."""
    teacher, seen = encoders.teacher().frozen(), list[tuple[int, ...]]()
    teacher.module.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))
    augmented(AugmentConfig(copies=4, share=0.5), PART, teacher, encoders.tokenizer, 24, 3)
    assert seen and all(shape[1] == 1 for shape in seen)


def test_the_share_is_of_whole_words_and_all_is_a_function_of_the_seed(encoders: Encoders) -> None:
    assert more(encoders).rows == more(encoders).rows != more(encoders, seed=4).rows
    few, all_of_them = more(encoders, copies=40, share=0.1), more(encoders, copies=40, share=1.0)
    plain = few.rows[0].ids

    def changed(rows: Any) -> float:
        return sum(a != b for row in rows.rows[2:42] for a, b in zip(row.ids, plain, strict=True)) / 40

    assert changed(few) < 0.5 < changed(all_of_them)


def test_the_guesser_is_as_it_was(encoders: Encoders) -> None:
    teacher = encoders.teacher()
    augmented(AugmentConfig(copies=1), PART, teacher, encoders.tokenizer, 24, 0)
    assert teacher.module.training and isinstance(teacher, Network)


# BERT's kind of vocabulary, with the tokens that are no words first
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NO_WORDS = [*SPECIAL, "[unused0]", "[unused12]", "##s", "##ing"]
WORDPIECES = [*NO_WORDS, "the", "file", "open", "##er", "closes", "[extra]"]


def wordpieces() -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDPIECES)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.add_special_tokens([AddedToken("[extra]", special=True)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **names)


def guesser(entries: int, likeliest: list[int], seed: int = 0) -> MaskedLM:
    """Guesses these everywhere, then the others; its table is padded to `entries`."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=entries, hidden_size=12, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=12, max_position_embeddings=24)  # fmt: skip
    model = seeded(seed, lambda: BertForMaskedLM(config))
    with torch.no_grad():
        model.cls.predictions.bias[likeliest] = 50.0
    return MaskedLM(model).frozen()


WORDED = Labelled([("the file opens the file", "files"), ("the opening closes", "sockets")] * 3, CLASSES)


def test_pieces_special_unused_and_padded_entries_are_not_proposed() -> None:
    tokenizer, bad = (
        wordpieces(),
        [*range(len(NO_WORDS)), WORDPIECES.index("##er"), WORDPIECES.index("[extra]"), 15, 16],
    )
    found = augmented(AugmentConfig(3, 1.0, 15), WORDED, guesser(17, bad), tokenizer, 24, 0)
    plain = text_rows(WORDED, tokenizer, 24).rows
    words = {WORDPIECES.index(word) for word in ("the", "file", "open", "closes")}
    changed = [now for i, row in enumerate(found.rows[6:]) for now, before in zip(row.ids, plain[i // 3].ids, strict=True)
               if now != before]  # fmt: skip
    assert len(changed) > 20 and set(changed) == words
    assert len({row.ids for row in found.rows[6:9]}) == 3, "copies of one text"
    of_one_text = [tuple(row.ids for row in found.rows[6 + 3 * i : 9 + 3 * i]) for i in (0, 2, 4)]
    assert len(set(of_one_text)) == 3, "each text has draws of its own"
    whole = whole_words(tokenizer, 17)
    assert whole.nonzero()[:, 0].tolist() == sorted(words)
    assert whole_words(tokenizer, 11).nonzero()[:, 0].tolist() == [9, 10], "of a table with fewer entries"
    with pytest.raises(InputError, match="whole words .* --augment.copies 0"):
        whole_words(tokenizer, len(NO_WORDS))


def test_words_of_vocabularies_that_mark_beginnings_or_ends() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def words_in(inner: Any) -> set[str]:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(inner), unk_token="<unk>")
        found = whole_words(tokenizer, len(tokenizer)).nonzero()[:, 0].tolist()
        return set(tokenizer.convert_ids_to_tokens(found))

    known = ["<unk>", "Ġ", "Ġfile", "s", "ing", "madeupword0001", "<unused3>"]
    assert words_in(models.BPE({w: i for i, w in enumerate(known)}, [], unk_token="<unk>")) == {"Ġfile"}
    pieces = [(word, -1.0) for word in ("<unk>", "▁", "▁file", "s", "▁the")]
    assert words_in(models.Unigram(pieces, 0)) == {"▁file", "▁the"}
    ends = {"<unk>": 0, "file</w>": 1, "open": 2}
    assert words_in(models.BPE(ends, [], unk_token="<unk>", end_of_word_suffix="</w>")) == {"file</w>"}


class Asked:
    """How many texts a model was asked about."""

    def __init__(self, model: MaskedLM) -> None:
        self.count = 0
        model.module.register_forward_pre_hook(self.more)

    def more(self, *_: Any) -> None:
        self.count += 1


def test_copies_are_made_once_and_known_by_what_they_came_from(tmp_path: Path) -> None:
    tokenizer, config = wordpieces(), AugmentConfig(2, 1.0, 2)

    def made(
        options: AugmentConfig = config, part: Labelled = WORDED, seed: int = 0, length: int = 24, teacher: int = 0
    ) -> tuple[Any, int]:
        model = guesser(17, [], teacher)
        asked = Asked(model)
        kept = Kept(tmp_path, weights_hash)
        rows = augmented(options, part, model, tokenizer, length, seed, kept).rows
        count = asked.count
        assert rows == augmented(options, part, model, tokenizer, length, seed).rows, "as without a place to keep them"
        return rows, count

    first, count = made()
    assert count == 6 and made() == (first, 0)
    others: list[dict[str, Any]] = [
        {"options": AugmentConfig(1, 1.0, 2)}, {"part": Labelled(WORDED.pairs[:4], CLASSES)}, {"seed": 1}, {"length": 5},
        {"teacher": 1}, {"options": AugmentConfig(2, 1.0, 3)},
    ]  # fmt: skip
    for number, other in enumerate(others):
        assert made(**other)[1] > 0 and made(**other)[1] == 0
        assert len(list(tmp_path.iterdir())) == number + 2
    assert made() == (first, 0)


def test_copies_go_on_where_a_run_was_killed_and_are_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Copies, "shard", 2)
    tokenizer, config, original = wordpieces(), AugmentConfig(2, 1.0, 2), Copies.make
    wanted = augmented(config, WORDED, guesser(17, []), tokenizer, 24, 0).rows

    def dying(self: Copies, items: range) -> Any:
        if items.start == 2:
            raise KeyboardInterrupt
        return original(self, items)

    monkeypatch.setattr(Copies, "make", dying)
    with pytest.raises(KeyboardInterrupt):
        augmented(config, WORDED, guesser(17, []), tokenizer, 24, 0, Kept(tmp_path / "killed", weights_hash))
    monkeypatch.setattr(Copies, "make", original)
    asked = Asked(model := guesser(17, []))
    assert augmented(config, WORDED, model, tokenizer, 24, 0, Kept(tmp_path / "killed", weights_hash)).rows == wanted
    assert asked.count == 4, "of six texts the first two were there"

    together, found, counts = threading.Barrier(2), dict[int, Any](), dict[int, int]()
    models = [guesser(17, []) for _ in range(2)]  # here: threads share the generator that weights are drawn from

    def process(rank: int) -> None:
        model, asked = models[rank], Asked(models[rank])
        kept = Kept(tmp_path / "two", weights_hash, rank, 2, lambda: (together.wait(20), None)[1])
        found[rank] = augmented(config, WORDED, model, wordpieces(), 24, 0, kept).rows
        counts[rank] = asked.count

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: wanted, 1: wanted} and counts == {0: 4, 1: 2}
