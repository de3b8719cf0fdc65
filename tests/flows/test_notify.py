"""Proves that nobody counts as notified by a service that does not answer. That people are told, the tests of the stack
show."""

import logging

import pytest
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock, MattermostWebhook
from prefect.variables import Variable

from flows.notify import VARIABLE, notify
from tests.conftest import free_ports


@pytest.mark.usefixtures("prefect")
def test_a_service_that_does_not_answer_has_notified_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flows.notify")
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    blocks: list[tuple[Block, str]] = [
        (MattermostWebhook(hostname=nobody, token="a" * 26), "onnection error"),
        (CustomWebhookNotificationBlock(name="ops", url=f"http://{nobody}"), "refused"),
    ]
    for block, why in blocks:
        block.save("ops")
        Variable.set(VARIABLE, f"{block.get_block_type_slug()}/ops", overwrite=True)
        notify("a run: Failed", "why it did")
        [said] = [record.getMessage() for record in caplog.records if record.name == "flows.notify"]
        assert said.startswith("nobody was notified that a run: Failed: ")
        assert why in said
        caplog.clear()
