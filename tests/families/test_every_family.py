"""What every family promises, against the stock pipeline of its checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FAMILIES, STEPS, Family, calls, encoded, network, normal, opened, our_run, stock, stock_run
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.families.fingerprint import fingerprint
from stepdistill.families.pixels import LUMA
from stepdistill.families.unet import embed_guidance
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.networks.lora import LoraSpec, StudentConfig
from stepdistill.networks.merge import merged
from stepdistill.randomness import StepRandom

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LATENT = [name for name, family in FAMILIES.items() if family.latent]
TABLES = [name for name, family in FAMILIES.items() if not family.flow]
SDXL = [name for name in FAMILIES if name.startswith("sdxl")]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.make(root / name) for name, family in FAMILIES.items()}


@pytest.fixture(params=list(FAMILIES))
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Family, Path]:
    return FAMILIES[request.param], folders[request.param]


def inputs(model: Any, family: Family) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    t = torch.tensor([1.0, 0.402], dtype=torch.float64) if family.flow else model.denoiser.table.time([999, 401])
    return normal(2, *model.latent_shape), t, model.conditions(family.prompts)


@torch.no_grad()
def look(denoiser: Any, given: tuple[Tensor, Tensor, dict[str, Tensor]], **more: Tensor) -> Tensor:
    x_t, t, cond = given
    return denoiser.output(x_t, t, {**cond, **more})


# against the stock pipeline


def test_samples_and_every_call_of_the_network_are_the_stock_pipelines(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    x_t = normal(2, *model.latent_shape)
    theirs, ours = stock_run(family, folder, x_t), our_run(family, model, model.denoiser, x_t)
    assert len(ours.calls) == len(theirs.calls) == STEPS
    for k, (mine, stocks) in enumerate(zip(ours.calls, theirs.calls, strict=True)):
        assert mine.keys() == stocks.keys()
        assert (stocks["timestep"] == family.native(k)).all()
        assert (mine["timestep"] == family.native(k)).all()
        for name in mine.keys() - {"timestep"}:
            # later samples have gone through our solver, and "" is encoded once and not in a batch
            exact = name in ("time_ids", "class_labels", "guidance", "img_ids", "txt_ids") or (
                name == "sample" and k == 0
            )
            torch.testing.assert_close(mine[name], stocks[name], **(EXACT if exact else CLOSE))
    torch.testing.assert_close(ours.latents, theirs.latents, **CLOSE)
    torch.testing.assert_close(ours.images, theirs.images, **CLOSE)
    assert theirs.images.std() > 0.01


@pytest.mark.parametrize("name", TABLES)
def test_schedule_and_kind_are_the_checkpoints(folders: dict[str, Path], name: str):
    folder = folders[name]
    denoiser, config = opened(folder).denoiser, stock(folder).scheduler.config
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    assert denoiser.predicts == kinds[config.prediction_type]
    alphas = stock(folder).scheduler.alphas_cumprod.double().sqrt()
    torch.testing.assert_close(denoiser.schedule.alpha(denoiser.table.time(torch.arange(1000))), alphas, **EXACT)
    assert denoiser.table.zero_terminal_snr == bool(config.get("rescale_betas_zero_snr"))


def test_resolution_and_latent_shape(case: tuple[Family, Path]):
    family, folder = case
    model, pipeline = opened(folder), stock(folder)
    if family.latent:
        assert model.resolution == 32
        assert model.latent_shape == (pipeline.vae.config.latent_channels, 4, 4)
    else:
        assert model.resolution == 16
        assert model.latent_shape == (pipeline.unet.config.in_channels, 16, 16)
    assert model.name == str(folder)


def test_images_become_latents_and_latents_images(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    pixels = normal(2, 3, model.resolution, model.resolution).clamp(-1, 1)
    mean, std = model.posterior(pixels)
    assert mean.shape == std.shape == (2, *model.latent_shape)
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    if family.latent:
        vae = stock(folder).vae
        shift = vae.config.shift_factor or 0.0
        assert (shift != 0.0) == family.flow
        with torch.no_grad():
            distribution = vae.encode(pixels).latent_dist
            images = vae.decode(mean / vae.config.scaling_factor + shift).sample
        torch.testing.assert_close(mean, (distribution.mean - shift) * vae.config.scaling_factor, **EXACT)
        torch.testing.assert_close(std, distribution.std * vae.config.scaling_factor, **EXACT)
    else:
        grey = (pixels * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        images = pixels if model.latent_shape[0] == 3 else grey
        torch.testing.assert_close(mean, images)
        assert not std.any()
    latents = mean.clone().requires_grad_()
    torch.testing.assert_close(model.decode(latents), images, **EXACT)
    model.decode(latents).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    torch.testing.assert_close(model.encode_images(pixels), mean, **EXACT)


@pytest.mark.parametrize("name", LATENT)
def test_prompts_are_encoded_as_the_pipeline_does_and_cut_at_its_length(folders: dict[str, Path], name: str):
    model, pipeline = opened(folders[name]), stock(folders[name])
    prompts = ["a red circle", "x" * 600, ""]
    ours = model.encode_prompts(prompts)
    theirs, without = encoded(pipeline, prompts)
    assert list(ours) == list(theirs)
    extra = torch.arange(3)
    uncond = model.uncond({**ours, "time_ids": extra})
    if FAMILIES[name].told:
        assert uncond == without == {}
    else:
        assert uncond.pop("time_ids") is extra
        torch.testing.assert_close(uncond, without, rtol=0, atol=1e-6)
    for key, value in ours.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, theirs[key], **EXACT)
        assert not torch.equal(value[0], value[1])


def test_no_prompt_is_zeros_only_where_the_checkpoint_says_so(folders: dict[str, Path]):
    for name, zeros in zip(SDXL, (True, False), strict=True):
        model = opened(folders[name])
        uncond = model.uncond(model.conditions(["a", "b"]))
        for key in ("prompt_embeds", "pooled_prompt_embeds"):
            assert bool((uncond[key] == 0).all()) == zeros
        assert torch.equal(uncond["time_ids"], model.conditions(["a", "b"])["time_ids"])


@pytest.mark.parametrize("name", SDXL)
def test_size_conditions_are_the_pipelines_time_ids(folders: dict[str, Path], name: str):
    model, pipeline = opened(folders[name]), stock(folders[name])
    sizes = [((301, 407), (3, 5), (32, 48)), ((1023, 9), (0, 1), (48, 32))]
    ours = model.size_cond(*zip(*sizes, strict=True))["time_ids"]
    project = pipeline.text_encoder_2.config.projection_dim
    theirs = [pipeline._get_add_time_ids(*size, torch.float32, project) for size in sizes]
    torch.testing.assert_close(ours, torch.cat(theirs), **EXACT)
    whole = model.conditions(["a"], size=(24, 40))["time_ids"]
    assert whole.tolist() == [[24, 40, 0, 0, 24, 40]]
    assert model.conditions(["a"])["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


def test_families_without_size_conditions_give_none(case: tuple[Family, Path]):
    _, folder = case
    if "sdxl" not in folder.name:
        model = opened(folder)
        assert model.size_cond([(1, 2)], [(3, 4)], [(5, 6)]) == {}
        assert model.conditions(model.examples).keys() == model.encode_prompts(model.examples).keys()


def test_pipeline_shares_the_weights_and_gives_what_stock_gives(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    pipeline: Any = model.pipeline()
    assert type(pipeline) is type(stock(folder))
    assert network(pipeline) is model.denoiser.module
    assert pipeline.scheduler.config == stock(folder).scheduler.config
    assert pipeline.scheduler is not model.pipeline().scheduler  # it holds the state of a run
    if family.classes:
        with pytest.raises(ValueError, match="class_labels should be provided"):
            pipeline(num_inference_steps=1)
        return
    options = {"num_inference_steps": 2, "output_type": "np"}
    if family.latent:
        options |= {"prompt": "a", "guidance_scale": 3.0, "height": 32, "width": 32}
    theirs, ours = (p(generator=torch.Generator().manual_seed(0), **options).images for p in (stock(folder), pipeline))
    assert (ours == theirs).all()


# students


def test_a_lora_student_starts_as_its_teacher_and_trains(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    given = inputs(model, family)
    before = look(model.denoiser, given)
    student = model.denoiser.student(StudentConfig(rank=2))
    torch.testing.assert_close(look(student, given), before, **EXACT)
    names = {n.split(".lora_")[0] for n in student.named_trainable()}
    for target in model.denoiser.lora_targets:
        assert any(n.endswith(f".{target}") for n in names), target
    optimizer = torch.optim.SGD(student.trainable(), lr=0.1)
    x_t, t, cond = given
    losses = []
    for _ in range(3):
        loss = (student.output(x_t, t, cond) - 1.0).square().mean()
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None for p in student.trainable())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    torch.testing.assert_close(look(model.denoiser, given), before, **EXACT)


def test_a_merged_student_computes_the_same_as_a_plain_network(case: tuple[Family, Path], tmp_path: Path):
    family, folder = case
    model = opened(folder)
    given = inputs(model, family)
    reference = {n: v.clone() for n, v in model.denoiser.module.state_dict().items()}
    student = model.denoiser.with_lora(LoraSpec(4, 8.0, tuple(model.denoiser.lora_targets)))
    with torch.no_grad():
        for seed, parameter in enumerate(student.trainable()):
            parameter.copy_(0.1 * normal(*parameter.shape, seed=seed))
    trained = look(student, given)
    module: Any = merged(student)
    assert module.state_dict().keys() == reference.keys()
    assert not torch.equal(trained, look(model.denoiser, given))
    torch.testing.assert_close(look(student, given), trained, **EXACT)  # it stays as it was
    module.save_pretrained(str(tmp_path / "unet"))
    loaded, info = type(module).from_pretrained(str(tmp_path / "unet"), output_loading_info=True)
    assert not any(info.values())
    for plain in (module, loaded):
        fresh = opened(folder).denoiser
        fresh.net = plain
        torch.testing.assert_close(look(fresh, given), trained, **CLOSE)


@pytest.mark.parametrize("name", ["sd-eps", "pixels"])
def test_a_merged_student_is_in_float32_and_can_be_adapted_again(folders: dict[str, Path], name: str):
    denoiser = opened(folders[name], torch.bfloat16).denoiser
    module: Any = merged(denoiser.student(StudentConfig(rank=2)))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not vars(module).keys() & {"peft_config", "_hf_peft_config_loaded"}
    again = opened(folders[name]).denoiser
    again.net = module
    assert len(again.student(StudentConfig(rank=2)).trainable()) == len(denoiser.adapters.parameters("student"))


def test_merging_needs_an_adapter(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="expected a LoRA student to merge"):
        merged(opened(folders["pixels"]).denoiser)


@pytest.mark.parametrize("embed", [False, True])
def test_a_full_student_starts_as_its_teacher(case: tuple[Family, Path], embed: bool):
    family, folder = case
    model = opened(folder)
    given = inputs(model, family)
    student = model.denoiser.student(StudentConfig(kind="full"), embed_guidance=embed)
    given_input = embed and family.latent and not family.flow
    assert student.takes_guidance == (given_input or family.told)
    assert {p.data_ptr() for p in student.module.parameters()}.isdisjoint(
        p.data_ptr() for p in model.denoiser.module.parameters()
    )
    before = look(model.denoiser, given)
    for guidance in ([1.0, 1.0], [2.5, 8.0], [7.5, 100.0]) if student.takes_guidance else ([0.0, 0.0],):
        told = {"guidance": torch.tensor(guidance, dtype=torch.float64)} if student.takes_guidance else {}
        before = look(model.denoiser, given, **told) if family.told else before
        torch.testing.assert_close(look(student, given, **told), before, **EXACT)
    assert len(student.trainable()) == len(list(student.module.parameters()))
    assert model.denoiser.takes_guidance == family.told
    if given_input:  # its input trains although it starts at zero
        student.output(*given[:2], {**given[2], "guidance": torch.tensor([4.0, 8.0])}).sum().backward()
        assert student.module.time_embedding.cond_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_method_trains_a_student_of_it(case: tuple[Family, Path], kind: Any):
    family, folder = case
    model = opened(folder)
    student = model.denoiser.student(StudentConfig(kind=kind, rank=2), embed_guidance=True)
    method = LCM(LCMConfig(), student, model.denoiser)
    x0 = model.encode_images(normal(2, 3, model.resolution, model.resolution).clamp(-1, 1))
    cond = model.conditions(family.prompts)
    with calls(model.denoiser.module) as seen:
        losses = method.training_step(Batch(x0, cond, model.uncond(cond), StepRandom(0, 0, range(2))))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(p.grad).all() for p in student.trainable() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.trainable())
    by_teacher = seen if kind == "full" else seen[1:2]  # student, teacher, target of one step
    assert [len(call["sample"]) for call in by_teacher] == [2 * family.rows]
    if family.told:  # each its own w, which the student is told too
        assert all(torch.equal(call["guidance"], seen[0]["guidance"]) for call in seen)
        assert len(set(seen[0]["guidance"].tolist())) == 2


def test_a_frozen_copy_stays_when_the_network_changes(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    given = inputs(model, family)
    for student in (model.denoiser.full_student(embed_guidance=False), model.denoiser.student(StudentConfig(rank=2))):
        twin = student.frozen_copy()
        before = look(twin, given)
        with torch.no_grad():
            for parameter in student.trainable():
                parameter.add_(0.1)
        torch.testing.assert_close(look(twin, given), before, **EXACT)
        assert not torch.equal(look(student, given), before)
        assert twin.trainable() == []


def test_tap_points_are_features_of_the_network(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    assert len(model.denoiser.tap_points) >= (2 if family.flow else 4)
    with model.denoiser.taps(model.denoiser.tap_points) as features:
        look(model.denoiser, inputs(model, family))
    assert set(features) == set(model.denoiser.tap_points)
    assert all(value.shape[0] == 2 and value.std() > 0 for value in features.values())


def test_activation_checkpointing_changes_no_gradient(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    x_t, t, cond = inputs(model, family)
    grads = []
    for wanted in (False, True):
        student = model.denoiser.full_student()
        student.module.train()
        student.checkpoint_activations(wanted)
        student.output(x_t, t, cond).square().sum().backward()
        grads.append([p.grad for p in student.trainable()])
    assert student.module.is_gradient_checkpointing
    torch.testing.assert_close(*grads)


# dtypes and fingerprints


def test_half_precision_is_the_networks_alone(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder, torch.bfloat16)
    assert model.denoiser.dtype == torch.bfloat16
    x_t, t, cond = inputs(model, family)
    assert all(value.dtype in (torch.float32, torch.int64) for value in cond.values())
    with calls(model.denoiser.module) as seen, torch.no_grad():
        prediction = model.denoiser(x_t, t, cond)
    given = seen[0]
    assert (given["sample"].dtype, given["timestep"].dtype) == (torch.bfloat16, torch.float32)
    times = torch.tensor([1000.0, 402.0]) / family.thousands if family.flow else torch.tensor([999.0, 401.0])
    torch.testing.assert_close(given["timestep"], times, rtol=1e-7, atol=0)
    assert prediction.x0.dtype == torch.float32
    assert torch.isfinite(prediction.x0).all()
    if family.latent:
        assert given["encoder_hidden_states"].dtype == torch.bfloat16
        assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
        torch.testing.assert_close(model.vae.state_dict(), opened(folder).vae.state_dict(), **EXACT)
        assert {p.dtype for m in model.modules[2:] for p in m.parameters()} == {torch.bfloat16}
    if "time_ids" in given:
        assert (given["text_embeds"].dtype, given["time_ids"].dtype) == (torch.bfloat16, torch.float32)
    student = model.denoiser.full_student()
    assert student.dtype == torch.float32
    assert look(student, (x_t, t, cond)).dtype == torch.float32


def test_nothing_requires_grad_or_is_in_training_mode(case: tuple[Family, Path]):
    model = opened(case[1])
    assert not any(p.requires_grad for m in model.modules for p in m.parameters())
    assert not any(m.training for m in model.modules)
    assert model.to("cpu") is model
    assert model.device == torch.device("cpu")


def test_fingerprint_is_of_all_that_decides_latents_and_embeddings(case: tuple[Family, Path]):
    family, folder = case
    model = opened(folder)
    first, of_denoiser, by_dtype = model.fingerprint(), model.denoiser_fingerprint(), model.denoiser_hash()
    assert opened(folder).denoiser_hash() == by_dtype and list(by_dtype) == ["float32"]
    assert list(opened(folder, torch.bfloat16).denoiser_hash()) == ["bfloat16"]
    model.conditions(family.prompts)
    assert opened(folder).fingerprint() == model.fingerprint() == first
    for module in model.modules[1:]:
        weight = next(module.parameters())
        saved = weight.data.clone()
        weight.data[(0,) * weight.ndim] += 1.0
        assert model.fingerprint() != first
        weight.data.copy_(saved)
    assert model.fingerprint() == first
    model.denoiser.student(StudentConfig(rank=1))
    assert (model.denoiser_fingerprint(), model.denoiser_hash()) == (of_denoiser, by_dtype)  # adapters don't count
    next(model.denoiser.module.parameters()).data.add_(1.0)
    assert model.fingerprint() == first
    assert model.denoiser_fingerprint() != of_denoiser and model.denoiser_hash() != by_dtype


def test_no_two_families_have_the_same_fingerprint_but_those_with_the_same_encoders(folders: dict[str, Path]):
    prints = {name: opened(folder).fingerprint() for name, folder in folders.items()}
    assert prints["sd-eps"] == prints["sd-v"] == prints["sd-v-ztsnr"]  # another scheduler changes no latent
    assert len(set(prints.values())) == len(prints) - 3  # both SDXL too
    assert len({opened(folder).denoiser_fingerprint() for folder in folders.values()}) == len(folders)
    assert len({opened(folder).denoiser_hash()["float32"] for folder in folders.values()}) == len(folders)


def test_the_last_bits_of_a_schedule_are_no_other_teacher(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    model = opened(folders["sd-v"])
    first, alpha = model.denoiser_hash(), model.denoiser.schedule.alpha
    monkeypatch.setattr(model.denoiser.schedule, "alpha", lambda t: alpha(t) * (1 + 1e-15))
    assert model.denoiser_hash() == first
    monkeypatch.setattr(model.denoiser.schedule, "alpha", lambda t: alpha(t) * (1 - 1e-4))
    assert model.denoiser_hash() != first


def test_a_fingerprint_is_of_names_and_facts_and_every_bit():
    weight = torch.nn.Linear(2, 2).requires_grad_(False)
    other = copy.deepcopy(weight)
    other.weight[0, 0] = torch.nextafter(other.weight[0, 0], torch.tensor(9.0))
    first, second = (torch.nn.ModuleDict({name: weight}) for name in ("a", "b"))
    prints = [fingerprint((1,), first), fingerprint((2,), first), fingerprint((1,), second), fingerprint((1,), weight)]
    assert len({*prints, fingerprint((1,), torch.nn.ModuleDict({"a": other}))}) == 5
    assert fingerprint((1,), copy.deepcopy(first)) == prints[0]


# guidance as an input


@pytest.mark.parametrize("channels", [256, 32])
def test_embedded_guidance_is_the_pipelines_to_the_bit(folders: dict[str, Path], channels: int):
    w = torch.tensor([0.0, 6.5, 7.1, 14.0])
    for name in ("sd-eps", "sdxl-eps"):
        theirs = stock(folders[name]).get_guidance_scale_embedding(w, embedding_dim=channels)
        torch.testing.assert_close(embed_guidance(w, channels), theirs, **EXACT)


def few_step(model: Any, student: Any, name: str) -> Any:
    """A stock pipeline for a student with a guidance input."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    pipeline = model.pipeline(student)
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if name != "lcm":
        pipeline.scheduler = scheduler
        return pipeline
    parts = {**pipeline.components, "scheduler": scheduler}
    pipeline = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 7.5, 8.1])
