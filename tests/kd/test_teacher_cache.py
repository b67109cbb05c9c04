"""Cached answers: what is stored, that a run with them is the run with the teacher, what survives a kill, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any, get_args

import pytest
import torch
from language import END, VOCABULARY, batch_of, gpt2, student, teacher, uneven, words
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import EXACT, Killed, options, rows, same, saved, stopping_after

from stepdistill.data.cache import ShardStore
from stepdistill.data.text import TextConfig
from stepdistill.data.tokens import Row, TokenRows
from stepdistill.errors import InputError
from stepdistill.kd.caching import TeacherCacheConfig, cache_answers, cache_logits
from stepdistill.kd.divergences import Divergence, Kind
from stepdistill.kd.language_model import LanguageModelKD, LanguageModelKDConfig
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.pair import CAUSAL, LMStudentConfig, LMTeacherConfig, Pair
from stepdistill.kd.reduction import Objective
from stepdistill.kd.signal import LiveTeacher, signal_of
from stepdistill.kd.targets import Asked, Buckets
from stepdistill.kd.teacher_cache import CachedRows, Key, pack, shard_rows, unpack
from stepdistill.networks.pretrained import checkpoint_hash
from stepdistill.training.trainer import Trainer

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
DATA = TokenRows(
    [*uneven(12, prompt=3).rows, *uneven(12).rows], END
)  # with prompts, and targets from the first token on
WHOLE = TeacherCacheConfig(k=VOCABULARY, stored="fp32", shard_tokens=40, batch_size=3)
FEW = replace(WHOLE, k=8)


def key(data: TokenRows = DATA, weights: str = "1", tokenizer: Any = None, **source: Any) -> Key:
    return Key.of({"path": "w", "sha256": weights}, data, tokenizer or words(), {"path": "text.txt", **source})


def cached(
    folder: Path, config: TeacherCacheConfig = WHOLE, lm: CausalLM | None = None, data: TokenRows = DATA
) -> CachedRows:
    cache_answers(folder, lm or teacher(), data, key(data), config, progress=False)
    return CachedRows(folder, data, key(data))


def contents(folder: Path) -> dict[str, Any]:
    """All tensors; copies, since those of load_file change with the file."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: {name: x.clone() for name, x in load_file(path).items()} for path in files}


# -- what is stored --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entries", "pages"), [(2**16, 0), (2**16 + 1, 1), (151_936, 2)])
def test_ids_of_every_page_come_back_from_16_bits(entries: int, pages: int) -> None:
    edges = [i for i in (0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**17 - 1, 2**17, entries - 2, entries - 1) if i < entries]
    spread = sorted({*edges, *range(2, 6)})[-6:]
    ids = torch.tensor([spread, list(range(6)), list(range(entries - 6, entries))])
    answers = Buckets(Asked(entries, 6), ids, torch.linspace(-9, -1, 21).view(3, 7))
    stored = pack(answers, torch.float16)
    found, log_probs = unpack(stored)
    assert found.tolist() == ids.tolist() and found.dtype == torch.int32
    assert_close(log_probs, answers.log_probs.half(), **EXACT)
    assert sum(x[0].numel() * x.element_size() for x in stored.values()) == 4 * 6 + 2 + 4 * pages


def test_answers_stand_where_their_targets_are_predicted(tmp_path: Path) -> None:
    """Written out row by row, in any order and company."""
    data, lm = cached(tmp_path, FEW), teacher()
    batch = batch_of(data, [20, 3, 7])
    for place, index in enumerate((20, 3, 7)):
        row = DATA.rows[index]
        wanted = Buckets.of(data.asked, lm.module(torch.tensor([row.ids])).logits[0])
        for s in range(batch.extra["input_ids"].shape[1]):
            ids, log_probs = (batch.extra[name][place, s] for name in ("teacher_ids", "teacher_log_probs"))
            if s + 1 < len(row.ids) and row.learned[s + 1]:
                assert ids.tolist() == wanted.ids[s].tolist()
                assert_close(log_probs, wanted.log_probs[s].detach(), **CLOSE)
            else:
                assert not ids.any() and not log_probs.any()
    plain = batch_of(DATA, [20, 3, 7]).extra
    assert all(torch.equal(batch.extra[name], value) for name, value in plain.items()) and len(data) == len(DATA)


