"""The evaluate command on digits: in training, from a run, from files, stopped, and refused."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import call as command_line
from processes import run_two
from tiny import tiny_config

from lasad_jax.config import DataConfig
from lasad_jax.data.images import load_images
from lasad_jax.evaluation import in_training
from lasad_jax.evaluation.evaluator import CLASSIFIER_FILE
from lasad_jax.evaluation.fit_classifier import fit_classifier, save_classifier
from lasad_jax.evaluation.requests import Request, carry_out
from lasad_jax.sampling.pictures import write_npz
from lasad_jax.sampling.run import GeneratorRun
from lasad_jax.training import loop
from lasad_jax.training.metrics import read_metrics

NUM = 130
NAMES = {
    "fid_classifier",
    "sfid_classifier",
    "inception_score_classifier",
    "inception_score_std_classifier",
    "precision_classifier",
    "recall_classifier",
    "kid_classifier",
    "kid_std_classifier",
    "class_agreement",
}


@pytest.fixture(scope="module")
def digits():
    return [load_images(DataConfig(), split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A run that is measured while it is trained, by a classifier that is hardly trained."""
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    trained = fit_classifier(*digits, epochs=1, name="digits", progress=False)
    save_classifier(workdir / in_training.FOLDER / CLASSIFIER_FILE, trained)
    config = tiny_config(steps=4, model={"num_layers": 1}, metrics_every=2, metrics_num=NUM)
    loop.train(config, workdir)
    return workdir


def call(capsys, **options):
    carry_out(Request(**options))
    return capsys.readouterr().out


