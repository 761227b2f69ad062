"""Training of both stages: flow matching, and the scripts for real, with one process and with two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import assemble_pipeline
import pytest
import torch
from model_zoo import tiny_model
from safetensors.torch import load_file
from script_runs import run_script
from training_runs import load_script

from gpstoken_diffusers import (
    AutoencoderGPSToken,
    GPSTokenImageProcessor,
    GPSTokenLayoutModel,
    GPSTokenPipeline,
    GPSTokenTransformerModel,
    partition_image,
)
from gpstoken_diffusers.training.flow_matching import FlowMatchingSamples, flow_matching_loss
from gpstoken_diffusers.training.latent_scale import LEAST_DEVIATION, latents_statistics, picture_shares
from gpstoken_diffusers.training.token_dataset import (
    ORIGIN_FILE,
    TokenDataset,
    model_fingerprint,
    shard_path,
    write_index,
    write_shard,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "train"


def made_up_dataset(
    folder: Path,
    names: tuple[str, ...] = ("calm", "loud"),
    count: int = 12,
    settings: dict | None = None,
    channels: int = 4,
) -> Path:
    """Tokens of classes whose textures differ, of pictures of 32 x 32 px in 6 tokens."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1
    initial = partition_image(images, 6).geometry
    label = torch.arange(count) % len(names)
    texture = torch.randn(count, 6, channels, generator=generator) + 6 * label[:, None, None]
    geometry = initial.clone()
    geometry[..., :2] *= 1.1
    tensors = {"initial_geometry": initial, "geometry": geometry, "texture": texture, "label": label}
    write_shard(shard_path(folder, 0), tensors, [(f"{i}.png", 0) for i in range(count)], settings or {})
    description = {"id2label": dict(enumerate(names)), "image_size": (32, 32), "autoencoder": {}}
    write_index(folder, 1, description)
    return folder


TINY = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    made_up_dataset(folder / "tokens")
    tiny_model("lattice").save_pretrained(folder / "autoencoder")
    GPSTokenImageProcessor(tile_size=32, num_tokens=6).save_pretrained(folder / "autoencoder")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def run(script: str, workplace: Path, output: str, *more: object, **how) -> str:
    """A training script on the made-up tokens; `how` as for `run_script`."""
    arguments = {
        "--train_dir": workplace / "tokens",
        "--validation_dir": workplace / "tokens",
        "--output_dir": workplace / output,
        "--mixed_precision": "no",
        "--num_workers": 0,
        "--warmup_steps": 2,
        "--checkpointing_steps": 4,
        "--validation_steps": 4,
        "--report_to": "none",
    }
    if "--pretrained" not in more:
        arguments["--config"] = workplace / "tiny.json"
    if script == "train_texture.py":
        arguments["--autoencoder"] = workplace / "autoencoder"
    command = [EXAMPLES / script, *(part for pair in arguments.items() for part in pair), *more]
    return run_script(command, workplace, **how)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "diffusion_pytorch_model.safetensors")


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- samples and loss


def items(count=5):
    return [{"latents": torch.full((3, 2), float(index)), "label": index} for index in range(count)]


