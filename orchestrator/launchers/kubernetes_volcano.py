"""TorchX's own scheduler for Volcano, with what it leaves out. No server has checked what is made here: Volcano's
fields are from its documentation."""

from __future__ import annotations

from typing import Any

from torchx.schedulers import Scheduler, get_scheduler_factories
from torchx.specs import AppDef, AppDryRunInfo

from orchestrator.launchers.kubernetes_pod import Identity, Pods, template
from orchestrator.launchers.kubernetes_schedulers import metadata

TORCHX = "kubernetes"
"""TorchX's name of it."""


def dry_run(client: Any | None, app: AppDef) -> tuple[Scheduler[Any], AppDryRunInfo[Any]]:
    """The scheduler and what it would create. TorchX names at random, keeps few of a pod's fields, and lets Volcano
    make evicted pods again: all that is said anew."""
    role = app.roles[0]
    section = Pods.of(role).section
    scheduler = get_scheduler_factories()[TORCHX]("dinoctl", client=client)
    config = {"namespace": section.namespace, "queue": section.queue or "default"}
    info = scheduler.submit_dryrun(app, {**config, "priority_class": section.priority_class})
    job = info.request.resource
    job["metadata"] = metadata(app)
    spec = job["spec"]
    spec["minAvailable"] = role.num_replicas  # all or none
    spec["policies"] = [{"event": event, "action": "TerminateJob"} for event in ("PodFailed", "PodEvicted")]
    for number, task in enumerate(spec["tasks"]):  # TorchX makes one a replica, in order
        # Volcano's svc plugin calls each pod <job>-<task>-<index in the task>, in a Service of the job's name.
        address = f"{app.name}-{role.name}-$(DINOCTL_NODE)-0.{app.name}"
        task["template"] = template(role, Identity({"value": str(number)}, {"value": app.name}, address))
    return scheduler, info
