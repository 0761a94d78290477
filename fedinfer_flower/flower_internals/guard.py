"""Whether the installed Flower is the one whose internals this package knows."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from fedinfer_flower.errors import DeploymentError

__all__ = ["INTERNALS", "KNOWN_FLOWER", "Internal", "require_flower"]

KNOWN_FLOWER: Final = (1, 41)
"""The minor version of Flower whose internals are used."""


@dataclass(frozen=True, kw_only=True)
class Internal:
    """One private name of Flower that the package uses.

    Parameters
    ----------
    module : str
    name : str
        Dotted within the module: ``Class.method``.
    parameters : tuple of str, optional
        Names of its parameters in order; None for what is no function.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None = None

    def problem(self) -> str:
        """Return what differs from what is known, or an empty text."""
        where = f"{self.module}.{self.name}"
        try:
            found: Any = importlib.import_module(self.module)
        except ImportError:
            return f"{self.module} cannot be imported"
        for part in self.name.split("."):
            if not hasattr(found, part):
                return f"{where} is not there"
            found = getattr(found, part)
        if self.parameters is None:
            return ""
        if tuple(inspect.signature(found).parameters) != self.parameters:
            return f"{where} takes other parameters"
        return ""


def _internal(module: str, name: str, parameters: str | None = None) -> Internal:
    names = None if parameters is None else tuple(parameters.split())
    return Internal(module=module, name=name, parameters=names)


_PULL = "max_concurrent_pulls max_time max_tries_per_object initial_backoff backoff_cap"
_INFLATABLE = "flwr.supercore.inflatable"
_LOOP = "flwr.supernode.start_client_internal"
_HANDLERS = "flwr.supernode.servicer.runtime.runtime_handlers"
_STATE = "flwr.supernode.nodestate.in_memory_nodestate"

