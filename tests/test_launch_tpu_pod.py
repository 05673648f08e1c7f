"""TPU pods: the calls and their order, against a cloud whose workers are folders."""

import contextlib
import os
import re
import signal
import subprocess
import time

import pytest
from launching import FalseTree, words

# What a worker runs in place of a trainer: the pod is taken away under the first attempt, the
# second is told to begin again, the third ends.
TRAINER = """
attempts=$FAKES/attempts-$(basename "$(dirname "$PWD")")
echo >>"$attempts"
echo "attempt $(wc -l <"$attempts") of $*"
case $(wc -l <"$attempts") in
1) echo SUSPENDED >"$FAKES/state"; sleep 60 ;;
2) exit 75 ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    yield FalseTree(tmp_path)
    for pid in tmp_path.rglob(".worker/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def test_a_pod_from_nothing_through_a_preemption_to_the_end(tree):
    subprocess.run(["git", "init", "--quiet"], cwd=tree.root, check=True)
    (tree.fakes / "old").touch()  # So is Python on the pod.
    (tree.root / "train.sh").write_text(TRAINER)  # Not known to git, but not ignored either.
    flags = "up pod --zone=z --type=v5litepod-16 --spot --shared=10.0.0.2:/runs --every=0.05"
    trainer = "bash train.sh lasad_jax.train --workdir=runs/a"
    said = tree("tpu_pod.sh", *flags.split(), "--", *trainer.split(), "a b")
    for name in ("pod-0", "pod-1"):
        log = (tree.root / f"logs/pod/{name}.log").read_text()
        assert re.findall("attempt .*|ended with .*", log) == [
            f"attempt 2 of {trainer[14:]} a b --distributed",
            "ended with 75",
            f"attempt 3 of {trainer[14:]} a b --distributed",
            "ended with 0",
        ]
    states = re.findall(r"pod: (\S+)", said)
    once = ["none", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert states == [*once, "SUSPENDED", *once, "ended"]

    # What was done to the pod, without the looking; the two nodes' workers at once are one call.
    calls, steps = tree.calls(), []
    for call in calls:
        if call[0] == "gcloud" and call[4] != "list":
            assert call.count("--zone=z") == 1
            command = re.search(r"--command=.*worker.sh (\w+)", call[-1])
            steps.append(command[1] if command else call[4])
    done = [step for step, before in zip(steps, [None, *steps], strict=False) if step != before]
    assert done == [
        *("create", "status", "scp", "ssh", "start", "status"),
        *("delete", "create", "status", "scp", "ssh", "start", "status"),
        *("wait", "describe", "log"),
    ]
    assert "--spot" in next(call for call in calls if "create" in call)
    assert calls.count(["mountpoint", "-q", "runs"]) == 4
    assert not any(call[0] == "sudo" for call in calls)  # It is there already.
    installed = [call for call in calls if call[1:3] == ["-m", "pip"]]
    wanted = [
        ["install", "--quiet", "--user", "uv"],
        ["install", "--quiet", "--requirement", "requirements.txt"],
        ["install", "--quiet", "--requirement", "launch/requirements-tpu.txt"],
    ]
    assert sorted(call[3:] for call in installed) == sorted(wanted * 4)


def test_steps_of_a_pod_of_two_slices(tree):
    subprocess.run(["git", "init", "--quiet"], cwd=tree.root, check=True)
    pod = ("pod", "--zone=z", "--project=p", "--slices=2", "--every=0.05")
    tree("tpu_pod.sh", "create", *pod, "--type=v5p-64", "--runtime=image")
    assert tree.calls() == words(
        "gcloud compute tpus queued-resources create pod --zone=z --project=p --node-count=2 "
        "--node-prefix=pod --accelerator-type=v5p-64 --runtime-version=image"
    )
    tree("tpu_pod.sh", "wait", *pod)
    assert len(tree.calls()) == 3
    tree.calls()
    (tree.fakes / "unmounted").touch()
    tree("tpu_pod.sh", "setup", *pod, "--shared=10.0.0.2:/runs")
    asked = [" ".join(call[1:]) for call in tree.calls() if call[0] == "sudo"]
    mounts = ["apt-get -qq install nfs-common", "mount -t nfs 10.0.0.2:/runs runs"]
    assert sorted(asked) == sorted(["apt-get -qq update", *mounts] * 4)
    everywhere = {f"pod-{node}-{worker}" for node in (0, 1) for worker in (0, 1)}
    workers = tree.fakes / "workers"
    assert {path.name for path in workers.iterdir()} == everywhere
    assert all((workers / name / "lasad_jax/launch/worker.sh").exists() for name in everywhere)

    # The trainer saves when it is told to stop.
    saves = "trap 'echo saved; exit 75' TERM; echo here; while true; do sleep 0.02; done"
    follower = tree.start("tpu_pod.sh", "run", *pod, "--", "bash", "-c", saves)
    try:
        logs = [workers / name / "lasad_jax/.worker/log" for name in everywhere]
        deadline = time.monotonic() + 20
        while not all(log.exists() and "\nhere" in log.read_text() for log in logs):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        said = tree("tpu_pod.sh", "status", *pod)
        assert said.startswith("pod: ACTIVE\n")
        assert said.count(": running\n") == 4
        tree("tpu_pod.sh", "stop", *pod)
        said, _ = follower.communicate(timeout=20)
    finally:
        follower.kill()
    assert follower.returncode == 1, said
    assert "pod: ended 75; logs/pod/ has the logs" in said
    logs = {path.stem: path.read_text() for path in (tree.root / "logs/pod").iterdir()}
    assert set(logs) == everywhere
    assert all(log.count("saved\n") == 1 and log.count("here\n") == 1 for log in logs.values())
    tree("tpu_pod.sh", "delete", *pod)
    assert tree.calls()[-1][4:] == ["delete", "pod", *pod[1:3], "--force", "--quiet"]


def test_what_cannot_be_told_is_not_taken_for_no_pod(tree):
    (tree.fakes / "offline").touch()
    said = tree("tpu_pod.sh", "up", "pod", "--zone=z", "--type=v6e-8", "--", "true", status=1)
    assert "no network" in said
    assert len(tree.calls()) == 1


def test_a_worker_gives_up_after_failures_in_a_row(tree):
    (tree.root / ".worker").mkdir()
    tree("worker.sh", "start", "bash", "-c", "echo again; exit 3", RETRIES="2")
    deadline = time.monotonic() + 20
    while (said := tree("worker.sh", "status")) == "running\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert said == "ended 3\n"
    assert tree("worker.sh", "log").count("\nagain\n") == 3
