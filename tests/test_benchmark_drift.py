"""How alarms of a detector are counted."""

import pytest

from benchmarks.drift import delays


@pytest.mark.parametrize(
    ("alarms", "changes", "late", "false"),
    [
        ([], [], [], 0),
        ([120], [], [], 1),
        ([416], [400], [16], 0),
        ([380, 416, 700], [400], [16], 2),
        ([316, 620], [300, 600, 900], [16, 20], 0),
        ([600, 904], [300, 600, 900], [300, 4], 0),
        ([400], [400], [], 1),
    ],
)
def test_a_change_explains_the_first_alarm_after_it(
    alarms: list[int], changes: list[int], late: list[int], false: int
) -> None:
    assert delays(alarms, changes) == (late, false)
