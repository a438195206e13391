"""Who took part in the rounds of a federation, and with what share of the cases."""

from collections.abc import Iterable
from dataclasses import dataclass

from flapsam.run.ledger import TOGETHER, AnswerLeftOut, Event, Fitted, RoundClosed, SiteJoined, Summed


@dataclass(frozen=True)
class RoundPart:
    """One closed round."""

    round: int
    sites: frozenset[str]
    """Sites whose answers are in its result."""


@dataclass(frozen=True)
class Participation:
    """The closed rounds of a federation, and the sites that joined it."""

    cases: dict[str, int]
    """Site → number of its training and validation cases; 0 in a private run, in which no counts leave a site."""
    rounds: list[RoundPart]

    def share(self, part: RoundPart) -> tuple[int, int]:
        """Cases of the sites in a round, and cases of all sites."""
        return sum(self.cases[site] for site in part.sites), sum(self.cases.values())

    def sentence(self) -> str:
        """How many rounds all sites took part in, and the smallest round; empty before the first round is closed."""
        if not self.rounds:
            return ""
        sites, rounds = len(self.cases), len(self.rounds)
        whole = sum(len(part.sites) == sites for part in self.rounds)
        if whole == rounds:
            return f"All {sites} sites took part in every round." if sites > 1 else ""
        least = min(self.rounds, key=lambda part: (self.share(part)[0], len(part.sites), part.round))
        inside, all_cases = self.share(least)
        counted = f" with {inside} of {all_cases} training and validation cases" if all_cases else ""
        return (
            f"All {sites} sites took part in {whole} of {rounds} rounds. The smallest was round {least.round}, in which "
            f"{len(least.sites)} of {sites} sites took part{counted}."
        )


def participation(events: Iterable[Event]) -> Participation:
    """Read from a ledger who took part in the closed rounds of the federation of all sites."""
    cases: dict[str, int] = {}
    answered: dict[int, set[str]] = {}
    closed: list[RoundPart] = []
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
                sites = frozenset(answered.get(event.round, ())) & cases.keys()
                closed.append(RoundPart(event.round, frozenset(sites)))
    return Participation(cases, closed)
