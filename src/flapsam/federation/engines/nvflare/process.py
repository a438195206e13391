"""The processes of NVFLARE, started through this module, so that nothing in them runs that a run does not need.

    python -m flapsam.federation.engines.nvflare.process server | site | server-job | site-job ARGUMENTS

The arguments are NVFLARE's own. NVFLARE starts the processes of jobs itself, with the command that this module gives it.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from nvflare.app_common.job_launcher import client_process_launcher, server_process_launcher
from nvflare.fuel.f3 import communicator
from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.f3.drivers import grpc_driver
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.utils.job_launcher_utils import generate_client_command, generate_server_command

from flapsam.base.escaping import one_line
from flapsam.federation.engines.nvflare import answers, commands, gate
from flapsam.federation.engines.nvflare.launch import MODULE
from flapsam.federation.engines.nvflare.sockets import SCHEME, UnixDriver

MAINS: Mapping[str, str] = {
    "server": "nvflare.private.fed.app.server.server_train",
    "site": "nvflare.private.fed.app.client.client_train",
    "server-job": "nvflare.private.fed.app.server.runner_process",
    "site-job": "nvflare.private.fed.app.client.worker_process",
}
"""NVFLARE's module for each kind of process."""
MESSAGE_BYTES = 16 << 20
"""Maximum size of one message. Everything that is larger travels in pieces of 1 MiB."""
COMMUNICATION = {
    "allow_adhoc_conns": False,
    "internal": {"scheme": SCHEME, "resources": {"connection_security": "clear"}},
    "max_message_size": MESSAGE_BYTES,
}
"""What NVFLARE would read from ``comm_config.json``. Sites connect to the server alone, never to each other."""


class OneLineRecord(logging.LogRecord):
    """An entry of a log whose message is one line, because others' names and texts could pretend to be further entries."""

    def getMessage(self) -> str:  # noqa: N802, the name is that of logging
        """The message, with escape sequences in place of characters that cannot be printed."""
        return one_line(super().getMessage())


def restrict(kind: str) -> None:
    """Remove from this process what no run needs.

    Args:
        kind: a key of ``MAINS``.
    """
    os.umask(0o077)
    logging.setLogRecordFactory(OneLineRecord)
    CommConfigurator._configuration = COMMUNICATION
    CommConfigurator._config_loaded = True
    grpc_driver.GRPC_DEFAULT_OPTIONS[:] = [
        ("grpc.max_send_message_length", 2 * MESSAGE_BYTES),
        ("grpc.max_receive_message_length", 2 * MESSAGE_BYTES),
    ]
    communicator.load_comm_drivers()
    communicator.driver_mgr.register(UnixDriver)
    gate.install()
    commands.install()
    if kind == "server-job":
        answers.install()
    client_process_launcher.generate_client_command = _starting("site-job", generate_client_command)
    server_process_launcher.generate_server_command = _starting("server-job", generate_server_command)


def _starting(kind: str, generate: Callable[[Any], str]) -> Callable[[Any], str]:
    """The function that makes the command for a job's process, with this module in the place of NVFLARE's."""
    return lambda fl_ctx: generate(fl_ctx).replace(f"-m {MAINS[kind]}", f"-m {MODULE} {kind}", 1)


def main() -> None:
    """Run NVFLARE's main function of this kind of process."""
    kind = sys.argv.pop(1)
    restrict(kind)
    module = importlib.import_module(MAINS[kind])
    arguments = module.parse_arguments()
    folder = f"{arguments.workspace}/{arguments.job_id}" if kind.endswith("job") else arguments.workspace
    sys.exit(cast(int, MainProcessMonitor.run(main_func=module.main, run_dir=folder, args=arguments)))


if __name__ == "__main__":
    main()
