"""GKE: the calls, and a JobSet by its schema."""

import re

import pytest
import yaml
from launching import FalseTree, words

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


@pytest.fixture
def tree(tmp_path):
    return FalseTree(tmp_path)


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
