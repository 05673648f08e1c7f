"""The commands as a user types them, from training to a classifier's verdict; the README."""

import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image
from processes import command
from tiny import ROOT, environment

from lasad_jax.config import DataConfig, build_config
from lasad_jax.data.images import load_images
from lasad_jax.evaluation.fit_classifier import fit_classifier, save_classifier
from lasad_jax.sampling.run import GeneratorRun

README = (ROOT / "README.md").read_text()
PODS = (ROOT / "docs/pods.md").read_text()
TRAIN = (
    "train --config=configs/digits.py --config.steps=4 --config.sample_every=4 "
    "--config.save_every=2 --config.eval_every=4 --config.num_samples=10 "
    "--config.optimizer.schedule=constant --config.model.num_layers=1 --config.model.width=16"
)


def run(line, *, fails=False):
    return command(*line.split(), fails=fails)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run(f"{TRAIN} --workdir={workdir}")
    return workdir


def test_sample_complete_and_evaluate(workdir):
    run(f"sample --workdir={workdir} --num=20 --out={workdir}/a --batch_size=8")
    with np.load(workdir / "a.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (20, 8, 8, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 2))
    assert Image.open(workdir / "a.png").size[1] > 10 * 48

    real = load_images(DataConfig(), "test").images[:5]
    np.savez(workdir / "real.npz", arr_0=real, arr_1=np.full(5, 3))
    run(
        f"sample --workdir={workdir} --complete={workdir}/real.npz --rows=5 "
        f"--out={workdir}/b --temperature=0 --guidance=1"
    )
    with np.load(workdir / "b.npz") as file:
        completed, labels = file["arr_0"], file["arr_1"]
    levels = lambda x: np.round(x / 255 * 15)
    np.testing.assert_array_equal(levels(completed[:, :5]), levels(real[:, :5]))
    assert (levels(completed[:, 5:]) != levels(real[:, 5:])).any()
    np.testing.assert_array_equal(labels, np.full(5, 3))

    digits = (load_images(DataConfig(), split) for split in ("train", "test"))
    save_classifier(
        workdir / "evaluation" / "classifier.safetensors", fit_classifier(*digits, epochs=1)
    )
    evaluate = f"evaluate --workdir={workdir} --samples={workdir}/a.npz"
    said = run(f"{evaluate} --metrics=inception_score,class_agreement")
    assert re.search(r"class agreement +[01]\.\d+", said)
    assert re.search(r"Inception Score \(classifier\) +\d\.\d+ ± ", said)
    said = run(f"{evaluate} --temperature=2", fails=True)
    assert "temperature: nothing is drawn with --samples" in said


def test_runs_are_drawn_by_what_they_see(workdir):
    out = workdir / "maps.png"
    assert str(out) in run(f"decay_maps --workdir={workdir},{workdir} --num=3 --out={out}")
    picture = np.asarray(Image.open(out).convert("RGB"))
    left, right = np.split(picture[:, : picture.shape[1] // 2 * 2], 2, axis=1)
    marks = lambda half: (half == (214, 39, 40)).all(-1).any()  # the predicted token, in red
    assert marks(left) and marks(right)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--classes=3,12", "classes: '12' is no class; there are 0 to 9"),
        ("--classes=cat", "classes: 'cat' is no class"),
        ("--step=3", r"step: 3 has no checkpoint .* \[2, 4\]"),
        ("--top_p=2", "sampling.top_p: 2.0 must be in"),
        ("--rows=3 stray", "unknown argument 'stray'"),
        (f"--complete={ROOT}/docs/demo.png --rows=3", "complete=.*demo.png.*npz"),
        ("--complete=nothing.npz --rows=3", "complete=nothing.npz: there is no such file"),
    ],
)
def test_bad_requests_are_refused_in_a_line(workdir, flags, message):
    assert re.search(message, run(f"sample --workdir={workdir} {flags}", fails=True))


def test_parameters_are_read_only_for_drawing(workdir, monkeypatch):
    read = []
    monkeypatch.setattr("lasad_jax.sampling.run.restore_parameters", lambda *a, **k: read.append(a))
    generator = GeneratorRun.open(workdir)
    assert generator.step == 4 and not read
    assert generator.params is None and len(read) == 1


def test_python_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert build_config(scope["get_config"]()).model.decay == "manhattan"
    assert scope["o_next"].shape == (2, 4, 64)


def parsed(words, monkeypatch):
    """The configuration that a training command's words ask for."""
    words = ["train", *words.split()]
    monkeypatch.setattr(sys, "argv", words)  # Where config_flags looks for fields.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(words)
    return values.config


@pytest.mark.parametrize(("page", "number"), [(README, 20), (PODS, 4)], ids=["README", "pods"])
def test_commands_in_the_pages_exist(page, number, monkeypatch):
    """Modules, flags, config files; configurations are such as may be trained."""
    monkeypatch.chdir(ROOT)
    shell = " ".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL))
    shell = re.sub(r"\\\n", " ", re.sub(r"#.*", "", shell))
    commands = re.findall(r"python -m (lasad_jax\.\w+)(.*)", shell)
    assert len(commands) >= number
    for module, words in commands:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        for shared in ("sampling", "data", "training"):
            if re.search(rf"lasad_jax\.{shared}(\.| import )flags", source):
                source += (ROOT / f"lasad_jax/{shared}/flags.py").read_text()
        for flag in re.findall(r"--(\w+)=", words):
            assert f'"{flag}"' in source, (module, flag)
        if module == "lasad_jax.train":
            build_config(parsed(words, monkeypatch))
    for path in re.findall(r"(?<![\w/])(?:configs|launch|docs)/[\w.-]*\w", page):
        assert (ROOT / path).exists(), path