def refused(match, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        carry_out(Request(**options))


def test_training_measures_its_samples_every_n_steps(run):
    rows = read_metrics(run / "metrics.jsonl")
    measured = {row["step"]: NAMES & row.keys() for row in rows}
    assert measured == {1: set(), 2: NAMES, 3: set(), 4: NAMES}
    values = rows[-1]
    assert 0 <= values["class_agreement"] < 0.5
    assert values["fid_classifier"] > 0 and np.isfinite([values[name] for name in NAMES]).all()


def test_too_few_samples_are_refused_before_training(tmp_path, run):
    (tmp_path / "evaluation").mkdir()
    file = f"evaluation/{CLASSIFIER_FILE}"
    (tmp_path / file).write_bytes((run / file).read_bytes())
    config = tiny_config(steps=4, model={"num_layers": 1}, metrics_every=2, metrics_num=20)
    with pytest.raises(ValueError, match=r"config\.metrics_num: 20 are too few for fid"):
        loop.train(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def swept(run, tmp_path_factory):
    """A sweep that was not stopped."""
    out = tmp_path_factory.mktemp("swept") / "a"
    carry_out(Request(workdir=run, sweep=(1.0, 3.0), num=NUM, out=out))
    return out.parent


def table(folder):
    rows = list(csv.DictReader((folder / "a_sweep_classifier.csv").open()))
    return {float(row.pop("guidance")): {n: float(v) for n, v in row.items()} for row in rows}


def test_a_sweep_has_a_row_for_each_scale_and_a_picture(swept):
    assert list(table(swept)) == [1.0, 3.0]
    assert all(row.keys() == NAMES for row in table(swept).values())
    lines = (swept / "a_sweep_classifier.md").read_text().splitlines()
    assert lines[0].startswith("| guidance | FID (classifier) | sFID (classifier) |")
    assert [line.split("|")[1].strip() for line in lines] == ["guidance", "---", "1", "3"]
    assert Image.open(swept / "a_sweep_classifier.png").size == (720, 540)
    rows = [json.loads(line) for line in (swept / "a_sweep_classifier.jsonl").open()]
    assert [row["report"]["sampling"]["guidance"] for row in rows] == [1.0, 3.0]
    assert all(row["report"]["checkpoint"]["step"] == 4 for row in rows)
    with np.load(swept / "a_guidance3.npz") as file:
        assert np.ptp(np.bincount(file["arr_1"])) == 0 and file["arr_1"][:3].tolist() == [0, 1, 2]


def test_a_sweep_stopped_between_rows_goes_on(run, swept, tmp_path, monkeypatch, capsys):
    drawn, draw = [], GeneratorRun.draw

    def counted(self, job, given=None):
        if drawn and stopping:
            raise KeyboardInterrupt
        drawn.append(job.identity["guidance"])
        draw(self, job, given)

    monkeypatch.setattr(GeneratorRun, "draw", counted)
    stopping, flags = (
        [True],
        {"workdir": run, "sweep": (1.0, 3.0), "num": NUM, "out": tmp_path / "a"},
    )
    with pytest.raises(KeyboardInterrupt):
        call(capsys, **flags)
    stopping.clear()
    assert list(table(tmp_path)) == [1.0]
    said = call(capsys, **flags)
    assert "guidance 1 is there already" in said
    assert drawn == [1.0, 3.0]
    assert table(tmp_path) == table(swept)

    # Rows of other images are no rows of this sweep, nor are they lost.
    call(capsys, **flags | {"seed": 1, "sweep": (3.0,)})
    assert drawn == [1.0, 3.0, 3.0] and list(table(tmp_path)) == [3.0]
    assert table(tmp_path)[3.0] != table(swept)[3.0]
    call(capsys, **flags)
    assert len(drawn) == 3 and table(tmp_path) == table(swept)


def test_two_processes_measure_as_one(run, swept, tmp_path):
    classifier = run / in_training.FOLDER / CLASSIFIER_FILE
    flags = (f"--cache={tmp_path}", f"--classifier={classifier}", "--source=digits")
    samples = f"--samples={swept / 'a_guidance3.npz'}"
    said = run_two(command_line("evaluate", samples, *flags, "--distributed"), devices=2)
    assert ["FID (classifier)" in out for out, _ in said] == [True, False]
    report = json.loads((tmp_path / "a_guidance3_classifier.json").read_text())
    assert report["metrics"] == table(swept)[3.0]


def test_a_file_is_measured_as_the_run_that_drew_it(run, swept, capsys):
    path = swept / "a_guidance3.npz"
    said = call(capsys, workdir=run, samples=path, out=swept / "file")
    report = json.loads((swept / "file_classifier.json").read_text())
    assert report["metrics"] == table(swept)[3.0]
    assert report["sampling"]["guidance"] == 3.0 and report["checkpoint"]["step"] == 4
    assert said == (swept / "file_classifier.txt").read_text()
    assert re.search(r"class agreement +[01]\.\d+", said)
    assert re.search(r"images +130\n", said)

    trained = run / in_training.FOLDER / CLASSIFIER_FILE
    said = call(
        capsys, samples=path, data={"source": "digits"}, classifier=trained, metrics=("fid",)
    )
    assert f"FID (classifier)  {table(swept)[3.0]['fid_classifier']:.4f}" in said
    assert (swept / "evaluation" / "a_guidance3_classifier.json").exists()


def test_real_images_are_nearest(run, swept, digits, tmp_path, capsys):
    """Training images themselves, held-out ones, and what the untrained run draws."""
    for name, images in zip(("train", "test"), digits, strict=True):
        write_npz(tmp_path / f"{name}.npz", [images.images], images.labels)
    values = {"drawn": table(swept)[1.0]}
    metrics = ("fid", "precision_recall", "class_agreement")
    for name in ("train", "test"):
        out = tmp_path / name
        call(capsys, workdir=run, samples=tmp_path / f"{name}.npz", out=out, metrics=metrics)
        values[name] = json.loads((tmp_path / f"{name}_classifier.json").read_text())["metrics"]
    fids = [values[name]["fid_classifier"] for name in ("train", "test", "drawn")]
    assert fids[0] == pytest.approx(0, abs=1e-6)
    assert fids[0] < fids[1] < fids[2] / 10
    assert values["train"]["precision_classifier"] == values["train"]["recall_classifier"] == 1
    assert values["test"]["class_agreement"] > values["drawn"]["class_agreement"]


def test_mix_ups_are_refused(run, swept, tmp_path):
    path = swept / "a_guidance3.npz"
    file = {"workdir": run, "samples": path}
    refused("protocol: 'generation' with .*'test'", **file, split="test")
    refused(
        "protocol: 'reconstruction' with .*'train'",
        **file,
        split="train",
        protocol="reconstruction",
    )
    refused("metrics: 'lpips' is not one of", **file, metrics=("lpips",))
    refused("num: 20 are too few for fid", workdir=run, num=20)
    refused("workdir: give --workdir=RUN")
    refused("source: there is nothing to compare with", samples=path)
    refused("source: directory is of a source", samples=path, data={"directory": "x"})
    refused("inception: images of 8 x 8 x 1", **file, inception=Path("absent.pth"))
    refused("samples=.*absent.npz", samples=tmp_path / "absent.npz", data={"source": "digits"})
    large = np.zeros((99, 16, 16, 1), np.uint8)
    write_npz(tmp_path / "large.npz", [large], np.zeros(99, int))
    refused(
        "samples are 16 x 16 x 1 but the real images 8 x 8 x 1",
        samples=tmp_path / "large.npz",
        data={"source": "digits"},
    )
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((99, 8, 8, 1)))
    refused(
        "samples=.*floats.npz.*uint8", samples=tmp_path / "floats.npz", data={"source": "digits"}
    )
    assert not (tmp_path / "evaluation").exists()
