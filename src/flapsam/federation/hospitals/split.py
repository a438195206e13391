"""A site's split into training, validation and test cases. Its first run fixes the split, so that no run can choose it."""

import json
from dataclasses import replace
from pathlib import Path

from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.sites import Site


def fixed_split(site: Site, path: Path) -> Site:
    """Give each case the split that it had in the site's first run, and fix the splits of cases that are new.

    A new case of a known subject joins the subject's other cases. A server that could have the split drawn again could
    compare models that were trained with and without one subject.

    Args:
        site: the site, with the splits that are drawn from all its cases.
        path: the file with the split of each case. It is written if cases are new.

    Raises:
        FlapsamError: the file is damaged or cannot be written.
    """
    known = _read(path)
    subjects = {case.subject: known[case.name] for case in site.cases if case.name in known}
    cases = tuple(
        replace(case, split=known.get(case.name) or subjects.get(case.subject) or case.split) for case in site.cases
    )
    splits = {**known, **{case.name: str(case.split) for case in cases}}
    if splits != known:
        write_text(path, json.dumps(splits, indent=1, sort_keys=True))
    return replace(site, cases=cases)


def _read(path: Path) -> dict:
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(known, dict) or not all(split in ("train", "val", "test") for split in known.values()):
            raise ValueError
        return known
    except (ValueError, TypeError, OSError) as error:
        raise FlapsamError(f"{path}: cannot read the split of this site; restore the file from a backup") from error
