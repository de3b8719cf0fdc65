"""Telling people: by the Prefect notification block that the Prefect variable `lenet_notify` names, if there is one.

prefect variable set lenet_notify slack-webhook/ops
"""

import logging
from typing import Any

from prefect import Flow
from prefect.blocks.core import Block
from prefect.client.schemas.objects import FlowRun, State
from prefect.variables import Variable

from pipeline.errors import first_line

log = logging.getLogger("flows.notify")

VARIABLE = "lenet_notify"


def notify(subject: str, body: str) -> None:
    """Send it, if anybody wants to hear. Whatever goes wrong is a warning: the run's outcome stands."""
    try:
        if name := Variable.get(VARIABLE):
            block: Any = Block.load(str(name))
            with block.raise_on_failure():  # what most blocks otherwise do is say nothing
                block.notify(body, subject)
            log.info("notified %s: %s", name, subject)
    except Exception as error:  # of any of the services a block may call
        said = getattr(error, "log", "") or first_line(error)  # where a NotificationError keeps what it says
        log.warning("nobody was notified that %s: %s", subject, said)


def on_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A flow's hook."""
    notify(f"{titled(flow_run)}: {state.name}", state.message or "")


def titled(flow_run: FlowRun) -> str:
    """Which flow run it is: many have the same name. Where nobody has named the run, its id ends like this too."""
    return f"{flow_run.name} ({str(flow_run.id)[:8]})"
