import math

import pytest

from recipes.seq2seq.schedules import SCHEDULES, check_schedule, rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 5), (5, 5), (9, 5), (3, 1), (7, 97)])
def test_every_schedule_is_between_zero_and_one_and_never_zero_in_training(schedule, warmup, total):
    factors = [rate_factor(step, warmup, total, schedule=schedule) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rise_is_a_straight_line_and_the_fall_monotone(schedule):
    factors = [rate_factor(step, 7, 97, schedule=schedule) for step in range(97)]
    assert factors[:7] == pytest.approx([factors[6] * step / 7 for step in range(1, 8)])
    assert factors[6] == max(factors) == pytest.approx(1 if schedule != "noam" else 7**-0.5)
    assert factors[6:] == sorted(factors[6:], reverse=True)


def test_closed_forms_after_the_warm_up():
    at = {schedule: rate_factor(51, 7, 97, schedule=schedule, dim=13) for schedule in SCHEDULES}
    assert at == pytest.approx(
        {
            "linear": (97 - 51) / 90,
            "cosine": (1 + math.cos(math.pi * (51 - 7) / 90)) / 2,
            "inverse_sqrt": math.sqrt(7 / 52),
            "noam": 13**-0.5 * 52**-0.5,
        }
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_linear_and_cosine_schedules_end_at_zero(schedule):
    assert rate_factor(97, 7, 97, schedule=schedule) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("square", 0.1), "schedule must be one of linear, inverse_sqrt, noam, cosine, got 'square'"),
        (("linear", 1), "schedule.warmup must be a share of the training in [0, 1), got 1"),
        (("linear", -0.1), "schedule.warmup must be a share of the training in [0, 1), got -0.1"),
    ],
)
def test_invalid_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        check_schedule(*arguments)
    assert str(error.value) == message