def test_annotations_hold_at_run_time():
    """jaxtyping's shapes, checked by beartype through a model, a train step and a decode.

    Tracing checks them; one decode is compiled and run, for the functions around it.
    """
    script = """
from jaxtyping import install_import_hook
modules = ["lasad_jax." + name for name in ("ops", "models", "sampling", "data", "training.step",
                                        "training.cross_entropy")]
with install_import_hook(modules, "beartype.beartype"):
    import jax, numpy as np
    from lasad_jax.config import Config, SamplingConfig
    from lasad_jax.models import ModelConfig
    from lasad_jax.models.decoder import prepare
    from lasad_jax.sampling.decode import balanced_labels, generate, sample_tokens
    from lasad_jax.training.sharding import make_mesh
    from lasad_jax.training.state import abstract_state
    from lasad_jax.training.step import make_eval_step, make_train_step
sampling = SamplingConfig(top_k=3, top_p=0.5)
labels, given = balanced_labels(4, 3), np.zeros((4, 4), np.int32)
for changes in ({}, {"mixer": "softmax"}, {"decay": "manhattan", "selective": False}):
    model = ModelConfig(vocab_size=7, num_classes=3, grid=(3, 4), num_layers=1, width=16,
                        num_heads=2, **changes)
    config = Config(model=model, batch_size=4)
    mesh = make_mesh(config.mesh)
    state = abstract_state(config, mesh)
    batch = {"tokens": np.zeros((4, 12), np.int32), "labels": np.zeros(4, np.int32),
             "mask": np.ones(4, np.float32)}
    jax.eval_shape(make_train_step(config), state, batch)
    jax.eval_shape(make_eval_step(model), state.params, batch)
    draw = lambda params, *images: generate(model, prepare(model, params), *images, sampling)
    keys = jax.random.split(jax.random.key(0), 4)
    jax.eval_shape(draw, state.params, labels, keys, given)
params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.params)
sample_tokens(model, params, labels, sampling=sampling, seed=0, mesh=mesh, given=given)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment(1),
    )
    assert result.returncode == 0, result.stderr[-3000:]
