"""An attempt as a TorchX app, and what its scheduler makes of it: the objects that are sent. Takes torchx to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from torchx.schedulers import Scheduler, get_scheduler_factories
from torchx.specs import AppDef, AppDryRunInfo, Resource, Role

from model import contract
from model.config import read
from model.contract import Attempt
from orchestrator import sections
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.launchers import kubernetes_records as records, kubernetes_volcano
from orchestrator.launchers.kubernetes_pod import TMP, Pods

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

CREATE_SECONDS = 30
"""How long one create may take: less than the controller's settling time."""


def section(cluster: Mapping[str, Any], attempt: Attempt) -> Kubernetes:
    """The profile's section with what the job has other than it. Both were checked when the job was."""
    return read(Kubernetes, sections.merged("kubernetes", cluster, _resources(attempt)))


def _resources(attempt: Attempt) -> Mapping[str, Any]:
    resources: Mapping[str, Any] = attempt.settings.get("resources", {})
    return resources


def app(cluster: Mapping[str, Any], attempt: Attempt, digest: str) -> AppDef:
    """One role, a replica a node. cluster: a resolved profile; digest: of attempt.yaml."""
    told = section(cluster, attempt)
    ours = {
        records.MANAGED_BY: "dinoctl",
        records.RUN_ID: attempt.run_id,
        records.NAME: attempt.launch_name,
        records.ATTEMPT: str(attempt.attempt),
        records.PHASE: attempt.phase,
    }
    pods = Pods(
        section=told,
        labels={**told.labels, **ours},
        annotations={**told.annotations, records.DIGEST: digest},
        exclude=tuple(dict.fromkeys([*told.exclude, *attempt.exclude])),
        seconds=_seconds(told, attempt),
    )
    workers = int(attempt.settings.get("data", {}).get("workers", 0))
    role = Role(
        name=records.ROLE,
        image=told.image,
        entrypoint=told.python,
        args=["-P", "-m", "model.agent", f"{attempt.run_dir}/{contract.attempt_yaml(attempt.attempt)}"],
        # The user may have neither a home nor a name in the image, and torch.compile's cache asks for both.
        env={"HOME": TMP, "TMPDIR": TMP, "USER": "dinoctl", **told.env},
        num_replicas=attempt.nodes,
        resource=Resource(
            cpu=attempt.processes_per_node * (attempt.threads + workers),
            gpu=attempt.processes_per_node if told.gpus else 0,
            memMB=-1,  # said by the section, in Kubernetes' own units
        ),
        metadata={"pods": pods},
    )
    return AppDef(name=attempt.launch_name, roles=[role])


def _seconds(told: Kubernetes, attempt: Attempt) -> int | None:
    """When a pod is asked to stop, so that with the grace that follows it keeps to the time limit."""
    limit = _resources(attempt).get("time_limit_minutes")
    return None if limit is None else max(1, int(limit) * 60 - told.grace_seconds)


def objects(cluster: Mapping[str, Any], attempt: Attempt, digest: str) -> list[dict[str, Any]]:
    """What is created, in that order; the job comes last. Pure."""
    _, info = _dry_run(None, cluster, attempt, digest)
    return [info.request.resource] if _is_volcano(info) else list(info.request.objects)


def text(made: list[dict[str, Any]]) -> str:
    """The objects as YAML, for `kubectl create -f` as for reading."""
    return str(yaml.dump_all(made, Dumper=_Dumper, sort_keys=False, width=120))


class _Dumper(yaml.SafeDumper):
    """Writes the same list or mapping twice rather than refer to the first: those who read it are people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def schedule(api_client: ApiClient, cluster: Mapping[str, Any], attempt: Attempt, digest: str) -> str:
    """Create them through the TorchX scheduler: `<namespace>:<name>`. A Service that is there already is no mistake.

    Raises kubernetes.client.ApiException for an answer that refuses (409 of the job: it is there already), and
    urllib3's errors where none came.
    """
    from kubernetes.client import ApiException

    scheduler, info = _dry_run(Bounded(api_client), cluster, attempt, digest)
    try:
        return str(scheduler.schedule(info))
    except ValueError as error:  # TorchX's words for a 409
        if isinstance(error.__cause__, ApiException):
            raise error.__cause__ from None
        raise


class Bounded:
    """An ApiClient that waits for an answer no longer than CREATE_SECONDS: TorchX does not say how long."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def call_api(self, *arguments: Any, **options: Any) -> Any:
        return self._client.call_api(*arguments, **{**options, "_request_timeout": CREATE_SECONDS})


def _dry_run(
    client: Bounded | None, cluster: Mapping[str, Any], attempt: Attempt, digest: str
) -> tuple[Scheduler[Any], AppDryRunInfo[Any]]:
    made = app(cluster, attempt, digest)
    name = Pods.of(made.roles[0]).section.scheduler
    if name == "volcano":
        return kubernetes_volcano.dry_run(client, made)
    scheduler = get_scheduler_factories()[name]("dinoctl", client=client)
    return scheduler, scheduler.submit_dryrun(made, {})


def _is_volcano(info: AppDryRunInfo[Any]) -> bool:
    return hasattr(info.request, "resource")
