"""`offramp import --from diffusers`: pipelines that diffusers wrote give the same network and the same samples."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import schedulers as theirs
from typer.testing import CliRunner

from models.api import GenerateWork, Runtime, SolverOptions, UserError
from models.evaluation.generate import run_work
from models.importing.cli import Format, Told, app, read
from models.importing.folder import write
from models.importing.schedulers import SCHEDULERS, read_scheduler
from models.solvers.noise import normal
from models.store import read_config, read_json
from models.tasks.generator import load, load_model
from tests.models.pipelines import CLASSES, SIZE, edit, random_transformer, random_vae, save

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2
LATENT = (4, SIZE, SIZE)
SEEDS = (3, 2**40 + 7)
LABELS = (1, 4)
GUIDANCE = 3.0


def imported(folder, out):
    parts = read(folder, Format.diffusers, Told())
    write(parts, out, "toy", "test")
    return out


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pipelines") / "plain")


@pytest.fixture
def copy(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "pipeline")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_channels": 8, "norm_eps": 1e-6},
        {"attention_bias": False, "num_layers": 3},
        {"patch_size": 4, "num_attention_heads": 2, "attention_head_dim": 16},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
@torch.no_grad()
def test_the_network_is_the_transformer(tmp_path, changes):
    transformer = random_transformer(**changes)
    model, config, _ = load_model(imported(save(tmp_path / "p", transformer), tmp_path / "m"))
    x, t, y = torch.randn(4, *LATENT), torch.tensor([0, 17, 500, 999]), torch.tensor([0, 2, 4, CLASSES])
    expected = transformer(x, timestep=t, class_labels=y).sample
    output, _ = model(x, model.condition(t.float(), y), [model.depth] * 4)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert config["network"]["block_embedders"]
    assert model.null_label == CLASSES


@torch.no_grad()
def test_embedders_that_agree_are_stored_once(tmp_path):
    transformer = random_transformer(num_layers=3)
    first, *others = (block.norm1.emb for block in transformer.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())
    model, config, _ = load_model(imported(save(tmp_path / "p", transformer), tmp_path / "m"))
    assert not config["network"]["block_embedders"]
    assert not len(model.embedders)
    x, t, y = torch.randn(2, *LATENT), torch.tensor([5, 700]), torch.tensor([1, 2])
    expected = transformer(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(model(x, model.condition(t.float(), y), [3, 3])[0], expected, rtol=1e-5, atol=1e-5)


RUNS = {
    "ddim": (theirs.DDIMScheduler, {"clip_sample": False}, {}),
    "ddim clips": (theirs.DDIMScheduler, {"clip_sample_range": 2.0, "set_alpha_to_one": False}, {}),
    "ddim v zero snr": (
        theirs.DDIMScheduler,
        {
            **{"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            **{"clip_sample": False, "beta_schedule": "scaled_linear"},
        },
        {},
    ),
    "ddpm": (theirs.DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_large"}, {}),
    "ddpm learned": (
        theirs.DDPMScheduler,
        {"clip_sample": False, "variance_type": "learned_range", "timestep_spacing": "linspace"},
        {"out_channels": 8},
    ),
    "ddim of learned": (theirs.DDIMScheduler, {"clip_sample": False, "steps_offset": 1}, {"out_channels": 8}),
    "dpmpp": (theirs.DPMSolverMultistepScheduler, {}, {}),
    "dpmpp karras": (theirs.DPMSolverMultistepScheduler, {"use_karras_sigmas": True, "solver_type": "heun"}, {}),
    "dpmpp v": (
        theirs.DPMSolverMultistepScheduler,
        {"prediction_type": "v_prediction", "final_sigmas_type": "sigma_min", "timestep_spacing": "leading"},
        {},
    ),
    "dpmpp sde": (theirs.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "unipc": (theirs.UniPCMultistepScheduler, {"beta_schedule": "squaredcos_cap_v2"}, {}),
    "euler": (theirs.EulerDiscreteScheduler, {"trained_betas": [0.0001 + 0.00002 * i for i in range(1000)]}, {}),
    "euler ancestral": (theirs.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, {}),
    "heun": (theirs.HeunDiscreteScheduler, {}, {}),
    "flow": (theirs.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
    "flow heun": (theirs.FlowMatchHeunDiscreteScheduler, {}, {}),
}


def reference(transformer, scheduler, steps, monkeypatch):
    """The loop of diffusers' DiTPipeline from our initial noise; the scheduler's draws are ours too."""
    seeds = torch.tensor(SEEDS, dtype=torch.int64)
    learned = scheduler.config.get("variance_type") == "learned_range"
    at = 0
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    drawn = lambda *args, **kwargs: normal(seeds, torch.full_like(seeds, at), LATENT)  # noqa: E731
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    scheduler.set_timesteps(steps)
    x = normal(seeds, torch.full_like(seeds, -1), LATENT) * getattr(scheduler, "init_noise_sigma", 1.0)
    y = torch.tensor([*LABELS, CLASSES, CLASSES])
    for at, t in enumerate(scheduler.timesteps):  # noqa: B007  # `drawn` reads it
        inputs = torch.cat([x, x])
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(inputs, t)
        output = transformer(inputs, timestep=t.expand(4), class_labels=y).sample
        conditional, plain = output[:, :4].chunk(2)
        guided = plain + GUIDANCE * (conditional - plain)
        x = scheduler.step(torch.cat([guided, output[:2, 4:]], dim=1) if learned else guided, t, x).prev_sample
    return x


@pytest.mark.parametrize("case", RUNS)
@torch.no_grad()
def test_samples_are_those_of_diffusers(case, tmp_path, monkeypatch):
    """From the same latents, guided: final latents alike, pixels within one level."""
    cls, settings, shape = RUNS[case]
    transformer, vae, scheduler = random_transformer(**shape), random_vae(), cls(**settings)
    task = load(imported(save(tmp_path / "p", transformer, scheduler, vae), tmp_path / "m"), 2, "cpu", Runtime())
    gear, steps = task.gears["full"], 6
    work = GenerateWork(
        model="toy",
        labels=LABELS,
        seeds=SEEDS,
        steps=steps,
        solver=gear.solver,
        guidance=GUIDANCE,
        gear="full",
        solver_options=gear.solver_options,
    )
    pixels, _ = run_work(task, work)
    expected = reference(transformer, scheduler, steps, monkeypatch)
    torch.testing.assert_close(task.pool.x[:2], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    pictures = vae.decode(expected / vae.config.scaling_factor).sample
    levels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    for drawn, wanted in zip(pixels, levels, strict=True):
        assert (torch.from_numpy(drawn).int() - wanted.int()).abs().max() <= 1
        assert drawn.std() > 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_are_those_of_diffusers(name):
    """Of the keys that are read and of those that are not, as of the installed version."""
    scheduler = getattr(diffusers, name)()
    known = SCHEDULERS[name].read | SCHEDULERS[name].only
    config = json.loads(scheduler.to_json_string())
    assert {key: config[key] for key in known} == known
    assert read_scheduler(config, False) == read_scheduler({"_class_name": name}, False)


REFUSED = {
    "DDIMScheduler": [{"thresholding": True}, {"beta_schedule": "sigmoid"}, {"prediction_type": "flow_prediction"}],
    "DDPMScheduler": [{"variance_type": "learned"}, {"variance_type": "learned_range"}],
    "DPMSolverMultistepScheduler": [
        *({"use_beta_sigmas": True}, {"use_lu_lambdas": True}, {"use_flow_sigmas": True}, {"solver_order": 3}),
        *({"algorithm_type": "dpmsolver"}, {"lambda_min_clipped": -5.1}),
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
    ],
    "UniPCMultistepScheduler": [{"disable_corrector": [0]}, {"predict_x0": False}],
    "EulerDiscreteScheduler": [
        *({"interpolation_type": "log_linear"}, {"final_sigmas_type": "sigma_min"}),
        {"timestep_spacing": "leading", "use_karras_sigmas": True},
    ],
    "FlowMatchEulerDiscreteScheduler": [{"use_dynamic_shifting": True}, {"stochastic_sampling": True}],
    "DDIMScheduler of tomorrow": [{"use_magic": True}],
}


@pytest.mark.parametrize(("name", "settings"), [(n.split()[0], s) for n, all_ in REFUSED.items() for s in all_])
def test_what_is_not_supported_is_named(name, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        read_scheduler({"_class_name": name, **settings}, False)


def test_a_scheduler_ignores_keys_that_are_anothers():
    """Schedulers made by `from_config` of another one carry its keys along."""
    plain = read_scheduler({"_class_name": "DPMSolverMultistepScheduler"}, False)
    carried = {"clip_sample": True, "skip_prk_steps": True, "set_alpha_to_one": False, "use_magic": False}
    assert read_scheduler({"_class_name": "DPMSolverMultistepScheduler", **carried}, False) == plain


def test_an_unknown_scheduler_is_named():
    with pytest.raises(UserError, match=r"PNDMScheduler.*DDIMScheduler"):
        read_scheduler({"_class_name": "PNDMScheduler"}, False)


def test_a_flow_scheduler_is_a_flow_process():
    process, gear = read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, False)
    assert process == {"kind": "flow", "timesteps": 1000, "shift": 3.0, "grid": "linspace"}
    assert gear["solver"] == "euler"


def rewrite(part, **changes):
    return lambda folder: edit(folder / part, **changes)


def pickled(folder):
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))


def spoilt(folder):
    (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"not a header")


def misfit(folder):
    edit(folder / "transformer/config.json", num_layers=1)


def shortened(folder):
    edit(folder / "transformer/config.json", num_layers=3)


def unreadable(folder):
    (folder / "model_index.json").write_text("{")


def a_list(folder):
    (folder / "vae/config.json").write_text("[]")


def no_scheduler(folder):
    shutil.rmtree(folder / "scheduler")


def another_vae(folder):
    shutil.rmtree(folder / "vae")
    random_vae(latent_channels=3).save_pretrained(folder / "vae")


BROKEN = {
    "unet": (rewrite("model_index.json", transformer=None, unet=["diffusers", "UNet2DModel"]), "UNet2DModel"),
    "pixart": (rewrite("model_index.json", transformer=["diffusers", "PixArtTransformer2DModel"]), "PixArt"),
    "other vae": (rewrite("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "AutoencoderTiny"),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json does not exist"),
    "half an index": (unreadable, "is not JSON"),
    "no table": (a_list, "config.json is no table"),
    "no scheduler": (no_scheduler, "scheduler_config.json does not exist"),
    "thresholding": (rewrite("scheduler/scheduler_config.json", thresholding=True), r"config.json: thresholding=True"),
    "activation": (rewrite("transformer/config.json", activation_fn="geglu"), "activation_fn=geglu"),
    "affine norms": (rewrite("transformer/config.json", norm_elementwise_affine=True), "norm_elementwise_affine"),
    "channels": (rewrite("transformer/config.json", out_channels=5), "out_channels=5"),
    "means": (rewrite("vae/config.json", latents_mean=[0.0] * 4), "latents_mean"),
    "pickled": (pickled, "safe_serialization"),
    "spoilt": (spoilt, "not a safetensors file"),
    "left over": (misfit, "tensors have no place"),
    "missing": (shortened, r"no tensor transformer_blocks\.2"),
    "latents": (another_vae, "3 latent channels, the network has 4"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_imported_says_why(copy, tmp_path, case):
    spoil, message = BROKEN[case]
    spoil(copy)
    with pytest.raises(UserError, match=message):
        imported(copy, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_source_keeps_its_precision(tmp_path):
    folder = save(tmp_path / "p", random_transformer().to(torch.bfloat16), variant="fp16")
    out = imported(folder, tmp_path / "m")
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    codec = load_file(out / "codec.safetensors")
    assert {value.dtype for value in codec.values()} == {torch.float32}
    assert not any(name.startswith(("encoder", "quant")) for name in codec)


def test_shards_are_read(tmp_path):
    whole, parts = imported(save(tmp_path / "a"), tmp_path / "m"), save(tmp_path / "b", max_shard_size="60KB")
    assert len(list((parts / "transformer").glob("*.safetensors"))) > 1
    other = imported(parts, tmp_path / "n")
    assert read_config(other)["files"] == read_config(whole)["files"]


def test_the_command_writes_a_folder_that_serves(copy, tmp_path):
    edit(copy / "model_index.json", id2label={"0": "tench, Tinca tinca", "1": "crane", "2": "cup", "3": "crane, bird"})
    out = tmp_path / "models" / "tiny"
    args = ["--from", "diffusers", str(copy), "--out", str(out), "--steps", "3", "--guidance", "1.5"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    config, gears = read_config(out, "generator"), read_json(out / "gears.json")["gears"]
    assert (config["name"], summary["model"]) == ("tiny", "tiny")
    assert config["labels"] == ["tench", "crane (1)", "cup", "crane (3)", "class-4"]
    assert [(g["name"], g["steps"], g["guidance"]) for g in gears] == [("full", 3, 1.5)]
    task = load(out, 2, "cpu", Runtime())
    assert task.info.image == (16, 16, 3)
    assert task.info.gears[0].solver_options == SolverOptions()
    assert {"ddim", "dpmpp_2m", "unipc"} <= set(task.info.solvers)


def test_a_folder_in_use_is_left_alone(copy, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        imported(copy, tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["notes.txt"]


def test_options_of_another_format_are_refused(copy):
    with pytest.raises(UserError, match="--heads"):
        read(copy, Format.diffusers, Told(heads=4))


def test_an_imported_model_mixes_solvers_steps_and_guidance_in_one_batch(tmp_path):
    """Staggered rows of a latent model: the pixels of each row alone, decoding included."""
    transformer = random_transformer(out_channels=8)
    task = load(imported(save(tmp_path / "p", transformer), tmp_path / "m"), 4, "cpu", Runtime())
    solvers = [("ddim", 5, 1.0), ("unipc", 7, 3.0), ("heun", 3, 1.0), ("ddpm", 6, 2.0), ("dpmpp_2m_sde", 4, 1.5)]
    works = [
        GenerateWork(model="toy", labels=(i,), seeds=(i,), steps=steps, solver=solver, guidance=guidance, gear="full")
        for i, (solver, steps, guidance) in enumerate(solvers)
    ]
    alone = [drawn(task, {0: work})[0] for work in works]
    first = drawn(task, dict(enumerate(works[:4])), late=works[4])
    for row, mixed in zip(alone, first, strict=True):
        assert (row.pixels == mixed.pixels).all()


def drawn(task, rows, late=None):
    """Rows of these slots, finished; `late` gets the first slot that is free again."""
    left = {slot: task.admit(work, [0], [slot])[0] for slot, work in rows.items()}
    owner, made, count = {slot: slot for slot in rows}, {}, len(rows)
    while left:
        waiting = task.step(list(left)).waiting
        left = {slot: n - (slot not in waiting) for slot, n in left.items()}
        for slot in [slot for slot, n in left.items() if not n]:
            made[owner[slot]] = task.collect([slot])[0]
            del left[slot]
            if late is not None:
                left[slot], owner[slot], late = task.admit(late, [0], [slot])[0], count, None
    return [made[i] for i in sorted(made)]


def test_a_vae_from_before_attention_had_todays_names(copy, tmp_path):
    from safetensors.torch import load_file, save_file

    now = imported(copy, tmp_path / "now")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    then = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(weights).items():
        for today, before in then.items():
            name = name.replace(f".{today}.", f".{before}.")
        old[name] = value
    assert any(".query." in name for name in old)
    save_file(old, weights)
    assert read_config(imported(copy, tmp_path / "then"))["files"] == read_config(now)["files"]


def test_a_transformer_from_before_dit_had_a_class_of_its_own(copy, tmp_path):
    before = imported(copy, tmp_path / "before")
    edit(copy / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(copy / "transformer/config.json", _class_name="Transformer2DModel", use_linear_projection=False)
    assert read_config(imported(copy, tmp_path / "after"))["network"] == read_config(before)["network"]


def test_without_a_vae_the_model_draws_pixels(tmp_path):
    folder = save(tmp_path / "p", random_transformer(in_channels=3, out_channels=3))
    shutil.rmtree(folder / "vae")
    edit(folder / "model_index.json", vae=None)
    task = load(imported(folder, tmp_path / "m"), 1, "cpu", Runtime())
    assert task.info.image == (SIZE, SIZE, 3)
    assert "codec" not in read_config(tmp_path / "m")
