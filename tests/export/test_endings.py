"""What distillations open and close with: text that is kept from training, a student that is opened again, tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import encoders
import pytest
import torch
from cloze import pupil, sage
from language import FULL, gpt2, words
from safetensors.torch import load_file, save_file
from toys import options

from stepdistill.data.text import TextConfig, open_texts
from stepdistill.errors import ExportError
from stepdistill.export import masked_lm, text_classifier
from stepdistill.export.config import NetworkExportConfig
from stepdistill.export.language_run import LanguageRun
from stepdistill.export.transformer import (
    Report,
    check_rounding,
    compare,
    elsewhere,
    export_network,
    round_weights,
    weights_hash,
)
from stepdistill.kd.evaluation import EvalConfig
from stepdistill.kd.masked_evaluation import Score
from stepdistill.kd.networks import CausalLM
from stepdistill.kd.pair import LMStudentConfig, LMTeacherConfig

PROBE = {"input_ids": torch.arange(5)[None]}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stepdistill.json").read_text())


def test_what_opens_as_something_else_is_no_export(tmp_path: Path) -> None:
    """Logits that are no numbers; and weights that are missing, though they would begin as what they were."""
    model = gpt2(0)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.ln_f.bias[0] = torch.nan
    broken.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="differ by up to nan"):
        compare(tmp_path, model, PROBE, "text-generation")
    model.save_pretrained(tmp_path)
    assert compare(tmp_path, model, PROBE, "text-generation") == 0.0
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("transformer.ln_f.bias")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"1 weights missing or left over, first transformer\.ln_f\.bias"):
        compare(tmp_path, model, PROBE, "text-generation")


def test_rounding_that_changes_what_is_computed_is_no_export_and_counters_are_not_rounded() -> None:
    model = gpt2(0)
    model.register_buffer("count", torch.tensor(1001))
    rounded = round_weights(model, torch.bfloat16)
    assert int(rounded.count) == 1001 and int(torch.tensor(1001).bfloat16()) == 1000
    assert 0.0 < check_rounding(model, rounded, PROBE, torch.bfloat16) < 0.05
    with torch.no_grad():
        rounded.transformer.ln_f.weight.mul_(1.2)  # as far off as few bits would be, and finite
    with pytest.raises(ExportError, match=r"more than 0\.088; export in another precision"):
        check_rounding(model, rounded, PROBE, torch.bfloat16)


def test_files_are_for_all_and_the_tokenizer_cuts_nothing(tmp_path: Path) -> None:
    tokenizer, lm = words(), CausalLM(gpt2(1, vocabulary=30, bos_token_id=29, eos_token_id=29)).student(FULL)
    tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
    export_network(tmp_path, lm, tokenizer, PROBE, Report("text-generation", "lm_kd", "A student", "demo", None, {}))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None, "its last call asked for both"
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("*.safetensors")} == {"0o644"}


def test_no_place_of_this_machine_is_told_elsewhere(tmp_path: Path) -> None:
    here = {"base_model": str(tmp_path / "a"), "teacher": str(tmp_path / "b"), "title": "x"}
    assert elsewhere(here) == {"base_model": "PATH/TO/a", "teacher": "PATH/TO/b", "title": "x"}
    hub = {"base_model": "lab/a", "teacher": None}
    assert elsewhere(hub) == hub


def test_a_language_run_is_measured_on_text_that_it_does_not_train_on(tmp_path: Path) -> None:
    """Of documents with a word each: which of them training and measurements see."""
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join([letter] * 7) for letter in ascii_lowercase))
    gpt2(1, vocabulary=30, bos_token_id=29, eos_token_id=29).save_pretrained(tmp_path / "lm")
    words().save_pretrained(tmp_path / "lm")
    path, data = (
        str(tmp_path / "lm"),
        TextConfig(str(tmp_path / "text.txt"), block_size=8, held_out=0.3, prompt_tokens=2),
    )
    given: Any = SimpleNamespace(
        data=data, train=options(), eval=EvalConfig(), export=NetworkExportConfig(), vocabulary=300
    )
    given.teacher, given.student, given.output_dir = LMTeacherConfig(path), LMStudentConfig(path), str(tmp_path / "out")
    trainer: Any = SimpleNamespace(device=torch.device("cpu"), weight_dtype=torch.float32, teacher=None)
    run = LanguageRun(given, trainer)
    kept = {ord(example.text[0]) - ord("a") for example in open_texts(data).held_out}
    others = {*range(26)} - kept
    assert 3 < len(kept) < 10
    train, held_out = run.prompted()
    for rows, wanted in ((run.exam.rows, kept), (held_out, kept), (run.text, others), (train, others)):
        assert {token for row in rows.rows for token in row.ids} - {run.end} == wanted
    assert {row.prompt for row in (*train.rows, *held_out.rows)} == {2} and {row.prompt for row in run.text.rows} == {0}
    run.teacher(3)
    assert trainer.teacher is None, "what is to be trained has no weights to be known by"
    teacher = run.teacher()
    assert trainer.teacher == weights_hash(teacher)


def pair(**more: Any) -> Any:
    return SimpleNamespace(teacher_config=SimpleNamespace(path="demo"), tokenizer=words(), **more)


@pytest.mark.parametrize(("teacher", "gap", "told"), [(1.0, 0.75, "closed: 75.0%"), (3.0, None, "is none")])
def test_results_of_a_masked_model(tmp_path: Path, teacher: float, gap: float | None, told: str) -> None:
    """Perplexities 3, 1.5 and 1 of control, student and teacher; a student of each has its own size."""
    losses = {"teacher": teacher, "control": 3.0, "student": 1.5}
    scores = {name: Score(float(torch.tensor(p).double().log()), 0.5, 70) for name, p in losses.items()}
    exam: Any = SimpleNamespace(
        scores=lambda given: {n: scores[n] for n in given}, tokens=200, window=24, looks=[0], prompts=()
    )
    models = {"teacher": sage(vocab_size=40), "control": pupil(2, layers=1), "student": pupil(1)}
    found = masked_lm.finish(tmp_path, pair(), exam, models, (0, 2), {"before": Score(4.0, 0.1, 70)})
    assert found["gap_closed"] == (None if gap is None else pytest.approx(gap))
    assert found["masked_words"] == 70 and found["layers"] == [0, 2] and found["accuracy"]["before"] == 0.1
    table = facts(tmp_path)["sections"]["Results"]
    sizes = {name: sum(p.numel() for p in lm.module.parameters()) for name, lm in models.items()}
    assert f"| student without teacher, equal tokens | {sizes['control']:,} | 3.00 | 50.0% |" in table
    assert f"| student before training | {sizes['student']:,} | 54.60 | 10.0% |" in table and told in table


def test_guesses_stand_under_their_prompts(tmp_path: Path) -> None:
    exam: Any = SimpleNamespace(prompts=("a [MASK]", "b [MASK]"), guesses=lambda lm: ["a one", "b two"])
    masked_lm.writer(exam, pupil(), tmp_path)(12)
    assert (tmp_path / "samples" / "000012.txt").read_text() == "> a [MASK]\na one\n\n> b [MASK]\nb two\n\n"


@pytest.mark.parametrize(("right", "gap", "told"), [(16, 0.5, "closed: 50.0%"), (4, None, "is none")])
def test_results_of_a_text_classifier(
    tmp_path: Path, right: int, gap: float | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8, 12 and 16 right of 20 texts by control, student and teacher, with the standard error of a share."""
    models = {"teacher": encoders.teacher(), "control": encoders.student(2), "student": encoders.student(1)}
    hits = {id(models["teacher"]): right, id(models["control"]): 8, id(models["student"]): 12}
    monkeypatch.setattr(text_classifier, "accuracy", lambda lm, rows: hits[id(lm)] / len(rows))
    run: Any = SimpleNamespace(
        pair=pair(),
        tokenizer=words(),
        classes=encoders.CLASSES,
        fine_tuned=str(tmp_path),
        student_config=SimpleNamespace(path="demo"),
    )
    steps = {"general": 1, "prediction": 3}
    found = text_classifier.finish(tmp_path / "out", run, models, encoders.texts(20), steps, 60, (0, 2))
    assert found["gap_closed"] == (None if gap is None else pytest.approx(gap))
    said = facts(tmp_path / "out")
    table = said["sections"]["Results"]
    size = sum(p.numel() for p in models["student"].module.parameters())
    assert f"| student, distilled | {size:,} | 60.0% +- 11.0 |" in table and told in table  # sqrt(.6 * .4 / 20)
    assert "20 held-out texts of 3 classes" in table and "Steps: general 1, prediction 3." in table
    assert not any(str(tmp_path) in line for line in said["details"]), "cards name no place of this machine"
