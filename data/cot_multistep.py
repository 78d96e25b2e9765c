"""The multi-step set of data/cot.py: seven categories of problems with 3 to 9 steps, in which each step needs the one before."""

import random
import re
from decimal import Decimal
from itertools import combinations

if __package__:
    from .cot_problems import Category, ints, listed, two_places
else:  # run as `python data/cot.py`
    from cot_problems import Category, ints, listed, two_places

PRICES = {"apples": (1, 5), "oranges": (1, 5), "bananas": (1, 5), "cartons of milk": (2, 8), "loaves of bread": (2, 6)}
MINUTES = {"a walk": (15, 45), "breakfast": (20, 60), "shopping": (30, 90), "a meeting": (30, 60), "a train ride": (60, 180)}

# ---------------------------------------------------------------- shopping: (((good, price, quantity), ...), budget)


def draw_shopping(rng: random.Random):
    goods = rng.sample(list(PRICES), rng.randint(3, 4))
    items = tuple((good, rng.randint(*PRICES[good]), rng.randint(1, 3)) for good in goods)
    return items, sum(price * quantity for _, price, quantity in items) + rng.randint(5, 15)


def shopping_text(numbers):
    """Money left after buying all items."""
    items, budget = numbers
    bought = listed(f"{quantity} {good} at {price} dollars each" for good, price, quantity in items)
    steps, spent = [], 0
    for good, price, quantity in items:
        cost = price * quantity
        steps += [f"The {good} cost {quantity} * {price} = {cost}.", f"Spent so far: {spent} + {cost} = {spent + cost}."]
        spent += cost
    steps.append(f"Dollars left: {budget} - {spent} = {budget - spent}.")
    return f"Anna has {budget} dollars. She buys {bought}. How many dollars does she have left?", steps, str(budget - spent)


def read_shopping(question):
    match = re.fullmatch(r"Anna has (\d+) dollars\. She buys (.+)\. How many dollars does she have left\?", question)
    if not match:
        return None
    bought = re.findall(r"(\d+) ([a-z ]+?) at (\d+) dollars each", match[2])
    return tuple((good, int(price), int(quantity)) for quantity, good, price in bought), int(match[1])


# ---------------------------------------------------------------- time: (hour, ((activity, minutes), ...))


def draw_time(rng: random.Random):
    activities = rng.sample(list(MINUTES), rng.randint(3, 5))
    return rng.randint(6, 10), tuple((activity, rng.randint(*MINUTES[activity])) for activity in activities)


def time_text(numbers):
    """The clock after all activities, 24 hours a day."""
    hour, activities = numbers
    now, steps = 60 * hour, []
    for activity, minutes in activities:
        steps.append(f"{activity.capitalize()} of {minutes} minutes, from {clock(now)}, lasts until {clock(now + minutes)}.")
        now += minutes
    done = listed(f"{activity} of {minutes} minutes" for activity, minutes in activities)
    question = f"Ben starts his day at {clock(60 * hour)}. Without a pause he has {done}. What time is it when he is done?"
    return question, steps, clock(now)


def clock(minutes: int) -> str:
    """Minutes after midnight as hours and minutes, `9:05`."""
    return f"{minutes // 60}:{minutes % 60:02}"


def read_time(question):
    pattern = r"Ben starts his day at (\d+):00\. Without a pause he has (.+)\. What time is it when he is done\?"
    match = re.fullmatch(pattern, question)
    if not match:
        return None
    activities = re.findall(rf"({'|'.join(MINUTES)}) of (\d+) minutes", match[2])
    return int(match[1]), tuple((activity, int(minutes)) for activity, minutes in activities)


# ---------------------------------------------------------------- distance: ((speed, hours), ...)


def draw_distance(rng: random.Random):
    return tuple((rng.choice((20, 30, 40, 50, 60)), rng.randint(1, 3)) for _ in range(rng.randint(3, 4)))


def distance_text(legs):
    """Kilometers of all legs."""
    steps, total = ["At first it has gone 0 km."], 0
    for i, (speed, hours) in enumerate(legs, start=1):
        way = speed * hours
        steps += [
            f"Part {i} is {speed} * {hours} = {way} km long.",
            f"After part {i} that makes {total} + {way} = {total + way}.",
        ]
        total += way
    parts = listed(f"{hours} h at {speed} km per hour" for speed, hours in legs)
    return f"A bus goes in {len(legs)} parts: {parts}. How many km does it go in all?", steps, str(total)


def read_distance(question):
    match = re.fullmatch(r"A bus goes in \d+ parts: (.+)\. How many km does it go in all\?", question)
    return match and tuple((int(speed), int(hours)) for hours, speed in re.findall(r"(\d+) h at (\d+) km per hour", match[1]))


# ---------------------------------------------------------------- inventory: (start, (in or minus out, ...))


def draw_inventory(rng: random.Random):
    """Moves that never take out more than there is."""
    start = stock = rng.randint(50, 200)
    moves: list[int] = []
    for _ in range(rng.randint(3, 5)):
        move = rng.randint(10, 50) if rng.random() < 0.5 else -rng.randint(5, 30)
        move = move if stock + move >= 0 else rng.randint(10, 50)
        moves.append(move)
        stock += move
    return start, tuple(moves)


def inventory_text(numbers):
    """Boxes after all moves."""
    start, moves = numbers
    steps, stock = [f"At first there are {start} boxes."], start
    for move in moves:
        word, sign = ("come in", "+") if move > 0 else ("go out", "-")
        steps.append(f"{abs(move)} {word}, which makes {stock} {sign} {abs(move)} = {stock + move}.")
        stock += move
    told = listed(f"{abs(move)} {'come in' if move > 0 else 'go out'}" for move in moves)
    return f"There are {start} boxes in a store room. Then {told}. How many boxes are there in the end?", steps, str(stock)


