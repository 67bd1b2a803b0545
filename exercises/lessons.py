"""The order of the course."""
from exercises import lesson1_decoder as one
from exercises import lesson2_files as two
from exercises import lesson3_sampling as three
from exercises import lesson4_beyond, lesson4_loop
from exercises import lesson5_experiment as five

LESSONS = {
    "I. The decoder": one.EXERCISES,
    "II. Files": two.EXERCISES,
    "III. Sampling": three.EXERCISES,
    "IV. SLOT": lesson4_loop.EXERCISES + lesson4_beyond.EXERCISES,
    "V. The experiment": five.EXERCISES,
}
EXERCISES = dict(enumerate((exercise for lesson in LESSONS.values() for exercise in lesson), 1))
