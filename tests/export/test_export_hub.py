"""Uploading: what would stop it is said before training, only the export goes up, and nothing tells of this machine."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from fake_hub import FakeApi, uploaded
from students import full_student_of, opened, student_of

from stepdistill.errors import InputError
from stepdistill.export import hub
from stepdistill.export.config import ExportConfig
from stepdistill.export.hub import check_hub, push
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.student import export_student
from stepdistill.families import TeacherConfig
from stepdistill.methods.lcm import LCMConfig

ON = ExportConfig(push_to_hub=True)


def test_it_is_off_by_default_and_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("asked"))
    assert check_hub(ExportConfig(), tmp_path) is None
    assert push(tmp_path, ExportConfig()) is None


def test_no_option_takes_a_token() -> None:
    assert not [f.name for f in dataclasses.fields(ExportConfig) if "token" in f.name]


@pytest.mark.parametrize(
    ("given", "folder", "repo"),
    [
        (None, "out/lcm_lora", "ada/lcm_lora"),
        (None, "out/my run, the 2nd.", "ada/my-run-the-2nd"),
        ("name", "out/x", "ada/name"),
        ("lab/name", "out/x", "lab/name"),
    ],
)
def test_the_repository_is_named_and_made(
    api: type[FakeApi], tmp_path: Path, given: str | None, folder: str, repo: str
) -> None:
    config = ExportConfig(push_to_hub=True, hub_model_id=given, hub_private_repo=True)
    assert check_hub(config, tmp_path / folder) == repo
    assert api.calls[-1] == ("create_repo", (repo,), {"private": True, "exist_ok": True})


def test_a_name_of_another_or_of_nobody(api: type[FakeApi], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"repository of ada or lab, got 'bob/x'; fix --export\.hub_model_id"):
        check_hub(ExportConfig(push_to_hub=True, hub_model_id="bob/x"), tmp_path)
    for name in ("ada/a b", "ada/x/y", "-x"):
        with pytest.raises(InputError, match=r"--export\.hub_model_id"):
            check_hub(ExportConfig(push_to_hub=True, hub_model_id=name), tmp_path)
    assert [name for name, _, _ in api.calls] == ["whoami"] * 4


def test_a_token_that_may_only_read(api: type[FakeApi], tmp_path: Path) -> None:
    api.user = {**api.user, "auth": {"accessToken": {"role": "read"}}}
    with pytest.raises(InputError, match=r"may only read; log in with `hf auth login`"):
        check_hub(ON, tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [("whoami", r"reach the hub, got: broken.*HF_TOKEN"), ("create_repo", r"write to 'ada/run'.*broken")],
)
def test_what_the_client_raises_is_one_paragraph(api: type[FakeApi], tmp_path: Path, call: str, message: str) -> None:
    from huggingface_hub.errors import HTTPError

    for error in (OSError("broken\n\nlines"), HTTPError("broken")):
        api.fails = {call: error}
        with pytest.raises(InputError, match=message + r".*or drop --export\.push_to_hub") as raised:
            check_hub(ON, tmp_path / "run")
        assert "\n" not in str(raised.value)


def test_offline_and_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client; tests run with HF_HUB_OFFLINE."""
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api, "get_token", lambda: "hf_some_token_that_is_none")
    with pytest.raises(InputError, match=r"offline mode is enabled.*drop --export\.push_to_hub") as raised:
        check_hub(ON, tmp_path)
    assert "hf_some" not in str(raised.value)
    monkeypatch.setattr(hf_api, "get_token", lambda: None)
    with pytest.raises(InputError, match=r"hf auth login"):
        check_hub(ON, tmp_path)


def run_folder(tmp_path: Path, base: Path, kind: str = "lora") -> Path:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "checkpoints" / "5").mkdir(parents=True)
    for name in (
        "samples/000005.png", "table.md", "grid.png", "config.yaml", "metrics.jsonl", "checkpoints/5/state.json", "notes",
    ):  # fmt: skip
        (folder / name).write_text(f"of {tmp_path}" if name not in ("table.md", "grid.png") else "| a |")
    model = opened(base)
    student = student_of(model) if kind == "lora" else full_student_of(model)
    teacher = TeacherConfig(str(base), vae=str(base))
    export_student(
        folder,
        model,
        student,
        teacher,
        lcm_sampling(LCMConfig(), model, student.takes_guidance),
        ExportConfig(formats=("diffusers", "kohya")),
    )
    return folder


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_export_goes_up_and_no_more(api: type[FakeApi], base: Path, tmp_path: Path, kind: str) -> None:
    folder = run_folder(tmp_path, base, kind)
    before = (folder / "README.md").read_bytes()
    assert push(folder, ON) == "https://huggingface.co/ada/run"
    contents = uploaded(api)
    weights = {
        "lora": ["lora_kohya.safetensors", "pytorch_lora_weights.safetensors"],
        "full": ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
    }[kind]
    shown = ["grid.png", "samples/000005.png", "table.md"]
    assert sorted(contents) == sorted(
        ["README.md", "stepdistill.json", "scheduler/scheduler_config.json", *weights, *shown]
    )
    for name, content in contents.items():
        if name not in ("README.md", "stepdistill.json"):
            assert content == (folder / name).read_bytes()
        if name != "samples/000005.png":  # the test's own
            assert str(tmp_path).encode() not in content and str(base).encode() not in content, name
    assert (folder / "README.md").read_bytes() == before  # here it goes on to load what is here


def test_the_card_that_goes_up_loads_from_there(api: type[FakeApi], base: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, base)
    push(folder, ON)
    card = uploaded(api)["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'pipe.load_lora_weights("ada/run")' in code
    assert 'LCMScheduler.from_pretrained("ada/run", subfolder="scheduler")' in code
    assert f'StableDiffusionPipeline.from_pretrained("PATH/TO/{base.name}")' in code
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front and "base_model_relation" not in front  # the hub takes ids of the hub
    assert "(samples/000005.png)" in card
    info = json.loads(uploaded(api)["stepdistill.json"])
    assert info["base_model"]["path"] == info["base_model"]["vae"] == f"PATH/TO/{base.name}"


def test_a_base_on_the_hub_is_named_there(base: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, base)
    info = json.loads((folder / "stepdistill.json").read_text())
    info["base_model"] = {"name": "org/model", "path": "org/model", "revision": None, "variant": None, "vae": None}
    (folder / "stepdistill.json").write_text(json.dumps(info))
    card = hub._content(folder, "README.md", "ada/run")
    assert isinstance(card, bytes)
    assert yaml.safe_load(card.decode().split("---\n")[1])["base_model"] == "org/model"
    assert 'from_pretrained("org/model")' in card.decode()


def test_a_failed_upload_says_that_the_export_is_whole(api: type[FakeApi], base: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, base)
    api.fails = {"create_commit": OSError("connection lost")}
    with pytest.raises(InputError, match=r"connection lost; it is whole here; repeat with `stepdistill export"):
        push(folder, ON)
