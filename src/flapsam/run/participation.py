"""Who took part in the rounds of a federation, and with what share of the cases."""

from collections.abc import Iterable
from dataclasses import dataclass

from flapsam.run.ledger import TOGETHER, AnswerLeftOut, Event, Fitted, RoundClosed, SiteJoined, Summed


@dataclass(frozen=True)
class Participation:
    """The closed rounds of a federation, and the sites that joined it."""

    cases: dict[str, int]
    """Site → number of its training and validation cases; 0 in a private run, in which no counts leave a site."""
    rounds: dict[int, set[str]]
    """Closed round → sites whose answers are in its result."""

    def sentence(self) -> str:
        """How many rounds all sites took part in, and the smallest round; empty before the first round is closed."""
        if not self.rounds:
            return ""
        sites, rounds = len(self.cases), len(self.rounds)
        whole = sum(len(part) == sites for part in self.rounds.values())
        if whole == rounds:
            return f"All {sites} sites took part in every round." if sites > 1 else ""
        inside, count, least = min(
            (sum(self.cases[site] for site in part), len(part), number) for number, part in self.rounds.items()
        )
        all_cases = sum(self.cases.values())
        counted = f" with {inside} of {all_cases} training and validation cases" if all_cases else ""
        return (
            f"All {sites} sites took part in {whole} of {rounds} rounds. The smallest was round {least}, in which "
            f"{count} of {sites} sites took part{counted}."
        )


def participation(events: Iterable[Event]) -> Participation:
    """Read from a ledger who took part in the closed rounds of the federation of all sites."""
    cases: dict[str, int] = {}
    answered: dict[int, set[str]] = {}
    closed: dict[int, set[str]] = {}
    for event in events:
        match event:
            case SiteJoined():
                cases[event.site] = event.cases.get("train", 0) + event.cases.get("val", 0)
            case Fitted() if event.cohort == TOGETHER:
                answered.setdefault(event.round, set()).add(event.site)
            case AnswerLeftOut() if event.cohort == TOGETHER:
                answered.setdefault(event.round, set()).discard(event.site)
            case Summed() if event.cohort == TOGETHER:
                answered[event.round] = set(event.sites)
            case RoundClosed() if event.cohort == TOGETHER:
                closed[event.round] = answered.get(event.round, set()) & cases.keys()
    return Participation(cases, closed)
