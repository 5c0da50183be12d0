"""kuberay.yaml against the fields of KubeRay's Go types (ray.io/v1) and of Kubernetes' pods, as far as it uses them.

The schema that is generated from those types has more than a megabyte, and there is no cluster here: unknown keys,
wrong types and numbers that contradict each other are what this finds.
"""

import copy
import re
import shlex
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jobs
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ray_jobs.settings import SearchConfig, read

TEXT = (jobs.ROOT / "kuberay.yaml").read_text()
JOB = yaml.safe_load(TEXT)

Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMGT]i?)?$")]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Resources(_Strict):
    limits: dict[str, Quantity]
    requests: dict[str, Quantity]


class Mount(_Strict):
    name: str
    mountPath: str = Field(pattern="^/")


class Container(_Strict):
    name: str
    image: str
    resources: Resources
    volumeMounts: list[Mount] = []


class Claim(_Strict):
    claimName: str


class Volume(_Strict):
    name: str
    persistentVolumeClaim: Claim


class Toleration(_Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class Pod(_Strict):
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> "Pod":
        mounted = {mount.name for container in self.containers for mount in container.volumeMounts}
        assert mounted <= {volume.name for volume in self.volumes}
        return self


class Template(_Strict):
    spec: Pod


class Head(_Strict):
    rayStartParams: dict[str, str]
    template: Template


class Workers(_Strict):
    groupName: str = Field(pattern="^[a-z0-9-]+$")
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: Template

    @model_validator(mode="after")
    def _in_order(self) -> "Workers":
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class Autoscaler(_Strict):
    idleTimeoutSeconds: Count
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"


class Auth(_Strict):
    mode: Literal["disabled", "token"]


class Cluster(_Strict):
    rayVersion: str
    enableInTreeAutoscaling: bool
    autoscalerOptions: Autoscaler
    authOptions: Auth
    headGroupSpec: Head
    workerGroupSpecs: list[Workers]


class Spec(_Strict):
    entrypoint: str
    runtimeEnvYAML: str
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    backoffLimit: Count
    rayClusterSpec: Cluster


class RayJob(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, str]
    spec: Spec


def test_its_fields_are_those_of_a_rayjob() -> None:
    job = RayJob.model_validate(JOB)
    cluster = job.spec.rayClusterSpec
    assert cluster.authOptions.mode == "token"
    assert cluster.headGroupSpec.rayStartParams["num-gpus"] == "0"
    (workers,) = cluster.workerGroupSpecs
    assert workers.minReplicas == 0
    assert workers.template.spec.nodeSelector == {"cloud.google.com/gke-spot": "true"}
    assert workers.template.spec.containers[0].resources.limits["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda job: job["spec"].update(entryPoint="x"),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=9),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-gpus": 0}),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].pop("volumes"),
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="none"),
    ],
)
def test_a_mistake_in_it_is_found(mistake: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(JOB)
    mistake(job)
    with pytest.raises(ValidationError):
        RayJob.model_validate(job)


def test_it_runs_a_search_with_the_versions_of_the_repository() -> None:
    python, flag, module, path, *overrides = shlex.split(JOB["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "ray_jobs.tune")
    config = read(SearchConfig, jobs.ROOT / path, overrides)
    assert config.search.concurrent == JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert config.experiment.gpus_per_worker == 1
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (jobs.ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    assert f"rayproject/ray:{pins['ray']}-py311-gpu" in TEXT
    assert yaml.safe_load(JOB["spec"]["runtimeEnvYAML"]) == {"working_dir": "/home/ray/loko"}