def test_prompts_are_not_stored_and_no_row_twice(tmp_path: Path) -> None:
    data = cached(tmp_path, replace(FEW, batch_size=4))
    assert data.shard > 4 and data.shard % 4, "a batch ends where a shard does"
    answers = sum(len(tensors["ids"]) for tensors in contents(tmp_path).values())
    assert answers == sum(sum(row.learned[1:]) for row in DATA.rows) == key().data["tokens"]
    assert len(contents(tmp_path)) == -(-len(DATA) // data.shard) > 2


def test_a_shard_is_a_row_at_least() -> None:
    tokens = key().data["tokens"]
    assert [shard_rows(DATA, n) for n in (1, tokens)] == [1, len(DATA)]
    assert shard_rows(TokenRows([Row((1, 2), (False, False))], END), 40) > 0, "of nothing to ask about too"


def test_a_model_with_another_head_is_asked_for_whole_logits(tmp_path: Path) -> None:
    opaque = teacher()
    opaque.explained = False
    cached(tmp_path / "one", FEW), cached(tmp_path / "other", FEW, opaque)
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    for name, tensors in one.items():
        assert_close(tensors["log_probs"], other[name]["log_probs"], **CLOSE)


# -- live or cached: one run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_loss_cannot_tell(tmp_path: Path, kind: Kind, factored: bool) -> None:
    pupil, objective, chosen = student(), Objective(Divergence(kind), 0.7, 0.4), [20, 3, 7, 0]
    pupil.explained = factored
    whole, few = cached(tmp_path / "whole"), cached(tmp_path / "few", FEW)
    wanted = LiveTeacher(teacher()).loss(objective, pupil, batch_of(DATA, chosen), 3)
    found = whole.teacher.loss(objective, pupil, batch_of(whole, chosen), 3)
    assert found.count == wanted.count
    assert_close([found.total, found.kd, found.ce], [wanted.total, wanted.kd, wanted.ce], **CLOSE)
    bound = few.teacher.loss(objective, pupil, batch_of(few, chosen), 3)
    assert 0.3 * float(wanted.kd) < float(bound.kd) < float(wanted.kd)
    assert_close(bound.ce, wanted.ce, **CLOSE)


def made(data: CachedRows | None, kind: Kind = "jsd", seed: int = 1) -> LanguageModelKD:
    config = LanguageModelKDConfig(Divergence(kind), ce_weight=0.3, chunk_size=5)
    return LanguageModelKD(config, student(seed), teacher() if data is None else data.teacher)


def fit(folder: Path, method: LanguageModelKD, data: Any, **changes: Any) -> None:
    Trainer(options(**{"max_train_steps": 5, "adam_epsilon": 1e-3, **changes}), folder).fit(method, data)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_training_with_all_of_the_vocabulary_is_the_one_with_the_teacher(tmp_path: Path, kind: Kind) -> None:
    data = cached(tmp_path / "cache")
    fit(tmp_path / "cached", made(data, kind), data)
    fit(tmp_path / "live", made(None, kind), DATA)
    assert_close(rows(tmp_path / "cached"), rows(tmp_path / "live"), **CLOSE)
    assert_close(saved(tmp_path / "cached")[0], saved(tmp_path / "live")[0], rtol=1e-4, atol=1e-6)
    few = cached(tmp_path / "few", FEW)
    fit(tmp_path / "bound", made(few, kind), few)
    first, bound = rows(tmp_path / "live")[0], rows(tmp_path / "bound")[0]
    assert bound["kd"] < first["kd"] and bound["ce"] == pytest.approx(first["ce"], rel=1e-5)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    data, changes = cached(tmp_path / "cache", FEW), {"checkpointing_steps": 2, "ema_decay": 0.9}
    fit(tmp_path / "whole", made(data), data, **changes)
    dying = made(data)
    with pytest.raises(Killed), stopping_after(dying, 4, Killed.now):
        fit(tmp_path / "killed", dying, data, **changes)
    again = CachedRows(tmp_path / "cache", DATA, key())
    fit(tmp_path / "killed", made(again, seed=7), again, **changes, resume_from_checkpoint="latest")
    same(tmp_path / "killed", tmp_path / "whole")


def test_what_is_to_be_said_is_said_of_both() -> None:
    assert signal_of(teacher(width=8)).check(Objective(), student(width=32)) != ""
    assert signal_of(signal := LiveTeacher(teacher())) is signal and signal.check(Objective(), student()) == ""


def test_a_cached_teacher_knows_its_size_and_its_data(tmp_path: Path) -> None:
    small = cached(tmp_path / "small", FEW, teacher(width=8))
    method = LanguageModelKD(LanguageModelKDConfig(), student(width=32), small.teacher)
    assert "wrong way round" in method.watch({}) and method.watch({}) == ""
    with pytest.raises(ValueError, match=r"teacher_log_probs.*CachedRows"):
        method.training_step(batch_of(DATA, [0]))
    with pytest.raises(InputError, match="--temperature"):
        LanguageModelKD(LanguageModelKDConfig(Divergence(temperature=2.0)), student(), small.teacher)
    with pytest.raises(InputError, match="--vocabulary 30"):
        LanguageModelKD(LanguageModelKDConfig(), student(vocabulary=30), small.teacher)


def test_tables_of_other_sizes(tmp_path: Path) -> None:
    """A student with more entries as with the teacher; for one with fewer the teacher is asked about those alone."""
    objective, chosen = Objective(Divergence("jsd")), [3, 9]
    data = cached(tmp_path / "one")
    wide, narrow = student(vocabulary=VOCABULARY + 8), student(vocabulary=VOCABULARY - 1)
    found = data.teacher.loss(objective, wide, batch_of(data, chosen)).total
    assert_close(found, LiveTeacher(teacher()).loss(objective, wide, batch_of(DATA, chosen)).total, **CLOSE)
    texts = TokenRows([Row(tuple(i % 30 for i in row.ids), row.learned) for row in DATA.rows], 0)
    data = cached(tmp_path / "other", replace(WHOLE, k=VOCABULARY - 1, vocabulary=VOCABULARY - 1), data=texts)
    found = data.teacher.loss(objective, narrow, batch_of(data, chosen)).total
    assert_close(found, LiveTeacher(teacher()).loss(objective, narrow, batch_of(texts, chosen)).total, **CLOSE)


def test_a_temperature_that_was_cached(tmp_path: Path) -> None:
    objective = Objective(Divergence(temperature=2.0), 0.7, 0.4)
    data, pupil = cached(tmp_path, replace(WHOLE, temperature=2.0)), student()
    found = data.teacher.loss(objective, pupil, batch_of(data, [3, 9])).total
    assert_close(found, LiveTeacher(teacher()).loss(objective, pupil, batch_of(DATA, [3, 9])).total, **CLOSE)


# -- kills and damage ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_teacher_cache import FEW, DATA, cached
from stepdistill.data.cache import ShardStore
original, written = ShardStore.write, []
def write(store, name, *rest):
    if len(written) == 2:
        store.path(name + ".half").write_bytes(b"...")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(name)
    return original(store, name, *rest)
ShardStore.write = write
cached(Path(sys.argv[1]), FEW)
"""


def killed(folder: Path) -> None:
    """By the system, in a process of its own."""
    here = Path(__file__).resolve()
    code = KILLED.format(paths=[str(here.parent), str(here.parents[1]), str(here.parents[2])])
    died = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert died.returncode == -9, died.stderr


def broken_off(folder: Path) -> None:
    """Here, at the same place."""
    original, written = ShardStore.write, []

    def write(store: ShardStore, name: str, *rest: Any) -> Any:
        if len(written) == 2:
            store.path(f"{name}.half").write_bytes(b"...")
            raise Killed
        written.append(name)
        return original(store, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardStore, "write", write)
        with pytest.raises(Killed):
            cached(folder, FEW)


@pytest.mark.parametrize("stop", [broken_off, pytest.param(killed, marks=pytest.mark.slow)])
def test_killed_between_shards_it_goes_on(tmp_path: Path, stop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(tmp_path / "a")
    with pytest.raises(InputError, match=r"got 2, without answers-00002.*not finished.*run the same"):
        CachedRows(tmp_path / "a", DATA, key())
    made: list[str] = []
    original = ShardStore.write
    monkeypatch.setattr(
        ShardStore, "write", lambda self, name, *rest: (made.append(name), original(self, name, *rest))[1]
    )
    cached(tmp_path / "a", FEW)
    assert made[0] == "answers-00002" and len(made) == len(set(made))
    cached(tmp_path / "b", FEW)
    (tmp_path / "a" / "answers-00002.half.safetensors").unlink()
    assert_close(contents(tmp_path / "a"), contents(tmp_path / "b"), **EXACT)


def test_a_last_shard_of_fewer_rows_is_missed_too(tmp_path: Path) -> None:
    data = cached(tmp_path, replace(FEW, shard_tokens=30))
    assert len(DATA) % data.shard
    last = max(tmp_path.glob("answers-*.safetensors"))
    for file in tmp_path.glob(f"{last.stem}*"):
        file.unlink()
    with pytest.raises(InputError, match=f"without {last.stem}: the cache was not finished"):
        CachedRows(tmp_path, DATA, key())


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_checkpoint_is_asked_in_the_precision_that_was_given(tmp_path: Path, dtype: str, name: str) -> None:
    gpt2(0, vocabulary=30, bos_token_id=29, eos_token_id=29).save_pretrained(tmp_path / "lm")
    words().save_pretrained(tmp_path / "lm")
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join([letter] * 7) for letter in ascii_lowercase))
    text = TextConfig(str(tmp_path / "text.txt"), block_size=8, held_out=0.3)
    cache_logits(LMTeacherConfig(str(tmp_path / "lm")), text, TeacherCacheConfig(k=4), str(tmp_path / "out"), dtype)
    assert json.loads((tmp_path / "out" / "about.json").read_text())["dtype"] == name


def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path) -> None:
    cached(tmp_path, FEW)
    kept, shard = contents(tmp_path), tmp_path / "answers-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for _ in range(2):  # looking changes nothing
        with pytest.raises(
            InputError, match=r"answers-00001\.safetensors' as it was written, got it damaged.*run the same"
        ):
            CachedRows(tmp_path, DATA, key())
    cached(tmp_path, FEW)
    assert_close(contents(tmp_path), kept, **EXACT)


# -- another cache ---------------------------------------------------------------------------------------------------------


def other_rows() -> TokenRows:
    return TokenRows([*DATA.rows[:-1], Row((1, 2, 3, 4), (False, True, True, True))], END)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (lambda: key(weights="2"), r"another teacher \(sha256 '1', here '2'\)"),
        (lambda: key(other_rows()), r"another data \(tokens \d+, here \d+\)"),
        (lambda: key(block_size=7, data=uneven(23)), r"another data \(block_size None, here 7; rows 24, here 23; tokens"),
        (lambda: key(tokenizer=words(bos_token="<s>")), r"another tokenizer \(tokens 30, here 31\)"),
    ],
)  # fmt: skip
def test_another_teacher_or_data(tmp_path: Path, now: Any, told: str) -> None:
    cached(tmp_path, FEW)
    with pytest.raises(InputError, match=rf"{told}.*stepdistill cache-logits"):
        CachedRows(tmp_path, DATA, now())
    with pytest.raises(InputError, match=rf"{told}.*--output_dir"):
        cache_answers(tmp_path, teacher(), DATA, now(), FEW, progress=False)


def test_the_same_words_in_another_order_are_another_tokenizer() -> None:
    one, other = words(), words()
    known = one.get_vocab()
    other.get_vocab = lambda: {**known, "a": known["b"], "b": known["a"]}
    assert key(tokenizer=one) == key() and key(tokenizer=other).differences(vars(key())) != []


def test_masks_and_order_are_of_the_data() -> None:
    first, *rest = DATA.rows
    unmasked = Row(first.ids, (True,) * len(first.ids))
    kinds = [DATA, TokenRows([unmasked, *rest], END), TokenRows([*rest, first], END), TokenRows(rest, END)]
    assert len({data.fingerprint() for data in kinds}) == 4
    assert TokenRows(list(DATA.rows), 0).fingerprint() == DATA.fingerprint()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 9}, "k 8, here 9"), ({"stored": "fp16"}, "stored 'fp32', here 'fp16'"),
        ({"temperature": 2.0}, "temperature 1.0"),
        ({"shard_tokens": 80}, "shard_rows"), ({"vocabulary": 30}, "vocabulary 40, here 30"),
    ],
)  # fmt: skip
def test_a_folder_with_other_answers(tmp_path: Path, change: Mapping[str, Any], told: str) -> None:
    cached(tmp_path, FEW)
    with pytest.raises(InputError, match=told):
        cached(tmp_path, replace(FEW, **change))


def hidden(folder: Path) -> Path:
    folder.mkdir()
    (folder / ".DS_Store").write_text("")
    return folder


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing of that kind; fix --teacher\.cache.*stepdistill cache-logits"):
        CachedRows(tmp_path / "nowhere", DATA, key())
    cached(hidden(tmp_path / "new"))  # what a system leaves in a folder is nobody's
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="with other files"):
        cached(tmp_path)
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(InputError, match=r"about\.json.*--teacher\.cache"):
        CachedRows(tmp_path, DATA, key())
    cached(tmp_path / "old", FEW)
    about = tmp_path / "old" / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "format": 0}))
    with pytest.raises(InputError, match=r"format 1.*got format 0"):
        CachedRows(tmp_path / "old", DATA, key())


def test_a_resumed_run_knows_the_cache_again(tmp_path: Path) -> None:
    def run(data: CachedRows, steps: int, **changes: Any) -> None:
        trainer = Trainer(options(max_train_steps=steps, **changes), tmp_path / "run")
        trainer.teacher = data.teacher.hashes
        trainer.fit(made(data), data)

    run(cached(tmp_path / "a", FEW), 2)
    run(cached(tmp_path / "a copy", FEW), 3, resume_from_checkpoint="latest")
    with pytest.raises(InputError, match="expected the teacher of"):
        run(cached(tmp_path / "b", replace(FEW, k=9)), 4, resume_from_checkpoint="latest")


def test_a_teacher_whose_outputs_are_not_numbers(tmp_path: Path) -> None:
    broken = gpt2(0)
    with torch.no_grad():
        broken.transformer.wte.weight[5] = torch.nan
    with pytest.raises(InputError, match=r"got NaN in rows 0 to 2; use --dtype"):
        cached(tmp_path, FEW, CausalLM(broken).frozen())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 0}, "--k"), ({"temperature": 0.0}, "--temperature"), ({"vocabulary": 0}, "--vocabulary"),
        ({"stored": "int8"}, "--stored"),
        ({"batch_size": 0}, "--batch_size"), ({"k": 41}, "--k"), ({"vocabulary": 41}, "--vocabulary"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(change: Mapping[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        replace(WHOLE, **{"k": 8, **change}).asked(teacher())


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def test_weights_are_known_again_however_they_are_cut(tmp_path: Path) -> None:
    lm = gpt2(0)
    for name, size in (("one", "1GB"), ("many", "4KB"), ("copy", "1GB")):
        lm.save_pretrained(tmp_path / name, max_shard_size=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    gpt2(1).save_pretrained(tmp_path / "other")
    lm.half().save_pretrained(tmp_path / "half")
    found = [checkpoint_hash(str(tmp_path / n), "--x") for n in ("one", "many", "copy", "other", "half")]
    assert found[0] == found[1] == found[2] and len(set(found)) == 3 and len(found[0]) == 64
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights in safetensors at .*fix --x"):
        checkpoint_hash(str(tmp_path / "one"), "--x")


def test_a_demo_has_no_checkpoint_to_cache() -> None:
    with pytest.raises(InputError, match=r"expected a checkpoint to cache.*got demo.*--teacher\.path"):
        cache_logits(LMTeacherConfig(), TextConfig(), TeacherCacheConfig(), "out", "fp32")
    for change in ({}, {"path": "x", "fit_steps": 3}):
        with pytest.raises(InputError, match=r"trained in the run.*drop --teacher\.cache"):
            LMTeacherConfig(**{"cache": "there", **change})  # type: ignore[arg-type]


def test_methods_on_other_text_refuse_a_cache(tmp_path: Path) -> None:
    gpt2(0).save_pretrained(tmp_path), words().save_pretrained(tmp_path)
    config = LMTeacherConfig(str(tmp_path), cache="there")
    pair = Pair(CAUSAL, config, LMStudentConfig(), [], 300, 24, 0, torch.device("cpu"))
    with pytest.raises(InputError, match=r"drop --teacher\.cache"):
        pair.teacher()
    assert not pair.live_teacher().trainable()
