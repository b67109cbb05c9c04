"""The licence in the card is the base's, and looking for it can't stop or slow an export."""

from pathlib import Path

import huggingface_hub
import pytest
import yaml
from students import opened, student_of
from tiny import tiny_pipeline

from stepdistill.export import licence as module
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.licence import licence
from stepdistill.export.student import export_student
from stepdistill.families import TeacherConfig
from stepdistill.methods.lcm import LCMConfig

OTHER = "---\nlicense: other\nlicense_name: their-own\nlicense_link: {link}\n---\n# Base\n"


def of_folder(tmp_path: Path, card: str | None) -> dict[str, str]:
    tmp_path.mkdir(exist_ok=True)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    return licence(TeacherConfig(str(tmp_path)))


def test_the_card_of_a_local_folder(tmp_path: Path) -> None:
    assert of_folder(tmp_path, "---\nlicense: mit\ntags: [a]\n---\ntext\n") == {"license": "mit"}
    link = "https://example.org/licence"
    named = {"license": "other", "license_name": "their-own"}
    assert of_folder(tmp_path, OTHER.format(link=link)) == {**named, "license_link": link}
    assert of_folder(tmp_path, OTHER.format(link="LICENSE.md")) == named  # it would be dead beside the student


@pytest.mark.parametrize(
    "card", [None, "", "# no front matter\n", "---\nlicense: [a\n---\n", "---\nlicense: 3\n---\n", "---\n- a\n---\n"]
)
def test_no_card_or_none_that_says_so(tmp_path: Path, card: str | None) -> None:
    assert of_folder(tmp_path, card) == {}


def test_the_demo_teacher_and_single_files(tmp_path: Path) -> None:
    assert licence(TeacherConfig("demo")) == {"license": "apache-2.0"}
    assert licence(TeacherConfig(str(tmp_path / "model.safetensors"))) == {}


def test_the_hub_s_card_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(OTHER.format(link="LICENSE.md"))
    asked = []

    def cached(*arguments: object, **options: object) -> str:
        asked.append((arguments, options))
        return str(tmp_path / "README.md")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    found = licence(TeacherConfig("org/model", revision="abc"))
    assert found["license_link"] == "https://huggingface.co/org/model/blob/abc/LICENSE.md"
    assert asked == [(("org/model", "README.md"), {"revision": "abc"})]


def test_the_hub_is_asked_only_if_it_answers_and_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    assert licence(TeacherConfig("org/model")) == {}
    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)

    def fails(*_: object, **options: object) -> str:
        assert options["etag_timeout"] <= 5
        raise OSError("gone")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    assert licence(TeacherConfig("org/model")) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "README.md"))
    assert licence(TeacherConfig("org/model")) == {"license": "mit"}


def test_the_student_s_card_carries_it_or_says_where_to_look(base: Path, tmp_path: Path) -> None:
    checkpoint = tiny_pipeline(tmp_path / "base")
    for text, expected in (("", None), ("---\nlicense: mit\n---\n", "mit")):
        (checkpoint / "README.md").write_text(text)
        model = opened(base)
        export_student(
            tmp_path / "run", model, student_of(model), TeacherConfig(str(checkpoint)), lcm_sampling(LCMConfig(), model)
        )
        card = (tmp_path / "run" / "README.md").read_text()
        assert yaml.safe_load(card.split("---\n")[1]).get("license") == expected
        assert ("licence: see the base model" in card) == (expected is None)
