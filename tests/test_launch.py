"""The launchers: what they call, in which order, against programs that pretend to be clouds."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launching import FalseTree
from tiny import ROOT

SCRIPTS = [*(ROOT / "launch").glob("*.sh"), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]


@pytest.fixture
def tree(tmp_path):
    yield FalseTree(tmp_path)
    for pid in tmp_path.rglob(".worker/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def words(*calls: str) -> list[list[str]]:
    return [shlex.split(call) for call in calls]


def test_shellcheck_finds_nothing():
    subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--external-sources", *SCRIPTS],
        cwd=ROOT,
        check=True,
    )


def test_help_and_mistakes(tree):
    for script in ("local.sh", "tpu_pod.sh", "gke.sh", "slurm.sh"):
        said = tree(script, "--help")
        assert f"launch/{script}" in said
        assert "DRY_RUN=1" in said
    for call, message in (
        ("local.sh --processes=two -- ls", "--processes: 'two' must be a number from 1"),
        ("local.sh --processes=2", "no command; it follows after --"),
        ("local.sh --process=2 -- ls", "unknown option '--process=2'"),
        ("tpu_pod.sh stat pod --zone=z", "unknown action 'stat'"),
        ("tpu_pod.sh status --zone=z", "status: name the pod"),
        ("tpu_pod.sh status pod", "--zone: name one"),
        ("tpu_pod.sh status pod --zone=", "--zone: give it a value: --zone=VALUE"),
        ("tpu_pod.sh create pod --zone=z", "--type: name one"),
        ("tpu_pod.sh create pod --zone=z --type=h100-8", "no image is known for 'h100-8'"),
        ("tpu_pod.sh up pod --zone=z --type=v6e-8", "no command"),
        ("gke.sh run x --type=v5p-8 --image=i -- ls", "--shared: '' must be SERVER:/PATH"),
        ("gke.sh run x --type=v5p-8 --shared=s:/p -- ls", "--image: name what"),
        (
            "gke.sh run x --type=v5p-8 --topology=4x4 --image=i --shared=s:/p -- ls",
            "--topology: 4x4 has 16 chips, v5p-8 4",
        ),
        ("gke.sh cluster x --zone=z --type=a100-8", "'a100-8' is none of v5litepod-N"),
        ("slurm.sh --nodes=2", "no command"),
    ):
        said = tree(*call.split(), status=2)
        assert message in said, (call, said)
        assert said.count("\n") == 1
    assert tree.calls() == []


def test_where_python_is_too_old_uv_makes_the_environment(tree):
    shutil.rmtree(tree.root / ".venv")
    (tree.fakes / "old").touch()
    tree("local.sh", "--processes=1", "--", "true")
    asked = [call for call in tree.calls() if "-c" not in call]
    assert asked == words(
        "uv venv --quiet --seed --python 3.12 .venv",
        "python -m pip install --quiet --requirement requirements.txt",
    )


# The TPU pod

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


# GKE


def test_gke_makes_a_cluster_an_image_and_a_run(tree):
    flags = "--zone=z --type=v5litepod-256 --slices=2 --spot -- --enable-workload-identity"
    tree("gke.sh", "cluster", "c", *flags.split())
    tree("gke.sh", "image", "registry/lasad")
    command = ["python", "-m", "lasad_jax.train", '--config="x"', "a \\ & ${NAME}: #'"]
    flags = "--type=v5litepod-256 --slices=2 --image=registry/lasad --shared=10.0.0.2:/share"
    tree("gke.sh", "run", "run", *flags.split(), "--", *command)
    tree("gke.sh", "status", "run")
    tree("gke.sh", "logs", "run")
    tree("gke.sh", "stop", "run")
    tree("gke.sh", "delete", "c", "--zone=z", "--project=p")
    pods = "--selector=jobset.sigs.k8s.io/jobset-name=run"
    assert tree.calls() == words(
        "xpk cluster create --cluster=c --zone=z --tpu-type=v5litepod-256 --num-slices=2 --spot "
        "--enable-workload-identity",
        "docker build --platform=linux/amd64 --file=launch/Dockerfile --tag=registry/lasad .",
        "docker push registry/lasad",
        "kubectl apply --filename=-",
        "kubectl get jobset run",
        f"kubectl get pods {pods} --output=wide",
        f"kubectl get pods {pods} --output=name",
        "kubectl logs pod/run-slice-0-0",
        "kubectl logs pod/run-slice-0-1",
        "kubectl delete jobset run --cascade=foreground",
        "xpk cluster delete --cluster=c --zone=z --project=p",
    )
    log = (tree.root / "logs/run/run-slice-0-1.log").read_text()
    assert log == "log of pod/run-slice-0-1\n"
    jobset = yaml.safe_load((tree.fakes / "applied").read_text())
    check(jobset, JOBSET)
    job = jobset["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == [*command, "--distributed"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (2, 64)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["volumes"][0]["nfs"] == {"server": "10.0.0.2", "path": "/share"}
    # The policies refer to what there is.
    rule = job["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["containerName"] == pod["containers"][0]["name"]
    assert [pod["containers"][0]["volumeMounts"][0]["name"]] == [pod["volumes"][0]["name"]]
    said = tree("gke.sh", "run", "run", *flags.split(), "--", "a\nb", status=2)
    assert "a control character in the command" in said


# The fields that the JobSet uses, by the schemas of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1:
# a field more, one less or one of another type is an error.
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "labels": {str: str}, "annotations": {str: str}},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": re.compile("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                    "action": re.compile("(FailJobSet|RestartJobSet(AndIgnoreMaxRestarts)?)"),
                    "onJobFailureReasons": [re.compile("PodFailurePolicy|BackoffLimitExceeded")],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": "FailJob",
                                    "onExitCodes": {
                                        "containerName": str,
                                        "operator": re.compile("In|NotIn"),
                                        "values": [int],
                                    },
                                },
                                {
                                    "action": "FailJob",
                                    "onPodConditions": [
                                        {"type": "DisruptionTarget", "status": "True"}
                                    ],
                                },
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": "Never",  # A podFailurePolicy asks for it.
                                "terminationGracePeriodSeconds": int,
                                "hostNetwork": bool,
                                "dnsPolicy": "ClusterFirstWithHostNet",
                                "nodeSelector": {str: str},
                                "tolerations": [
                                    {"key": str, "operator": "Exists", "effect": "NoSchedule"}
                                ],
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "command": [str],
                                        "ports": [{"containerPort": int}],
                                        "resources": {"limits": {"google.com/tpu": int}},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [{"name": str, "nfs": {"server": str, "path": str}}],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def check(value, schema, place="jobset"):
    if isinstance(schema, dict) and str in schema:
        assert all(type(key) is type(item) is str for key, item in value.items()), place
    elif isinstance(schema, dict):
        assert set(value) == set(schema), place
        for name in schema:
            check(value[name], schema[name], f"{place}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        # One schema for all, or one for each.
        schemas = schema if len(schema) == len(value) else schema * len(value)
        for item, of_item in zip(value, schemas, strict=True):
            check(item, of_item, f"{place}[]")
    elif isinstance(schema, re.Pattern):
        assert schema.fullmatch(value), (place, value)
    elif isinstance(schema, type):
        assert type(value) is schema, (place, value)
    else:
        assert value == schema, place


@pytest.mark.parametrize(
    ("kind", "accelerator", "topology", "hosts", "chips"),
    [
        ("v5litepod-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v6e-1", "tpu-v6e-slice", "1x1", 1, 1),
        ("v6e-64", "tpu-v6e-slice", "8x8", 16, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v4-32", "tpu-v4-podslice", "2x2x4", 4, 4),
    ],
)
def test_what_a_type_is_made_of(tree, kind, accelerator, topology, hosts, chips):
    flags = ("--image=i", "--shared=s:/p", "--", "true")
    said = tree("gke.sh", "run", "run", f"--type={kind}", *flags, DRY_RUN="1")
    jobset = yaml.safe_load(re.fullmatch("kubectl .*?END\n(.*)END\n", said, re.DOTALL)[1])
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


# Slurm


def test_slurm_submits_with_the_users_flags(tree):
    train = ["python", "-m", "lasad_jax.train", "--workdir=a b"]
    tree("slurm.sh", "--nodes=2", "--time=60", "--", *train)
    tree("slurm.sh", "--", "hostname")
    assert tree.calls() == [
        ["sbatch", "--nodes=2", "--time=60", "launch/slurm.sbatch", *train, "--distributed"],
        ["sbatch", "launch/slurm.sbatch", "hostname"],
    ]
    assert (tree.root / "logs").is_dir()


@pytest.mark.parametrize(
    ("ended", "job", "requeued"),
    [
        (0, "RUNNING", False),
        (75, "RUNNING", True),
        (143, "RUNNING", True),
        (75, "CANCELLED", False),
        (1, "RUNNING", False),
    ],
)
def test_a_job_is_queued_again_when_it_was_warned(tree, ended, job, requeued):
    (tree.fakes / "srun").write_text(str(ended))
    (tree.fakes / "job").write_text(job)
    job = {"SLURM_SUBMIT_DIR": str(tree.root), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}
    tree("slurm.sbatch", "train", "a b", status=ended, **job)
    srun, *rest = tree.calls()
    assert srun[0] == "srun"
    assert "--cpus-per-task=3" in srun
    assert srun[-2:] == ["train", "a b"]
    assert (rest[-1:] == [["scontrol", "requeue", "7"]]) == requeued
    header = re.findall(r"^#SBATCH (\S+)", (tree.root / "launch/slurm.sbatch").read_text(), re.M)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(header)


# Several processes of one machine

MEET = """
import jax, sys
jax.distributed.initialize(num_processes=2, process_id=int(sys.argv[1]))
print("process", jax.process_index(), "of", jax.process_count(), "devices", jax.device_count())
"""


def test_local_processes_meet(tree):
    number = '"$JAX_PROCESS_ID"'
    command = f"exec python -c {shlex.quote(MEET)} {number}"
    tree("local.sh", "--processes=2", "--devices=2", "--", "bash", "-c", command, XLA_FLAGS="")
    for process in (0, 1):
        log = (tree.root / f"logs/local/{process}.log").read_text()
        assert f"process {process} of 2 devices 4\n" in log


def test_local_processes_end_together(tree):
    waits = "trap 'echo stopped; exit 75' TERM; echo here; while true; do sleep 0.02; done"
    log = tree.root / "logs/local"
    fails = (
        f"if [[ $JAX_PROCESS_ID == 1 ]]; then until grep here {log}/0.log; do :; done; exit 9; fi"
    )
    tree("local.sh", "--processes=3", "--", "bash", "-c", f"{fails}; {waits}", status=9)
    assert "stopped" in (log / "0.log").read_text()

    process = tree.start("local.sh", "--processes=2", "--gpus", "--", "bash", "-c", waits)
    try:
        deadline = time.monotonic() + 20
        while (
            not all("here" in (log / f"{i}.log").read_text() for i in (0, 1))
            or "stopped" in (log / "0.log").read_text()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 75


def test_dry_runs_call_nothing(tree):
    command = ("--", "python", "-m", "lasad_jax.train", "--workdir=runs/a")
    pod = ("pod", "--zone=z", "--type=v6e-8", "--shared=s:/p", "--slices=2")
    said = tree("tpu_pod.sh", "up", *pod, *command, DRY_RUN="1")
    order = ["create pod", "list", "tar", "scp", "ssh", "worker.sh\\ start", "worker.sh\\ status"]
    places = [said.index(step) for step in order]
    assert places == sorted(places)
    assert "lasad_jax.train\\ --workdir=runs/a\\ --distributed" in said
    for action in ("status", "logs", "stop", "delete", "wait", "setup"):
        assert "gcloud compute tpus" in tree("tpu_pod.sh", action, *pod, DRY_RUN="1")
    said = tree("local.sh", "--processes=2", "--gpus", *command, DRY_RUN="1", PORT="99")
    assert said.splitlines() == [
        "env JAX_COORDINATOR_ADDRESS=localhost:99 JAX_NUM_PROCESSES=2 "
        f"JAX_PROCESS_ID={i} CUDA_VISIBLE_DEVICES={i} python -m lasad_jax.train --workdir=runs/a "
        f"--distributed > logs/local/{i}.log"
        for i in (0, 1)
    ]
    said = tree("slurm.sh", "--nodes=2", *command, DRY_RUN="1")
    assert said.startswith("sbatch --nodes=2 launch/slurm.sbatch python -m lasad_jax.train")
    assert "xpk cluster create" in tree("gke.sh", "cluster", "c", *pod[1:3], DRY_RUN="1")
    for action in ("status", "logs", "stop"):
        assert "kubectl " in tree("gke.sh", action, "run", DRY_RUN="1")
    assert tree.calls() == []
    assert not (tree.root / "logs").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/pods.md"])
def test_launches_in_the_pages_are_taken(tree, page):
    text = (ROOT / page).read_text()
    shell = " \n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    shell = re.sub(r"\\\n", " ", shell)
    launches = re.findall(r"bash launch/((?:local|tpu_pod|gke|slurm)\.sh .*)", shell)
    assert len(launches) >= 2
    for launch in launches:
        assert tree(*shlex.split(launch, comments=True), DRY_RUN="1"), launch
    assert tree.calls() == []