INTERNALS: Final = (
    _internal(f"{_INFLATABLE}.inflatable_object", "get_all_nested_objects", "obj"),
    _internal(f"{_INFLATABLE}.inflatable_object", "get_object_tree", "obj"),
    _internal(f"{_INFLATABLE}.inflatable_object", "iterate_object_tree", "tree"),
    _internal(f"{_INFLATABLE}.inflatable_object", "no_object_id_recompute", ""),
    _internal(
        f"{_INFLATABLE}.inflatable_utils",
        "inflate_object_from_contents",
        "object_id object_contents keep_object_contents objects",
    ),
    _internal(
        f"{_INFLATABLE}.inflatable_utils", "pull_objects", f"object_ids pull_object_fn {_PULL}"
    ),
    _internal(
        f"{_INFLATABLE}.inflatable_utils",
        "pull_and_inflate_object_from_tree",
        f"object_tree pull_object_fn confirm_object_received_fn return_type {_PULL}",
    ),
    _internal("flwr.supercore.task_identity", "TaskIdentity"),
    _internal("flwr.supercore.constant", "TASK_TOKEN_HEADER"),
    _internal("flwr.supercore.constant", "TaskType.CLIENT_APP"),
    _internal("flwr.common.constant", "SubStatus.COMPLETED"),
    _internal("flwr.common.constant", "Status.PENDING"),
    _internal("flwr.common.serde", "context_from_proto", "context_proto"),
    _internal("flwr.common.serde", "context_to_proto", "context"),
    _internal("flwr.common.serde", "message_to_proto", "message"),
    _internal("flwr.common.serde", "run_from_proto", "run_proto"),
    _internal("flwr.common.config", "get_fused_config_from_fab", "fab_file run"),
    _internal("flwr.app.message", "remove_content_from_message", "message"),
    _internal("flwr.app.message", "make_message", "metadata content error"),
    _internal("flwr.common.serde", "message_from_proto", "message_proto"),
    _internal("flwr.common.serde_utils", "metadata_to_proto", "metadata"),
    _internal("flwr.common.serde_utils", "error_to_proto", "error"),
    _internal("flwr.supercore.constant", "HEAD_BODY_DIVIDER"),
    _internal("flwr.supercore.constant", "HEAD_VALUE_DIVIDER"),
    _internal("flwr.supercore.constant", "SYSTEM_MESSAGE_TYPE"),
    _internal(
        f"{_INFLATABLE}.inflatable_protobuf_utils",
        "make_pull_object_fn_protobuf",
        "pull_object_protobuf node run_id",
    ),
    _internal(
        f"{_INFLATABLE}.inflatable_protobuf_utils",
        "make_push_object_fn_protobuf",
        "push_object_protobuf node run_id session_id",
    ),
    _internal(
        f"{_INFLATABLE}.inflatable_utils",
        "push_objects",
        "objects push_object_fn object_ids_to_push keep_objects max_concurrent_pushes",
    ),
    _internal("flwr.superlink.grid.http_grid", "HttpGrid._runtime_client"),
    _internal("flwr.superlink.grid.http_grid", "HttpGrid.push_messages", "self messages"),
    _internal("flwr.superlink.grid.http_grid", "HttpGrid.pull_messages", "self message_ids"),
    _internal("flwr.supercore.runtime", "RuntimeHttpClient.PushMessages", "self request"),
    _internal("flwr.supercore.runtime", "RuntimeHttpClient.PullMessages", "self request"),
    _internal("flwr.supercore.runtime", "RuntimeHttpClient.PushObject", "self request"),
    _internal("flwr.supercore.runtime", "RuntimeHttpClient.PullObject", "self request"),
    _internal("flwr.supercore.runtime", "RuntimeHttpClient.ConfirmMessageReceived", "self request"),
    _internal("flwr.cli.install", "install_from_fab", "fab_file install_dir skip_prompt"),
    _internal(
        "flwr.clientapp.utils", "get_load_client_app_fn", "default_app_ref app_path multi_app"
    ),
    _internal("flwr.supercore.runtime", "RuntimeHttpClient.AcquireTask", "self request"),
    _internal(
        "flwr.supercore.runtime",
        "RuntimeHttpClient.from_server_address",
        "server_address insecure root_certificates interceptors retry_invoker",
    ),
    _internal("flwr.supercore.interceptors", "RuntimeTokenHttpInterceptor", "token"),
    _internal("flwr.supercore.interceptors", "RuntimeVersionHttpInterceptor", "component_name"),
    _internal("flwr.supernode.runtime.run_clientapp", "pull_task_input", "client"),
    _internal("flwr.supernode.runtime.run_clientapp", "push_message", "client message context"),
    _internal(
        "flwr.supernode.runtime.run_clientapp",
        "push_task_output",
        "client context sub_status details",
    ),
    _internal("flwr.supercore.heartbeat", "HEARTBEAT_DEFAULT_INTERVAL"),
    _internal("flwr.supernode.fleet_http_connection", "HEARTBEAT_DEFAULT_INTERVAL"),
    _internal("flwr.supernode.cli.flower_supernode", "flower_supernode", ""),
    _internal("flwr.supernode.main", "create_app", "state_factory superexec_auth_secret"),
    _internal(_LOOP, "time.sleep"),
    _internal(_LOOP, "_insert_message", "msg state store"),
    _internal(_LOOP, "get_fused_config_from_fab", "fab_file run"),
    _internal(
        _LOOP,
        "_pull_and_store_message",
        "state object_store node_config receive get_run get_fab pull_object"
        " confirm_message_received trusted_entities",
    ),
    _internal(_LOOP, "_push_messages", "state object_store send push_object"),
    _internal(_HANDLERS, "acquire_task", "request state"),
    _internal(_HANDLERS, "pull_task_input", "request state task"),
    _internal(_HANDLERS, "pull_messages", "request state task"),
    _internal(_HANDLERS, "pull_object", "request state task"),
    _internal(_HANDLERS, "confirm_message_received", "request state task"),
    _internal(_HANDLERS, "push_messages", "request state task"),
    _internal(_HANDLERS, "push_object", "request state task"),
    _internal(_HANDLERS, "push_task_output", "request state task"),
    _internal(_STATE, "InMemoryNodeState.get_task_by_token", "self token"),
    _internal(_STATE, "InMemoryNodeState.acknowledge_task_heartbeat", "self task_id"),
    _internal(_STATE, "InMemoryNodeState.finish_task", "self task_id sub_status details"),
    _internal(_STATE, "InMemoryNodeState.delete_messages", "self message_ids"),
    _internal(
        _STATE,
        "InMemoryNodeState.get_tasks",
        "self task_ids run_ids statuses order_by ascending limit",
    ),
)
"""Every private name of Flower that the package uses, as this version of Flower has it."""

_HINT: Final = (
    "run the stock flower-supernode, or `fedinfer site up --stock`; or install flwr>=1.41,<1.42"
)


def require_flower() -> None:
    """Make sure that Flower is the version whose internals are known.

    Raises
    ------
    DeploymentError
        Naming the version found, or the first name that is not as it was.

    Examples
    --------
    >>> require_flower()
    """
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise DeploymentError(
            "Flower is not installed", hint="pip install 'flwr>=1.41,<1.42'"
        ) from None
    known = ".".join(str(part) for part in KNOWN_FLOWER)
    if tuple(found.split(".")[:2]) != tuple(known.split(".")):
        raise DeploymentError(
            f"the warm path knows Flower {known}, this is {found[:40]}", hint=_HINT
        )
    for internal in INTERNALS:
        if problem := internal.problem():
            raise DeploymentError(
                f"this Flower {found[:40]} is not as the warm path knows it: {problem}", hint=_HINT
            )