@pytest.mark.parametrize("name", ["sd-v", "sdxl-eps", "lcm"])
def test_stock_pipelines_feed_the_guidance_that_call_feeds(folders: dict[str, Path], name: str, guidance: float):
    model = opened(folders["sd-v" if name == "lcm" else name])
    student = model.denoiser.full_student(embed_guidance=True)
    weight = student.module.time_embedding.cond_proj.weight
    weight.data.copy_(normal(*weight.shape))
    x_t = normal(2, *model.latent_shape)
    prompts, t = ["a", "b"], student.table.time(torch.tensor([999, 999]))
    scale = torch.full((2,), guidance, dtype=torch.float64)
    outputs: list[Tensor] = []
    watch = student.module.register_forward_hook(lambda _m, _i, output: outputs.append(output[0]))
    with calls(student.module) as seen, torch.no_grad():
        student.output(x_t, t, {**model.conditions(prompts), "guidance": scale})
        few_step(model, student, name)(
            prompts, num_inference_steps=2, guidance_scale=guidance, latents=x_t.clone(), output_type="latent"
        )
    watch.remove()
    ours, *theirs = seen
    assert len(theirs) == 2
    for call in theirs:
        assert len(call["sample"]) == 2  # no second half for classifier-free guidance
        torch.testing.assert_close(call["timestep_cond"], ours["timestep_cond"], **EXACT)
    assert ours.keys() == theirs[0].keys()
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


