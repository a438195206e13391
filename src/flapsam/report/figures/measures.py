"""All measures over all test cases, with their intervals."""

from flapsam.learning.metrics import few_patients, spread, summarise
from flapsam.report.measured import measure_rows, rules, worst_site
from flapsam.report.run import TITLES, Scores
from flapsam.report.section import Section, Table


def all_measures(scores: Scores) -> Section | None:
    """A table of all measures by mode and class, with the worst site; None if no case is tested.

    Args:
        scores: mode → test scores.
    """
    summaries = {TITLES[mode]: summarise(cases) for mode, cases in scores.items() if cases}
    if not summaries:
        return None
    several = len(summaries) > 1
    told = [worst_site(spread(cases), TITLES[mode] if several else "") for mode, cases in scores.items()]
    first = next(iter(summaries.values()))
    head, *rows = measure_rows(summaries)
    return Section(
        "measures",
        "Test scores",
        " ".join(filter(None, [*told, few_patients(first), *rules(list(summaries.values()))])),
        tables=[
            Table("measures-table", "All measures over all test cases", head, rows, text_columns=2, opened=True),
        ],
    )