def read_inventory(question):
    match = re.fullmatch(r"There are (\d+) boxes in a store room\. Then (.+)\. How many boxes are there in the end\?", question)
    if not match:
        return None
    moves = re.findall(r"(\d+) (come in|go out)", match[2])
    return int(match[1]), tuple(int(number) if word == "come in" else -int(number) for number, word in moves)


# ---------------------------------------------------------------- conditional: (score, least for A, for B, for C)


def conditional_space():
    """Every score with every three thresholds: 51 x 35."""
    for a, b, c in combinations(range(90, 55, -5), 3):
        for score in range(50, 101):
            yield score, a, b, c


def conditional_text(numbers):
    """The grade of a score."""
    score, *thresholds = numbers
    steps, grade = [f"The score is {score}."], "D"
    for letter, least in zip("ABC", thresholds):
        if score >= least:
            steps.append(f"{score} is at least {least}, which is enough for grade {letter}.")
            grade = letter
            break
        steps.append(f"{score} is less than {least}, which is not enough for grade {letter}.")
    a, b, c = thresholds
    question = (
        f"A test gives grade A from {a} points on, grade B from {b} points on, grade C from {c} points on, and grade D to all "
        f"others. Carla has a score of {score} points. Which grade does she get?"
    )
    return question, [*steps, f"So the grade is {grade}."], grade


def read_conditional(question):
    found = ints(
        r"A test gives grade A from (\d+) points on, grade B from (\d+) points on, grade C from (\d+) points on, and grade D "
        r"to all others\. Carla has a score of (\d+) points\. Which grade does she get\?",
        question,
    )
    return found and (found[3], *found[:3])


# ---------------------------------------------------------------- average: (target, (score, ...))


def draw_average(rng: random.Random):
    """Scores and a target that a next score of 0 to 150 can reach."""
    while True:
        scores = tuple(rng.randint(70, 100) for _ in range(rng.randint(3, 5)))
        target = rng.randint(80, 95)
        if 0 <= needed_score(target, scores) <= 150:
            return target, scores


def needed_score(target: int, scores: tuple[int, ...]) -> int:
    """The next score that makes `target` the mean."""
    return target * (len(scores) + 1) - sum(scores)


def average_text(numbers):
    """The next score that makes the target the mean."""
    target, scores = numbers
    n, total = len(scores), sum(scores)
    steps = [
        f"So far there are {n} scores.",
        f"With the next one there are {n} + 1 = {n + 1}.",
        f"An average of {target} needs a sum of {target} * {n + 1} = {target * (n + 1)}.",
        f"The sum so far is {' + '.join(map(str, scores))} = {total}.",
        f"The next score must be {target * (n + 1)} - {total} = {needed_score(target, scores)}.",
    ]
    question = f"Dora has the scores {listed(scores)}. Which score does she need next for an average of {target}?"
    return question, steps, str(needed_score(target, scores))


def read_average(question):
    match = re.fullmatch(r"Dora has the scores (.+)\. Which score does she need next for an average of (\d+)\?", question)
    return match and (int(match[2]), tuple(map(int, re.findall(r"\d+", match[1]))))


# ---------------------------------------------------------------- percentage: (price, (percent up or minus down, ...))


def draw_percentage(rng: random.Random):
    changes = (rng.choice((1, -1)) * rng.choice((10, 15, 20, 25, 30)) for _ in range(rng.randint(3, 4)))
    return rng.randint(100, 500), tuple(changes)


def percentage_text(numbers):
    """The price after all changes, rounded half up to two places after each."""
    start, changes = numbers
    price = Decimal(start)
    steps = [f"The price is {price:.2f}."]
    for change in changes:
        after = two_places(price * (100 + change) / 100)
        how = f"{'Up' if change > 0 else 'Down'} {abs(change)}%"
        steps.append(f"{how}: {price:.2f} * {Decimal(100 + change) / 100:.2f} = {after:.2f}.")
        price = after
    told = listed(f"{'up' if change > 0 else 'down'} {abs(change)}%" for change in changes)
    question = (
        f"A price of {start}.00 dollars goes {told}. After each change it is rounded half up to two places. "
        "What is the price in the end?"
    )
    return question, [*steps, f"In the end the price is {price:.2f}."], f"{price:.2f}"


def read_percentage(question):
    pattern = r"A price of (\d+)\.00 dollars goes (.+)\. After each change it is rounded half up to two places\. What is .+\?"
    match = re.fullmatch(pattern, question)
    if not match:
        return None
    changes = re.findall(r"(up|down) (\d+)%", match[2])
    return int(match[1]), tuple(int(percent) if way == "up" else -int(percent) for way, percent in changes)


# ---------------------------------------------------------------- all of them


def _sorted_first(numbers):
    return tuple(sorted(numbers[0])), numbers[1]


def _sorted_second(numbers):
    return numbers[0], tuple(sorted(numbers[1]))


CATEGORIES = {
    category.name: category
    for category in (
        Category("shopping", shopping_text, read_shopping, key=_sorted_first, draw=draw_shopping),
        Category("time", time_text, read_time, key=_sorted_second, draw=draw_time),
        Category("distance", distance_text, read_distance, key=lambda legs: tuple(sorted(legs)), draw=draw_distance),
        Category("inventory", inventory_text, read_inventory, key=_sorted_second, draw=draw_inventory),
        Category("conditional", conditional_text, read_conditional, space=conditional_space),
        Category("average", average_text, read_average, key=_sorted_second, draw=draw_average),
        Category("percentage", percentage_text, read_percentage, key=_sorted_second, draw=draw_percentage),
    )
}