@pytest.mark.parametrize("name", ["sd-v", "sdxl-eps"])
def test_a_saved_full_student_loads_with_its_guidance_input(folders: dict[str, Path], tmp_path: Path, name: str):
    from diffusers import UNet2DConditionModel

    model = opened(folders[name])
    student = model.denoiser.full_student(embed_guidance=True)
    with torch.no_grad():
        student.module.time_embedding.cond_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    student.module.save_pretrained(str(tmp_path))
    loaded, info = UNet2DConditionModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.time_cond_proj_dim == 256
    given = inputs(model, FAMILIES[name])
    scale = torch.tensor([3.0, 9.0], dtype=torch.float64)
    trained = look(student, given, guidance=scale)
    assert not torch.equal(trained, look(student, given, guidance=scale + 1.0))
    student.net = loaded
    torch.testing.assert_close(look(student, given, guidance=scale), trained, **EXACT)


def test_set_aside_is_what_no_student_is_made_of(case: tuple[Family, Path], monkeypatch: pytest.MonkeyPatch):
    model, moved = opened(case[1]), []
    monkeypatch.setattr(type(model.denoiser.module), "to", lambda module, *to: moved.append((module, to)) or module)
    model.set_aside(model.denoiser)
    assert not moved
    model.set_aside(model.denoiser.student(StudentConfig(kind="full")))
    assert moved == [(model.denoiser.module, ("cpu",))]
    model.set_aside(model.denoiser.with_lora(LoraSpec(rank=2, alpha=2, targets=tuple(model.denoiser.lora_targets))))
    assert len(moved) == 1
