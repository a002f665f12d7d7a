"""The files for Kubernetes and SkyPilot, against the schemas that others publish."""

from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from anon_dist.exits import USAGE

FOLDER = Path(__file__).parents[2] / "launch" / "multinode"
VERSION = "1.37"


def documents(file: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def job_of(document: dict) -> dict:
    """A Job as Kubernetes itself knows it; of a JobSet, the one that it makes."""
    if document["kind"] != "JobSet":
        return document
    (made,) = document["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": made["name"]}, **made["template"]}


@pytest.mark.parametrize("file", ["indexed-job.yaml", "jobset.yaml"])
def test_kubernetes_takes_every_field(file):
    """Its own schema, in which a field that it does not know is an error, as one is here."""
    for document in documents(file):
        kubernetes_validate.validate(job_of(document), VERSION, strict=True)
    job = job_of(documents(file)[-1])
    job["spec"]["completionMod"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


def test_jobset_takes_every_field():
    """Its API's model, made from its definition, leaves out what it does not know: here nothing."""

    def lost(given, kept, path="") -> list[str]:
        if isinstance(given, dict):
            return [x for key, value in given.items() for x in lost(value, (kept or {}).get(key), f"{path}/{key}")]
        if isinstance(given, list):
            return [x for i, value in enumerate(given) for x in lost(value, kept[i], f"{path}/{i}")]
        return [] if given == kept else [path]

    (document,) = documents("jobset.yaml")
    assert lost(document, JobsetV1alpha2JobSet.from_dict(document).to_dict()) == []
    document["spec"]["network"]["enableDNSHostname"] = True
    assert lost(document, JobsetV1alpha2JobSet.from_dict(document).to_dict()) == ["/spec/network/enableDNSHostname"]


@pytest.mark.parametrize("file", ["indexed-job.yaml", "jobset.yaml"])
def test_what_must_agree_does(file):
    """Pods, NODES, the container that the policy names, and node 0's name."""
    document = documents(file)[-1]
    spec = job_of(document)["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {e["name"]: e.get("value") for e in container["env"]}
    assert str(spec["parallelism"]) == str(spec["completions"]) == variables["NODES"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == variables["RANKS_PER_NODE"]
    rules = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    codes = ([int(variables["STOPPED_CODE"])], [USAGE])
    assert rules == [{"containerName": container["name"], "operator": "In", "values": values} for values in codes]
    host, domain = variables["MASTER_ADDR"].split(".")
    name = document["metadata"]["name"]
    if document["kind"] == "JobSet":
        assert (host, domain) == (f"{name}-node-0-0", document["spec"]["network"]["subdomain"])
    else:
        service = documents(file)[0]
        assert (host, domain) == (f"{name}-0", service["metadata"]["name"])
        assert pod["subdomain"] == domain
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
