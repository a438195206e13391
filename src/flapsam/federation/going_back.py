"""Going back to the state before a round, for example because a site has spoilt the rounds since."""

from flapsam.base.errors import FlapsamError
from flapsam.federation.state import ServerState
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, Ledger


def go_back(folder: RunFolder, number: int) -> None:
    """Drop the federated rounds from ``number`` on. No other process may use the run's folder meanwhile.

    The sites need not do anything. They get all tensors with the next packet, and repeat the rounds with the optimizer's
    moments from before.

    Args:
        folder: the run's folder.
        number: the first round to repeat.

    Raises:
        FlapsamError: the folder holds no run, or the state before that round is not kept.
    """
    folder.read_environment()
    state = ServerState(folder.server_state(TOGETHER))
    possible = [done + 1 for done in state.rounds()]
    if number not in possible:
        choices = ", ".join(map(str, possible)) or "none, because no round has begun"
        raise FlapsamError(
            f"--from-round {number}: {folder.path} does not hold the state before this round; possible rounds: {choices}"
        )
    state.go_back(number - 1)
    Ledger(folder.ledger).go_back(TOGETHER, number)