def test_a_sample_depends_on_seed_and_index_alone():
    first, second = (FlowMatchingSamples(items(), 40, null_class=9, seed=1) for _ in range(2))
    forwards = [first[index] for index in range(40)]
    backwards = [second[index] for index in reversed(range(40))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = FlowMatchingSamples(items(), 40, null_class=9, seed=2)
    assert not torch.equal(other[0]["noise"], forwards[0]["noise"])


def test_every_pass_shows_each_item_once():
    samples = FlowMatchingSamples(items(), 15, null_class=9, label_dropout=0.0)
    seen = [samples[index]["label"].item() for index in range(15)]
    passes = [seen[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_labels_are_dropped_and_times_spread():
    samples = FlowMatchingSamples(items(), 2000, null_class=9, label_dropout=0.25, time_sampling="uniform")
    drawn = [samples[index] for index in range(2000)]
    dropped = sum(sample["label"] == 9 for sample in drawn).item() / 2000
    assert abs(dropped - 0.25) < 0.04  # four standard deviations
    times = torch.stack([sample["time"] for sample in drawn])
    assert abs(times.mean() - 0.5) < 0.03 and times.min() < 0.01 and times.max() > 0.99
    normal = FlowMatchingSamples(items(), 2000, null_class=9)
    middle = torch.stack([normal[index]["time"] for index in range(2000)])
    assert 0.2 < middle.std() < 0.23  # of a sigmoid of a normal number: 0.208


def test_the_loss_is_of_the_velocity():
    latents, noise = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    batch = {"latents": latents, "noise": noise, "time": torch.tensor([0.0, 1.0])}
    seen = {}

    def exact(noisy, time):
        seen["noisy"] = noisy
        return latents - noise

    assert flow_matching_loss(exact, batch).tolist() == [0, 0]
    # t = 0 is noise, t = 1 is data.
    torch.testing.assert_close(seen["noisy"], torch.stack([noise[0], latents[1]]))
    off_by_two = flow_matching_loss(lambda noisy, time: latents - noise + 2, batch)
    torch.testing.assert_close(off_by_two, torch.full((2,), 4.0))


@pytest.mark.parametrize("settings", [{"time_sampling": "often"}, {"label_dropout": 1.5}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FlowMatchingSamples(items(), 4, 9, **settings)


# ---------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script, kind", [
    ("train_texture.py", GPSTokenTransformerModel),
    ("train_layout.py", GPSTokenLayoutModel),
])  # fmt: skip
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(workplace, script, kind):
    name = script.removesuffix(".py")
    more = ("--batch_size", "4", "--max_train_steps", "8")
    run(script, workplace, f"{name}_whole", *more)
    run(script, workplace, f"{name}_parts", *more, "--max_minutes", "0")
    folder = workplace / f"{name}_parts"
    assert [row["step"] for row in curve(folder)] == [1]
    run(script, workplace, f"{name}_parts", *more, "--resume_from_checkpoint", "latest")
    ours, theirs = weights(folder), weights(workplace / f"{name}_whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    model = kind.from_pretrained(folder / "model")
    assert model.config.num_classes == 2 and model.config.num_tokens == 6
    picture = "samples.png" if script == "train_texture.py" else "layouts.png"
    assert (folder / picture).stat().st_size > 1000


def test_two_processes_learn_what_one_does(workplace):
    """Of the same samples in each step: two processes of two, or one of four."""
    run("train_texture.py", workplace, "one", "--batch_size", "4", "--max_train_steps", "4")
    run("train_texture.py", workplace, "two", "--batch_size", "2", "--max_train_steps", "4", processes=2)
    ours, theirs = weights(workplace / "two"), weights(workplace / "one")
    for key, expected in theirs.items():
        # Sums of gradients in another order; Muon's orthogonalisation is in bfloat16.
        torch.testing.assert_close(ours[key], expected, atol=2e-3, rtol=0)


def test_it_learns(workplace):
    run(
        "train_texture.py", workplace, "long", "--batch_size", "8", "--max_train_steps", "60",
        "--learning_rate", "5e-3", "--ema_decay", "0.9", "--validation_steps", "30", "--checkpointing_steps", "60",
    )  # fmt: skip
    first, last = curve(workplace / "long")
    # A fresh network predicts 0, whose loss is that of unit noise and unit data: 2.
    assert last["validation_loss"] < first["validation_loss"] < 1.5


def assemble(output: Path, *more: str, **folders: Path) -> GPSTokenPipeline:
    options = [str(part) for name, folder in folders.items() for part in (f"--{name}", folder)]
    assemble_pipeline.main([*options, "--output", str(output), *more])
    return GPSTokenPipeline.from_pretrained(output)


def test_both_stages_make_a_pipeline(workplace):
    """After the runs above: their models, put together, draw."""
    parts = {
        "autoencoder": workplace / "autoencoder",
        "transformer": workplace / "train_texture_whole" / "model",
        "layout_model": workplace / "train_layout_whole" / "model",
    }
    pipe = assemble(workplace / "pipeline", **parts, tokens=workplace / "tokens")
    assert pipe.id2label == {0: "calm", 1: "loud"}
    assert pipe("loud", num_inference_steps=2, layout_num_inference_steps=2).images[0].size == (32, 32)
    for part in ("autoencoder", "transformer", "layout_model"):  # the layout model too, which computes in float32 alone
        saved = load_file(workplace / "pipeline" / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float16}, part
    assert pipe.layout_model.dtype == torch.float32
    # The tokenizer's folder is of use by itself.
    assert GPSTokenImageProcessor.from_pretrained(workplace / "pipeline" / "autoencoder").tile_size == 32
    made_up_dataset(workplace / "swapped", ("loud", "calm"))
    for part in ("transformer", "layout_model"):
        with pytest.raises(
            ValueError, match=r"of the 2 classes loud, calm of .*swapped, got .*model with 2 \(calm, loud"
        ):
            some = {name: folder for name, folder in parts.items() if name in ("autoencoder", "transformer", part)}
            assemble(workplace / "nothing", **some, tokens=workplace / "swapped")


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    names = ("own", "tuned", "wide", "large")
    changes = ({}, {"seed": 1}, {"texture_channels": 8}, {"sample_size": 64, "map_size": 16})
    for name, change in zip(names, changes, strict=True):
        tiny_model("lattice", **change).save_pretrained(tmp_path / name)
    maker = {"autoencoder": model_fingerprint(AutoencoderGPSToken.from_pretrained(tmp_path / "own"))}
    tokens = made_up_dataset(tmp_path / "tokens", settings=maker)
    three = made_up_dataset(tmp_path / "three", ("a", "b", "c"), settings=maker)
    elsewhere = made_up_dataset(tmp_path / "elsewhere", settings={"autoencoder": "another's"})
    model = GPSTokenTransformerModel(**TINY, texture_channels=4, num_tokens=6, num_classes=2)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / ORIGIN_FILE).write_text(json.dumps(TokenDataset(tokens).origin()))
    own = {"autoencoder": tmp_path / "own", "transformer": tmp_path / "model", "tokens": tokens}
    for change, message in (
        ({"autoencoder": tmp_path / "tuned"}, "tuned is not the tokenizer .*--other_tokenizer"),
        ({"autoencoder": tmp_path / "wide"}, "with 4 texture channels, got .*wide with 8"),
        ({"autoencoder": tmp_path / "large"}, "with 32 pixels as the side of its tile, got .*large with 64"),
        ({"tokens": three}, "of the 3 classes a, b, c of .*got .*model with 2"),
        ({"tokens": elsewhere}, "not the tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble(tmp_path / "out", **own | change)
        assert not (tmp_path / "out").exists()
    # Trained on tokens of another tokenizer than these, which are the given one's.
    maker = {"autoencoder": model_fingerprint(AutoencoderGPSToken.from_pretrained(tmp_path / "tuned"))}
    others = {"autoencoder": tmp_path / "tuned", "tokens": made_up_dataset(tmp_path / "others", settings=maker)}
    with pytest.raises(ValueError, match="trained on those of another"):
        assemble(tmp_path / "out", **own | others)
    train_texture = load_script(EXAMPLES / "train_texture.py")
    with pytest.raises(ValueError, match="with 4 texture channels, got .*wide with 8"):
        train_texture.main(["--train_dir", str(tokens), "--output_dir", "x", "--autoencoder", str(tmp_path / "wide")])
    wide = made_up_dataset(tmp_path / "wide_tokens", channels=8)
    line = ["--train_dir", wide, "--output_dir", "x", "--autoencoder", tmp_path / "wide"]
    with pytest.raises(ValueError, match="of 8 texture channels, as .*wide_tokens have, got .*model with 4"):
        train_texture.main([str(part) for part in (*line, "--pretrained", tmp_path / "model")])
    with pytest.raises(ValueError, match="validation_dir with 8 texture channels, as .*wide_tokens has, got .* with 4"):
        train_texture.main([str(part) for part in (*line, "--validation_dir", tokens)])
    # An earlier version, which had fewer settings, would have named the same tokenizer the same.
    model, earlier = (AutoencoderGPSToken.from_pretrained(tmp_path / "own") for _ in range(2))
    config = json.loads(earlier.to_json_string())
    del config["partition_criterion"]
    earlier.to_json_string = lambda: json.dumps(config)
    assert model_fingerprint(earlier) == model_fingerprint(model)
    # None of these folders holds an image processor's settings; what follows from the model takes their place.
    pipe = assemble(tmp_path / "out", **own)
    assert GPSTokenImageProcessor.from_pretrained(tmp_path / "out" / "autoencoder").tile_size == 32
    assert pipe.image_processor.num_tokens == 6
    assemble(tmp_path / "out", "--other_tokenizer", **own | {"autoencoder": tmp_path / "tuned"})


@pytest.mark.parametrize("script, kind", [
    ("train_texture", GPSTokenTransformerModel), ("train_layout", GPSTokenLayoutModel),
])  # fmt: skip
def test_a_pretrained_model_of_other_classes_starts_them_as_no_class(tmp_path, script, kind):
    script = load_script(EXAMPLES / f"{script}.py")
    extra = {"texture_channels": 4} if kind is GPSTokenTransformerModel else {}
    before = kind(**TINY, **extra, num_tokens=6, num_classes=1).eval()
    torch.nn.init.normal_(before.head.proj.weight)
    torch.nn.init.normal_(before.blocks[0].modulation.weight, std=0.2)
    before.save_pretrained(tmp_path / "model")
    dataset = TokenDataset(made_up_dataset(tmp_path / "tokens", ("a", "b", "c")))
    args = ["--train_dir", str(tmp_path / "tokens"), "--output_dir", "x", "--pretrained", str(tmp_path / "model")]
    tokenizer = [None] if extra else []  # which the latents' scale alone would need
    model = script.build_model(script.parse_args(args), dataset, *tokenizer).eval()
    assert model.config.num_classes == 3 and model.null_class == 3
    labels = torch.arange(4)
    layout = [dataset.layouts()[:4]] if extra else []
    noisy, time = torch.randn(4, 6, 9 if extra else 4), torch.rand(4)
    with torch.no_grad():
        ours, expected = model(noisy, time, labels, *layout), before(noisy, time, torch.ones_like(labels), *layout)
    torch.testing.assert_close(ours.sample, expected.sample)
    assert not torch.allclose(before(noisy, time, torch.zeros_like(labels), *layout).sample, expected.sample)


def test_validation_classes_are_matched_by_name(workplace, tmp_path):
    other = TokenDataset(made_up_dataset(tmp_path / "other", ("loud", "calm")))
    names = [other.id2label[label] for label in other.labels.tolist()]
    other.use_classes({0: "calm", 1: "loud", 2: "none of them"})
    assert [other.id2label[label] for label in other.labels.tolist()] == names and other[0]["label"] == 1
    made_up_dataset(tmp_path / "strange", ("calm", "strange"))
    assert "got strange in" in run(
        "train_layout.py", workplace, "strange", "--validation_dir", tmp_path / "strange", fails=True
    )


def test_a_missing_dataset_is_named(workplace):
    text = run("train_layout.py", workplace, "none", "--train_dir", workplace / "nowhere", fails=True)
    assert "nowhere/dataset.json: no such file" in text


def test_a_model_goes_on_with_tokens_of_another_tokenizer(workplace):
    """Its weights are taken over, and latents are standardised by what the new tokens are."""
    run("train_texture.py", workplace, "first", "--max_train_steps", "4")
    folder = workplace / "moved"
    shutil.copytree(workplace / "first" / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    known = config["latents_mean"], config["latents_std"]
    config["latents_mean"] = [value + 1 for value in known[0]]
    (folder / "config.json").write_text(json.dumps(config))
    for output, more in (("kept", ()), ("renewed", ("--new_statistics",))):
        run(
            "train_texture.py", workplace, output, "--pretrained", folder, *more,
            "--max_train_steps", "4", "--learning_rate", "1e-12", "--adam_learning_rate", "1e-12",
        )  # fmt: skip
        trained = json.loads((workplace / output / "model" / "config.json").read_text())
        expected = known[0] if more else config["latents_mean"]
        assert trained["latents_mean"] == pytest.approx(expected) and trained["latents_std"] == pytest.approx(known[1])
        before, after = weights(workplace / "first"), weights(workplace / output)
        assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-10) for name in before)


@pytest.mark.parametrize("more, message", [
    (["--emphasis", "0.5"], "--emphasis needs --new_statistics"),
    (["--config", "tiny.json"], "leave --config out"),
])  # fmt: skip
def test_a_pretrained_model_keeps_its_own(capsys, more, message):
    script = load_script(EXAMPLES / "train_texture.py")
    line = ["--train_dir", "tokens", "--output_dir", "x", "--pretrained", "model", *more]
    with pytest.raises(SystemExit):
        script.parse_args(line)
    assert message in capsys.readouterr().err
    if "--emphasis" in more:
        assert script.parse_args([*line, "--new_statistics"]).emphasis == 0.5


@pytest.mark.parametrize("residual", ["additive", "relative"])
def test_latents_are_scaled_by_how_much_they_change_the_picture(tmp_path, residual):
    dataset, tokenizer = TokenDataset(made_up_dataset(tmp_path / "tokens")), tiny_model("lattice").eval()
    plain = latents_statistics(dataset, residual, tokenizer, 0)
    mean, std = dataset.statistics(residual)
    assert plain["latents_mean"] == mean.tolist() and plain["latents_std"] == pytest.approx(std.tolist(), abs=1e-6)
    shares = picture_shares(tokenizer, dataset, torch.tensor(plain["latents_std"]), residual)
    assert shares.sum().item() == pytest.approx(1) and shares.max() > 2 * shares.min()
    for emphasis in (0.5, 1.0):
        scaled = latents_statistics(dataset, residual, tokenizer, emphasis)
        assert scaled["latents_mean"] == plain["latents_mean"]
        deviation = torch.tensor(plain["latents_std"]) / torch.tensor(scaled["latents_std"])
        expected = (shares / shares.max()).pow(emphasis / 2).clamp(min=LEAST_DEVIATION)
        torch.testing.assert_close(deviation, expected, rtol=1e-4, atol=0)
    # With 1, equal noise in two channels is equal noise in the picture. 0.3: the network is not quite linear.
    free = deviation > LEAST_DEVIATION
    equal = picture_shares(tokenizer, dataset, torch.tensor(scaled["latents_std"]), residual)[free]
    assert free.sum() >= 4 and equal.max() / equal.min() < 1.3
